r"""ALP: every answer pays for its length, the more the easier its question.

Source: "Just Enough Thinking", arXiv 2506.05256, known from third-party notes. The default is the linear penalty that the
trainer prime-rl ships (code), which is of this kind but does not claim to be this paper's:

    R = c - weight * p * L / max(L)           p: the group's pass rate, max over all its answers; weight 0.25
    A = R - mean(R), without the standard deviation: loss.normalize_std is off in configs/methods/alp.yaml

`form: paper` is UNVERIFIED (third-party notes): R = c - beta * L * max(p, 1/G). Set loss.normalize_std=true with it, since
beta is so small that only the division by the deviation makes length count: in groups of one class, and there fully. beta
1e-7 per token was published on DeepScaleR-1.5B (mean 6229 tokens) and scales with the inverse of the base's mean length.
The shipped form is relative to the group's longest answer and not scaled.

Edge cases: wrong answers pay as well. No right answer: nothing in prime-rl, 1/G in the paper's form, which so teaches
groups without a right answer to be short. Equal lengths: no length signal. A cut answer is a wrong one at the limit.
Rewards that lie within 1e-6 have no advantage: that silences the paper's form where its prices differ by less. No state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from nanolapo.config import Config, NotNegative
from nanolapo.methods.base import Method
from nanolapo.methods.tools import DEEPSCALER, as_parts, each_group, refuse_unused, scale
from nanolapo.rollouts import Rollouts


@dataclass(frozen=True)
class Options:
    form: Literal["shipped", "paper"] = "shipped"
    weight: NotNegative[float] = 0.25  # shipped: what the longest answer of a solved group pays
    beta: NotNegative[float] | None = None  # paper: price per token; None: 1e-7, scaled


def shipped_reward(lengths: np.ndarray, correct: np.ndarray, weight: float = 0.25) -> np.ndarray:
    """prime-rl's form on one group, float64 [G].

    >>> shipped_reward(np.array([100.0, 200.0, 400.0, 400.0]), np.array([True, True, False, False]))    # p = 1/2
    array([ 0.96875,  0.9375 , -0.125  , -0.125  ])
    """
    return correct - weight * correct.mean() * lengths / max(lengths.max(), 1.0)


def paper_reward(lengths: np.ndarray, correct: np.ndarray, beta: float) -> np.ndarray:
    """The paper's form (UNVERIFIED) on one group, float64 [G].

    >>> paper_reward(np.array([100.0, 200.0]), np.array([False, False]), beta=0.001)    # max(0, 1/2)
    array([-0.05, -0.1 ])
    """
    return correct - beta * lengths * max(correct.mean(), 1.0 / len(lengths))


class Alp(Method):
    """A price on length that rises with the pass rate."""

    Options = Options

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.beta, form = self.options.beta, self.options.form
        refuse_unused(self.options, ["weight" if form == "paper" else "beta"], f"with form={form}")
        if form == "paper" and self.beta is None:
            self.beta = 1e-7 / scale(config, DEEPSCALER, "method.options.beta")

    def reward(self, rollouts: Rollouts) -> dict[str, np.ndarray]:
        if self.options.form == "paper":
            return as_parts(rollouts, each_group(rollouts, lambda n, c: paper_reward(n, c, self.beta)))
        return as_parts(rollouts, each_group(rollouts, lambda n, c: shipped_reward(n, c, self.options.weight)))
