"""Averages over seeds: rows like those of an evaluation's results.json."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from nanolapo.report.tables import Row


def mean_rows(results: Sequence[dict[str, Any]]) -> list[Row]:
    """One row per set, temperature, model and guidance that all seeds' results.json have, in the order of the first."""
    found = []
    for first in results[0]["rows"]:
        place = place_of(first)
        same = [row for one in results for row in one["rows"] if place_of(row) == place]
        if len(same) == len(results):
            found.append(mean_row(same))
    return found


def place_of(row: Row) -> tuple[str, float, str, str]:
    return row["set"], row["temperature"], row["model"], row["guidance"]


def mean_row(same: Sequence[Row]) -> Row:
    """The seeds' rows of one model as one row, with `worst`, the seed of the lowest AES.

    The 95 % intervals come from drawing problems only. What another training would change is not in them.
    """
    first = same[0]
    found: Row = {key: first[key] for key in ("model", "set", "temperature", "guidance", "run", "step") if key in first}
    for key in ("accuracy", "tokens", "truncated", "aes", "tokens_correct", "adaptivity", "need_correlation",
                "length_spread"):  # fmt: skip
        values = [row.get(key) for row in same]
        found[key] = None if None in values else float(np.mean(values))  # type: ignore[arg-type]
    for key in ("problems", "samples"):
        if key in first:
            found[key] = sum(row[key] for row in same)
    for key in ("accuracy", "tokens", "adaptivity"):
        bounds = [row.get(f"{key}_interval") for row in same]
        if all(bounds):
            found[f"{key}_interval"] = combined_interval([(row[key], *row[f"{key}_interval"]) for row in same])
    for key in ("by_level", "keywords", "pass_at_k"):
        if first.get(key):
            found[key] = mean_of_nested([row[key] for row in same])
    worst = min(same, key=lambda row: none_first(row.get("aes")))
    found["worst"] = {key: worst[key] for key in ("accuracy", "tokens", "aes")}
    return found


def none_first(value: float | None) -> float:
    return -math.inf if value is None else value


def mean_of_nested(values: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean of equal mappings, leaf by leaf.

    >>> mean_of_nested([{"1": {"tokens": 2}}, {"1": {"tokens": 4}}])
    {'1': {'tokens': 3.0}}
    """
    found: dict[str, Any] = {}
    for key, value in values[0].items():
        others = [one[key] for one in values]
        found[key] = mean_of_nested(others) if isinstance(value, dict) else float(np.mean(others))
    return found


def combined_interval(means_and_bounds: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """An interval of the mean over seeds, from (mean, low, high) of each seed. It averages the half-widths.

    The seeds answer the same problems, and a problem that is long for one is long for all, so their errors do not average
    out as independent ones would. Averaged half-widths are never too narrow. Where the seeds err on different problems they
    are too wide, by up to the root of the number of seeds.

    >>> [round(x, 3) for x in combined_interval([(0.5, 0.4, 0.6), (0.7, 0.5, 0.9)])]
    [0.45, 0.75]
    """
    mean = float(np.mean([m for m, _, _ in means_and_bounds]))
    below = float(np.mean([m - low for m, low, _ in means_and_bounds]))
    above = float(np.mean([high - m for m, _, high in means_and_bounds]))
    return mean - below, mean + above
