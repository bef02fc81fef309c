"""Prints tables over several seeds: of one evaluation, or of a comparison of methods.

    python -m nanolapo.reproduce.seeds runs/demo/seed0/evaluate runs/demo/seed1/evaluate ...

The command prints mean, lowest and highest of every number, straight from the results.json files of these directories.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanolapo import cli
from nanolapo.config import UserError
from nanolapo.report.tables import Row, label, level_cells, number, table
from nanolapo.reproduce.over_seeds import mean_rows


def spread(values: Sequence[float | None], form: str) -> str:
    """Mean, with the range over seeds behind it; a dash where a seed has no value.

    >>> spread([0.5, 0.75], ".1%")
    '62.5% (50.0% to 75.0%)'
    """
    found = [value for value in values if value is not None]
    return f"{np.mean(found):{form}} ({min(found):{form}} to {max(found):{form}})" if len(found) == len(values) else "-"


def seed_table(results: Sequence[dict[str, Any]], source: str, temperature: float) -> str:
    """One set at one temperature: a row for each model, its cells over all seeds.

    Raises UserError when the seeds have different models.
    """
    seeds = [[r for r in one["rows"] if (r["set"], r["temperature"]) == (source, temperature)] for one in results]
    names = [[label(row) for row in rows] for rows in seeds]
    if any(other != names[0] for other in names):
        raise UserError(
            f"{source}, temperature {temperature:g}: these results have different models ({names}); compare evaluations of "
            "one config"
        )
    means = mean_rows([{"rows": rows} for rows in seeds])
    shown, body = shown_levels(means), []
    for mean, *same in zip(means, *seeds, strict=True):
        levels = [mean["by_level"][level] for level in shown]
        body.append([
            label(mean), spread([row["accuracy"] for row in same], ".1%"), spread([row["tokens"] for row in same], ".1f"),
            number(mean["aes"], "+.2f"), spread([row.get("adaptivity") for row in same], "+.1f"),
            number(mean["need_correlation"], ".2f"), number(mean["length_spread"], ".1f"),
            *(f"{at['accuracy']:.0%} / {at['tokens']:.0f}" for at in levels),
        ])  # fmt: skip
    head = ["model", "pass@1", "tokens", "AES", "adaptivity", "rank correlation", "length spread"]
    return table([*head, *(f"level {level}" for level in shown)], body)


def shown_levels(rows: Sequence[Row]) -> list[str]:
    """The lowest, the middle and the highest level, if there are levels."""
    levels = list(rows[0].get("by_level", {}))
    return [levels[0], levels[len(levels) // 2], levels[-1]] if levels else []


def read_results(folder: Path) -> dict[str, Any]:
    """results.json of an evaluation's run directory. Raises UserError saying what the folder is instead."""
    path = folder / "results.json"
    try:
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        [(row["set"], row["temperature"], row["model"], row["aes"]) for row in results["rows"]]
    except OSError:
        there = "has no results.json" if folder.is_dir() else "is no folder"
        raise UserError(
            f"{folder} {there}: name finished run directories of evaluate.py, such as runs/demo/seed0/evaluate"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not what evaluate.py writes ({error!r}): run evaluate.py again") from None
    return results


def comparison_table(rows: Sequence[Row]) -> str:
    """Markdown of one set and temperature; * marks the Pareto front, (u) a method that is partly unverified."""
    body = []
    for r in rows:
        low, high = r.get("accuracy_interval", (math.nan, math.nan))
        thousand = [number(r[k] / 1000 if k in r else None, ".0f") for k in ("sampled_tokens", "trained_tokens")]
        body.append([
            r["model"] + " (u)" * r["unverified"] + " \\*" * r["pareto"],
            f"{r['accuracy']:.1%}", f"{number(low, '.1%')} to {number(high, '.1%')}", f"{r['tokens']:.1f}",
            number(r["aes"], "+.2f"), number(r.get("adaptivity"), "+.1f"), *thousand,
            number(r.get("steps"), ".0f"), number(r.get("seconds"), ".0f"), seed_cell(r["best"]), seed_cell(r["worst"]),
        ])  # fmt: skip
    head = ["method", "pass@1", "95% interval", "tokens", "AES", "adaptivity", "sampled (k)", "trained (k)",
            "steps", "seconds", "best seed", "worst seed"]  # fmt: skip
    return table(head, body)


def seed_cell(r: Row) -> str:
    return f"{r['accuracy']:.1%} / {r['tokens']:.1f}"


def comparison_text(rows: Sequence[Row], tokens: int, seeds: Sequence[int]) -> str:
    """results.md: one table per set and temperature, and how to read them."""
    parts = []
    for source, temperature in dict.fromkeys((r["set"], r["temperature"]) for r in rows):
        mine = [r for r in rows if (r["set"], r["temperature"]) == (source, temperature)]
        count = f"{len(seeds)} seed{'s' * (len(seeds) > 1)}"
        parts.append(f"### {source}, temperature {temperature:g}, {count}, {tokens:,} sampled tokens each\n")
        parts.append(comparison_table(mine) + "\n")
        if mine[0].get("by_level"):
            parts += ["Accuracy % / tokens by level:\n", table(*level_cells(mine)) + "\n"]
    parts.append("Best AES first. \\* on the Pareto front of accuracy and tokens. (u) something of the method is "
                 "unverified, see its file. Interval: problems only, not training. Seconds: of training, without start-up. "
                 "AES: its mean over the seeds. Best and worst seed by AES, accuracy / tokens. Adaptivity: mean tokens "
                 "above the lowest level minus those at the lowest level.\n")  # fmt: skip
    return "\n".join(parts)


def write_comparison(folder: Path, rows: Sequence[Row], tokens: int, seeds: Sequence[int]) -> list[Path]:
    """results.md and results.json in `folder`."""
    paths = [folder / "results.md", folder / "results.json"]
    paths[0].write_text(comparison_text(rows, tokens, seeds), encoding="utf-8")
    text = json.dumps({"tokens": tokens, "seeds": list(seeds), "rows": list(rows)}, indent=1)
    paths[1].write_text(text, encoding="utf-8")
    return paths


def main() -> None:
    results = [read_results(Path(folder)) for folder in sys.argv[1:]]
    if not results:
        raise UserError("no folder given: name run directories of evaluate.py, such as runs/demo/seed0/evaluate")
    for source, temperature in dict.fromkeys((r["set"], r["temperature"]) for r in results[0]["rows"]):
        print(f"### {source}, temperature {temperature:g}, {len(results)} seeds: mean (lowest to highest)\n")
        print(seed_table(results, source, temperature), end="\n\n")


if __name__ == "__main__":
    cli.run(main)
