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
    first, rest = between(name), text.removeprefix(between(name))
    assert text == first + rest and rest.startswith("\nAccuracy % / tokens by level:\n"), "the page has the first table"
    assert "temperature 0.6" in first.splitlines()[0] and f"(results/{name}.md)" in PAGE


def test_the_methods_of_both_tasks_stand_by_their_mean_aes() -> None:
    first, second = (
        {row["model"]: row for row in results(name)["rows"] if row["temperature"] == 0.6}
        for name in ("field", "compare_too_long")
    )
    by_mean = sorted(second, key=lambda name: -(first[name]["aes"] + second[name]["aes"]))

    def cell(row: dict[str, Any]) -> str:
        return f"{row['accuracy']:.1%} / {row['tokens']:.1f} / {row['aes']:+.2f} | {row['setting'] or '-'}"

    rows = [f"| {name} | {cell(first[name])} | {cell(second[name])} |" for name in by_mean]
    assert between("both").splitlines()[2:] == rows


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
