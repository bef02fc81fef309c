r"""GRPO-lambda: only the groups that do well pay for length.

Source: Dai, Liu, Si, "Stable Reinforcement Learning for Efficient Reasoning", arXiv 2505.18086, Eq. 1 and 2. The step's
groups are ranked by pass rate. The best share lambda gets

    R = c * (1 - a * sigmoid((L - mean(L+)) / std(L+)))         lambda 0.2, a 0.2

and the others plain 0/1. Ours, because the paper does not say: the number of groups is rounded up and at least one, ties in
pass rate keep the order of the batch, and std is the population's.

Edge cases: a best group without a right answer -> zeros; one right answer -> z = 0, it pays a / 2. In a group that is right
throughout, `a` has no effect: dividing by the group's std (loss.normalize_std) cancels it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from nanolapo.config import Share
from nanolapo.methods.base import Method
from nanolapo.methods.efficient_reasoning import sigmoid_reward
from nanolapo.methods.tools import as_parts
from nanolapo.rollouts import Rollouts


def best_groups(correct_PG: np.ndarray, share: float) -> np.ndarray:
    """Boolean [P]: the groups in the best `share` by pass rate.

    >>> best_groups(np.array([[1, 0], [1, 1], [0, 0], [1, 1]]), share=0.3)   # two of four: 1.2, rounded up
    array([False,  True, False,  True])
    """
    num_groups = len(correct_PG)
    num_best = max(1, math.ceil(share * num_groups - 1e-9))  # 0.28 * 25 is 7.000000000000001
    order = np.argsort(-correct_PG.sum(axis=1), kind="stable")
    best = np.zeros(num_groups, dtype=bool)
    best[order[:num_best]] = True
    return best


@dataclass(frozen=True)
class Options:
    share: Share = 0.2  # lambda
    weight: Share = 0.2  # a


class GrpoLambda(Method):
    """Length penalty for the groups with the highest pass rate only."""

    Options = Options

    def reward(self, rollouts: Rollouts) -> dict[str, np.ndarray]:
        lengths = rollouts.by_group(rollouts.lengths_B).astype(np.float64)
        correct = rollouts.by_group(rollouts.correct_B)
        best = best_groups(correct.astype(np.int64), self.options.share)
        total = [
            sigmoid_reward(lengths[g], correct[g], self.options.weight if best[g] else 0.0) for g in range(len(best))
        ]
        return as_parts(rollouts, np.concatenate(total))
