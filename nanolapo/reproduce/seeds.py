"""Prints tables of one evaluation over several seeds.

    python -m nanolapo.reproduce.seeds runs/demo/seed0/evaluate runs/demo/seed1/evaluate ...

The command prints mean, lowest and highest of every number, straight from the results.json files of these directories.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanolapo import cli
from nanolapo.config import UserError
from nanolapo.report.tables import Row, label, number, table
from nanolapo.reproduce.over_seeds import mean_rows


def mean_and_range(values: Sequence[float | None], form: str) -> str:
    """Mean, with the range over seeds behind it; a dash where a seed has no value.

    >>> mean_and_range([0.5, 0.75], ".1%")
    '62.5% (50.0% to 75.0%)'
    """
    found = [value for value in values if value is not None]
    return f"{np.mean(found):{form}} ({min(found):{form}} to {max(found):{form}})" if len(found) == len(values) else "-"


def seed_table(results: Sequence[dict[str, Any]], source: str, temperature: float) -> str:
    """One set at one temperature: a row for each model, its cells over all seeds.

    Raises UserError when the seeds have different models, samples or levels.
    """
    seeds = [[r for r in one["rows"] if (r["set"], r["temperature"]) == (source, temperature)] for one in results]
    names = [[label(row) for row in rows] for rows in seeds]
    if any(other != names[0] for other in names):
        raise UserError(
            f"{source}, temperature {temperature:g}: these results have different models ({names}); compare evaluations of "
            "one config"
        )
    for of_model in zip(*seeds, strict=True):
        if len(kinds := dict.fromkeys(map(asked, of_model))) > 1:
            raise UserError(
                f"{source}, temperature {temperature:g}: of {label(of_model[0])} these results have "
                f"{' against '.join(kinds)}; compare evaluations of one config"
            )
    means = mean_rows([{"rows": rows} for rows in seeds])
    shown, body = shown_levels(means), []
    for mean, *same in zip(means, *seeds, strict=True):
        levels = [mean["by_level"][level] for level in shown]
        body.append([
            label(mean), mean_and_range([row["accuracy"] for row in same], ".1%"),
            mean_and_range([row["tokens"] for row in same], ".1f"), number(mean["aes"], "+.2f"),
            mean_and_range([row.get("adaptivity") for row in same], "+.1f"), number(mean["need_correlation"], ".2f"),
            number(mean["length_spread"], ".1f"),
            *(f"{at['accuracy']:.0%} / {at['tokens']:.0f}" for at in levels),
        ])  # fmt: skip
    head = ["model", "pass@1", "tokens", "AES", "adaptivity", "rank correlation", "length spread"]
    return table([*head, *(f"level {level}" for level in shown)], body)


def asked(row: Row) -> str:
    """What a row's numbers are of.

    >>> asked({"samples": 4, "pass_at_k": {"1": 0.5, "2": 0.75}, "by_level": {"3": {}}})
    '4 samples, pass@1,2, levels 3'
    """
    powers, levels = (",".join(row.get(key) or "-") for key in ("pass_at_k", "by_level"))
    return f"{row.get('samples', '-')} samples, pass@{powers}, levels {levels}"


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="run directories of evaluate.py")
    results = [read_results(folder) for folder in parser.parse_args().folders]
    for source, temperature in dict.fromkeys((r["set"], r["temperature"]) for r in results[0]["rows"]):
        print(f"### {source}, temperature {temperature:g}, {len(results)} seeds: mean (lowest to highest)\n")
        print(seed_table(results, source, temperature), end="\n\n")


if __name__ == "__main__":
    cli.run(main)
