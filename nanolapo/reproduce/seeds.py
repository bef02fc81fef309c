"""One table over several seeds: mean, lowest and highest of every number, straight from their results.json files.

python -m nanolapo.reproduce.seeds runs/demo/seed0/evaluate runs/demo/seed1/evaluate ...
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanolapo import cli
from nanolapo.config import UserError
from nanolapo.report.tables import label, number, table


def spread(values: Sequence[float], form: str) -> str:
    """Mean, with the range over seeds behind it.

    >>> spread([0.5, 0.75], ".1%")
    '62.5% (50.0% to 75.0%)'
    """
    return f"{np.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def mean_aes(scores: Sequence[float | None]) -> float | None:
    """The mean, or None where some seed has none (a base model that solved nothing)."""
    known = [score for score in scores if score is not None]
    return float(np.mean(known)) if len(known) == len(scores) else None


def seed_table(results: Sequence[dict[str, Any]], source: str, temperature: float) -> str:
    """Rows by model, as in one evaluation, each cell over all seeds. Raises UserError when the runs differ in rows."""
    columns = [[r for r in one["rows"] if (r["set"], r["temperature"]) == (source, temperature)] for one in results]
    names = [[label(row) for row in rows] for rows in columns]
    if any(other != names[0] for other in names):
        raise UserError(
            f"{source}, temperature {temperature:g}: these results have different models ({names}); compare evaluations of "
            "one config"
        )
    levels = list(columns[0][0].get("by_level", {}))
    shown = [levels[0], levels[len(levels) // 2], levels[-1]] if levels else []
    head = ["model", "pass@1", "tokens", "AES", *(f"level {level}" for level in shown)]
    body = []
    for same in zip(*columns, strict=True):
        cells = [
            label(same[0]),
            spread([row["accuracy"] for row in same], ".1%"),
            spread([row["tokens"] for row in same], ".1f"),
            number(mean_aes([row["aes"] for row in same]), "+.2f"),
        ]
        for level in shown:
            at = [row["by_level"][level] for row in same]
            right, tokens = (np.mean([x[key] for x in at]) for key in ("accuracy", "tokens"))
            cells.append(f"{right:.0%} / {tokens:.0f}")
        body.append(cells)
    return table(head, body)


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
    results = [read_results(Path(folder)) for folder in sys.argv[1:]]
    if not results:
        raise UserError("no folder given: name run directories of evaluate.py, such as runs/demo/seed0/evaluate")
    for source, temperature in dict.fromkeys((r["set"], r["temperature"]) for r in results[0]["rows"]):
        print(f"### {source}, temperature {temperature:g}, {len(results)} seeds: mean (lowest to highest)\n")
        print(seed_table(results, source, temperature), end="\n\n")


if __name__ == "__main__":
    cli.run(main)
