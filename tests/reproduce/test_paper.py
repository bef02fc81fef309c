"""The paper's tables as data, against METHODS.md where the developers have it and against themselves everywhere.

Run: python -m pytest tests/reproduce/test_paper.py        How our numbers are compared: test_beside_paper.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nanolapo.reproduce.paper import (
    PaperRow,
    Score,
    base_name,
    changes,
    disagreements,
    paper_tables,
    recomputed_average,
)

METHODS = Path(__file__).parents[2] / "../shared/METHODS.md"  # the developers' notes; absent in a clone
SETS = ("MATH-500", "AIME24", "AMC23", "OlympiadBench", "average")
ROWS = [row for table in paper_tables().values() for row in table.rows]
NOT_THE_MEAN = {("A", "AutoThink", "tokens"), ("B", "Outside", "accuracy")}  # worked out by hand: 4301.5, 63.65


def as_told(*cells: str) -> list[tuple[float, float]]:
    """ "82.2 / 2288" or "82.2/2288" -> (82.2, 2288.0)"""
    return [(float(a), float(t)) for a, t in (cell.split("/") for cell in cells)]


def as_ours(row: PaperRow) -> list[tuple[float, float]]:
    return [(score.accuracy, score.tokens) for score in row.scores.values()]


@pytest.fixture(scope="module")
def methods() -> str:
    if not METHODS.exists():
        pytest.skip("the developers' notes are not on this machine; the tests below need only the package")
    text = METHODS.read_text(encoding="utf-8")
    return text[text.index("### 1.9 ") : text.index("### 1.10 ")]


@pytest.mark.parametrize(("number", "labels"), [(1, 2), (2, 1), (3, 1), (6, 2)])
def test_a_table_is_the_notes_table(methods, number, labels):
    """Every row, every cell, in the notes' order; `labels` columns come before the numbers."""
    part = methods[re.search(rf"\bTable {number} \(", methods).start() :]  # type: ignore[union-attr]
    lines = re.match(r"[^|]*((?:\|.*\n)+)", part)[1].splitlines()[2:]  # type: ignore[index]
    told = []
    for line in lines:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        told.append((cells[:labels], as_told(*cells[labels:])))
    ours = []
    for row in paper_tables()[number].rows:
        label = {1: [row.base, row.name], 6: row.name.split(", ")}.get(number, [row.name])
        ours.append((label, as_ours(row)))
    assert ours == told and len(told) >= 3


def test_table_4_is_the_notes_table(methods):
    told = re.search(r"Table 4 .*?:\n(.*?)\n\n", methods.replace("MATH-500): ", "MATH-500):\n"), re.DOTALL)[1]  # type: ignore[index]
    rows = []
    for part in told.split(";"):
        model = re.match(r"\s*(.*?) none", part)[1]  # type: ignore[index]
        rows += [
            (f"{model}, {name}", as_told(cell))
            for name, cell in re.findall(r"(none|\w+(?:\(\d+\))?) ([\d.]+/\d+)", part)
        ]
    named = [(re.sub(r"\(\d+\)", "", row.name), as_ours(row)) for row in paper_tables()[4].rows]
    assert [(re.sub(r"\(\d+\)", "", name), cells) for name, cells in rows] == named and len(named) == 6


def test_table_7_is_the_notes_table(methods):
    told = methods[methods.index("Table 7 ") :]
    for base, cells in re.findall(r"\b([AB]) (base .*?)(?:;|\.\n)", told):
        names = {"base": "Base", "D": "+LAPO-D", "I": "+LAPO-I"}
        for name, cell in re.findall(r"(base|D|I) ([\d.]+/\d+)", cells):
            assert as_ours(paper_tables()[7].row(base, names[name])) == as_told(cell)
            names.pop(name)
        assert not names
    assert len(paper_tables()[7].rows) == 6 == len(re.findall(r"[\d.]+/\d+", told))


