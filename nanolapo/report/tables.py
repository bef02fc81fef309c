"""Tables and plots from results.json and metrics.jsonl: Markdown for people, PNG for the eye."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from nanolapo.evaluation.scores import KEYWORDS, rank_correlation

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
    """The number, or a dash where there is none (None, nan).

    >>> number(0.5, ".1%"), number(float("nan"), ".1%")
    ('50.0%', '-')
    """
    return "-" if value is None or math.isnan(value) else format(value, form)


def without_nan(value: Any) -> Any:
    """JSON has no NaN: an AES against a base without a right answer, and the like, is written as null."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def interval(bounds: Sequence[float] | None, form: str) -> str:
    return f"{bounds[0]:{form}} to {bounds[1]:{form}}" if bounds else "-"


def main_cells(rows: Sequence[Row]) -> Cells:
    body = []
    for r in rows:
        body.append([
            label(r), f"{r['accuracy']:.1%}", interval(r.get("accuracy_interval"), ".1%"),
            f"{r['tokens']:.1f}", interval(r.get("tokens_interval"), ".1f"),
            number(r.get("tokens_correct"), ".1f"), f"{r['truncated']:.1%}", number(r["aes"], "+.2f"),
        ])  # fmt: skip
    return ["model", "pass@1", "95% interval", "tokens", "95% interval", "tokens when right", "cut", "AES"], body


def pass_at_k_cells(rows: Sequence[Row]) -> Cells:
    powers = list(rows[0]["pass_at_k"])
    body = [[label(r), *(f"{r['pass_at_k'][k]:.1%}" for k in powers)] for r in rows]
    return ["model", *(f"pass@{k}" for k in powers)], body


def level_cells(rows: Sequence[Row]) -> Cells:
    levels = list(rows[0]["by_level"])
    body = []
    for r in rows:
        cells = [f"{100 * r['by_level'][k]['accuracy']:.0f} / {r['by_level'][k]['tokens']:.0f}" for k in levels]
        body.append([label(r), *cells, number(r.get("length_level_correlation"), ".2f")])
    return ["model", *(f"level {k}" for k in levels), "rank correlation"], body


def keyword_cells(rows: Sequence[Row]) -> Cells:
    groups = list(KEYWORDS)
    return ["model", *groups], [[label(r), *(f"{r['keywords'][g]:.2f}" for g in groups)] for r in rows]


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl; the run may still be writing, or was killed in mid-line."""
    path = run_dir / "metrics.jsonl"
    whole, _, _ = path.read_text(encoding="utf-8", errors="replace").rpartition("\n") if path.exists() else ("", "", "")
    return [json.loads(line) for line in whole.split("\n") if line]


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


@rc_context({"text.parse_math": False})  # a name with a $ is no formula
def plots(results: dict[str, Any], run_dirs: dict[str, Path], out: Path) -> list[Path]:
    """The paper's figures 1, 3, 4 and 5 as far as the results have them, and the curves of the training runs.

    The first row's model is the base; figures that compare models need two that are no exports of one run.
    """
    first = results["rows"][0]
    plain = [r for r in results["rows"] if r["temperature"] == first["temperature"] and not r["guidance"]]
    of_set = [r for r in plain if r["set"] == first["set"]]
    final = [r for r in of_set if r.get("step") is None]
    logs = {name: read_metrics(folder) for name, folder in run_dirs.items()}
    sampled = {name: [(x["step"], x["length"], x["accuracy"]) for x in lines] for name, lines in logs.items() if lines}
    exported = training_dynamics(of_set, first["model"])
    places = difficulty_axis(plain, first["model"])
    figures = {}
    if sampled:
        figures["training.png"] = curves_figure(sampled, "of rollouts")
    if exported:
        figures["dynamics.png"] = curves_figure(exported, f"on {first['set']}")
    if len(final) > 1:
        overall = [r for r in plain if r["set"] == plain[-1]["set"] and r.get("step") is None]  # the average, if any
        figures["tradeoff.png"] = tradeoff_figure(overall)
        if len(places) > 1:
            figures["length_by_level.png"] = difficulty_figure(plain, [r["model"] for r in final], places)
        if first.get("keywords"):
            figures["keywords.png"] = keyword_figure(final)
    for name, figure in figures.items():
        figure.tight_layout()
        figure.savefig(out / name, dpi=120)
    return [out / name for name in figures]


def curves_figure(curves: dict[str, list[tuple[float, float, float]]], where: str) -> Figure:
    """Fig. 5: tokens and accuracy over steps. A curve of one point is drawn as a level line (the base model)."""
    figure = Figure(figsize=(10, 3.6))
    left, right = figure.subplots(1, 2)
    for name, points in curves.items():
        steps, tokens, accuracy = zip(*points, strict=True)
        for axis, values in ((left, tokens), (right, [100 * a for a in accuracy])):
            if len(points) == 1:
                axis.axhline(values[0], label=name, color="grey", linestyle="--")
            else:
                axis.plot(steps, values, label=name, marker="." if len(points) < 30 else "")
    right.set_ylim(accuracy_limits([100 * a for points in curves.values() for _, _, a in points]))
    for axis, title in ((left, "mean length (tokens)"), (right, "accuracy (%)")):
        axis.set_xlabel("step")
        axis.set_title(f"{title} {where}")
    left.legend(fontsize=8)
    return figure


def tradeoff_figure(rows: Sequence[Row]) -> Figure:
    """Fig. 1: accuracy against tokens, better is up and left."""
    figure = Figure(figsize=(5.5, 3.6))
    axis = figure.subplots()
    for r in rows:
        place = r["tokens"], 100 * r["accuracy"]
        axis.scatter(*place)
        axis.annotate(r["model"], place, fontsize=7, xytext=(3, 3), textcoords="offset points")
    axis.set_ylim(accuracy_limits([100 * r["accuracy"] for r in rows]))
    axis.set_xlabel("mean tokens")
    axis.set_title(f"accuracy (%), {rows[0]['set']}")
    return figure


def difficulty_figure(rows: Sequence[Row], models: Sequence[str], places: Sequence[tuple[str, str]]) -> Figure:
    """Fig. 3: mean tokens from easy to hard, with the rank correlation of the two."""
    figure = Figure(figsize=(max(5.5, 0.7 * len(places)), 3.6))
    axis = figure.subplots()
    for model in models:
        tokens = [tokens_at(rows, model, place) for place in places]
        rho = number(rank_correlation(range(len(places)), tokens), ".2f")
        axis.plot(range(len(places)), tokens, marker="o", label=f"{model} (rank correlation {rho})")
    one_set = len({name for name, _ in places}) == 1
    ticks = [level if one_set else f"{name} {level}".strip() for name, level in places]
    axis.set_xticks(range(len(places)), ticks, rotation=0 if one_set else 30, fontsize=8)
    axis.set_xlabel("level" if one_set else "from easy to hard")
    axis.set_title("mean tokens by difficulty")
    axis.legend(fontsize=7)
    return figure


def keyword_figure(rows: Sequence[Row]) -> Figure:
    """Fig. 4: words of each group per answer."""
    figure, width = Figure(figsize=(7, 3.6)), 0.8 / len(rows)
    axis = figure.subplots()
    for i, r in enumerate(rows):
        axis.bar(
            [g + i * width for g in range(len(KEYWORDS))], [r["keywords"][g] for g in KEYWORDS], width, label=r["model"]
        )
    axis.set_xticks([g + 0.4 - width / 2 for g in range(len(KEYWORDS))], list(KEYWORDS))
    axis.set_title("words per answer")
    axis.legend(fontsize=8)
    return figure
