"""Our rows beside the paper's: right columns, right differences, the same numbers in Markdown, LaTeX and JSON.

Run: python -m pytest tests/reproduce/test_beside_paper.py        The paper's own numbers: test_paper.py.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from tiny import make_answer, make_config

from nanolapo.config import EvaluateConfig, UserError
from nanolapo.evaluation.scores import add_aes, score_sets
from nanolapo.reproduce.beside_paper import Comparison, cells, compare, latex, markdown, write_tables

BENCHMARKS = ("MATH-500", "AIME24", "AMC23", "OlympiadBench")
NAMES = {"Base": "base", "+LAPO-I": "LAPO-I"}


def our_rows(models: dict[str, tuple[int, int]], sets: tuple[str, ...] = ("demo",), guidance: str = "") -> list[dict]:
    """Rows as evaluate.py makes them: per model the right answers of ten, and the tokens of the first problem."""
    config = replace(make_config(), evaluate=EvaluateConfig(bootstrap=50))
    rows = []
    for model, (right, tokens) in models.items():
        found = [
            make_answer(f"{name}{i}", 0, tokens + 10 * i, i < right, source=name, finished=i != 9)
            for name in sets
            for i in range(10)
        ]
        rows += score_sets(model, 0.6, guidance, found, config)
    if "base" in models:
        add_aes(rows, "base")
    return rows


def line(comparison: Comparison, model: str, name: str = "demo") -> dict:
    return next(row for row in comparison.rows if (row["model"], row["set"]) == (model, name))


def test_a_miniature_is_compared_by_its_changes():
    """Ours 80 % -> 90 %, 145 -> 95 tokens; the paper's column is base B's averages 62.5 / 6229 -> 64.8 / 3832."""
    made = compare(1, "B", our_rows({"base": (8, 100), "LAPO-I": (9, 50)}), NAMES)
    row = line(made, "+LAPO-I")
    assert (row["accuracy"], row["tokens"]) == (pytest.approx(90), 95) and row["paper_set"] == "average"
    assert (row["paper_accuracy"], row["paper_tokens"]) == (64.8, 3832)
    assert row["tokens_vs_base"] == pytest.approx(100 * (95 / 145 - 1)) and row["points_vs_base"] == pytest.approx(10)
    assert row["paper_tokens_vs_base"] == pytest.approx(-38.48, abs=0.01)
    assert row["paper_points_vs_base"] == pytest.approx(2.3)
    assert row["aes"] == pytest.approx(50 / 145 + 3 * 10 / 80) and row["paper_aes"] == pytest.approx(0.495, abs=1e-3)
    assert "accuracy_difference" not in row and "tokens_difference" not in row  # another set: no difference of levels
    assert (row["problems"], row["samples"], row["truncated"]) == (10, 10, pytest.approx(10))
    assert row["tokens_correct"] == 90 and row["accuracy_interval"][0] < 90 < row["accuracy_interval"][1] + 1e-9
    assert "Not the paper's problem sets: its columns are its average" in markdown(made)


def test_the_papers_sets_are_compared_column_by_column():
    rows = our_rows({"base": (8, 100), "LAPO-I": (9, 50)}, BENCHMARKS)
    made = compare(1, "A", rows, NAMES)
    assert [row["set"] for row in made.rows[:5]] == [*BENCHMARKS, "average"]
    row = line(made, "+LAPO-I", "AIME24")
    assert row["accuracy_difference"] == pytest.approx(90 - 29.3)
    assert row["tokens_difference"] == pytest.approx(100 * (95 / 8318 - 1))
    average = line(made, "+LAPO-I", "average")
    assert average["accuracy_difference"] == pytest.approx(90 - 59.1) and average["problems"] == 40
    assert average["accuracy_interval"][0] < 90 < average["accuracy_interval"][1]
    assert "Not the paper's" not in markdown(made)
    some = compare(1, "A", our_rows({"base": (8, 100)}, BENCHMARKS[:2]), {"Base": "base"})
    assert {row["set"] for row in some.rows} == set(BENCHMARKS[:2])  # an average over two is not one over four


def test_rows_that_we_have_not_run_stay_beside_the_papers_numbers():
    made = compare(1, "B", our_rows({"base": (8, 100)}), {"Base": "base"})
    hapo = line(made, "HAPO")
    assert hapo["ours"] is None and "accuracy" not in hapo and hapo["paper_accuracy"] == 59.3
    head, body = cells(made)
    at = head.index("accuracy % (95 %)")
    assert next(cell for cell in body if cell[0] == "HAPO")[at] == "-"
    empty = compare(7, "A", [], {})
    assert cells(empty)[0][:4] == ["model", "set", "paper's %", "paper's tokens"] and len(empty.rows) == 3


@pytest.mark.parametrize("number", [2, 3, 6])
def test_tables_without_a_base_take_that_of_table_1(number):
    made = compare(number, "B", our_rows({"base": (8, 100)}), {"Base": "base"})
    assert made.rows[0]["model"] == "Base" and made.rows[0]["paper_tokens"] == 6229
    assert all(row["against"] == "Base" for row in made.rows)
    assert made.rows[1]["paper_tokens_vs_base"] == pytest.approx(100 * (made.rows[1]["paper_tokens"] / 6229 - 1))


def test_table_4_measures_against_the_same_model_without_an_instruction():
    rows = our_rows({"LAPO-I": (9, 50)}) + our_rows({"LAPO-I": (8, 55)}, guidance="20 tokens, outside")
    names = {"LAPO-I, none": "LAPO-I", "LAPO-I, Short(500)": "LAPO-I, told 20 tokens, outside"}
    made = compare(4, "B", rows, names)
    short = line(made, "LAPO-I, Short(500)")
    assert short["points_vs_base"] == pytest.approx(-10) and short["tokens_vs_base"] == pytest.approx(100 * 5 / 95)
    assert short["paper_points_vs_base"] == pytest.approx(-0.3) and short["paper_set"] == "MATH-500"
    outside = line(made, "LAPO-I w/ Outside, Long(3500)")
    assert outside["paper_tokens_vs_base"] == pytest.approx(100 * (2821 / 2251 - 1))
    head, body = cells(made)
    assert head[:3] == ["model", "ours", "set"] and body[1][:3] == [
        "LAPO-I, Short(500)",
        names["LAPO-I, Short(500)"],
        "demo",
    ]
    assert body[2][1] == "-" and "ours is" in markdown(made) and "w/ Outside, none" in markdown(made)


def test_one_list_of_rows_three_writers(tmp_path):
    rows = our_rows({"base": (8, 100), "LAPO-I": (9, 50)})
    made = [compare(1, base, rows, NAMES) for base in ("A", "B")]
    paths = write_tables(made, tmp_path)
    assert [path.name for path in paths] == ["tables.md", "tables.tex", "tables.json"]
    text, tex, data = paths[0].read_text(), paths[1].read_text(), json.loads(paths[2].read_text())
    assert [table["table"] for table in data["tables"]] == [1, 1]
    assert data["tables"][1]["rows"][-1]["aes"] == made[1].rows[-1]["aes"]
    numbers = re.compile(r"[-+]?[\d.,]+")
    body = [ln for ln in text.splitlines() if ln.startswith("| ") and not ln.startswith(("| model", "| :--"))]
    tex_body = [ln for ln in tex.splitlines() if " & " in ln and not ln.startswith("model")]
    assert [numbers.findall(ln) for ln in body] == [numbers.findall(ln) for ln in tex_body]
    assert len(body) == 7 + 11 and "80.0 (" in body[3] and len(data["paper_disagrees"]) == text.count("\n- ")
    assert tex.count(r"\begin{tabular}") == tex.count(r"\end{tabular}") == 2 and not re.search(r"(?<!\\)%(?! )", tex)
    assert "Table 1. Main comparison (DeepSeek-R1-Distill-Qwen-1.5B in the paper)" in text


def test_no_nan_where_the_base_solves_nothing(tmp_path):
    made = compare(1, "B", our_rows({"base": (0, 100), "LAPO-I": (9, 50)}), NAMES)
    assert "nan" not in markdown(made) + latex(made)
    path = write_tables([made], tmp_path)[2]
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_what_does_not_fit_is_refused():
    rows = our_rows({"base": (8, 100)})
    with pytest.raises(UserError, match=r"Table 2, base B, has the rows .*'Range'.* not \['Ranged'\]"):
        compare(2, "B", rows, {"Ranged": "x"})
    with pytest.raises(UserError, match="rows of one temperature"):
        compare(2, "B", rows + [row | {"temperature": 1.0} for row in rows], {})
