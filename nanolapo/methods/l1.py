r"""L1: a length asked for in the question, kept exactly or as an upper limit (LCPO).

Source: Aggarwal & Welleck, arXiv 2503.04697; code cmu-l3/l1. Paper text and code were both read.

    prompt         "{question} ... Think for {n} tokens."    Max: "... Think for maximum {n} tokens."
    Exact (Eq. 1)  R = c - alpha * |n - L|                   alpha 0.0003; wrong answers pay for the length error as well
    Max   (Eq. 2)  R = c * clip(alpha * (n - L) + delta, 0, 1)      alpha 0.01, delta 0.5

n is drawn uniformly from [100, 4000], once per problem as in the paper, or at every visit (`redraw`). L1Max is trained
on both kinds of prompt, each with its own reward: a problem is Max with probability 0.5, else Exact.

Not followed, because the released code is at odds with the paper: its Max halves the slope, and its published Max
script sets none of the reward switches. Tokens scale with the limit (4096 for Exact, 4500 for Max), and alpha, a price
per token, with its inverse. The sentence stands at the end of the question; the rest of the prompt is the recipe's own.

Edge cases: no right answer -> Exact still ranks by length error, Max gives zeros. Exact is not clipped, so that a right
answer far off its length can score below a wrong one on target. A prompt without a budget has no length term.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanolapo.config import Config, UserError
from nanolapo.methods.base import Method, SamplingPlan
from nanolapo.methods.tools import as_parts, scale
from nanolapo.problems import Problem
from nanolapo.prompts import Guidance, l1_max_guidance, outside_guidance
from nanolapo.rollouts import Rollouts


def exact_reward(lengths: np.ndarray, correct: np.ndarray, budgets: np.ndarray, alpha: float = 0.0003) -> np.ndarray:
    """Eq. 1, element by element.

    >>> exact_reward(np.array([1500, 1000, 1000]), np.array([1, 1, 0]), np.array([1000, 1000, 3000]))
    array([ 0.85,  1.  , -0.6 ])
    """
    return correct - alpha * np.abs(budgets - lengths)


def max_reward(
    lengths: np.ndarray, correct: np.ndarray, budgets: np.ndarray, alpha: float = 0.01, delta: float = 0.5
) -> np.ndarray:
    """Eq. 2, element by element: at n half of the reward is left, 50 tokens below it all of it, 50 above it none.

    >>> max_reward(np.array([950, 1000, 1025, 1050, 10]), np.array([1, 1, 1, 1, 0]), np.full(5, 1000)).round(6)
    array([1.  , 0.5 , 0.25, 0.  , 0.  ])
    """
    return correct * np.clip(alpha * (budgets - lengths) + delta, 0.0, 1.0)


@dataclass(frozen=True)
class ExactOptions:
    alpha: float | None = None  # price per token of length error; None: 0.0003 at the paper's limit
    min_budget: int | None = None  # tokens; None: 100 at the paper's limit
    max_budget: int | None = None  # tokens; None: 4000 at the paper's limit
    redraw: bool = False  # draw a problem's budget anew at every visit


@dataclass(frozen=True)
class MaxOptions(ExactOptions):
    max_fraction: float = 0.5  # of the problems whose budget is an upper limit; the others are Exact
    max_alpha: float | None = None  # slope per token; None: 0.01 at the paper's limit
    delta: float = 0.5  # reward of a right answer of exactly n tokens


class L1Exact(Method):
    """Budget in the question, reward for keeping to it."""

    Options = ExactOptions
    paper_limit = 4096
    max_fraction = 0.0

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        o, self.scale = self.options, scale(config, self.paper_limit)
        self.low = max(1, round(100 * self.scale)) if o.min_budget is None else o.min_budget
        self.high = round(4000 * self.scale) if o.max_budget is None else o.max_budget
        if not 1 <= self.low <= self.high:
            raise UserError(f"method.options: budgets from {self.low} to {self.high} tokens; need 1 <= min <= max")
        self.alpha = 0.0003 / self.scale if o.alpha is None else o.alpha
        self.step = 0

    def sampling(self, step: int) -> SamplingPlan:
        self.step = step  # rewards are given for the budgets of this step
        return super().sampling(step)

    def draw(self, problem_id: str, step: int) -> tuple[int, bool]:
        """(budget, is it an upper limit?): a pure function of its arguments and the seed, so nothing is remembered."""
        visit = step if self.options.redraw else "once"
        rng = random.Random(f"{self.config.run.seed}/{problem_id}/{visit}")
        return rng.randint(self.low, self.high), rng.random() < self.max_fraction

    def guidance(self, problem: Problem, rollout_index: int, step: int) -> Guidance:
        budget, is_limit = self.draw(problem.id, step)
        return (l1_max_guidance if is_limit else outside_guidance)(budget)

    def limits(self, rollouts: Rollouts) -> np.ndarray:
        """Boolean [B]: rows whose budget was an upper limit."""
        return np.repeat([self.draw(p.id, self.step)[1] for p in rollouts.problems], rollouts.group_size)

    def reward(self, rollouts: Rollouts) -> dict[str, np.ndarray]:
        correct, budgets = rollouts.correct_B.astype(np.float64), rollouts.budgets_B
        total = self.total(rollouts.lengths_B, correct, budgets, self.limits(rollouts))
        return as_parts(rollouts, np.where(np.isnan(budgets), correct, total))

    def total(self, lengths: np.ndarray, correct: np.ndarray, budgets: np.ndarray, limits: np.ndarray) -> np.ndarray:
        return exact_reward(lengths, correct, budgets, self.alpha)

    def after_step(self, rollouts: Rollouts) -> dict[str, float]:
        """The paper's two measures of obedience."""
        budgets, limits = rollouts.budgets_B, self.limits(rollouts)
        error = rollouts.lengths_B - budgets
        slack = 500 * self.scale
        violated = np.where(limits, error > slack, np.abs(error) > slack)
        return {"budget/relative_error": float((error / budgets).mean()), "budget/violated": float(violated.mean())}


class L1Max(L1Exact):
    """Half of the problems carry an upper limit, the other half an exact length."""

    Options: Any = MaxOptions
    paper_limit = 4500

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        o = self.options
        self.max_fraction = o.max_fraction
        self.max_alpha = 0.01 / self.scale if o.max_alpha is None else o.max_alpha

    def total(self, lengths: np.ndarray, correct: np.ndarray, budgets: np.ndarray, limits: np.ndarray) -> np.ndarray:
        exact = super().total(lengths, correct, budgets, limits)
        return np.where(limits, max_reward(lengths, correct, budgets, self.max_alpha, self.options.delta), exact)
