"""ConciseR: accuracy first, then L-GRPO (Song & Zheng, "Walk Before You Run!", arXiv 2505.21178; nick7nlp/ConciseR).

UNVERIFIED: from the abstract, the read-me and its figure; no training code is public. Only the shape is known: a long
first stage of GRPO with clip-higher and dynamic sampling (5,700 of 5,810 steps), then a short one in which length enters
the reward of a group only if all of its answers are right. The length term itself could not be found, so it is OURS. So is
first_stage 0.8, for 0.98 of a run as short as ours would leave a step or none:

    second stage, every answer of the group right:  R_i = 1 + weight * (1 - L_i / L_max),  L_max = rollout.max_new_tokens
    everything else:                                R_i = c_i

Groups are filtered by this reward, not by accuracy, or the all-right groups, which matter here, would be dropped. Within
such a group the advantage is divided by the group's std (loss.normalize_std), so `weight` and L_max change what is logged,
not what is learned. Two reviews speak of an entropy bonus in its GRPO; there is none here.

Edge: an all-right group of equal lengths has no signal and is dropped. No state: the run's progress decides the stage.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from nanolapo.config import NotNegative, Positive, Share
from nanolapo.methods.base import Method, SamplingPlan
from nanolapo.methods.dapo import mixed_groups
from nanolapo.rollouts import Rollouts


@dataclass(frozen=True)
class Options:
    first_stage: Share = 0.8  # share of the run before length counts; 0: L-GRPO from the start (ours)
    weight: NotNegative[float] = 1.0  # of the length term (ours)
    max_rounds: Positive[int] = 4  # rounds of sampling to fill a batch; 1: no refill (ours)


def length_term(lengths_PG: np.ndarray, correct_PG: np.ndarray, limit: int) -> np.ndarray:
    """1 - L / limit in groups that are all right, 0 elsewhere: float64 [P, G].

    >>> length_term(np.array([[100, 200], [100, 200]]), np.array([[True, True], [True, False]]), limit=400)
    array([[0.75, 0.5 ],
           [0.  , 0.  ]])
    """
    solved_P1 = np.asarray(correct_PG, dtype=bool).all(axis=1, keepdims=True)
    return solved_P1 * (1.0 - np.asarray(lengths_PG) / limit)


class ConciseR(Method):
    Options = Options

    def sampling(self, step: int) -> SamplingPlan:
        return replace(super().sampling(step), max_rounds=self.options.max_rounds)

    def reward(self, rollouts: Rollouts) -> dict[str, np.ndarray]:
        parts = super().reward(rollouts)
        lengths_PG, correct_PG = rollouts.by_group(rollouts.lengths_B), rollouts.by_group(rollouts.correct_B)
        term_PG = length_term(lengths_PG, correct_PG, self.config.rollout.max_new_tokens)
        second_stage = self.progress >= self.options.first_stage
        return parts | {"length": second_stage * self.options.weight * term_PG.flatten()}

    def keep_groups(self, rollouts: Rollouts, rewards_PG: np.ndarray) -> np.ndarray:
        return mixed_groups(rewards_PG)
