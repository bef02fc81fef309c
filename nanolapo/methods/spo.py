"""SPO: Single-stream Policy Optimization (Xu & Ding, arXiv 2509.13232; code of its recipe read, paper second-hand).

One rollout per problem. GRPO compares answers of a group; SPO compares with a memory of the problem, a Beta counter (a, b)
with value v = a / (a + b), read before this step's answer is counted:

    advantage   A = r - v, then (A - mean(A)) / (std(A) + 1e-8) over the step's answers (not over tokens); r is 0 or 1
    update      a <- rho a + r,   b <- rho b + (1 - r)
    sampling    problems without replacement, with probability in proportion to sqrt(v (1 - v)) + 0.05
    start       a = b = 0.5; or n0 answers to every problem before step 0, k of them right, N0 = 1 / (1 - rho):
                a = N0 (k + 0.5) / (n0 + 1),   b = N0 (n0 - k + 0.5) / (n0 + 1)

Deviations: rho is a constant, the published lower bound 0.875; theirs rises up to 0.96 the less the policy moved since the
problem's last visit, which needs that visit's answer and log-probs. The paper divides the root in the sampling weight by a
power of a + b; the code does not, nor do we. The paper's start has no + 0.5.
Step 0 draws its problems before the first samples, so with equal weights.

A step samples prompts_per_step x group_size problems once each, so that it costs what a step of a group method costs.
Edge: all A equal: no gradient. State: (a, b) by problem id.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanolapo.advantages import MIN_SPREAD
from nanolapo.config import Config, NotNegative, UserError
from nanolapo.data.problems import Problem
from nanolapo.methods.base import Method, MonitorPlan, SamplingPlan
from nanolapo.rollouts import Measured, Rollouts


@dataclass(frozen=True)
class Options:
    rho: float = 0.875  # how much of the past a visit keeps; 1 / (1 - rho) visits count
    floor: NotNegative[float] = 0.05  # added to every problem's sampling weight
    first_samples: NotNegative[int] = 8  # n0, answers to every problem before step 0; 0: none


def whiten(values: Tensor) -> Tensor:
    """(x - mean) / (std + 1e-8), unbiased std; all zero where nothing differs.

    >>> whiten(torch.tensor([0.5, -0.5]))
    tensor([ 0.7071, -0.7071])
    """
    if len(values) < 2 or values.max() - values.min() < MIN_SPREAD:
        return torch.zeros_like(values)
    return (values - values.mean()) / (values.std() + 1e-8)


def first_counts(num_right: int, num_samples: int, rho: float) -> tuple[float, float]:
    """(a, b) from answers sampled beforehand, worth N0 = 1 / (1 - rho) visits together.

    >>> first_counts(8, 8, 0.875), first_counts(0, 1, 0.5)
    ((7.555555555555555, 0.4444444444444444), (0.5, 1.5))
    """
    scale = 1.0 / (1.0 - rho) / (num_samples + 1)
    return scale * (num_right + 0.5), scale * (num_samples - num_right + 0.5)


class Spo(Method):
    Options = Options
    compares_group = uses_normalize_std = False

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if not 0 <= self.options.rho < 1:
            raise UserError(f"method.options.rho={self.options.rho}: give 0 <= rho < 1")
        self.counts: dict[str, tuple[float, float]] = {}

    def start(self, problems: list[Problem]) -> None:
        self.ids, wanted = [p.id for p in problems], self.config.rollouts_per_step
        if len(problems) < wanted:
            raise UserError(
                f"SPO samples rollout.prompts_per_step x rollout.group_size = {wanted} different problems a step, and "
                f"there are {len(problems)}: lower one of the two or add data"
            )

    def value(self, problem_id: str) -> float:
        a, b = self.counts.get(problem_id, (0.5, 0.5))
        return a / (a + b)

    def monitor(self, step: int) -> MonitorPlan | None:
        if step or not self.options.first_samples:
            return None
        r, everyone = self.config.rollout, tuple(range(len(self.ids)))
        return MonitorPlan(everyone, self.options.first_samples, r.temperature, r.max_new_tokens)

    def on_monitor(self, found: Measured | Rollouts) -> dict[str, float]:
        for problem, correct_G in zip(found.problems, found.by_group(found.correct_B), strict=True):
            self.counts[problem.id] = first_counts(int(correct_G.sum()), len(correct_G), self.options.rho)
        return {"spo/first_accuracy": float(found.correct_B.mean())}

    def sampling(self, step: int) -> SamplingPlan:
        values = np.array([self.value(problem_id) for problem_id in self.ids])
        weights = np.sqrt(values * (1 - values)) + self.options.floor
        num_prompts = self.config.rollouts_per_step
        return replace(super().sampling(step), num_prompts=num_prompts, group_size=1, weights=weights / weights.sum())

    def advantage(self, rollouts: Rollouts, rewards_PG: Tensor) -> Tensor:
        values_P1 = torch.tensor([[self.value(p.id)] for p in rollouts.problems], dtype=rewards_PG.dtype)
        return whiten((rewards_PG - values_P1).flatten())

    def after_step(self, rollouts: Rollouts) -> dict[str, float]:
        rho = self.options.rho
        for row in rollouts.rows:
            (a, b), right = self.counts.get(row.problem.id, (0.5, 0.5)), float(row.correct)
            self.counts[row.problem.id] = (rho * a + right, rho * b + (1.0 - right))
        return {
            "spo/value_mean": float(np.mean([self.value(i) for i in self.ids])),
            "spo/visited_fraction": len(self.counts) / len(self.ids),
        }

    def state_dict(self) -> dict[str, Any]:
        return {"counts": {problem_id: list(ab) for problem_id, ab in sorted(self.counts.items())}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts = {problem_id: (a, b) for problem_id, (a, b) in state["counts"].items()}
