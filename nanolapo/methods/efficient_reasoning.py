r"""Efficient reasoning: a right answer pays for its length relative to the group's right answers.

Source: Arora and Zanette, "Training Language Models to Reason Efficiently", arXiv 2502.04463; code
Zanette-Labs/efficient-reasoning (code read, paper not).

    R = c * (1 - a * sigmoid((L - mean(L+)) / std(L+)))         L+: lengths of the group's right answers

a is 0.1 in its script. The deviation is that of the population.

    A = (A' - mean(A')) / std(A') over all tokens of the step, A'_i = R_i - mean of the others' R (RLOO)

No group's deviation divides A' (loss.normalize_std does not count), so a decides how much length counts. With it a group
that is right throughout would be pushed to be short as hard as another is pushed to be right, whatever a is. The mean of
the whole group, which is taken here, differs by a factor that cancels. Deviation: their KL term (k1, 0.001) is a part of
the reward, here of the loss.

Edge cases: no right answer: rewards 0, and the advantage that the subtracted mean leaves. One right answer, or all of one
length: z = 0, so each pays a / 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanolapo.advantages import batch_advantages
from nanolapo.config import Share
from nanolapo.methods.base import Method
from nanolapo.methods.tools import as_parts, each_group
from nanolapo.rollouts import Rollouts


def sigmoid_reward(lengths: np.ndarray, correct: np.ndarray, weight: float) -> np.ndarray:
    """The formula on one group, float64 [G].

    >>> sigmoid_reward(np.array([100.0, 300.0, 50.0]), np.array([1, 1, 0]), 0.4).round(4)   # mean 200, std 100: z = -1, 1
    array([0.8924, 0.7076, 0.    ])
    """
    right = correct.astype(bool)
    if not right.any():
        return np.zeros(len(lengths))
    mean, std = lengths[right].mean(), lengths[right].std()
    z = (lengths - mean) / std if std > 1e-6 else np.zeros(len(lengths))
    z = np.where(right, z, 0.0)  # wrong answers may have any length, and get nothing
    return right * (1.0 - weight / (1.0 + np.exp(-z)))


@dataclass(frozen=True)
class Options:
    weight: Share = 0.1  # a


class EfficientReasoning(Method):
    """Every group pays for length."""

    Options = Options
    uses_normalize_std = False

    def reward(self, rollouts: Rollouts) -> dict[str, np.ndarray]:
        total = each_group(rollouts, lambda n, c: sigmoid_reward(n, c, self.options.weight))
        return as_parts(rollouts, total)

    def advantage(self, rollouts: Rollouts, rewards_PG: Tensor) -> Tensor:
        tokens_PG = torch.from_numpy(rollouts.by_group(rollouts.lengths_B))
        return batch_advantages(rewards_PG, tokens_PG).flatten()
