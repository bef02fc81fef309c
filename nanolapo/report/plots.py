"""The plots of report.html as inline SVG: training curves, M(q), accuracy against tokens.

One picture serves light and dark pages: ink and grid are drawn in two stand-in colours, for which the page's own are put.
Text stays text, in the page's font; matplotlib escapes it. The same numbers make the same bytes.
"""

from __future__ import annotations

import io
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from colorsys import hsv_to_rgb
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from nanolapo.report.files import printable
from nanolapo.report.runs import Place, Run, Visit
from nanolapo.report.tables import Row, accuracy_limits

INK, GRID = "#0a0b0c", "#0d0e0f"  # become currentColor and var(--line)
# Medium lightness: legible on white and on near-black.
COLOURS = ("#3b82d6", "#e07b2e", "#2f9e63", "#b65fc9", "#d4504f", "#9a8f2a", "#1f9fa8", "#a3704e", "#7c7fd8", "#d166a0")
# Few to many, all of medium lightness as well.
LEVELS = LinearSegmentedColormap.from_list("levels", ["#2f9e63", "#1f9fa8", "#3b82d6", "#b65fc9", "#d4504f"])
Panel = tuple[str, tuple[str, ...], bool]  # title, metrics (a second one is drawn dashed), logarithmic
PANELS: tuple[Panel, ...] = (
    ("reward", ("reward",), False),
    ("accuracy", ("accuracy",), False),
    ("length, tokens (dashed: P90)", ("length", "length_p90"), False),
    ("entropy per token", ("entropy",), False),
    ("mismatch", ("mismatch",), True),
    ("share cut at the limit", ("truncated",), False),
)
MAP_PANELS: tuple[Panel, ...] = (
    ("mean M(q) of visited problems (tokens)", ("map/target_mean",), False),
    ("share of them solved", ("map/solved_fraction",), False),
    ("mean change of M(q) at a visit (tokens)", ("map/moved_mean",), False),
)
SHARES = ("truncated", "map/solved_fraction")  # a range of its own would blow up a tiny difference
STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "nanolapo", "text.parse_math": False, "font.size": 9, "legend.fontsize": 9,
    "axes.titlesize": 9.5, "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "axes.edgecolor": GRID, "grid.color": GRID, "grid.linewidth": 0.7,
    "xtick.major.size": 0, "ytick.major.size": 0, "ytick.minor.size": 0, "legend.frameon": False, "lines.linewidth": 1.5,
    "lines.markersize": 4, "axes.prop_cycle": cycler(color=COLOURS), "boxplot.flierprops.markersize": 2.5,
    **dict.fromkeys(["xtick.color", "ytick.color", "text.color", "axes.labelcolor", "axes.titlecolor"], INK),
    **{f"boxplot.{part}props.color": INK for part in ("box", "whisker", "cap", "median")},
    "boxplot.flierprops.markeredgecolor": INK,
}  # fmt: skip


def palette(count: int) -> list[str]:
    """As many colours: the ten above, or hues in even steps where ten are too few.

    >>> palette(2), len(set(palette(15)))
    (['#3b82d6', '#e07b2e'], 15)
    """
    hues = [to_hex(hsv_to_rgb(i / count, 0.68, 0.8)) for i in range(count)]
    return list(COLOURS[:count]) if count <= len(COLOURS) else hues


def svg(figure: Figure) -> str:
    """The figure as an <svg> element for a page with a --line colour."""
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
    )
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor").replace(GRID, "var(--line)")


def values(metrics: Iterable[dict[str, Any]], name: str) -> list[float]:
    """One metric over the steps; nan (a gap) where a step has none."""
    found = [line.get(name) for line in metrics]
    return [float(v) if isinstance(v, (int, float)) else math.nan for v in found]


