"""Tables and figures made from results: what they say, what they leave out, and that they need nothing that may be missing.

Run: python -m pytest tests/report/test_report.py
"""

from __future__ import annotations

import itertools
import json
import math
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from matplotlib.text import Text
from tiny import make_answer, make_config

from nanolapo.config import EvaluateConfig
from nanolapo.evaluation import evaluate as benchmarking
from nanolapo.evaluation.evaluate import write_results
from nanolapo.evaluation.scores import add_aes, score_sets
from nanolapo.report.files import read_metrics
from nanolapo.report.plots import write_figures
from nanolapo.report.tables import (
    difficulty_axis,
    label,
    main_cells,
    markdown,
    table,
    tokens_at,
    training_dynamics,
)
from nanolapo.report.tradeoff import evaluation_figure

ROOT = Path(__file__).parents[2]


def results(base_right: bool = True, level: int | None = None) -> dict:
    config = make_config()
    rows = []
    for model, right in (("base", base_right), ("new", True)):
        found = [make_answer(f"{s}{i}", 0, 5 + i, right, source=s, level=level) for s in "st" for i in range(3)]
        rows += score_sets(model, 0.6, "", found, replace(config, evaluate=EvaluateConfig(bootstrap=10)))
    add_aes(rows, "base")
    return {"base": "base", "rows": rows}


def test_tables():
    assert table(["a", "b"], []) == "| a | b |\n| :-- | --: |"
    assert label({"model": "m", "guidance": "2x own length"}) == "m, told 2x own length"
    text = markdown(results(level=2))
    assert text.count("### ") == 3 and "### average, temperature 0.6\n" in text and "level 2" in text
    assert "adaptivity |\n| :--" not in text  # one level: the main table has no such column
    assert "| base | 100.0% | 100.0% to 100.0% | 6.0 |" in text and "| new | 100.0% | 100.0% to 100.0% | 6.0 |" in text


def leveled(*lengths: int) -> dict:
    """One model for each length, at levels 0 and 1. An answer at level 1 has 30 tokens more, the second one 6 more."""
    rows = []
    for i, n in enumerate(lengths):
        found = [make_answer(f"{q}", k, n + 30 * (q % 2) + 6 * k, level=q % 2) for q in range(4) for k in range(2)]
        rows += score_sets(f"m{i}", 0.6, "", found, make_config())
    add_aes(rows, "m0")
    return {"base": "m0", "rows": rows}


def test_how_length_follows_need_is_in_the_tables():
    main, *_, levels = (part.splitlines() for part in markdown(leveled(10)).split(":\n\n")[:3])
    assert main[2].endswith("| cut | AES | adaptivity |") and main[4].endswith("| 0.0% | +0.00 | +30.0 |")
    assert levels[0] == "| model | level 0 | level 1 | adaptivity | 95% interval | rank correlation | length spread |"
    assert levels[2] == "| m0 | 100 / 13 | 100 / 43 | +30.0 | +30.0 to +30.0 | 1.00 | 3.0 |"


def test_names_of_points_that_coincide_do_not_cover_each_other():
    """Three models at one point and one beside it: no name lies on another, in either panel, and all are there."""
    rows = leveled(10, 10, 10, 11, 90)["rows"]
    figure = evaluation_figure(rows, rows)
    figure.draw_without_rendering()
    for axis, more in zip(figure.axes, ("", " (+30 tokens)"), strict=True):
        assert [text.get_text() for text in axis.texts if text.get_text() == f"m4{more}"]
        assert sorted(text.get_text() for text in axis.texts) == [f"m{i}{more}" for i in range(5)]
        boxes = [Text.get_window_extent(text) for text in axis.texts]  # of the words, without the line to the point
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_one_set_with_levels_has_them_in_the_first_picture(tmp_path):
    written = [path.name for path in write_figures(leveled(10, 20), {}, tmp_path)]
    assert written == ["tradeoff.png", "keywords.png"]
    rows = leveled(10, 20)["rows"]
    left, right = evaluation_figure(rows, rows).axes
    assert [list(line.get_ydata()) for line in right.get_lines()] == [[13, 43], [23, 53]]
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in left.get_lines()]
    for r in rows:
        x, y, bars = r["tokens"], 100 * r["accuracy"], [100 * bound for bound in r["accuracy_interval"]]
        assert ([x], [y]) in drawn and (list(r["tokens_interval"]), [y] * 2) in drawn and ([x] * 2, bars) in drawn


