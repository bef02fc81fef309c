"""GRPO's loss and the parts that every other loss shares: clip, KL, importance weights, and what the sum is divided by.

Legend: B rows, T response tokens (padded to the right with log-probs 0 and advantage 0). r is a token's ratio of new to old
probability, A its advantage.

A loss returns per-token values; only `row_weights` decides what they are divided by, and it uses counts taken over the
whole optimizer batch: every rank and every micro-batch. So the gradient does not depend on how rows are split, and no mean
of means can creep in. What a loss needs to know about the whole batch is computed in `prepare`, before it is split.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanolapo.config import Config, NoOptions, UserError
from nanolapo.config_file import build
from nanolapo.ranks import to_device
from nanolapo.rollouts import Rollouts


@dataclass(frozen=True)
class BatchTotals:
    """Counts over one optimizer batch, all ranks together, without rows that are masked out."""

    tokens: int
    rows: int
    max_new_tokens: int


def row_weights(lengths_B: Tensor, aggregation: str, totals: BatchTotals) -> Tensor:
    """Return the factor of each token of row b, so that the weighted sum over all tokens of all ranks is the loss.

    token_mean     1 / (all tokens)            every token counts the same: long answers weigh more
    sequence_mean  1 / (L_b * all rows)        every answer counts the same: a short answer's tokens weigh more,
                                               which by itself prefers short right answers and long wrong ones
    constant       1 / (max_new_tokens * rows) Dr. GRPO: no length preference, a constant scale

    >>> row_weights(torch.tensor([3, 1]), "sequence_mean", BatchTotals(tokens=4, rows=2, max_new_tokens=8))
    tensor([0.1667, 0.5000])
    """
    lengths = lengths_B.double()
    if aggregation == "token_mean":
        weights = torch.full_like(lengths, 1.0 / totals.tokens)
    elif aggregation == "sequence_mean":
        weights = 1.0 / (lengths.clamp(min=1) * totals.rows)
    elif aggregation == "constant":
        weights = torch.full_like(lengths, 1.0 / (totals.max_new_tokens * totals.rows))
    else:
        raise ValueError(f"unknown aggregation {aggregation!r}")
    return weights.float()


def clipped_surrogate(
    ratio_BT: Tensor, advantages_BT: Tensor, clip_low: Any, clip_high: Any, dual_clip: float = 0.0
) -> tuple[Tensor, Tensor]:
    """-min(r A, clip(r, 1 - low, 1 + high) A), and with dual_clip = c at most -A c where A < 0. Both widths are numbers, or
    both tensors [B, T].

    A token is touched only where a clip removes its gradient: r above 1 + high with A > 0, r below 1 - low with A < 0, and
    r above c with A < 0 (without the dual clip, one token that has become likely by mistake has no bound).
    """
    unclipped = ratio_BT * advantages_BT
    clipped = ratio_BT.clamp(1 - clip_low, 1 + clip_high) * advantages_BT
    loss, touched = -torch.minimum(unclipped, clipped), clipped < unclipped
    if dual_clip:
        too_far = (advantages_BT < 0) & (ratio_BT > dual_clip)
        loss, touched = torch.where(too_far, -advantages_BT * dual_clip, loss), touched | too_far
    return loss, touched


def policy_loss(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """PPO's and GRPO's loss (arXiv 2402.03300): the clipped surrogate with one ratio per token.

    >>> ratio = torch.tensor([[1.3, 1.3]]).log()
    >>> loss, clipped = policy_loss(ratio, torch.zeros(1, 2), torch.tensor([[1.0, -1.0]]))
    >>> loss.tolist(), clipped.tolist()
    ([[-1.2000000476837158, 1.2999999523162842]], [[True, False]])
    """
    assert logprobs_BT.shape == old_logprobs_BT.shape == advantages_BT.shape, (
        f"{tuple(logprobs_BT.shape)}, {tuple(old_logprobs_BT.shape)}, {tuple(advantages_BT.shape)}"
    )
    ratio = torch.exp(logprobs_BT - old_logprobs_BT)
    return clipped_surrogate(ratio, advantages_BT, clip_low, clip_high, dual_clip)


def kl_penalty(logprobs_BT: Tensor, ref_logprobs_BT: Tensor, kind: str = "k3") -> Tensor:
    """Per-token estimate of KL(policy || reference) on sampled tokens, d = log p_ref - log p.

    k1 -d, unbiased value, but its gradient through the loss is zero in expectation; k2 d^2/2, the gradient of the true KL
    when samples are on-policy; k3 exp(d) - d - 1, always >= 0, the paper's choice (its gradient is that of the reverse
    direction, KL(reference || policy), when samples are on-policy).
    """
    d = ref_logprobs_BT - logprobs_BT
    if kind == "k1":
        return -d
    if kind == "k2":
        return d.square() / 2
    if kind == "k3":
        return torch.exp(d) - d - 1
    raise ValueError(f"unknown KL estimator {kind!r}")


def tis_weights(old_logprobs_BT: Tensor, sampler_logprobs_BT: Tensor, cap: float) -> Tensor:
    """Truncated importance sampling: w = min(exp(logp_old - logp_sampler), cap), no gradient.

    Corrects for a sampler whose probabilities differ a little from the trainer's (bf16 kernels, another engine).
    """
    return torch.exp(old_logprobs_BT - sampler_logprobs_BT).clamp(max=cap).detach()


def sequence_weights(
    old_logprobs_BT: Tensor, sampler_logprobs_BT: Tensor, mask_BT: Tensor, low: float, high: float
) -> Tensor:
    """Sequence-masked importance weights: every token of a row gets w = product over t of p_old / p_sampler, or 0 if w is
    not in [low, high]. No gradient.

    >>> old, mask = torch.tensor([[0.6, 0.5], [0.9, 0.8]]).log(), torch.ones(2, 2)
    >>> sequence_weights(old, torch.full((2, 2), 0.5).log(), mask, low=0.0, high=2.0)
    tensor([[1.2000, 1.2000],
            [0.0000, 0.0000]])
    """
    weights_B1 = torch.exp(((old_logprobs_BT - sampler_logprobs_BT) * mask_BT).sum(dim=1, keepdim=True))
    inside_B1 = (weights_B1 >= low) & (weights_B1 <= high)
    return weights_B1.where(inside_B1, torch.zeros_like(weights_B1)).expand_as(mask_BT).detach()


def mastered_tokens(x: LossInputs, below: float, probability: float) -> Tensor:
    """DMMPT (UloRL, arXiv 2507.19766, Eq. 9 and 10): which tokens are mastered, bool [B, T].

    Those with at least this old probability, in right answers whose mean entropy (nats per token) is below a target.
    """
    assert x.entropy_BT is not None  # Loss asks for it
    right_B = to_device(np.array([x.rollouts.rows[row].correct for row in x.rows], dtype=bool), x.mask_BT.device)
    narrow_B = x.entropy_BT.sum(dim=1) / x.mask_BT.sum(dim=1) < below
    return (x.old_logprobs_BT.exp() >= probability) & (right_B & narrow_B)[:, None]


@dataclass(frozen=True)
class LossInputs:
    """One micro-batch on its way to the loss; rows are padded to the right with zeros where mask_BT is 0."""

    logprobs_BT: Tensor  # of the policy being trained, with gradient
    old_logprobs_BT: Tensor  # of the policy at the start of this step
    sampler_logprobs_BT: Tensor  # as recorded while sampling; of tokens given without a random choice the old ones
    ref_logprobs_BT: Tensor | None  # of the stage's first model; None when loss.kl_coef is 0
    entropy_BT: Tensor | None  # of the policy at the start of this step; only when the loss sets needs_entropy
    advantages_BT: Tensor
    mask_BT: Tensor  # 1 for the answer's tokens, given ones too, by position (the end token included)
    rows: list[int]  # row numbers in `rollouts`
    rollouts: Rollouts


class Loss:
    """GRPO's loss. Another loss overrides `policy_term`, and rarely more.

    update_policy calls `prepare` once a step, the loss itself once a micro-batch, and `after_update` once a step.
    """

    Options: type = NoOptions  # a frozen dataclass; loss.options in the YAML fills it, strictly
    aggregations: tuple[str, ...] = ("token_mean", "sequence_mean", "constant")  # those that the loss is defined with
    dual_clips = True  # True if loss.dual_clip may be set
    acts_without_advantage = False  # True if the loss also acts where the advantage is 0
    # True: `drift` is set before each optimizer batch, at the cost of a forward pass (none for the first update of a step
    # with loss.old_logprobs=trainer)
    needs_drift = False
    drift = 0.0  # mean of log p_old - log p over all tokens of the optimizer batch, on all ranks
    needs_entropy = False  # True: rollouts.old_entropies is filled before `prepare`, at the cost of a forward pass

    def __init__(self, config: Config) -> None:
        c = self.config = config.loss
        self.options: Any = build(self.Options, dict(c.options), "loss.options")
        self.state: dict[str, float] = {}  # what the loss remembers; goes into every checkpoint
        if c.kl_coef:
            self.acts_without_advantage = True
        if c.mastered_mask:
            self.needs_entropy = True
        if c.aggregation not in self.aggregations:
            raise UserError(
                f"loss.aggregation={c.aggregation!r}: loss.kind={c.kind!r} is defined with "
                f"{' or '.join(self.aggregations)}; set loss.aggregation={self.aggregations[0]}"
            )
        if c.dual_clip and not self.dual_clips:
            raise UserError(
                f"loss.dual_clip={c.dual_clip}: loss.kind={c.kind!r} has no dual clip; set loss.dual_clip=0"
            )

    def prepare(self, rollouts: Rollouts, advantages: Tensor) -> None:
        """Compute what the loss must know about the whole batch. Every rank computes the same.

        All ranks hold the old policy's log-probs as recorded while sampling: rollouts.sampler_logprobs.
        """

    def policy_term(self, x: LossInputs) -> tuple[Tensor, Tensor]:
        """(loss_BT, touched_BT): touched marks tokens whose loss is not -r A (clipped, capped, ...)."""
        c = self.config
        return policy_loss(x.logprobs_BT, x.old_logprobs_BT, x.advantages_BT, c.clip_low, c.clip_high, c.dual_clip)

    def __call__(self, x: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the per-token loss [B, T] and per-token quantities to log (each averaged over the trained tokens).

        Masks and weights act on the policy term alone; what they mask keeps its KL term and its place in the denominators.
        """
        c = self.config
        loss_BT, touched_BT = self.policy_term(x)
        ratio_BT = torch.exp(x.logprobs_BT - x.old_logprobs_BT).detach()
        logged = {"clip_fraction": touched_BT.float(), "ratio": ratio_BT}
        if c.tis_cap:
            weights_BT = tis_weights(x.old_logprobs_BT, x.sampler_logprobs_BT, c.tis_cap)
            loss_BT = loss_BT * weights_BT
            logged["tis_weight"] = weights_BT
        if c.sequence_mask:
            weights_BT = sequence_weights(x.old_logprobs_BT, x.sampler_logprobs_BT, x.mask_BT, *c.sequence_mask)
            loss_BT = loss_BT * weights_BT
            logged |= {"sequence_weight": weights_BT, "sequence_masked": (weights_BT == 0).float()}
        if c.mastered_mask:
            mastered_BT = mastered_tokens(x, *c.mastered_mask)
            loss_BT = loss_BT.masked_fill(mastered_BT, 0.0)
            logged["mastered"] = mastered_BT.float()
        if x.ref_logprobs_BT is not None:
            kl_BT = kl_penalty(x.logprobs_BT, x.ref_logprobs_BT, c.kl_kind)
            loss_BT = loss_BT + c.kl_coef * kl_BT
            logged["kl"] = kl_BT.detach()
        return loss_BT, logged

    def after_update(self, trained: dict[str, float]) -> dict[str, float]:
        """Change `state` after the updates of a step, given what they logged; returns further numbers to log."""
        return {}
