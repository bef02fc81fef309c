r"""O1-Pruner: shorter than the reference model, without being wrong more often.

Source: Luo et al., arXiv 2501.12570; code StarDewXXX/O1-Pruner. Paper text and code read.

    R_LH = Lbar_ref / L - 1 + lambda * (c - Abar_ref)          lambda = 2

Lbar_ref and Abar_ref are mean length and accuracy of the reference model on the problem. R_LH is the advantage itself;
no group mean is subtracted. As in the code it is cut to [-2, 4], because Lbar_ref / L is huge for very short answers,
and then standardised; `standardize: false` gives the paper's text.

The loss is theirs (configs/methods/o1-pruner.yaml): one ratio for an answer, exp(mean(log r)), clipped at 0.2.

Ours is online: the paper trains off-policy on samples of the reference model and standardises over the whole set; ours
uses the step's rollouts. So their ratio is to the reference, and its clip keeps the policy near it; ours is to the policy
before the step. `reference_samples: 8` measures the reference before step 0, every problem in one sampling
(the paper: 16 for the 7B model, 12 for the 32B). With 0 the group of a problem's first visit becomes its reference:
it comes from the model of that step, not from the first one.

Edge cases: an answer of length 1 meets the cut at 4; a problem never solved has Abar_ref 0, so length alone decides;
all R_LH of a step equal -> advantage 0. Cut answers count in Lbar_ref at the limit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanolapo.config import NotNegative
from nanolapo.methods.reference import Reference
from nanolapo.rollouts import Rollouts


def harmonizing_reward(
    lengths: np.ndarray, correct: np.ndarray, ref_length: float, ref_accuracy: float, weight: float = 2.0
) -> np.ndarray:
    """R_LH of one group, float64 [G].

    >>> harmonizing_reward(np.array([500, 1000, 2000]), np.array([1, 1, 0]), ref_length=1000.0, ref_accuracy=0.75)
    array([ 1.5,  0.5, -2. ])
    """
    return ref_length / np.maximum(lengths, 1) - 1.0 + weight * (correct - ref_accuracy)


def cut_and_standardize(rewards_B: np.ndarray, standardize: bool = True) -> np.ndarray:
    """Rewards cut to [-2, 4]; then mean 0 and (population) std 1.

    >>> cut_and_standardize(np.array([9.0, 0.0]))
    array([ 1., -1.])
    """
    cut = np.clip(rewards_B, -2.0, 4.0)
    if not standardize:
        return cut
    return (cut - cut.mean()) / cut.std() if cut.std() > 1e-6 else np.zeros(len(cut))


@dataclass(frozen=True)
class Options:
    weight: NotNegative[float] = 2.0  # lambda
    standardize: bool = True
    # Per problem, sampled before step 0; 0: the first visit's group is the reference
    reference_samples: NotNegative[int] = 8


class O1Pruner(Reference):
    """Length-harmonizing reward, used as the advantage."""

    Options = Options
    compares_group = uses_normalize_std = False

    def reward(self, rollouts: Rollouts) -> dict[str, np.ndarray]:
        lengths, correct = rollouts.by_group(rollouts.lengths_B), rollouts.by_group(rollouts.correct_B)
        verdict, total, gain, weight = rollouts.correct_B.astype(np.float64), [], [], self.options.weight
        for g, (problem, own) in enumerate(zip(rollouts.problems, self.measure(rollouts), strict=True)):
            ref_length, ref_accuracy = self.reference.get(problem.id, own)
            total.append(harmonizing_reward(lengths[g], correct[g], ref_length, ref_accuracy, weight))
            gain.append(weight * (correct[g] - ref_accuracy))
        gain_B = np.concatenate(gain)
        return {"correct": verdict, "correct_extra": gain_B - verdict, "length": np.concatenate(total) - gain_B}

    def advantage(self, rollouts: Rollouts, rewards_PG: Tensor) -> Tensor:
        rewards = rewards_PG.flatten().double().numpy()
        return torch.from_numpy(cut_and_standardize(rewards, self.options.standardize))

    def after_step(self, rollouts: Rollouts) -> dict[str, float]:
        self.remember(rollouts)
        return {}
