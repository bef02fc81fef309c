"""PALU ("Concise Reasoning in the Lens of Lagrangian Optimization", arXiv 2510.10168).

UNVERIFIED: from the authors' poster, the abstract and public reviews; the paper's text was not available. It minimises a
length budget L_q of every problem subject to a pass rate of at least C, with a Lagrange multiplier that only takes its two
extremes:

    R_q >= C:  L_q <- L_q - (Q_1(L+) - Q_{1-tau}(L+))     longest right length minus the (1 - tau) quantile; C 0.8, tau 0.5
    else:      L_q <- L_max                               reset

with R_q and L+ from the problem's previous visit. The policy follows R_q alone: R = c * [L <= L_q]. The poster has "> C"
and quantiles over all lengths, the reviews ">= C" and those of right answers, as here.

Also our reading: "right" means right within the budget, both in R_q (it is R(theta, L, q)) and in L+. So the budget never
falls below the quantile of lengths that did suffice. The budget is read only at the next visit, so it is moved at the end
of this one, from this one's rollouts: the numbers are the same, and only L_q must be stored.

L_max is the limit of the run and not scaled with the base: it is what holds where there is no budget.

Edge: nothing right: reset. One right answer, or equal lengths: step 0. A problem that never reaches C stays at L_max.
State: L_q by problem id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanolapo.config import Config, Share
from nanolapo.methods.base import Method
from nanolapo.rollouts import Rollouts


@dataclass(frozen=True)
class Options:
    pass_rate: Share = 0.8  # C, the pass rate to keep
    tau: Share = 0.5  # the step: from the longest right length down to their (1 - tau) quantile; an ablation: 0.1


def next_budget(
    budget: float,
    lengths_G: Sequence[int] | np.ndarray,
    solved_G: Sequence[bool] | np.ndarray,
    limit: float,
    pass_rate: float = 0.8,
    tau: float = 0.5,
) -> float:
    """The budget of the next visit; solved_G: right within the budget.

    >>> next_budget(1000, [300, 400, 600, 900, 2000], [True, True, True, True, False], limit=4096)   # 1000 - (900 - 500)
    600.0
    >>> next_budget(600, [300, 400, 500, 500], [True, True, True, False], limit=4096)                # 3/4 < 0.8
    4096.0
    """
    lengths, solved = np.asarray(lengths_G, dtype=np.float64), np.asarray(solved_G, dtype=bool)
    if not solved.any() or solved.mean() < pass_rate:
        return float(limit)
    return float(budget - (lengths[solved].max() - np.quantile(lengths[solved], 1.0 - tau)))


class Palu(Method):
    Options = Options

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.limit = float(config.rollout.max_new_tokens)
        self.budgets: dict[str, float] = {}

    def within_budget(self, rollouts: Rollouts) -> np.ndarray:
        """Boolean [B]: right, and no longer than the problem's budget."""
        budgets_P = np.array([self.budgets.get(p.id, self.limit) for p in rollouts.problems])
        return rollouts.correct_B & (rollouts.lengths_B <= np.repeat(budgets_P, rollouts.group_size))

    def reward(self, rollouts: Rollouts) -> dict[str, np.ndarray]:
        parts = super().reward(rollouts)
        return parts | {"over_budget": self.within_budget(rollouts) - parts["correct"]}

    def after_step(self, rollouts: Rollouts) -> dict[str, float]:
        o, lengths_PG = self.options, rollouts.by_group(rollouts.lengths_B)
        solved_PG, before = rollouts.by_group(self.within_budget(rollouts)), dict(self.budgets)
        for problem, lengths, solved in zip(rollouts.problems, lengths_PG, solved_PG, strict=True):
            budget = before.get(problem.id, self.limit)  # moved once even if a problem comes twice in a step
            self.budgets[problem.id] = next_budget(budget, lengths, solved, self.limit, o.pass_rate, o.tau)
        values = np.array(list(self.budgets.values()))
        return {
            "palu/budget_mean": float(values.mean()),
            "palu/reset_fraction": float((values >= self.limit).mean()),
        }

    def state_dict(self) -> dict[str, Any]:
        return {"budgets": dict(self.budgets)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.budgets = dict(state["budgets"])
