"""Tables and figures made from results: what they say, what they leave out, and that they need nothing that may be missing.

Run: python -m pytest tests/report/test_report.py
"""

from __future__ import annotations

import json
import math
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
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
    assert "| base | 100.0% | 100.0% to 100.0% | 6.0 |" in text and "| new | 100.0% | 100.0% to 100.0% | 6.0 |" in text


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
