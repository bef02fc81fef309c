"""Accuracy against tokens: of an evaluation, with the tokens by level beside it, and of a comparison of methods."""

from __future__ import annotations

from collections.abc import Sequence
from colorsys import hsv_to_rgb
from math import log
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from matplotlib.transforms import Transform

from nanolapo.report.files import printable
from nanolapo.report.tables import Row, accuracy_limits, number

# Medium lightness: legible on white and on near-black.
COLOURS = ("#3b82d6", "#e07b2e", "#2f9e63", "#b65fc9", "#d4504f", "#9a8f2a", "#1f9fa8", "#a3704e", "#7c7fd8", "#d166a0")
GREY, INK, BAND, FRONT = "#7b8088", "#222222", "#dbe7f6", "#9dbfe8"
SIZE = 8  # of the names, in points
SHOWN = 0.05  # share of the draws from which on a method counts as on the front
NEAR = (0.025, 0.006)  # points closer than this, as a share of the tokens and in accuracy, lie on each other
Bar = tuple[float, float, float]  # from x to x, at height y


class Name(NamedTuple):
    """What is written beside a point of the axis."""

    x: float
    y: float
    text: str
    colour: str
    size: float = SIZE  # points


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
            ends.append(Name(len(levels) - 1, tokens[-1], printable(name), colour))
        axis.set_xlim(-0.1 * len(levels), 1.9 * (len(levels) - 1))  # room for the names
        axis.set_title(printable(f"mean tokens by level, {leveled[0]['set']} (in brackets: adaptivity)"))
        axis.set_xlabel("level")
        write_names(axis, ends, [])
    return figure


def tradeoff(axis: Axes, rows: Sequence[Row], colours: dict[str, str]) -> None:
    """Fig. 1: accuracy against tokens, every point named, with 95 % intervals."""
    names: list[Name] = []
    bars: list[Bar] = []
    heights: list[float] = []
    for r in rows:
        across, up = cross(axis, r, colours[r["model"]])
        x, y = r["tokens"], 100 * r["accuracy"]
        names.append(
            Name(x, y, printable(f"told {r['guidance']}" if r["guidance"] else r["model"]), colours[r["model"]])
        )
        bars.append((min(across), max(across), y))
        heights += up
    axis.set_ylim(accuracy_limits(heights))
    axis.set_xlabel("mean tokens (bars: 95 % intervals)")
    axis.set_title(printable(f"accuracy (%), {rows[0]['set']}, temperature {rows[0]['temperature']:g}"))
    write_names(axis, names, bars)


def cross(axis: Axes, r: Row, colour: str, size: float = 4, width: float = 0.7) -> tuple[list[float], list[float]]:
    """Draw a point with its two intervals. Returns the ends of both; of a missing one the place of the point."""
    x, y = r["tokens"], 100 * r["accuracy"]
    across = list(r.get("tokens_interval") or [x])
    up = [100 * bound for bound in r.get("accuracy_interval") or [y / 100]]
    axis.plot(x, y, "o", markersize=size, color=colour, fillstyle="none" if r["guidance"] else "full")
    axis.plot(across, [y] * len(across), linewidth=width, color=colour)
    axis.plot([x] * len(up), up, linewidth=width, color=colour)
    return across, up


def methods_figure(rows: Sequence[Row], front: Row) -> Figure:
    """The picture of a comparison of few methods, to be read from the back of a room.

    front: see reproduce/differences.front_band. Methods that are on the Pareto front in one of twenty draws have a colour,
    and their share of the draws beside the name. Methods whose points lie on each other have one colour, and their names
    one below the other.
    """
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    axis = figure.subplots()
    low, high = ([100 * bound for bound in front[key]] for key in ("low", "high"))
    axis.fill_between(front["tokens"], low, high, color=BAND, linewidth=0, zorder=0)
    best = sorted((r["tokens"], 100 * r["accuracy"]) for r in rows if r["pareto"])
    across, up = zip(*best, (front["tokens"][-1], best[-1][1]), strict=True)
    axis.step(across, up, where="post", color=FRONT, linewidth=2, zorder=0)
    places = same_places(rows)
    shown = [place[0]["model"] for place in places if place[0]["front_share"] >= SHOWN]
    colours = dict(zip(shown, palette(len(shown)), strict=True)) | {"base": INK}
    names: list[Name] = []
    bars: list[Bar] = []
    heights: list[float] = []
    for place in reversed(places):  # the front on top
        colour = colours.get(place[0]["model"], GREY)
        for r in place:
            width, height = cross(axis, r, colour, size=8, width=2.2)
            bars.append((min(width), max(width), 100 * r["accuracy"]))
            heights += height
        first = place[0]["tokens"], 100 * place[0]["accuracy"]
        names.append(Name(*first, "\n".join(map(front_name, place)), colour, 11))
    axis.set_ylim(accuracy_limits(heights))
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 7, 8)))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(labelsize=12)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel("mean tokens of an answer (crosses: 95 % over seeds and problems)", fontsize=12)
    title = (
        f"Accuracy (%), {front['set']}, temperature {front['temperature']:g}. Line: the Pareto front of the means. "
        "Band: 95 %\nof the fronts of draws of seeds and problems. Colours: methods on the front, with their share of draws"
    )
    axis.set_title(printable(title), fontsize=12, loc="left")
    write_names(axis, names, bars)
    return figure


