"""Losses with one ratio per answer: GSPO, LUSPO, and DHPO, which mixes it with the token's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nanolapo.config import NotNegative, Share
from nanolapo.losses.grpo import Loss, LossInputs, clipped_surrogate


def sequence_ratio(x: LossInputs) -> Tensor:
    """GSPO's s_i = exp(mean over t of log r_t), repeated for every token of its row.

    The value is s_i everywhere. The gradient at token t is s_i * grad log p_t, so the mean over the row's tokens has the
    value and gradient of the sequence form, and advantages may still differ between tokens.
    """
    log_ratio = (x.logprobs_BT - x.old_logprobs_BT) * x.mask_BT
    mean_B1 = log_ratio.sum(dim=1, keepdim=True) / x.mask_BT.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.exp(mean_B1.detach() + x.logprobs_BT - x.logprobs_BT.detach())


class Gspo(Loss):
    """GSPO (arXiv 2507.18071): one ratio per sequence, clipped as a whole."""

    aggregations = ("sequence_mean",)
    dual_clips = False

    def policy_term(self, x: LossInputs) -> tuple[Tensor, Tensor]:
        return clipped_surrogate(sequence_ratio(x), x.advantages_BT, self.config.clip_low, self.config.clip_high)


class Luspo(Gspo):
    """LUSPO (arXiv 2602.05261): GSPO's term times the length L_i, so that sequence_mean adds up tokens per sequence.

    It cancels GSPO's 1 / L_i, under which a long wrong answer is pushed down less per token than a short one. It makes
    answers longer by itself, which matters if you combine it with a length reward.
    """

    def policy_term(self, x: LossInputs) -> tuple[Tensor, Tensor]:
        loss_BT, touched_BT = super().policy_term(x)
        return loss_BT * x.mask_BT.sum(dim=1, keepdim=True), touched_BT


@dataclass(frozen=True)
class DhpoOptions:
    """Unverified: the weight is ours, the sequence clips are GSPO's numbers. The token ratio's clips are loss.clip_*."""

    token_weight: Share = 0.5  # w of the token ratio, 1 - w of the sequence ratio
    sequence_clip_low: Share = 3e-4
    sequence_clip_high: NotNegative[float] = 4e-4


class Dhpo(Loss):
    """DHPO (arXiv 2601.05607; UNVERIFIED, abstract: its averaged mix): token ratio r and sequence ratio s, each clipped in
    its own range before they are mixed. Ours: w, and -min(m A, m' A) with m = w r + (1 - w) s, and m' of clipped r, s.
    """

    Options = DhpoOptions
    dual_clips = False

    def policy_term(self, x: LossInputs) -> tuple[Tensor, Tensor]:
        c, o = self.config, self.options
        w, r, s = o.token_weight, torch.exp(x.logprobs_BT - x.old_logprobs_BT), sequence_ratio(x)
        unclipped = (w * r + (1 - w) * s) * x.advantages_BT
        r_clipped = r.clamp(1 - c.clip_low, 1 + c.clip_high)
        s_clipped = s.clamp(1 - o.sequence_clip_low, 1 + o.sequence_clip_high)
        clipped = (w * r_clipped + (1 - w) * s_clipped) * x.advantages_BT
        return -torch.minimum(unclipped, clipped), clipped < unclipped
