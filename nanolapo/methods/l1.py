r"""L1-Exact: the question asks for a length, the reward is for keeping it (LCPO). L1-Max (upper limit) is in l1_max.py.

Source: Aggarwal & Welleck, arXiv 2503.04697; code cmu-l3/l1. Paper text and code were both read.

    prompt        "{question} ... Think for {n} tokens."
    R (Eq. 1)     c - alpha * |n - L|                 alpha 0.0003; wrong answers pay for the length error as well

n is drawn uniformly from [100, 4000], once per problem as in the paper, or at every visit (`redraw`); if prompts state
only multiples (prompt.length_multiple), n is rounded to one. Tokens scale with the base's mean length (published on
DeepScaleR-1.5B-Preview), and alpha, a price per token, with its inverse; no budget is above our own limit, but for its
rounding. The sentence stands at the end of the question; the rest of the prompt is the recipe's own.

Edge cases: no right answer -> the group is still ranked by length error. Nothing is clipped, so a right answer far
from its length can score below a wrong one on target. A prompt without a budget has no length term. No state.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanolapo.config import Config, NotNegative, Positive, UserError
from nanolapo.data.problems import Problem
from nanolapo.data.prompts import Guidance, outside_guidance
from nanolapo.methods.base import Method
from nanolapo.methods.tools import DEEPSCALER, as_parts, scale, stated
from nanolapo.rollouts import Rollouts


def exact_reward(lengths: np.ndarray, correct: np.ndarray, budgets: np.ndarray, alpha: float = 0.0003) -> np.ndarray:
    """Eq. 1, element by element.

    >>> exact_reward(np.array([1500, 1000, 1000]), np.array([1, 1, 0]), np.array([1000, 1000, 3000]))
    array([ 0.85,  1.  , -0.6 ])
    """
    return correct - alpha * np.abs(budgets - lengths)


@dataclass(frozen=True)
class Options:
    alpha: NotNegative[float] | None = None  # price per token of length error; None: 0.0003, scaled
    min_budget: Positive[int] | None = None  # tokens; None: 100, scaled
    max_budget: Positive[int] | None = None  # tokens; None: 4000, scaled
    redraw: bool = False  # draw a new budget at every visit of a problem


class L1Exact(Method):
    """Budget in the question, reward for keeping to it."""

    Options: Any = Options

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        o, limit = self.options, config.rollout.max_new_tokens
        self.low, self.high, self.alpha = o.min_budget, o.max_budget, o.alpha
        if o.min_budget is None:
            self.low = max(1, round(100 * scale(config, DEEPSCALER, "method.options.min_budget")))
        if o.max_budget is None:
            self.high = min(limit, round(4000 * scale(config, DEEPSCALER, "method.options.max_budget")))
        if o.alpha is None:
            self.alpha = 0.0003 / scale(config, DEEPSCALER, "method.options.alpha")
        if not 1 <= self.low <= self.high <= limit:
            raise UserError(
                f"method.options.min_budget={self.low}, max_budget={self.high}: need 1 <= min_budget <= max_budget <= "
                f"rollout.max_new_tokens={limit}"
            )

    def chance(self, problem_id: str, step: int) -> random.Random:
        """Return random numbers for a problem, or for a visit to it. They depend on the seed only; nothing is stored."""
        return random.Random(f"{self.config.run.seed}/{problem_id}/{step if self.options.redraw else 'once'}")

    def budget(self, problem_id: str, step: int) -> int:
        """Return n as the prompt prints it."""
        return stated(self.config, self.chance(problem_id, step).randint(self.low, self.high))

    def guidance(self, problem: Problem, rollout_index: int, step: int) -> Guidance:
        return outside_guidance(self.budget(problem.id, step))

    def reward(self, rollouts: Rollouts) -> dict[str, np.ndarray]:
        verdict_B = rollouts.correct_B.astype(np.float64)
        return as_parts(rollouts, np.where(np.isnan(rollouts.budgets_B), verdict_B, self.total(rollouts, verdict_B)))

    def total(self, rollouts: Rollouts, verdict_B: np.ndarray) -> np.ndarray:
        return exact_reward(rollouts.lengths_B, verdict_B, rollouts.budgets_B, self.alpha)

    def off_budget(self, rollouts: Rollouts) -> np.ndarray:
        """Return the tokens that count as disobedience, [B]."""
        return np.abs(rollouts.lengths_B - rollouts.budgets_B)

    def after_step(self, rollouts: Rollouts) -> dict[str, float]:
        """The paper's two measures of obedience."""
        error_B = (rollouts.lengths_B - rollouts.budgets_B) / rollouts.budgets_B
        violated_B = self.off_budget(rollouts) > self.high / 8  # 500 of 4000
        return {"budget/relative_error": float(error_B.mean()), "budget/violated": float(violated_B.mean())}
