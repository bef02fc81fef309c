"""Measures the first model before step 0, for methods that compare with it: mean length and accuracy on each problem."""

from __future__ import annotations

from typing import Any

import numpy as np

from nanolapo.config import Config
from nanolapo.data.problems import Problem
from nanolapo.methods.base import Method, MonitorPlan
from nanolapo.rollouts import Measured, Rollouts


class Reference(Method):
    """Samples every problem before step 0. A subclass has the option reference_samples; 0: it samples nothing."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.problems: list[Problem] = []
        self.reference: dict[str, tuple[float, float]] = {}  # problem id -> mean length, accuracy

    def start(self, problems: list[Problem]) -> None:
        self.problems = problems

    def monitor(self, step: int) -> MonitorPlan | None:
        r, samples = self.config.rollout, self.options.reference_samples
        if step > 0 or not samples:
            return None
        return MonitorPlan(tuple(range(len(self.problems))), samples, r.temperature, r.max_new_tokens)

    def on_monitor(self, found: Measured | Rollouts) -> dict[str, float]:
        self.remember(found)
        length, accuracy = np.mean(list(self.reference.values()), axis=0).tolist()
        for problem in self.problems:  # the groups of some may have been dropped, see Rollouts.usable
            self.reference.setdefault(problem.id, (length, accuracy))
        return {"reference/length": length, "reference/accuracy": accuracy}

    def remember(self, found: Measured | Rollouts) -> None:
        """Take these groups as reference for the problems that have none."""
        for problem, measured in zip(found.problems, self.measure(found), strict=True):
            self.reference.setdefault(problem.id, measured)

    def measure(self, found: Measured | Rollouts) -> list[tuple[float, float]]:
        """Mean length and accuracy of every group."""
        lengths, correct = found.by_group(found.lengths_B), found.by_group(found.correct_B)
        return [(float(n.mean()), float(c.mean())) for n, c in zip(lengths, correct, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        return {"reference": {problem_id: list(entry) for problem_id, entry in self.reference.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reference = {problem_id: (float(n), float(a)) for problem_id, (n, a) in state["reference"].items()}
