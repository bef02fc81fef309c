"""R2VPO (arXiv 2601.03320, 2605.26784; UNVERIFIED): a penalty lam on the variance of the ratio instead of a clip.

The form is that of two third-party implementations. The paper adapts lam as a dual variable; the rule here, its rate and
its target are ours, because the paper's are not available.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nanolapo.config import Config, NotNegative
from nanolapo.losses.grpo import Loss, LossInputs


@dataclass(frozen=True)
class R2vpoOptions:
    lam: NotNegative[float] = 1.0  # at the start
    rate: NotNegative[float] = 1.0  # 0 keeps lam as it is
    target: NotNegative[float] = 0.01  # of mean((r - 1)^2)


def next_lam(lam: float, variance: float, rate: float, target: float) -> float:
    """lam for the next step: it rises while mean((r - 1)^2) is above target, else it falls.

    >>> next_lam(1.0, variance=0.03, rate=2.0, target=0.01), next_lam(0.01, variance=0.0, rate=2.0, target=0.01)
    (1.04, 0.0)
    """
    return max(0.0, lam + rate * (variance - target))


class R2vpo(Loss):
    """-(r A - lam (r - 1)^2). `state` holds lam, which moves after every step with an update. loss.clip_low and
    clip_high do not act."""

    Options = R2vpoOptions
    dual_clips = False
    acts_without_advantage = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.state = {"r2vpo_lam": self.options.lam}

    def policy_term(self, x: LossInputs) -> tuple[Tensor, Tensor]:
        ratio = torch.exp(x.logprobs_BT - x.old_logprobs_BT)
        loss_BT = -(ratio * x.advantages_BT - self.state["r2vpo_lam"] * (ratio - 1).square())
        return loss_BT, torch.zeros_like(ratio, dtype=torch.bool)

    def __call__(self, x: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        loss_BT, logged = super().__call__(x)
        return loss_BT, logged | {"ratio_variance": (logged["ratio"] - 1).square()}

    def after_update(self, trained: dict[str, float]) -> dict[str, float]:
        variance = trained.get("ratio_variance", math.nan)  # missing in a step without any update
        if math.isfinite(variance):
            self.state["r2vpo_lam"] = next_lam(
                self.state["r2vpo_lam"], variance, self.options.rate, self.options.target
            )
        return dict(self.state)