def front_name(r: Row) -> str:
    """The method, with the share of draws in which it is on the Pareto front, if it counts as on it."""
    return printable(r["model"] + f" (front {r['front_share']:.0%})" * (r["front_share"] >= SHOWN))


def same_places(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows in the order of their shares of the front; those whose points lie on each other in one list. The base stays
    alone.

    >>> points = [("a", 60, 0), ("b", 61, 1), ("c", 70, 0)]
    >>> rows = [{"model": m, "tokens": t, "accuracy": 1.0, "front_share": share} for m, t, share in points]
    >>> [[r["model"] for r in place] for place in same_places(rows)]
    [['b', 'a'], ['c']]
    """
    places: list[list[Row]] = []
    for r in sorted(rows, key=lambda r: -r["front_share"]):
        for place in places:
            near = abs(log(r["tokens"] / place[0]["tokens"])), abs(r["accuracy"] - place[0]["accuracy"])
            if near[0] < NEAR[0] and near[1] < NEAR[1] and "base" not in (r["model"], place[0]["model"]):
                place.append(r)
                break
        else:
            places.append([r])
    return places


def write_names(axis: Axes, names: Sequence[Name], bars: Sequence[Bar]) -> None:
    """Write a name, of one or several lines, beside each point. A name that would cover a bar or another name moves to the
    nearest free height, and a thin line leads back to its point. The limits of the axis must be set before."""
    figure = axis.figure
    assert isinstance(figure, Figure)

    def in_points(x: float, y: float, transform: Transform) -> tuple[float, float]:
        across, up = transform.transform((x, y)) * 72 / figure.dpi
        return across, up

    figure.draw_without_rendering()  # the layout decides how large the axis is
    right, middle = in_points(0.6, 0.5, axis.transAxes)
    bottom, top = (in_points(0, edge, axis.transAxes)[1] for edge in (0.0, 1.0))
    places = [in_points(name.x, name.y, axis.transData) for name in names]
    taken: list[tuple[float, float, float, float]] = []  # from, to, height of the middle, half of the height
    for x, end, y in bars:
        (left, at), (to, _) = in_points(x, y, axis.transData), in_points(end, y, axis.transData)
        taken.append((left - 3, to, at, 0.55 * SIZE))
    for i in sorted(range(len(names)), key=lambda i: -abs(places[i][1] - middle)):
        (x, y, text, colour, size), (left, at) = names[i], places[i]
        lines = text.split("\n")
        length, half = 0.6 * size * max(map(len, lines)), 0.6 * size * len(lines)
        side, step = -1 if left > right else 1, -1 if at > middle else 1
        start = left + 6 * side - length * (side < 0)
        inside = (m for m in range(-int(top - bottom), int(top - bottom)) if bottom + half <= at + m <= top - half)
        beside = [0] if len(lines) == 1 else []  # one line may stand half outside
        nearest = sorted((*beside, *inside), key=lambda m: (abs(m), m * step < 0))
        in_the_way = [(c, half + d) for a, b, c, d in taken if start < b and a < start + length]
        moved = next((m for m in nearest if all(abs(at + m - c) >= room for c, room in in_the_way)), 0)
        taken.append((start, start + length, at + moved, half))
        axis.annotate(
            text, (x, y), (6 * side, moved), textcoords="offset points", fontsize=size, color=colour,
            ha="right" if side < 0 else "left", va="center",
            arrowprops={"arrowstyle": "-", "color": "0.7", "linewidth": 0.4, "shrinkA": 0, "shrinkB": 0},
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.5},  # over lines that cross it
        )  # fmt: skip
