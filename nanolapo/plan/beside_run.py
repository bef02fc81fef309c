"""One line in a run's own output: how far its first steps are from the forecast of their lengths on this machine."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from nanolapo.config import Config, UserError
from nanolapo.plan.cost import forecast
from nanolapo.plan.footprint import logged_steps
from nanolapo.plan.machines import this_machine


def beside_run(config: Config) -> str:
    """Compare the steps in metrics.jsonl, medians without the first, with a forecast for their own lengths. It never raises
    UserError: a run must not stop because it cannot be forecast."""
    steps = logged_steps(config.run_dir)
    if len(steps) < 2:
        return "forecast: none, metrics.jsonl does not hold two steps"
    try:
        found = forecast(config, this_machine(config))
    except UserError as error:
        return f"forecast: none ({error})"
    parts = [
        compared("sampling", [step["seconds/sample"] for step in steps[1:]], found.sample_seconds),
        compared("update", [step["seconds/update"] for step in steps[1:]], found.train_seconds),
    ]
    return f"forecast: of the first {len(steps)} steps, {'; '.join(parts)}; {found.machine.source}"


def compared(phase: str, seconds: Sequence[float], planned: float) -> str:
    """Say what a phase took, and what was planned.

    >>> compared("update", [3.0, 2.0, 10.0], 1.5)
    'update took 3 s, 2.00 times the forecast of 1.5 s'
    """
    took = statistics.median(seconds)
    if not planned:  # no group had a signal, so no row was trained
        return f"{phase} took {took:.2g} s, where the forecast has none"
    return f"{phase} took {took:.2g} s, {took / planned:.2f} times the forecast of {planned:.2g} s"
