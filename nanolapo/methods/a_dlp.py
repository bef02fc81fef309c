r"""A-DLP: a price per token that rises while accuracy is above a reference and falls while it is below.

Source: "Thinking Fast and Right", arXiv 2505.18298; the authors' code (JinyanSu1/A-DLP) and its training script were read,
the paper's text was not.

    R = c - lam * L                                           every answer, wrong ones as well
    lam <- max(0, lam + rate * (accuracy - reference))        after each step, from the accuracy of its batch

lam starts at 0.001 per token and the rate is 0.001, on DeepScaleR-1.5B (mean 6229 tokens), so both scale with the inverse
of the base's mean length: at the start an answer of that mean pays 6.2, more than a right answer earns. The reference is
0.62 there; `reference: null` takes the accuracy of the first step's batch, which is the base's (ours). The advantage is
GRPO's, with the standard deviation. Their entropy bonus of 0.001 is not built here.

Edge cases: in a group of one class the deviation cancels lam, which then only decides whether there is a signal: rewards
within 1e-6, as with lam 0, have none. None right: the shortest answer is best. A cut answer pays the whole limit. State:
lam and the reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from nanolapo.config import Config, NotNegative, Share
from nanolapo.methods.base import Method
from nanolapo.methods.tools import DEEPSCALER, as_parts, scale
from nanolapo.rollouts import Rollouts


@dataclass(frozen=True)
class Options:
    lam: NotNegative[float] | None = None  # the price per token to start from; None: 0.001, scaled
    rate: NotNegative[float] | None = None  # what a step adds per unit of accuracy; None: 0.001, scaled
    reference: Share | None = None  # accuracy to keep; None: that of the first step


def next_price(lam: float, rate: float, accuracy: float, reference: float) -> float:
    """The price per token of the next step.

    >>> round(next_price(0.001, 0.001, 0.72, 0.62), 6), next_price(0.001, 0.01, 0.42, 0.62)
    (0.0011, 0.0)
    """
    return max(0.0, lam + rate * (accuracy - reference))


class ADlp(Method):
    """A price per token that follows accuracy."""

    Options = Options

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        o = self.options
        self.lam = 0.001 / scale(config, DEEPSCALER, "method.options.lam") if o.lam is None else o.lam
        self.rate = 0.001 / scale(config, DEEPSCALER, "method.options.rate") if o.rate is None else o.rate
        self.reference = o.reference

    def reward(self, rollouts: Rollouts) -> dict[str, np.ndarray]:
        return as_parts(rollouts, rollouts.correct_B - self.lam * rollouts.lengths_B)

    def after_step(self, rollouts: Rollouts) -> dict[str, float]:
        used, reached = self.lam, float(rollouts.correct_B.mean())
        if self.reference is None:
            self.reference = reached
        self.lam = next_price(used, self.rate, reached, self.reference)
        return {"a_dlp/lam": used}

    def state_dict(self) -> dict[str, Any]:
        return {"lam": self.lam, "reference": self.reference}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.lam, self.reference = state["lam"], state["reference"]
