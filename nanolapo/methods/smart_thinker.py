r"""SmartThinker: the length at which an answer is most likely right, from the group's own lengths.

Source: "SmartThinker: Progressive Chain-of-Thought Length Calibration ...", arXiv 2603.08000; code
SJTU-RTEAS/SmartThinker. The code was read, the paper through secondary sources.

All lengths of a group are modelled as normal with mean m1, variance v1; the right ones with m2, v2 (population).
Their ratio is largest at the calibrated length l*, see `calibrated_length`. With s = -max(0, L - l*) for right and 0
for wrong answers:

    R = c + Lam * s          Lam = p_err / (mean(s) - min(s) + 1e-6)        mean over the group, min over right answers

Lam is as large as possible while no right answer falls below the group's mean reward: normalised, right answers have
advantage >= 0 (the longest exactly 0) and wrong ones <= 0. Groups that are all right give no signal: easy problems are
not compressed by this method.

Deviation from the code: where v1 = v2 it has min L and max L swapped; here the model's own consequence is used.
Where v2 > v1 it takes min L, and so do we; the ratio has no maximum between the ends then, and may be larger at max L.

Edge cases: none or all right -> Lam = 0. One right answer: v2 = 0, so l* = m2, its length. v1 = v2 and m1 = m2: the
lengths say nothing, l* = max L (ours).
"""

from __future__ import annotations

import numpy as np

from nanolapo.methods.base import Method
from nanolapo.methods.tools import as_parts, each_group
from nanolapo.rollouts import Rollouts


def calibrated_length(lengths: np.ndarray, correct: np.ndarray) -> float:
    """l* of one group.

    >>> calibrated_length(np.array([100.0, 200.0, 300.0, 400.0]), np.array([False, True, True, False]))   # m1 = m2 = 250
    250.0
    """
    shortest, longest = float(lengths.min()), float(lengths.max())
    if correct.all():
        return shortest
    if not correct.any():
        return longest
    m1, v1 = lengths.mean(), lengths.var()
    m2, v2 = lengths[correct].mean(), lengths[correct].var()
    if abs(v1 - v2) < 1e-6:  # the ratio of the two is monotonic
        return longest if m2 >= m1 else shortest
    if v2 > v1:  # no maximum between the ends
        return shortest
    return float(np.clip((v1 * m2 - v2 * m1) / (v1 - v2), shortest, longest))


def calibrated_reward(lengths: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """R of one group, float64 [G].

    >>> calibrated_reward(np.array([100.0, 200.0, 300.0, 400.0]), np.array([False, True, True, False])).round(4)
    array([0.    , 1.    , 0.3333, 0.    ])
    """
    if not correct.any():
        return np.zeros(len(lengths))
    errors = 1.0 - correct.mean()
    score = np.where(correct, np.minimum(0.0, calibrated_length(lengths, correct) - lengths), 0.0)
    weight = errors / (score.mean() - score[correct].min() + 1e-6)
    return correct + weight * score


class SmartThinker(Method):
    """Right answers beyond the calibrated length lose reward, at most down to the group's mean."""

    def reward(self, rollouts: Rollouts) -> dict[str, np.ndarray]:
        return as_parts(rollouts, each_group(rollouts, calibrated_reward))