def test_aes_of_the_notes(methods):
    """Base B, from the averages; the notes computed these by themselves."""
    told = dict(re.findall(r"([\w-]+(?: \w+)?) (-?\d\.\d{3})[,.]?", methods[methods.index("AES (section 23)") :]))
    base = paper_tables()[1].row("B", "Base").scores["average"]
    assert len(told) == 8
    for name, value in told.items():
        row = next(r for r in paper_tables()[1].rows if r.base == "B" and r.name.lstrip("+") == name.strip())
        assert changes(row.scores["average"], base)["aes"] == pytest.approx(float(value), abs=6e-4), name


# ------------------------------------------------------------------------------------------------ without the notes


def test_what_is_there():
    counts = {number: (table.sets, len(table.rows)) for number, table in paper_tables().items()}
    rest = {4: (("MATH-500",), 6), 7: (("GPQA",), 6)}
    assert counts == {1: (SETS, 18), 2: (SETS, 4), 3: (SETS, 3), 6: (SETS, 6)} | rest
    for table in paper_tables().values():
        assert len({(row.base, row.name) for row in table.rows}) == len(table.rows)
        for row in table.rows:
            assert tuple(row.scores) == table.sets and base_name(row.base)
            assert all(20 < s.accuracy < 90 and 1000 < s.tokens < 12500 for s in row.scores.values()), row


@pytest.mark.parametrize("row", [r for r in ROWS if "average" in r.scores], ids=lambda r: f"{r.base}-{r.name}")
def test_printed_averages_are_the_means_of_the_columns(row):
    """A digit copied wrongly shows here: means of printed numbers agree with printed means to their rounding, but for the
    two cells of the paper that do not."""
    pairs = [row.scores[name] for name in SETS[:4]]
    accuracy, tokens = sum(s.accuracy for s in pairs) / 4, sum(s.tokens for s in pairs) / 4
    assert recomputed_average(row) == Score(pytest.approx(accuracy), pytest.approx(tokens))  # type: ignore[arg-type]
    printed = row.scores["average"]
    assert (abs(accuracy - printed.accuracy) > 0.1) == ((row.base, row.name, "accuracy") in NOT_THE_MEAN)
    assert (abs(tokens - printed.tokens) > 1) == ((row.base, row.name, "tokens") in NOT_THE_MEAN)


def test_where_the_paper_does_not_agree_with_itself():
    """Each by hand: (2017+7084+3499+4606)/4 = 4301.5; (86.5+36.4+76.3+55.4)/4 = 63.65; 4775/8086, 3832/6229."""
    assert disagreements() == [
        "Table 1, base A, AutoThink: prints 3825 tokens as average, its columns give 4301.5",
        "Table 2, base B, Outside: prints 63.9 % as average, its columns give 63.65 %",
        "Table 4, base B, LAPO-I w/ Outside, none, MATH-500: 86.2 / 2251, but Table 2, Outside, has 86.5 / 2251",
        "Abstract: -40.9 % tokens and +2.3 points; Table 1 has -40.9 % and +1.2 points on DeepSeek-R1-Distill-Qwen-1.5B "
        "and -38.5 % and +2.3 points on DeepScaleR-1.5B-Preview",
    ]


def test_rows_that_are_the_same_model_are_linked():
    linked = {
        (table.number, row.name): row.same_as for table in paper_tables().values() for row in table.rows if row.same_as
    }
    assert linked == {
        (2, "Exact (default)"): "1/+LAPO-I", (3, "Median"): "1/+LAPO-I", (4, "LAPO-I, none"): "1/+LAPO-I",
        (4, "LAPO-I w/ Outside, none"): "2/Outside", (6, "combined, D"): "1/+LAPO-D", (6, "combined, I"): "1/+LAPO-I",
    }  # fmt: skip


def test_changes_by_hand():
    """Base A: 8086 -> 4775 tokens, 57.9 -> 59.1 %; a lost point costs five times its share."""
    told = changes(Score(59.1, 4775), Score(57.9, 8086))
    by_hand = {"tokens_vs_base": -40.9473, "points_vs_base": 1.2, "aes": 0.409473 + 3 * 1.2 / 57.9}
    assert told == pytest.approx(by_hand, abs=1e-4)
    assert changes(Score(45, 100), Score(50, 100))["aes"] == pytest.approx(-0.5)
