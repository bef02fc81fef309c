"""The figure of an evaluation: accuracy against tokens, every point named, and beside it the tokens by level."""

from __future__ import annotations

from collections.abc import Sequence
from colorsys import hsv_to_rgb

from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.transforms import Transform

from nanolapo.report.files import printable
from nanolapo.report.tables import Row, accuracy_limits, number

# Medium lightness: legible on white and on near-black.
COLOURS = ("#3b82d6", "#e07b2e", "#2f9e63", "#b65fc9", "#d4504f", "#9a8f2a", "#1f9fa8", "#a3704e", "#7c7fd8", "#d166a0")
SIZE = 8  # of the names, in points
Name = tuple[float, float, str, str]  # x, y, text, colour
Bar = tuple[float, float, float]  # from x to x, at height y


def palette(count: int) -> list[str]:
    """As many colours: the ten above, or hues in even steps where ten are too few.

    >>> palette(2), len(set(palette(15)))
    (['#3b82d6', '#e07b2e'], 15)
    """
    hues = [to_hex(hsv_to_rgb(i / count, 0.68, 0.8)) for i in range(count)]
    return list(COLOURS[:count]) if count <= len(COLOURS) else hues


def evaluation_figure(rows: Sequence[Row], leveled: Sequence[Row]) -> Figure:
    """Accuracy against tokens of `rows`; beside it, where `leveled` has two or more levels, its mean tokens by level."""
    models = list(dict.fromkeys(r["model"] for r in [*leveled, *rows]))
    colours = dict(zip(models, palette(len(models)), strict=True))
    levels = list(leveled[0].get("by_level") or ()) if leveled else []
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    axes = figure.subplots(1, 1 + (len(levels) > 1), squeeze=False)[0]
    tradeoff(axes[0], rows, colours)
    for axis in axes[1:]:
        ends: list[Name] = []
        for r in leveled:
            tokens, colour = [r["by_level"][level]["tokens"] for level in levels], colours[r["model"]]
            axis.plot(levels, tokens, "o-", markersize=4, color=colour)
            name = f"{r['model']} ({number(r.get('adaptivity'), '+.0f')} tokens)"
            ends.append((len(levels) - 1, tokens[-1], printable(name), colour))
        axis.set_xlim(-0.1 * len(levels), 1.9 * (len(levels) - 1))  # room for the names
        axis.set_title(printable(f"mean tokens by level, {leveled[0]['set']} (in brackets: adaptivity)"))
        axis.set_xlabel("level")
        write_names(axis, ends, [])
    return figure


def tradeoff(axis: Axes, rows: Sequence[Row], colours: dict[str, str]) -> None:
    """Fig. 1: accuracy against tokens, every point named, with 95 % intervals. A comparison of methods has bars from the
    best seed to the worst instead, and the Pareto front."""
    compared = "pareto" in rows[0]
    front = sorted((r["tokens"], 100 * r["accuracy"]) for r in rows if r.get("pareto"))
    axis.step([x for x, _ in front], [y for _, y in front], where="post", color="0.7", zorder=0)
    names: list[Name] = []
    bars: list[Bar] = []
    heights: list[float] = []
    for r in rows:
        x, y, colour = r["tokens"], 100 * r["accuracy"], colours[r["model"]]
        across = [r[key]["tokens"] for key in ("best", "worst")] if compared else r.get("tokens_interval") or []
        up = [] if compared else [100 * bound for bound in r.get("accuracy_interval") or ()]
        axis.plot(x, y, "o", markersize=4, color=colour, fillstyle="none" if r["guidance"] else "full")
        axis.plot(across, [y] * len(across), linewidth=0.7, color=colour)
        axis.plot([x] * len(up), up, linewidth=0.7, color=colour)
        names.append((x, y, printable(f"told {r['guidance']}" if r["guidance"] else r["model"]), colour))
        bars.append((min(x, *across), max(x, *across), y) if across else (x, x, y))
        heights += [y, *up]
    axis.set_ylim(accuracy_limits(heights))
    axis.set_xlabel(f"mean tokens (bars: {'best and worst seed' if compared else '95 % intervals'})")
    axis.set_title(printable(f"accuracy (%), {rows[0]['set']}, temperature {rows[0]['temperature']:g}"))
    write_names(axis, names, bars)


def write_names(axis: Axes, names: Sequence[Name], bars: Sequence[Bar]) -> None:
    """Write a name beside each point. A name that would cover a bar or another name moves towards half the height of the
    axis, and a thin line leads back to its point. The limits of the axis must be set before."""
    figure = axis.figure
    assert isinstance(figure, Figure)

    def in_points(x: float, y: float, transform: Transform) -> tuple[float, float]:
        across, up = transform.transform((x, y)) * 72 / figure.dpi
        return across, up

    figure.draw_without_rendering()  # the layout decides how large the axis is
    right, middle = in_points(0.6, 0.5, axis.transAxes)
    places = [in_points(x, y, axis.transData) for x, y, _, _ in names]
    taken = [
        (in_points(x, y, axis.transData)[0] - 3, *in_points(end, y, axis.transData)) for x, end, y in bars
    ]  # from, to, height
    for i in sorted(range(len(names)), key=lambda i: -abs(places[i][1] - middle)):
        (x, y, text, colour), (left, at) = names[i], places[i]
        length, side, step = 0.6 * SIZE * len(text), -1 if left > right else 1, -1 if at > middle else 1
        start, moved = left + 6 * side - length * (side < 0), 0
        while any(start < b and a < start + length and abs(at + moved - c) < 1.1 * SIZE for a, b, c in taken):
            moved += step
        taken.append((start, start + length, at + moved))
        axis.annotate(
            text, (x, y), (6 * side, moved), textcoords="offset points", fontsize=SIZE, color=colour,
            ha="right" if side < 0 else "left", va="center",
            arrowprops={"arrowstyle": "-", "color": "0.7", "linewidth": 0.4, "shrinkA": 0, "shrinkB": 0},
        )  # fmt: skip
