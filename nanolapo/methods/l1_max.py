r"""L1-Max: L1-Exact, but half of the problems get an upper limit in place of an exact length (LCPO-Max).

Source: as for l1.py, arXiv 2503.04697; paper text and code were both read.

    prompt        "{question} ... Think for maximum {n} tokens."
    R (Eq. 2)     c * clip(alpha * (n - L) + delta, 0, 1)         alpha 0.01 (the code's default), delta 0.5

A problem is Max with probability 0.5, else Exact, each with its own sentence and reward. Tokens scale with the base's mean
length (published on DeepScaleR-1.5B-Preview), alpha with its inverse.

The released code contradicts the paper and is not followed: its Max halves the slope, and its published Max script sets
none of the reward switches.

Edge case: in a group of Max prompts without a right answer all rewards are 0. No state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from nanolapo.config import Config, NotNegative, Share
from nanolapo.data.problems import Problem
from nanolapo.data.prompts import Guidance, l1_max_guidance
from nanolapo.methods import l1
from nanolapo.methods.base import SamplingPlan
from nanolapo.methods.tools import DEEPSCALER, scale
from nanolapo.rollouts import Rollouts


def max_reward(
    lengths: np.ndarray, correct: np.ndarray, budgets: np.ndarray, alpha: float = 0.01, delta: float = 0.5
) -> np.ndarray:
    """Eq. 2, element by element: at n half of the reward is left, 50 tokens below it all of it, 50 above it none.

    >>> max_reward(np.array([950, 1000, 1025, 1050, 10]), np.array([1, 1, 1, 1, 0]), np.full(5, 1000)).round(6)
    array([1.  , 0.5 , 0.25, 0.  , 0.  ])
    """
    return correct * np.clip(alpha * (budgets - lengths) + delta, 0.0, 1.0)


@dataclass(frozen=True)
class Options(l1.Options):
    max_fraction: Share = 0.5  # of the problems whose budget is an upper limit; the others are Exact
    max_alpha: NotNegative[float] | None = None  # slope per token; None: 0.01, scaled
    delta: Share = 0.5  # reward of a right answer of exactly n tokens


class L1Max(l1.L1Exact):
    """Half of the problems carry an upper limit, the other half an exact length."""

    Options: Any = Options

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        slope = self.options.max_alpha
        self.max_alpha = 0.01 / scale(config, DEEPSCALER, "method.options.max_alpha") if slope is None else slope
        self.step = 0

    def sampling(self, step: int) -> SamplingPlan:
        self.step = step  # rewards are given for the sentences of this step
        return super().sampling(step)

    def is_limit(self, problem_id: str, step: int) -> bool:
        return self.chance(f"{problem_id}/kind", step).random() < self.options.max_fraction

    def limits(self, rollouts: Rollouts) -> np.ndarray:
        """Boolean [B]: rows whose budget was an upper limit."""
        return np.repeat([self.is_limit(p.id, self.step) for p in rollouts.problems], rollouts.group_size)

    def guidance(self, problem: Problem, rollout_index: int, step: int) -> Guidance:
        exact = super().guidance(problem, rollout_index, step)
        return l1_max_guidance(self.budget(problem.id, step)) if self.is_limit(problem.id, step) else exact

    def total(self, rollouts: Rollouts, verdict_B: np.ndarray) -> np.ndarray:
        lengths_B, budgets_B = rollouts.lengths_B, rollouts.budgets_B
        limited_B = max_reward(lengths_B, verdict_B, budgets_B, self.max_alpha, self.options.delta)
        return np.where(self.limits(rollouts), limited_B, super().total(rollouts, verdict_B))

    def off_budget(self, rollouts: Rollouts) -> np.ndarray:
        above_B = rollouts.lengths_B - rollouts.budgets_B
        return np.where(self.limits(rollouts), above_B, np.abs(above_B))
