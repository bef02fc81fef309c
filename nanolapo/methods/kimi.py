r"""Kimi k1.5's length reward: within a group, short is good and long is bad, linearly.

Source: Kimi k1.5, arXiv 2501.12599, section 2.3.3, read; weight from LASER's re-implementation (code).

    lam = 0.5 - (L - min L) / (max L - min L)         over all answers of the group, right or wrong
    R = c + weight * (lam if right, min(0, lam) if wrong)

The weight was not published. LASER's default is 0.4, where right and wrong are 1.5 apart; here they are 1 apart, so it is
0.4 / 1.5. (LASER's has no length term for a badly formed answer, but -1 for it: without that an unfinished answer would
be worth more than a wrong one. Ours is the paper's: the term is for all.) Training begins without the term, for 10 % of
the run (ours; the number was not published either).

Theirs subtracts the group's mean and does not divide by the deviation; LASER's, and ours, does. So in a group that is right
throughout the weight has no effect.

Edge cases: all lengths equal -> no length term. A short wrong answer gains nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nanolapo.config import NotNegative, Share
from nanolapo.methods.base import Method
from nanolapo.methods.tools import each_group
from nanolapo.rollouts import Rollouts


def kimi_length_reward(lengths: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """R_len of one group, float64 [G].

    >>> kimi_length_reward(np.array([100.0, 200.0, 300.0, 100.0, 300.0]), np.array([True, True, True, False, False]))
    array([ 0.5,  0. , -0.5,  0. , -0.5])
    """
    shortest, longest = lengths.min(), lengths.max()
    if shortest == longest:
        return np.zeros(len(lengths))
    lam = 0.5 - (lengths - shortest) / (longest - shortest)
    return np.where(correct, lam, np.minimum(0.0, lam))


@dataclass(frozen=True)
class Options:
    weight: NotNegative[float] = 0.267
    warmup_fraction: Share = 0.1  # of the run without the length term


class KimiLength(Method):
    """Linear length reward after a warm-up."""

    Options = Options

    def reward(self, rollouts: Rollouts) -> dict[str, np.ndarray]:
        warming_up = self.progress < self.options.warmup_fraction
        weight = 0.0 if warming_up else self.options.weight
        length = each_group(rollouts, kimi_length_reward)
        return {"correct": rollouts.correct_B.astype(np.float64), "length": weight * length}
