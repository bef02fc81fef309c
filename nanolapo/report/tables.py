"""The tables of an evaluation, from its results.json: the cells of each, and all of them as Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from nanolapo.evaluation.scores import KEYWORDS

Row = dict[str, Any]
Cells = tuple[list[str], list[list[str]]]  # head and body of a table, as shown


def tables(results: dict[str, Any]) -> list[tuple[str, list[tuple[str, Cells]]]]:
    """All tables of an evaluation: a title for every set and temperature, and its (caption, cells)."""
    found = []
    for name, temperature in dict.fromkeys((r["set"], r["temperature"]) for r in results["rows"]):
        rows = [r for r in results["rows"] if (r["set"], r["temperature"]) == (name, temperature)]
        n = f", {rows[0]['samples'] // rows[0]['problems']} samples a problem" if name != "average" else ""
        parts = [("", main_cells(rows))]
        if len(rows[0].get("pass_at_k", {})) > 1:
            parts.append(("Right at least once in k samples", pass_at_k_cells(rows)))
        if rows[0].get("by_level"):
            parts.append(("Accuracy % / tokens by level", level_cells(rows)))
        if rows[0].get("keywords"):
            parts.append(("Words per answer", keyword_cells(rows)))
        found.append((f"{name}, temperature {temperature:g}{n}", parts))
    return found


def markdown(results: dict[str, Any]) -> str:
    """All tables of an evaluation, one per set and temperature."""
    parts = []
    for title, captioned in tables(results):
        parts.append(f"### {title}")
        for caption, cells in captioned:
            parts += [f"{caption}:", table(*cells)] if caption else [table(*cells)]
    return "\n\n".join(parts) + f"\n\nAES is measured against {results['base']} (weights of O1-Pruner).\n"


def label(row: Row) -> str:
    return row["model"] + (f", told {row['guidance']}" if row["guidance"] else "")


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    r"""A Markdown table, first column left, the others right.

    >>> print(table(["a", "b"], [["x|y", "1"]]))
    | a | b |
    | :-- | --: |
    | x\|y | 1 |
    """
    lines = [head, [":--", *["--:"] * (len(head) - 1)], *body]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def number(value: float | None, form: str) -> str:
    """Return the number, or a dash for None and nan.

    >>> number(0.5, ".1%"), number(float("nan"), ".1%")
    ('50.0%', '-')
    """
    return "-" if value is None or math.isnan(value) else format(value, form)


def with_interval(row: Row, key: str, form: str) -> str:
    """
    >>> with_interval({"tokens": 50, "tokens_interval": (40, 60)}, "tokens", ".1f"), with_interval({}, "aes", "+.2f")
    ('50.0 (40.0 to 60.0)', '-')
    """
    bounds = row.get(f"{key}_interval")
    return number(row.get(key), form) + (f" ({bounds[0]:{form}} to {bounds[1]:{form}})" if bounds else "")


def bounds_text(bounds: Sequence[float] | None, form: str) -> str:
    return f"{bounds[0]:{form}} to {bounds[1]:{form}}" if bounds else "-"


def main_cells(rows: Sequence[Row]) -> Cells:
    """The column of adaptivity is there where the set has levels."""
    columns, body = ["adaptivity"] * (rows[0].get("adaptivity") is not None), []
    for r in rows:
        body.append([
            label(r), f"{r['accuracy']:.1%}", bounds_text(r.get("accuracy_interval"), ".1%"),
            f"{r['tokens']:.1f}", bounds_text(r.get("tokens_interval"), ".1f"),
            number(r.get("tokens_correct"), ".1f"), f"{r['truncated']:.1%}", number(r["aes"], "+.2f"),
            *(number(r[key], "+.1f") for key in columns),
        ])  # fmt: skip
    head = ["model", "pass@1", "95% interval", "tokens", "95% interval", "tokens when right", "cut", "AES", *columns]
    return head, body


def pass_at_k_cells(rows: Sequence[Row]) -> Cells:
    powers = list(rows[0]["pass_at_k"])
    body = [[label(r), *(f"{r['pass_at_k'][k]:.1%}" for k in powers)] for r in rows]
    return ["model", *(f"pass@{k}" for k in powers)], body


def level_cells(rows: Sequence[Row]) -> Cells:
    levels = list(rows[0]["by_level"])
    body = []
    for r in rows:
        cells = [f"{100 * r['by_level'][k]['accuracy']:.0f} / {r['by_level'][k]['tokens']:.0f}" for k in levels]
        body.append([
            label(r), *cells, number(r.get("adaptivity"), "+.1f"), bounds_text(r.get("adaptivity_interval"), "+.1f"),
            number(r.get("need_correlation"), ".2f"), number(r.get("length_spread"), ".1f"),
        ])  # fmt: skip
    head = ["model", *(f"level {k}" for k in levels), "adaptivity", "95% interval", "rank correlation", "length spread"]
    return head, body


def keyword_cells(rows: Sequence[Row]) -> Cells:
    groups = list(KEYWORDS)
    return ["model", *groups], [[label(r), *(f"{r['keywords'][g]:.2f}" for g in groups)] for r in rows]


# ------------------------------------------------------------------ the numbers behind the paper's figures 3 and 5


def difficulty_axis(rows: Sequence[Row], base: str) -> list[tuple[str, str]]:
    """(set, level) from easy to hard: the levels of sets that have several, then the other sets, by the base's accuracy.

    >>> math = {"model": "b", "set": "MATH", "by_level": {"1": {}, "2": {}}}
    >>> rest = [{"model": "b", "set": name, "by_level": {}, "accuracy": a} for name, a in (("AIME", 0.3), ("AMC", 0.7))]
    >>> difficulty_axis([*rest, math, {"model": "b", "set": "average"}], "b")
    [('MATH', '1'), ('MATH', '2'), ('AMC', ''), ('AIME', '')]
    """
    of_base = [r for r in rows if r["model"] == base and r["set"] != "average"]
    leveled = [r for r in of_base if len(r.get("by_level", {})) > 1]
    single = sorted((r for r in of_base if r not in leveled), key=lambda r: -float(r["accuracy"]))
    return [(r["set"], level) for r in leveled for level in r["by_level"]] + [(r["set"], "") for r in single]


def tokens_at(rows: Sequence[Row], model: str, place: tuple[str, str]) -> float:
    """Mean tokens of one model at one place of the difficulty axis."""
    row = next(r for r in rows if (r["model"], r["set"]) == (model, place[0]))
    return float(row["by_level"][place[1]]["tokens"] if place[1] else row["tokens"])


def training_dynamics(rows: Sequence[Row], base: str) -> dict[str, list[tuple[float, float, float]]]:
    """Fig. 5: (step, tokens, accuracy) of the models each run has exported; the base model is one point, at step 0.

    `rows`: unguided, of one set and temperature. Empty where nothing was exported.
    """
    exported = sorted((r for r in rows if r.get("step") is not None), key=lambda r: int(r["step"]))
    curves: dict[str, list[tuple[float, float, float]]] = {}
    for r in exported:
        curves.setdefault(r["run"], []).append((r["step"], r["tokens"], r["accuracy"]))
    start = [(0.0, float(r["tokens"]), float(r["accuracy"])) for r in rows if r["model"] == base]
    return curves | {base: start} if curves else {}


def accuracy_limits(percents: Sequence[float]) -> tuple[float, float]:
    """Ends of an accuracy axis: at least four points wide, so that one answer in a thousand does not look like a fall.

    >>> accuracy_limits([99.9, 100.0]), accuracy_limits([40.0, 60.0])
    ((96.5, 100.5), (38.0, 62.0))
    """
    room = max(2.0, 0.1 * (max(percents) - min(percents)))
    top = min(100.5, max(percents) + room)
    return min(top - 4.0, min(percents) - room), top
