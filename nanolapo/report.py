"""Tables and plots from results.json and metrics.jsonl: Markdown for people, PNG for the eye."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanolapo.evaluation import KEYWORDS

Row = dict[str, Any]


def markdown(results: dict[str, Any]) -> str:
    """All tables of an evaluation, one per set and temperature."""
    parts = []
    for name, temperature in dict.fromkeys((r["set"], r["temperature"]) for r in results["rows"]):
        rows = [r for r in results["rows"] if (r["set"], r["temperature"]) == (name, temperature)]
        n = f", {rows[0]['samples'] // rows[0]['problems']} samples a problem" if "samples" in rows[0] else ""
        parts.append(f"### {name}, temperature {temperature:g}{n}\n\n{main_table(rows)}")
        if rows[0].get("by_level"):
            parts.append(f"Accuracy % / tokens by level:\n\n{level_table(rows)}")
        if rows[0].get("keywords"):
            parts.append(f"Words per answer:\n\n{keyword_table(rows)}")
    return "\n\n".join(parts) + f"\n\nAES is measured against {results['base']} (weights of O1-Pruner).\n"


def label(row: Row) -> str:
    return row["model"] + (f", told {row['guidance']}" if row["guidance"] else "")


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table, first column left, the others right.

    >>> print(table(["a", "b"], [["x", "1"]]))
    | a | b |
    | :-- | --: |
    | x | 1 |
    """
    lines = [head, [":--", *["--:"] * (len(head) - 1)], *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


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
    return f"{bounds[0]:{form}} to {bounds[1]:{form}}" if bounds else "-"  # an average over sets has none


def main_table(rows: Sequence[Row]) -> str:
    body = []
    for r in rows:
        body.append([
            label(r), f"{r['accuracy']:.1%}", interval(r.get("accuracy_interval"), ".1%"),
            f"{r['tokens']:.1f}", interval(r.get("tokens_interval"), ".1f"),
            number(r.get("tokens_correct"), ".1f"), f"{r['truncated']:.1%}", number(r["aes"], "+.2f"),
        ])  # fmt: skip
    return table(["model", "pass@1", "95% interval", "tokens", "95% interval", "tokens when right", "cut", "AES"], body)


def level_table(rows: Sequence[Row]) -> str:
    levels = list(rows[0]["by_level"])
    body = []
    for r in rows:
        cells = [f"{100 * r['by_level'][k]['accuracy']:.0f} / {r['by_level'][k]['tokens']:.0f}" for k in levels]
        body.append([label(r), *cells, number(r.get("length_level_correlation"), ".2f")])
    return table(["model", *(f"level {k}" for k in levels), "rank correlation"], body)


def keyword_table(rows: Sequence[Row]) -> str:
    groups = list(KEYWORDS)
    return table(["model", *groups], [[label(r), *(f"{r['keywords'][g]:.2f}" for g in groups)] for r in rows])


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl; the run may still be writing, or was killed in mid-line."""
    path = run_dir / "metrics.jsonl"
    whole, _, _ = path.read_text(encoding="utf-8", errors="replace").rpartition("\n") if path.exists() else ("", "", "")
    return [json.loads(line) for line in whole.split("\n") if line]


def plots(results: dict[str, Any], run_dirs: dict[str, Path], out: Path) -> list[Path]:
    """Length and accuracy over training steps, length against level, keyword groups by model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    written = []

    def save(figure: Any, name: str) -> None:
        figure.tight_layout()
        figure.savefig(out / name, dpi=120)
        plt.close(figure)
        written.append(out / name)

    curves = {name: read_metrics(folder) for name, folder in run_dirs.items()}
    if any(curves.values()):
        figure, axes = plt.subplots(1, 2, figsize=(10, 3.6))
        for name, lines in curves.items():
            if lines:
                steps = [line["step"] for line in lines]
                axes[0].plot(steps, [line["length"] for line in lines], label=name)
                axes[1].plot(steps, [line["accuracy"] for line in lines], label=name)
        for axis, title in zip(axes, ("mean length of rollouts (tokens)", "accuracy of rollouts"), strict=True):
            axis.set_xlabel("step")
            axis.set_title(title)
        axes[0].legend(fontsize=8)
        save(figure, "training.png")

    first = results["rows"][0]
    rows = [r for r in results["rows"] if (r["set"], r["temperature"]) == (first["set"], first["temperature"])]
    plain = [r for r in rows if not r["guidance"]]
    if first.get("by_level"):
        figure, axis = plt.subplots(figsize=(5.5, 3.6))
        for r in plain:
            axis.plot(list(r["by_level"]), [v["tokens"] for v in r["by_level"].values()], marker="o", label=r["model"])
        axis.set_xlabel("level")
        axis.set_title("mean length by level (tokens)")
        axis.legend(fontsize=8)
        save(figure, "length_by_level.png")

    if first.get("keywords"):
        figure, axis = plt.subplots(figsize=(7, 3.6))
        width = 0.8 / len(plain)
        for i, r in enumerate(plain):
            places = [g + i * width for g in range(len(KEYWORDS))]
            axis.bar(places, [r["keywords"][g] for g in KEYWORDS], width, label=r["model"])
        axis.set_xticks([g + 0.4 - width / 2 for g in range(len(KEYWORDS))], list(KEYWORDS))
        axis.set_title("words per answer")
        axis.legend(fontsize=8)
        save(figure, "keywords.png")
    return written
