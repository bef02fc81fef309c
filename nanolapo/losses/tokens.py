"""Losses that weigh each token by a ratio without gradient: CISPO by its own, MinPRO also by the smallest before it."""

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
    loss.clip_low and clip_high do not act.
    """

    Options = CispoOptions
    aggregations = ("token_mean",)
    dual_clips = False

    def policy_term(self, x: LossInputs) -> tuple[Tensor, Tensor]:
        ratio = torch.exp(x.logprobs_BT - x.old_logprobs_BT).detach()
        return -ratio.clamp(max=self.options.cap) * x.advantages_BT * x.logprobs_BT, ratio > self.options.cap


class Minpro(Loss):
    """MinPRO (arXiv 2601.22718; UNVERIFIED, its objective from a survey): -sg(clip(m r)) A log p, with the smallest ratio m
    of the tokens before, which stands in for the product of all. No token loses its gradient. Ours: m is 1 at the first.
    """

    aggregations = ("token_mean",)
    dual_clips = False

    def policy_term(self, x: LossInputs) -> tuple[Tensor, Tensor]:
        ratio = torch.exp(x.logprobs_BT - x.old_logprobs_BT).detach()
        before = torch.cat([torch.ones_like(ratio[:, :1]), ratio.cummin(dim=1).values[:, :-1]], dim=1)
        weight = (before * ratio).clamp(1 - self.config.clip_low, 1 + self.config.clip_high)
        return -weight * x.advantages_BT * x.logprobs_BT, weight != before * ratio
