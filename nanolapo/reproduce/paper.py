"""The numbers that LAPO's paper prints (paper.yaml), and the places where they contradict each other."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from nanolapo.config_file import parse
from nanolapo.evaluation.scores import aes


@dataclass(frozen=True)
class Score:
    accuracy: float  # %
    tokens: float


@dataclass(frozen=True)
class PaperRow:
    """One row of a printed table."""

    base: str  # A or B
    name: str  # as printed
    scores: dict[str, Score]  # by problem set; "average" is the printed one
    against: str  # name of the row that relative numbers refer to
    same_as: str  # "table/row" of the same model elsewhere, or ""


@dataclass(frozen=True)
class PaperTable:
    number: int
    title: str
    sets: tuple[str, ...]
    rows: tuple[PaperRow, ...]
    notes: tuple[str, ...]

    def row(self, base: str, name: str) -> PaperRow:
        return next(row for row in self.rows if (row.base, row.name) == (base, name))


@cache
def _printed() -> Any:
    return parse(files("nanolapo.reproduce").joinpath("paper.yaml").read_text(encoding="utf-8"), "paper.yaml")


@cache
def paper_tables() -> dict[int, PaperTable]:
    """Tables 1, 2, 3, 4, 6 and 7 by their number (5 lists hyper-parameters: those are the configs).

    >>> paper_tables()[1].row("B", "+LAPO-I").scores["average"]
    Score(accuracy=64.8, tokens=3832.0)
    """
    tables = {}
    for num, content in _printed()["tables"].items():
        rows = []
        for row in content["rows"]:
            pairs = [tuple(map(float, pair.split("/"))) for pair in row["scores"].split()]
            scores = {name: Score(*pair) for name, pair in zip(content["sets"], pairs, strict=True)}
            rows.append(PaperRow(row["base"], row["name"], scores, row.get("against", "Base"), row.get("same_as", "")))
        notes = tuple(content.get("notes", ()))
        tables[num] = PaperTable(num, content["title"], tuple(content["sets"]), tuple(rows), notes)
    return tables


def base_name(base: str) -> str:
    """The model that the paper's base A or B stands for."""
    return str(_printed()["bases"][base])


def changes(score: Score, reference: Score) -> dict[str, float]:
    """The change against the reference: tokens in %, accuracy in points, and AES.

    >>> {key: round(value, 2) for key, value in changes(Score(64.8, 3832), Score(62.5, 6229)).items()}
    {'tokens_vs_base': -38.48, 'points_vs_base': 2.3, 'aes': 0.5}
    """
    return {
        "tokens_vs_base": 100 * (score.tokens / reference.tokens - 1) if reference.tokens else float("nan"),
        "points_vs_base": score.accuracy - reference.accuracy,
        "aes": aes(score.accuracy, score.tokens, reference.accuracy, reference.tokens),
    }


# Rounding allowed between a mean of printed numbers and a printed mean. The paper cuts tokens off instead of rounding.
ROUNDING = Score(0.1, 1.0)


def disagreements() -> list[str]:
    """One line for each average that is not the mean of its columns, each model with two results, and the abstract."""
    lines = []
    for printed in paper_tables().values():
        for row in printed.rows:
            where = f"Table {printed.number}, base {row.base}, {row.name}"
            if "average" in row.scores:
                stated, mean = row.scores["average"], recomputed_average(row)
                if abs(stated.accuracy - mean.accuracy) > ROUNDING.accuracy + 1e-9:
                    lines.append(
                        f"{where}: prints {stated.accuracy} % as average, its columns give {mean.accuracy:.2f} %"
                    )
                if abs(stated.tokens - mean.tokens) > ROUNDING.tokens:
                    lines.append(
                        f"{where}: prints {stated.tokens:.0f} tokens as average, its columns give {mean.tokens:.1f}"
                    )
            if row.same_as:
                num, _, name = row.same_as.partition("/")
                other = paper_tables()[int(num)].row(row.base, name)
                lines += [
                    f"{where}, {key}: {score.accuracy} / {score.tokens:.0f}, but Table {num}, {name}, has "
                    f"{other.scores[key].accuracy} / {other.scores[key].tokens:.0f}"
                    for key, score in row.scores.items()
                    if score != other.scores[key]
                ]
    return [*lines, *_headline()]


def recomputed_average(row: PaperRow) -> Score:
    """Unweighted mean over the row's problem sets."""
    scores = [score for name, score in row.scores.items() if name != "average"]
    return Score(float(np.mean([s.accuracy for s in scores])), float(np.mean([s.tokens for s in scores])))


def _headline() -> list[str]:
    """A line if no base model has both of the abstract's numbers, tokens saved and points gained."""
    claim, rows = _printed()["headline"], paper_tables()[1]
    by_base = {
        base: changes(*(rows.row(base, name).scores["average"] for name in ("+LAPO-I", "Base")))
        for base in _printed()["bases"]
    }
    told = [(round(c["tokens_vs_base"], 1), round(c["points_vs_base"], 1)) for c in by_base.values()]
    if (claim["tokens_percent"], claim["points"]) in told:
        return []
    told_by_base = " and ".join(
        f"{c['tokens_vs_base']:+.1f} % and {c['points_vs_base']:+.1f} points on {base_name(base)}"
        for base, c in by_base.items()
    )
    return [f"Abstract: {claim['tokens_percent']} % tokens and +{claim['points']} points; Table 1 has {told_by_base}"]
