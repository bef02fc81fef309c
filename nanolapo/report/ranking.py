"""A comparison of many methods: one line for each, best AES first."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from nanolapo.report.files import printable
from nanolapo.report.tables import Row
from nanolapo.report.tradeoff import COLOURS, GREY, INK, front_name

PANELS = (("aes", 1, "AES"), ("accuracy", 100, "accuracy (%)"), ("tokens", 1, "mean tokens of an answer"))


def ranking_figure(rows: Sequence[Row], bases: Sequence[str] = ()) -> Figure:
    """AES, accuracy and tokens of each row with its intervals; the worst seed is an open circle. The methods that are not
    told apart from the best have a colour. Behind a name: the share of draws in which it is on the Pareto front, if that is
    one in twenty, and † if the method is in `bases`: it started from other base models than most."""
    figure = Figure(figsize=(10, 1.3 + 0.2 * len(rows)), layout="constrained")
    axes = figure.subplots(1, len(PANELS), sharey=True)
    axes[-1].set_xscale("log")
    axes[-1].xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 6)))
    axes[-1].xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    axes[-1].xaxis.set_minor_locator(NullLocator())
    colours = [INK if r["model"] == "base" else COLOURS[0] if r.get("like_best") else GREY for r in rows]
    base = next(r for r in rows if r["model"] == "base")
    for axis, (key, scale, title) in zip(axes, PANELS, strict=True):
        for height, (r, colour) in enumerate(zip(rows, colours, strict=True)):
            if r[key] is None:
                continue
            low, high = r.get(f"{key}_interval") or (r[key], r[key])
            axis.plot([scale * low, scale * high], [height] * 2, linewidth=2, color=colour, alpha=0.5)
            axis.plot(scale * r["worst"][key], height, "o", markersize=4, color=colour, fillstyle="none")
            axis.plot(scale * r[key], height, "o", markersize=5, color=colour)
        if base[key] is not None:
            axis.axvline(scale * base[key], color=INK, linewidth=0.7, linestyle=":", zorder=0)
        axis.set_title(title, fontsize=11)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
        axis.set_axisbelow(True)
        axis.grid(axis="y", color="0.92", linewidth=0.7)
    axes[0].set_yticks(range(len(rows)), [front_name(r) + " †" * (r["model"] in bases) for r in rows], fontsize=9)
    axes[0].set_ylim(len(rows) - 0.5, -0.5)  # the best on top
    for label, colour in zip(axes[0].get_yticklabels(), colours, strict=True):
        label.set_color(colour)
    title = (
        f"{rows[0]['set']}, temperature {rows[0]['temperature']:g}. Blue: not told apart from the best by AES. Bars: 95 % "
        "over seeds and problems.\nOpen circle: the worst seed by AES. Front: share of draws in which the method is on the "
        "Pareto front. Dotted: the base"
    )
    title += "\n†: started from other base models than most" * bool(bases)
    figure.suptitle(printable(title), fontsize=10, x=0.01, ha="left")
    return figure
