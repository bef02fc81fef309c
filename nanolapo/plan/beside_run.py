"""One line on how far the steps of a run are from the forecast of their lengths."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from nanolapo.config import Config
from nanolapo.plan.cost import Forecast
from nanolapo.report.files import read_metrics


def beside_run(config: Config, planned: Forecast) -> list[str]:
    """Compare the steps in metrics.jsonl, medians without the first, with their forecast. Empty before the second step."""
    steps = read_metrics(config.run_dir)[1:]
    if not steps:
        return []
    parts = [
        compared("sampling", [step["seconds/sample"] for step in steps], planned.sample_seconds),
        compared("update", [step["seconds/update"] for step in steps], planned.train_seconds),
    ]
    return [f"steps 2 to {len(steps) + 1} of {config.run_dir}: {', '.join(parts)}"]


def compared(phase: str, seconds: Sequence[float], planned: float) -> str:
    """Say what a phase took, and what was planned.

    >>> compared("update", [3.0, 2.0, 10.0], 1.5)
    'update took 3 s, 2.00 times the forecast of 1.5 s'
    """
    took = statistics.median(seconds)
    if not planned:  # no group had a signal, so no row was trained
        return f"{phase} took {took:.2g} s, where the forecast has none"
    return f"{phase} took {took:.2g} s, {took / planned:.2f} times the forecast of {planned:.2g} s"
