"""Lays our results beside the paper's tables: one list of rows, written as Markdown, LaTeX and JSON.

If our problem sets are the paper's, every set is compared with its column. A miniature (the demo) has other sets. It is
compared with the paper's average, and only by the change against the base model: tokens in percent, accuracy in points.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nanolapo.config import UserError
from nanolapo.evaluation.scores import without_nan
from nanolapo.report.tables import Row, label, table, with_interval
from nanolapo.reproduce.paper import Score, base_name, changes, disagreements, paper_tables

COLUMNS = (  # key of a row, heading, format
    ("samples", "samples", ",d"),
    ("accuracy", "accuracy % (95 %)", ".1f"),
    ("paper_accuracy", "paper's %", ".1f"),
    ("accuracy_difference", "difference, points", "+.1f"),
    ("tokens", "tokens (95 %)", ",.1f"),
    ("paper_tokens", "paper's tokens", ",.0f"),
    ("tokens_difference", "difference, %", "+.1f"),
    ("tokens_vs_base", "tokens changed, %", "+.1f"),
    ("paper_tokens_vs_base", "paper's", "+.1f"),
    ("points_vs_base", "points gained", "+.1f"),
    ("paper_points_vs_base", "paper's", "+.1f"),
    ("tokens_correct", "tokens when right", ",.1f"),
    ("truncated", "cut %", ".1f"),
    ("aes", "AES", "+.2f"),
    ("paper_aes", "paper's AES", "+.2f"),
)


@dataclass(frozen=True)
class Comparison:
    """Our rows beside one printed table, for one base model. See `compare` for the keys of a row."""

    number: int
    title: str
    rows: list[Row]
    notes: tuple[str, ...]


def compare(number: int, base: str, ours: Sequence[Row], names: Mapping[str, str]) -> Comparison:
    """Lay our rows beside the paper's Table `number` for its base model `base` (A or B).

    ours: rows of results.json of one temperature, also of several evaluations (of equal rows the first counts).
    names: the paper's row name -> our label of that model. Rows of the paper without a name stay, without our numbers.

    A resulting row has our and the `paper_` value of `accuracy` (%), `tokens`, `tokens_vs_base` (%), `points_vs_base` and
    `aes`. The last three are relative to the row named in `against`. If the set is the same, it also has
    `accuracy_difference` (points) and `tokens_difference` (%).
    Raises UserError for a name that the table does not have, and for rows of two temperatures.
    """
    printed = paper_tables()[number]
    rows = [row for row in printed.rows if row.base == base]
    if not any(row.name == row.against for row in rows):  # tables 2, 3, 6 print no base: it is that of table 1
        rows = [paper_tables()[1].row(base, "Base"), *rows]
    unknown = sorted(set(names) - {row.name for row in rows})
    if unknown:
        raise UserError(f"Table {number}, base {base}, has the rows {[row.name for row in rows]}, not {unknown}")
    if len({row["temperature"] for row in ours}) > 1:
        raise UserError(f"Table {number}: give rows of one temperature; the paper evaluates at 0.6")
    found = {(label(row), row["set"]): row for row in reversed(ours)}
    shared = shared_sets(printed.sets, [row["set"] for row in ours])
    sets = shared or tuple(dict.fromkeys(row["set"] for row in ours)) or printed.sets
    lines = []
    for row in rows:
        against = next(other for other in rows if other.name == row.against)
        for name in sets:
            # A miniature: the average, or the only set
            column = name if name in shared or not ours else printed.sets[-1]
            mine, reference = (found.get((names.get(who.name, ""), name)) for who in (row, against))
            line: Row = {"model": row.name, "ours": names.get(row.name), "against": row.against, "set": name}
            line |= {"paper_set": column} | _ours(mine, reference) | _theirs(row.scores[column], against.scores[column])
            if mine and name in shared:
                line["accuracy_difference"] = line["accuracy"] - line["paper_accuracy"]
                line["tokens_difference"] = 100 * (line["tokens"] / line["paper_tokens"] - 1)
            lines.append(line)
    notes = list(printed.notes)
    if ours and not shared:
        notes.append(f"Not the paper's problem sets: its columns are its {printed.sets[-1]}; compare the changes.")
    return Comparison(number, f"Table {number}. {printed.title} ({base_name(base)} in the paper)", lines, tuple(notes))


def shared_sets(theirs: Sequence[str], ours: Sequence[str]) -> tuple[str, ...]:
    """The paper's sets that are ours too. The average is one of them only if it is over the same sets.

    >>> shared_sets(["AIME24", "AMC23", "average"], ["AMC23", "demo", "average"])
    ('AMC23',)
    >>> shared_sets(["AIME24", "average"], ["AIME24", "average"]), shared_sets(["AIME24", "average"], ["demo", "average"])
    (('AIME24', 'average'), ())
    """
    same = set(theirs) == set(ours)
    return tuple(name for name in theirs if name in ours and (name != "average" or same))


def _ours(mine: Row | None, reference: Row | None) -> Row:
    if mine is None:
        return {}
    row = {key: mine.get(key) for key in ("problems", "samples", "tokens", "tokens_interval", "tokens_correct")}
    row |= {key: 100 * mine[key] for key in ("accuracy", "truncated")}
    bounds = mine.get("accuracy_interval")
    row["accuracy_interval"] = [100 * bound for bound in bounds] if bounds else None
    return row | (changes(_score(mine), _score(reference)) if reference else {})


def _score(row: Row) -> Score:
    return Score(100 * row["accuracy"], row["tokens"])


def _theirs(score: Score, reference: Score) -> Row:
    row = {"accuracy": score.accuracy, "tokens": score.tokens} | changes(score, reference)
    return {f"paper_{key}": value for key, value in row.items()}


# ------------------------------------------------------------------------------------------------ three ways to write


def cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Heading and body of the printed table, as text, without the columns that are empty."""
    shown = [column for column in COLUMNS if any(row.get(column[0]) is not None for row in comparison.rows)]
    names = ["model", "set"]
    if any(row.get("ours") and row["set"] != row["paper_set"] for row in comparison.rows):
        names = ["model", "ours", "set"]  # what stands for the paper's model in a miniature
    head = [*names, *(heading for _, heading, _ in shown)]
    body = [
        [*(row[name] or "-" for name in names), *(with_interval(row, key, form) for key, _, form in shown)]
        for row in comparison.rows
    ]  # fmt: skip
    return head, body


