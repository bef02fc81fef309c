r"""DDCA: length is a second advantage, among right answers only, and weighs more where the question is easy.

Source: arXiv 2602.02099, code read (advantages only; its trainer is not released), paper not read.

    A = (c - mean(c)) / (std(c) + 1e-8) - beta * c * p * (s - mean_right(s))        p: the group's pass rate
    s = sigmoid(clip((L - mean(L+)) / (std(L+) + 1e-8), -20, 20))

Deviations are those of the population; one below 1e-8 counts as 1e-8. Without the factor p (`by_pass_rate: false`) it is
DCA. `leave_one_out`: A = c - mean of the others' c - beta * c * p * (s - mean of s over the other right answers). The
scores s stay as above.

The reward stays c, so neither wrong answers nor the division by the deviation can weaken the length term: a group that is
right throughout still has a signal, of strength beta (their code: 0.2, and 0.2 to 0.5 in a comment). The form does not
depend on the unit of length, so nothing is scaled. loss.normalize_std has no effect: the formula says where it divides.

Edge cases: none right: 0. All right: length alone counts. A lone right answer has no length term, nor have equal lengths.
Cut answers are wrong, so their length counts nowhere. With a large beta a right answer may be pushed down: in a group with
p = 7/8, from beta 1 on. No state.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanolapo.config import NotNegative
from nanolapo.methods.base import Method
from nanolapo.methods.tools import each_group
from nanolapo.rollouts import Rollouts

EPS = 1e-8


@dataclass(frozen=True)
class Options:
    beta: NotNegative[float] = 0.2  # weight of the length term
    by_pass_rate: bool = True  # False: DCA
    leave_one_out: bool = False


def centred(values: np.ndarray, leave_one_out: bool) -> np.ndarray:
    """values minus their mean, or minus the mean of the others (0 where there are none).

    >>> centred(np.array([1.0, 0.0, 0.0]), leave_one_out=True), centred(np.array([0.7]), leave_one_out=True)
    (array([ 1. , -0.5, -0.5]), array([0.]))
    """
    n = len(values)
    difference = values - values.mean()
    return difference * (n / (n - 1)) if leave_one_out and n > 1 else difference


def length_scores(lengths: np.ndarray) -> np.ndarray:
    """s of right answers with these lengths: 0.5 at their mean, towards 1 for long ones.

    >>> length_scores(np.array([100.0, 300.0])).round(4), length_scores(np.array([80.0, 80.0]))
    (array([0.2689, 0.7311]), array([0.5, 0.5]))
    """
    z = (lengths - lengths.mean()) / (max(lengths.std(), EPS) + EPS)
    return 1.0 / (1.0 + np.exp(-np.clip(z, -20.0, 20.0)))


def ddca_advantages(lengths: np.ndarray, correct: np.ndarray, o: Options) -> np.ndarray:
    """The formula on one group, float64 [G].

    >>> ddca_advantages(np.array([100.0, 300.0]), np.array([True, True]), Options(beta=1.0)).round(4)
    array([ 0.2311, -0.2311])
    >>> ddca_advantages(np.array([100.0, 300.0, 50.0, 50.0]), np.array([True, True, False, False]), Options(1.0)).round(4)
    array([ 1.1155,  0.8845, -1.    , -1.    ])
    """
    verdict = correct.astype(np.float64)
    advantages = centred(verdict, o.leave_one_out)
    if not o.leave_one_out:
        advantages = advantages / (max(verdict.std(), EPS) + EPS)
    if correct.any():
        weight = o.beta * (verdict.mean() if o.by_pass_rate else 1.0)
        advantages[correct] -= weight * centred(length_scores(lengths[correct]), o.leave_one_out)
    return advantages


class Ddca(Method):
    """Accuracy and length as two advantages."""

    Options = Options
    uses_normalize_std = False

    def advantage(self, rollouts: Rollouts, rewards_PG: Tensor) -> Tensor:
        advantages_B = each_group(rollouts, lambda n, c: ddca_advantages(n, c, self.options))
        return torch.from_numpy(advantages_B).to(rewards_PG.dtype)
