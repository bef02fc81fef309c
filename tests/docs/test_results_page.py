"""docs/RESULTS.md and the pages in docs/results print what the JSON there says: their tables are made again from it.

Run: python -m pytest tests/docs/test_results_page.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanolapo.evaluation.scores import aes
from nanolapo.reproduce.beside_paper import Comparison, markdown
from nanolapo.reproduce.comparison import comparison_text

DOCS = Path(__file__).parents[2] / "docs"
BOTH = ("field", "compare_too_long")  # the first task and the second
PAGE = (DOCS / "RESULTS.md").read_text(encoding="utf-8")


def between(name: str) -> str:
    """What stands between <!-- name --> and <!-- /name --> on the page."""
    found = re.findall(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", PAGE, re.DOTALL)
    assert len(found) == 1, f"{len(found)} parts are marked {name}"
    return str(found[0])


def results(name: str) -> dict[str, Any]:
    return dict(json.loads((DOCS / "results" / f"{name}.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", ["compare", "compare_too_long", "field", "losses", "smollm2"])
def test_a_comparison_is_that_of_its_json(name: str) -> None:
    found = results(name)
    enough = 1 if name == "smollm2" else 3  # PROTOCOL says so
    assert all(len(row.get("seeds") or found["seeds"]) >= enough for row in found["rows"])
    text = comparison_text(**found)
    assert (DOCS / "results" / f"{name}.md").read_text(encoding="utf-8").partition("\n\n")[2] == text, "after its title"
    assert f"(results/{name}.md)" in PAGE
    if name not in BOTH:  # RESULTS has one table of both tasks
        first, rest = between(name), text.removeprefix(between(name))
        assert text == first + rest and rest.startswith("\nAccuracy % / tokens by level:\n"), (
            "the page has the first table"
        )
        assert "temperature 0.6" in first.splitlines()[0]


def test_the_methods_of_both_tasks_stand_by_their_mean_aes() -> None:
    first, second = ({row["model"]: row for row in results(name)["rows"] if row["temperature"] == 0.6} for name in BOTH)
    by_mean = sorted(second, key=lambda name: -(first[name]["aes"] + second[name]["aes"]))

    def cells(row: dict[str, Any]) -> str:
        low, high = row["aes_interval"]
        value = f"**{row['aes']:+.2f}**" if row["like_best"] else f"{row['aes']:+.2f}"
        aes_cell = f"{value} ({low:+.2f} to {high:+.2f})" + " \\*" * row["pareto"]
        return f"{row['setting'] or '-'} | {row['accuracy']:.1%} / {row['tokens']:.1f} | {aes_cell}"

    names = {name: name + " (u)" * row["unverified"] for name, row in first.items()}
    rows = [f"| {names[name]} | {cells(first[name])} | {cells(second[name])} |" for name in by_mean]
    assert set(first) == set(second) and between("both").splitlines()[2:] == rows


@pytest.mark.parametrize("name", ["published", "published_deepscaler"])
def test_the_aes_of_published_numbers_is_that_of_their_averages(name: str) -> None:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in between(name).splitlines()[2:]]
    pairs = [np.mean([[float(x) for x in cell.split(" / ")] for cell in row[2:-1]], axis=0) for row in rows]
    assert [row[-1] for row in rows] == [f"{aes(*pair, *pairs[0]):+.2f}" for pair in pairs]


def test_the_papers_tables_are_those_of_their_json() -> None:
    found = [Comparison(t["table"], t["title"], t["rows"], tuple(t["notes"])) for t in results("reproduce")["tables"]]
    assert [comparison.number for comparison in found] == [1, 2, 3, 4, 6]
    assert all("seeds 0, 1, 2." in comparison.notes[-1] for comparison in found)
    page = (DOCS / "results/reproduce.md").read_text(encoding="utf-8")
    assert page.split("\n\n", 2)[2] == "\n".join(markdown(comparison) for comparison in found)
