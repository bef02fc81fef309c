"""What a comparison shows: one row per method over all seeds, as Markdown, JSON and a plot of accuracy against tokens."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from nanolapo.report.tables import Row, number, read_metrics, table
from nanolapo.reproduce.over_seeds import mean_rows, none_first

BASE = "base"


def summarize_methods(
    results: Sequence[dict[str, Any]], run_dirs: dict[str, list[list[Path]]], unverified: set[str]
) -> list[Row]:
    """One row per model, set and temperature from the seeds' results.json, best AES first within each.

    run_dirs: method -> for each seed the run directories of its phases. See over_seeds.mean_row for the numbers.
    """
    rows = []
    for row in mean_rows(results):
        model = row["model"]
        rows.append(row | {"unverified": model in unverified} | costs(run_dirs.get(model, [])))
    mark_pareto(rows)
    order = {place: i for i, place in enumerate(dict.fromkeys((r["set"], r["temperature"]) for r in rows))}
    return sorted(rows, key=lambda r: (order[r["set"], r["temperature"]], -none_first(r["aes"])))


def costs(runs_of_seeds: Sequence[Sequence[Path]]) -> Row:
    """Sampled and trained tokens, steps and seconds of training, each a mean over seeds of the sum over phases."""
    seeds = []
    for run_dirs in runs_of_seeds:
        phases = [read_metrics(folder) for folder in run_dirs]
        lines = [line for phase in phases for line in phase]
        seconds = sum(value for line in lines for key, value in line.items() if key.startswith("seconds/"))
        seeds.append({
            "sampled_tokens": sum(phase[-1]["sampled_tokens"] for phase in phases if phase),
            "trained_tokens": sum(line.get("trained_tokens") or 0 for line in lines),
            "steps": len(lines), "seconds": seconds,
        })  # fmt: skip
    return {key: float(np.mean([seed[key] for seed in seeds])) for key in (seeds[0] if seeds else ())}


def mark_pareto(rows: Sequence[Row]) -> None:
    """Set row["pareto"]: no other model of the same set and temperature has more accuracy with no more tokens, or fewer
    tokens with no less accuracy."""
    for row in rows:
        rivals = [r for r in rows if (r["set"], r["temperature"]) == (row["set"], row["temperature"])]
        row["pareto"] = not any(
            r["accuracy"] >= row["accuracy"]
            and r["tokens"] <= row["tokens"]
            and (r["accuracy"], r["tokens"]) != (row["accuracy"], row["tokens"])
            for r in rivals
        )


def comparison_table(rows: Sequence[Row]) -> str:
    """Markdown of one set and temperature; * marks the Pareto front, (u) a method that is partly unverified."""
    levels = list(rows[0].get("by_level", {}))
    shown = [levels[0], levels[len(levels) // 2], levels[-1]] if levels else []
    body = []
    for r in rows:
        low, high = r.get("accuracy_interval", (math.nan, math.nan))
        thousand = [number(r[k] / 1000 if k in r else None, ".0f") for k in ("sampled_tokens", "trained_tokens")]
        body.append([
            r["model"] + " (u)" * r["unverified"] + " \\*" * r["pareto"],
            f"{r['accuracy']:.1%}", f"{number(low, '.1%')} to {number(high, '.1%')}", f"{r['tokens']:.1f}",
            number(r["aes"], "+.2f"), " / ".join(f"{r['by_level'][k]['tokens']:.0f}" for k in shown), *thousand,
            number(r.get("steps"), ".0f"), number(r.get("seconds"), ".0f"), seed_cell(r["best"]), seed_cell(r["worst"]),
        ])  # fmt: skip
    head = ["method", "pass@1", "95% interval", "tokens", "AES", f"tokens at level {' / '.join(shown)}", "sampled (k)",
            "trained (k)", "steps", "seconds", "best seed", "worst seed"]  # fmt: skip
    return table(head, body)


def seed_cell(r: Row) -> str:
    return f"{r['accuracy']:.1%} / {r['tokens']:.1f}"


def comparison_text(rows: Sequence[Row], tokens: int, seeds: Sequence[int]) -> str:
    """results.md: one table per set and temperature, and how to read them."""
    parts = []
    for source, temperature in dict.fromkeys((r["set"], r["temperature"]) for r in rows):
        mine = [r for r in rows if (r["set"], r["temperature"]) == (source, temperature)]
        parts.append(f"### {source}, temperature {temperature:g}, {len(seeds)} seeds, {tokens:,} sampled tokens each\n")
        parts.append(comparison_table(mine) + "\n")
    parts.append("Best AES first. \\* on the Pareto front of accuracy and tokens. (u) something of the method is "
                 "unverified, see its file. Interval: problems only, not training. Seconds: of training, without start-up. "
                 "AES: its mean over the seeds. Best and worst seed by AES, accuracy / tokens.\n")  # fmt: skip
    return "\n".join(parts)


def write_comparison(folder: Path, rows: Sequence[Row], tokens: int, seeds: Sequence[int]) -> None:
    """results.md, results.json and pareto.png in `folder`."""
    (folder / "results.md").write_text(comparison_text(rows, tokens, seeds), encoding="utf-8")
    text = json.dumps({"tokens": tokens, "seeds": list(seeds), "rows": list(rows)}, indent=1)
    (folder / "results.json").write_text(text, encoding="utf-8")
    plot(folder / "pareto.png", rows)


@rc_context({"text.parse_math": False})  # a name with a $ is no formula
def plot(path: Path, rows: Sequence[Row]) -> None:
    """Accuracy against tokens, one panel per set and temperature, the Pareto front as a line, every point named."""
    places = list(dict.fromkeys((r["set"], r["temperature"]) for r in rows))
    figure = Figure(figsize=(8 * len(places), 6.5))
    axes = figure.subplots(1, len(places), squeeze=False)
    for axis, place in zip(axes[0], places, strict=True):
        mine = [r for r in rows if (r["set"], r["temperature"]) == place]
        front = sorted((r["tokens"], r["accuracy"]) for r in mine if r["pareto"])
        axis.step([x for x, _ in front], [y for _, y in front], where="post", color="0.7", zorder=0)
        for r in mine:
            color = "black" if r["model"] == BASE else "tab:red" if r["model"].startswith("lapo") else "tab:blue"
            spread = [[r["tokens"] - min(r[k]["tokens"] for k in ("best", "worst"))],
                      [max(r[k]["tokens"] for k in ("best", "worst")) - r["tokens"]]]  # fmt: skip
            axis.errorbar(r["tokens"], r["accuracy"], xerr=np.clip(spread, 0, None), fmt="o", ms=4, lw=0.6, color=color)
            axis.annotate(
                r["model"], (r["tokens"], r["accuracy"]), xytext=(3, 3), textcoords="offset points", fontsize=6
            )
        axis.set_xlabel("mean tokens (bars: best and worst seed)")
        axis.set_ylabel("pass@1")
        axis.set_title(f"{place[0]}, temperature {place[1]:g}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