def markdown(comparison: Comparison) -> str:
    against = {row["against"] for row in comparison.rows}
    base = " and ".join(sorted(against))
    measured = f"Changes, gains and AES (of the mean scores) are measured against {base}; 95 %: problems resampled."
    notes = " ".join([measured, *comparison.notes])
    return f"### {comparison.title}\n\n{table(*cells(comparison))}\n\n{notes}\n"


def latex(comparison: Comparison) -> str:
    """A plain LaTeX tabular that needs no package.

    >>> print(latex(Comparison(9, "T_9", [{"model": "+x", "set": "50% & more", "against": "x", "samples": 1200}], ())))
    % T_9
    \\begin{tabular}{llr}
    \\hline
    model & set & samples \\\\
    \\hline
    +x & 50\\% \\& more & 1,200 \\\\
    \\hline
    \\end{tabular}
    """
    head, body = cells(comparison)
    head, *body = [[_escape(text) for text in line] for line in (head, *body)]
    lines = [" & ".join(line) + r" \\" for line in (head, *body)]
    texts = head.index("set") + 1
    columns = "l" * texts + "r" * (len(head) - texts)
    start = [f"% {comparison.title}", *(f"% {note}" for note in comparison.notes), rf"\begin{{tabular}}{{{columns}}}"]
    return "\n".join([*start, r"\hline", lines[0], r"\hline", *lines[1:], r"\hline", r"\end{tabular}"])


def _escape(text: str) -> str:
    r"""The text on one line, with LaTeX's special characters escaped.

    >>> print(_escape(r"a_1 \input{x} ~2^n"))
    a\_1 \textbackslash{}input\{x\} \textasciitilde{}2\textasciicircum{}n
    """
    words = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    words |= {letter: rf"\{letter}" for letter in "&%$#_{}"}
    return "".join(words.get(letter, letter) for letter in " ".join(text.split()))


def write_tables(comparisons: Sequence[Comparison], folder: Path) -> list[Path]:
    """Write tables.md, tables.tex and tables.json from the same rows. The first ends with the paper's own disagreements."""
    found = disagreements()
    own = "### Where the paper's own numbers do not agree\n\n" + "\n".join(f"- {line}" for line in found) + "\n"
    plain = [{"table": c.number, "title": c.title, "notes": list(c.notes), "rows": c.rows} for c in comparisons]
    texts = {
        "tables.md": "\n".join([*map(markdown, comparisons), own]),
        "tables.tex": "\n\n".join(map(latex, comparisons)) + "\n",
        "tables.json": json.dumps(without_nan({"tables": plain, "paper_disagrees": found}), indent=1) + "\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]