def legend(figure: Figure, lines: dict[str, Any]) -> None:
    """One legend for all panels, above them."""
    names = [printable(name) for name in lines]
    columns = max(1, 150 // (8 + max(map(len, names))))
    figure.legend(list(lines.values()), names, loc="outside upper left", ncols=min(len(names), columns))


def training(runs: Sequence[Run], panels: Sequence[Panel]) -> list[str]:
    """Metrics over steps, all runs in one axes, at most one figure; panels that no run has a number for are left out."""
    shown = [p for p in panels if any(math.isfinite(v) for run in runs for v in values(run.metrics, p[1][0]))]
    if not shown:
        return []
    with matplotlib.rc_context(STYLE):
        rows = math.ceil(len(shown) / 3)
        figure = Figure(figsize=(11, 2.5 * rows + 0.4), layout="constrained")
        lines: dict[str, Any] = {}
        colours = palette(len(runs))
        for place, (title, names, log) in enumerate(shown, start=1):
            axis = figure.add_subplot(rows, 3, place)
            axis.set_title(title)
            axis.set_xlabel("step")
            for i, run in enumerate(runs):
                if not any(math.isfinite(v) for v in values(run.metrics, names[0])):
                    continue
                colour, steps = colours[i], values(run.metrics, "step")
                for name, style in reversed([*zip(names, ("-", "--"), strict=False)]):
                    points = [p for p in zip(steps, values(run.metrics, name), strict=True) if math.isfinite(p[1])]
                    [lines[run.name]] = axis.plot(*zip(*points or [(math.nan,) * 2], strict=True), style, color=colour)
            if log and any(v > 0 for run in runs for v in values(run.metrics, names[0])):
                axis.set_yscale("log")
                for labels in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
                    labels(LogFormatter(minor_thresholds=(1, 0.5)))  # 1e-07: the default writes TeX
            if names[0] in SHARES:
                axis.set_ylim(-0.03, max(0.1, axis.get_ylim()[1]))
        legend(figure, lines)
        return [svg(figure)]


def lengths(name: str, visited: Sequence[Visit], targets: dict[Place, list[float | None]]) -> str:
    """One run's M(q): on the left by step and level at the logged visits, on the right the final map by level."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 3.1), layout="constrained")
        left, right = figure.subplots(1, 2)
        told = any(v.budget is not None for v in visited)
        left.set_title(f"{name}: M(q) {'in the prompt (dotted: measured)' if told else 'measured'}, by level")
        left.set_xlabel("step")
        by_level: dict[Any, list[Visit]] = defaultdict(list)
        for visit in visited:
            by_level[visit.level].append(visit)
        order = sorted(by_level, key=lambda level: (level is None, level))
        lines: dict[str, Any] = {}
        for i, level in enumerate(order):
            colour = LEVELS(i / max(1, len(order) - 1))
            if told:
                left.plot(*mean_by_step((v.step, v.measured) for v in by_level[level]), ":", color=colour, linewidth=1)
            points = mean_by_step((v.step, v.budget if told else v.measured) for v in by_level[level])
            [line] = left.plot(*points, "o-", color=colour, markersize=2.5, linewidth=1)
            lines["no level" if level is None else f"level {level}"] = line
        if lines:
            left.legend(list(lines.values()), list(lines), loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
        right.set_title(f"{name}: M(q) now, all problems (tokens)")
        solved = {
            head.removeprefix("level "): [t for t in found if t is not None] for (_, _, head), found in targets.items()
        }
        boxes = {head: found for head, found in solved.items() if found}
        if boxes:
            right.boxplot(list(boxes.values()), tick_labels=list(boxes), widths=0.5)
            right.set_xlabel("level")
        return svg(figure)


def mean_by_step(points: Iterable[tuple[int, float | None]]) -> tuple[list[int], list[float]]:
    """Steps that have a value, and the mean of each.

    >>> mean_by_step([(3, 10.0), (1, 8.0), (3, 20.0), (2, None)])
    ([1, 3], [8.0, 15.0])
    """
    found: dict[int, list[float]] = defaultdict(list)
    for step, value in points:
        if value is not None:
            found[step].append(value)
    return sorted(found), [float(np.mean(found[step])) for step in sorted(found)]


def evaluation(rows: Sequence[Row]) -> str:
    """One set at one temperature: accuracy against tokens, and length by level where there are levels."""
    plain = [r for r in rows if not r["guidance"]]
    colours = dict(zip([r["model"] for r in plain], palette(len(plain)), strict=True))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 3.3), layout="constrained")
        left = figure.add_subplot(1, 2, 1)
        lines: dict[str, Any] = {}
        for r in rows:
            colour, fill = colours.get(r["model"], INK), "none" if r["guidance"] else "full"
            place = r["tokens"], 100 * r["accuracy"]
            [line] = left.plot(*place, "o", color=colour, fillstyle=fill)
            if r.get("tokens_interval") and r.get("accuracy_interval"):
                left.plot(r["tokens_interval"], [place[1]] * 2, color=colour, linewidth=1)
                left.plot([place[0]] * 2, [100 * bound for bound in r["accuracy_interval"]], color=colour, linewidth=1)
            if r["guidance"]:
                left.annotate(
                    printable(f"told {r['guidance']}"), place, (6, -11), textcoords="offset points", fontsize=8
                )
            else:
                lines[r["model"]] = line
        left.set_title("accuracy (%) against tokens, 95 % intervals")
        left.set_xlabel("tokens per answer")
        ends = [bound for r in rows for bound in (r["accuracy"], *(r.get("accuracy_interval") or ()))]
        left.set_ylim(accuracy_limits([100 * bound for bound in ends]))
        if plain and plain[0].get("by_level"):
            right = figure.add_subplot(1, 2, 2)
            for r in plain:
                tokens = [at_level["tokens"] for at_level in r["by_level"].values()]
                right.plot(list(r["by_level"]), tokens, "o-", color=colours[r["model"]])
            right.set_title("mean length by level (tokens)")
            right.set_xlabel("level")
        if lines:
            legend(figure, lines)
        return svg(figure)
