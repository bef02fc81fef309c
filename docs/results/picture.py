"""The README's picture: accuracy against tokens at temperature 1, four models in colour, all other methods in grey.

    python docs/results/picture.py     # reads compare.json beside this file, writes tradeoff.png beside it

A dot is a mean over the seeds.
"""

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

HERE = Path(__file__).parent
TEMPERATURE = 1.0
NAMED = {  # model -> its label, its colour, and the label's place in points from the dot
    "base": ("base", "black", (9, -4)),
    "accuracy-only": ("accuracy-only", "tab:orange", (-38, -17)),
    "lapo-d": ("LAPO-D (stage 1)", "tab:blue", (9, -4)),
    "lapo": ("LAPO (both stages)", "tab:red", (9, -4)),
}


def draw(rows: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    others = [row for row in rows if row["model"] not in NAMED]
    axes.scatter(*points(others), color="lightgrey", s=22, label=f"{len(others)} other methods")
    for row in (row for row in rows if row["model"] in NAMED):
        label, color, place = NAMED[row["model"]]
        axes.scatter(*points([row]), color=color, s=55, zorder=3)
        axes.annotate(label, (row["tokens"], 100 * row["accuracy"]), place, textcoords="offset points", color=color)
    axes.set_xlabel("mean tokens of an answer")
    axes.set_ylabel("right answers, %")
    axes.legend(loc="lower left", frameon=False)
    axes.grid(alpha=0.25)
    return figure


def points(rows: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    return [row["tokens"] for row in rows], [100 * row["accuracy"] for row in rows]


if __name__ == "__main__":
    found = json.loads((HERE / "compare.json").read_text(encoding="utf-8"))["rows"]
    draw([row for row in found if row["temperature"] == TEMPERATURE]).savefig(HERE / "tradeoff.png", dpi=130)
