"""All figures: those of report.html as inline SVG, and the paper's figures and a comparison's Pareto front as PNG.

One SVG serves light and dark pages: ink and grid are drawn in two stand-in colours, which are then replaced by the page's
own. Text stays text, in the page's font, and matplotlib escapes it. The same numbers make the same bytes.

Only this file, tradeoff.py and ranking.py import matplotlib. Commands that do not always draw import it where they draw.
"""

from __future__ import annotations

import io
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cycler import cycler
from matplotlib import rc_context
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from nanolapo.evaluation.scores import KEYWORDS, rank_correlation
from nanolapo.report.files import printable, read_metrics
from nanolapo.report.ranking import ranking_figure
from nanolapo.report.runs import Place, Run, Visit, mean_by_step
from nanolapo.report.tables import Row, accuracy_limits, difficulty_axis, number, tokens_at, training_dynamics
from nanolapo.report.tradeoff import COLOURS, evaluation_figure, methods_figure, palette

INK, GRID = "#0a0b0c", "#0d0e0f"  # become currentColor and var(--line)
NOT_IN_NAMES = r"[^\w.=+-]"  # a set may be called org/name
FEW = 12  # methods of a comparison, with the base, whose names all fit beside their points
# Few to many, all of medium lightness as well.
LEVELS = LinearSegmentedColormap.from_list("levels", ["#2f9e63", "#1f9fa8", "#3b82d6", "#b65fc9", "#d4504f"])
Panel = tuple[str, tuple[str, ...], bool]  # title, metrics (a second one is drawn dashed), logarithmic
SHARES = ("truncated", "map/solved_fraction")  # a fitted range would blow up tiny differences
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


# ------------------------------------------------------------------------------------------ report.html


@rc_context(STYLE)
def training(runs: Sequence[Run], panels: Sequence[Panel]) -> list[str]:
    """Metrics over steps, all runs in one axes, at most one figure; panels that no run has a number for are left out."""
    shown = [p for p in panels if any(math.isfinite(v) for run in runs for v in values(run.metrics, p[1][0]))]
    if not shown:
        return []
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


@rc_context(STYLE)
def lengths(name: str, visited: Sequence[Visit], targets: dict[Place, list[float | None]]) -> str:
    """One run's M(q): on the left by step and level at the logged visits, on the right the final map by level."""
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


@rc_context(STYLE)
def evaluation(rows: Sequence[Row]) -> str:
    """One set at one temperature, as write_figures draws it, with the rows that were told a length."""
    return svg(evaluation_figure(rows, [r for r in rows if not r["guidance"]]))


# ------------------------------------------------------------------------------------------------- PNG


@rc_context({"text.parse_math": False})  # a name with a $ is no formula
def write_figures(results: dict[str, Any], run_dirs: dict[str, Path], out: Path) -> list[Path]:
    """The paper's figures 1, 3, 4 and 5 as far as the results have them, and the curves of the training runs.

    The first row's model is the base. A figure that compares models needs two that are not exports of one run.
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
        figures["tradeoff.png"] = evaluation_figure(overall, final)
        if len({name for name, _ in places}) > 1:
            figures["length_by_level.png"] = difficulty_figure(plain, [r["model"] for r in final], places)
        if first.get("keywords"):
            figures["keywords.png"] = keyword_figure(final)
    for name, figure in figures.items():
        figure.savefig(out / name, dpi=120)
    return [out / name for name in figures]


@rc_context({"text.parse_math": False})
def write_comparison_figures(
    folder: Path, rows: Sequence[Row], fronts: Sequence[Row], bases: Sequence[str] = ()
) -> list[Path]:
    """A comparison of methods (reproduce/comparison.py): a picture for each set and temperature. It has a point for each
    method, or a line where they are many. bases: the methods that started from other base models than most."""
    paths = []
    for front in fronts:
        name, temperature = front["set"], front["temperature"]
        mine = [r for r in rows if (r["set"], r["temperature"]) == (name, temperature)]
        paths.append(folder / f"methods-{re.sub(NOT_IN_NAMES, '_', name)}-T{temperature:g}.png")
        figure = methods_figure(mine, front) if len(mine) <= FEW else ranking_figure(mine, bases)
        figure.savefig(paths[-1], dpi=160)
    return paths


def curves_figure(curves: dict[str, list[tuple[float, float, float]]], where: str) -> Figure:
    """Fig. 5: tokens and accuracy over steps. A curve of one point is drawn as a level line (the base model)."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
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


def difficulty_figure(rows: Sequence[Row], models: Sequence[str], places: Sequence[tuple[str, str]]) -> Figure:
    """Fig. 3: mean tokens over several sets from easy to hard, with the rank correlation of the two."""
    figure = Figure(figsize=(max(5.5, 0.7 * len(places)), 3.6), layout="constrained")
    axis = figure.subplots()
    for model in models:
        tokens = [tokens_at(rows, model, place) for place in places]
        rho = number(rank_correlation(range(len(places)), tokens), ".2f")
        axis.plot(range(len(places)), tokens, marker="o", label=f"{model} (rank correlation {rho})")
    ticks = [f"{name} {level}".strip() for name, level in places]
    axis.set_xticks(range(len(places)), ticks, rotation=30, fontsize=8)
    axis.set_xlabel("from easy to hard")
    axis.set_title("mean tokens by difficulty")
    axis.legend(fontsize=7)
    return figure


def keyword_figure(rows: Sequence[Row]) -> Figure:
    """Fig. 4: words of each group per answer."""
    figure, width = Figure(figsize=(7, 3.6), layout="constrained"), 0.8 / len(rows)
    axis = figure.subplots()
    for i, r in enumerate(rows):
        axis.bar(
            [g + i * width for g in range(len(KEYWORDS))], [r["keywords"][g] for g in KEYWORDS], width, label=r["model"]
        )
    axis.set_xticks([g + 0.4 - width / 2 for g in range(len(KEYWORDS))], list(KEYWORDS))
    axis.set_title("words per answer")
    axis.legend(fontsize=8)
    return figure