def test_no_nan_in_tables_or_json(tmp_path):
    """A base without a right answer has no AES."""
    config = replace(make_config(), run=replace(make_config().run, dir=str(tmp_path), name="."))
    bad = results(base_right=False)
    assert (
        math.isnan(bad["rows"][0]["aes"])
        and "nan" not in markdown(bad)
        and "nan" not in table(*main_cells(bad["rows"]))
    )
    path = write_results(config, bad)
    rows = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))["rows"]
    assert rows[0]["aes"] is None and rows[0]["tokens"] == 6.0
    assert "nan" not in markdown({"base": "base", "rows": rows})  # results.json makes the same tables


def test_plots_need_neither_metrics_nor_levels(tmp_path):
    written = [path.name for path in write_figures(results(), {"new": tmp_path / "nowhere"}, tmp_path)]
    assert written == ["tradeoff.png", "length_by_level.png", "keywords.png"]
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "length": 9.0, "accuracy": 0.5}\n{"step": 1, "len')
    assert read_metrics(tmp_path) == [{"step": 0, "length": 9.0, "accuracy": 0.5}]  # the run still writes
    written = [path.name for path in write_figures(results(level=1), {"new": tmp_path}, tmp_path)]
    assert written == ["training.png", "tradeoff.png", "length_by_level.png", "keywords.png"]


def test_a_name_that_is_no_formula_can_be_drawn(tmp_path):
    name = r"cost $\bad{$"  # as mathematics it would end the drawing
    rows = [row | {"model": name} if row["model"] == "new" else row for row in results()["rows"]]
    assert name in {row["model"] for row in rows}
    assert len(write_figures(results() | {"rows": rows}, {}, tmp_path)) == 3


def test_pass_at_k_in_the_tables():
    found = [make_answer("a", i, correct=i == 0) for i in range(4)] + [
        make_answer("b", i, correct=True) for i in range(4)
    ]
    rows = score_sets("m", 0.6, "", found, make_config())
    add_aes(rows, "m")
    text = markdown({"base": "m", "rows": rows})
    assert "| model | pass@1 | pass@2 | pass@4 |" in text and "| m | 62.5% | 75.0% | 100.0% |" in text


def test_lengths_from_easy_to_hard():
    """Fig. 3: MATH's levels first, then the competitions, the easiest for the base model first, whatever their order."""
    rows = []
    for model, factor in (("base", 10), ("new", 5)):
        found = [make_answer(f"M{i}", 0, factor * (i + 1), source="MATH", level=i + 1) for i in range(5)]
        for name, right, tokens in (("AIME", 1, 90), ("AMC", 3, 70), ("OB", 2, 80)):
            found += [make_answer(f"{name}{i}", 0, factor * tokens, i < right, source=name) for i in range(4)]
        rows += score_sets(model, 0.6, "", found, make_config())
    places = difficulty_axis(rows, "base")
    assert places == [*(("MATH", str(k)) for k in range(1, 6)), ("AMC", ""), ("OB", ""), ("AIME", "")]
    assert [tokens_at(rows, "new", place) for place in places] == [5, 10, 15, 20, 25, 350, 400, 450]


def exports() -> list[dict]:
    rows = [{"model": "base", "tokens": 90.0, "accuracy": 0.5}]
    for run, step, tokens in (("D", 10, 70.0), ("D", 5, 80.0), ("I", 5, 60.0)):
        rows.append(
            {"model": f"{run} step {step}", "run": run, "step": step, "tokens": tokens, "accuracy": tokens / 100}
        )
    return [row | {"set": "s", "temperature": 0.6, "guidance": ""} for row in rows]


def test_training_dynamics_are_in_the_order_of_steps(tmp_path):
    """Fig. 5: a curve for each run, and the base as where they came from; nothing without exports."""
    curves = training_dynamics(exports(), "base")
    assert curves == {"D": [(5, 80, 0.8), (10, 70, 0.7)], "I": [(5, 60, 0.6)], "base": [(0, 90, 0.5)]}
    assert training_dynamics(exports()[:1], "base") == {}
    written = write_figures({"base": "base", "rows": exports()}, {}, tmp_path)
    assert [path.name for path in written] == ["dynamics.png"]  # one finished model: nothing to compare


@pytest.mark.parametrize("main", [True, False])
def test_only_one_rank_writes_the_results(tmp_path, monkeypatch, main):
    config = tmp_path / "c.yaml"
    config.write_text(f"run: {{dir: {tmp_path}, name: e}}\nevaluate: {{models: [m=x]}}")
    (tmp_path / "e").mkdir()
    monkeypatch.setattr(benchmarking, "evaluate", lambda config: results())
    monkeypatch.setattr("nanolapo.ranks.Ranks", lambda: SimpleNamespace(is_main=main))
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(config)])
    runpy.run_path(str(ROOT / "evaluate.py"))["main"]()
    assert ((tmp_path / "e/results.json").exists(), (tmp_path / "e/results.md").exists()) == (main, main)
