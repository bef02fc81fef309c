"""Losses that weigh each token by a ratio without gradient: CISPO by its own, MinPRO by the smallest before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from nanolapo.config import Must
from nanolapo.losses.grpo import Loss, LossInputs


@dataclass(frozen=True)
class CispoOptions:
    cap: Annotated[float, Must(lambda x: x >= 1, "must be at least 1")] = 5.0  # largest weight of a token


class Cispo(Loss):
    """CISPO (MiniMax-M1, arXiv 2506.13585): -sg(min(r, cap)) A log p. No token loses its gradient.

    Sources differ on the bound (verl: both sides, around 1); here it is an absolute upper bound, as in ScaleRL (5).
    """

    Options = CispoOptions
    aggregations = ("token_mean",)
    dual_clips = False

    def policy_term(self, x: LossInputs) -> tuple[Tensor, Tensor]:
        ratio = torch.exp(x.logprobs_BT - x.old_logprobs_BT).detach()
        return -ratio.clamp(max=self.options.cap) * x.advantages_BT * x.logprobs_BT, ratio > self.options.cap


class Minpro(Loss):
    """MinPRO (arXiv 2601.22718; UNVERIFIED, abstract only): the smallest token ratio of the prefix stands in for their
    product. Ours: it multiplies GRPO's clipped term, without gradient, 1 at the first token and never above 1.
    """

    def policy_term(self, x: LossInputs) -> tuple[Tensor, Tensor]:
        loss_BT, touched_BT = super().policy_term(x)
        ratio = torch.exp(x.logprobs_BT - x.old_logprobs_BT).detach()
        before = torch.cat([torch.ones_like(ratio[:, :1]), ratio[:, :-1]], dim=1)  # 1, r_1, r_2, ...
        return loss_BT * before.cummin(dim=1).values, touched_BT
