"""The published policy losses and their parts, as pure functions of tensors. Legend: B rows, T response tokens (padded
to the right with log-probs 0 and advantage 0). r is a token's ratio of new to old probability, A its advantage.

Every function returns per-token values; only `row_weights` decides what they are divided by, and it uses counts taken over
the whole optimizer batch: every rank and every micro-batch. So the gradient does not depend on how rows are split, and no
mean of means can creep in. What a loss needs to know about the whole batch (KL-Cov) is computed before it is split.

The losses return (loss_BT, touched_BT); touched marks the tokens that the loss treats otherwise than -r A: clipped, capped,
or under a KL term. With one update per rollout every r is 1 and all of them but the divisor are the same policy gradient.

Where they come from: policy_loss, CISPO and KL-Cov from the maintained code of verl and of the authors; GSPO from the
authors' code; LUSPO from a third-party library, its paper was not read; UNVERIFIED are R2VPO (two third-party
codes), DHPO and MinPRO (abstracts only, our readings of them).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanolapo.config import LossConfig


@dataclass(frozen=True)
class BatchTotals:
    """Counts over one optimizer batch, all ranks together, without rows that are masked out."""

    tokens: int
    rows: int
    max_new_tokens: int


def row_weights(lengths_B: Tensor, aggregation: str, totals: BatchTotals) -> Tensor:
    """What each token of row b is multiplied by, so that the weighted sum over all tokens of all ranks is the loss.

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


def sequence_ratio(logprobs_BT: Tensor, old_logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """GSPO's s_i = exp(mean over t of log r_t), repeated for every token of its row.

    The value is s_i everywhere; the gradient at token t is s_i * grad log p_t, so that the mean over the row's tokens has
    value and gradient of the sequence form, and advantages may still differ between tokens.
    """
    log_ratio = (logprobs_BT - old_logprobs_BT) * mask_BT
    mean_B1 = log_ratio.sum(dim=1, keepdim=True) / mask_BT.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.exp(mean_B1.detach() + logprobs_BT - logprobs_BT.detach())


def gspo_loss(
    logprobs_BT: Tensor, old_logprobs_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """GSPO (arXiv 2507.18071): one ratio per sequence, clipped as a whole. To be averaged with sequence_mean."""
    return clipped_surrogate(sequence_ratio(logprobs_BT, old_logprobs_BT, mask_BT), advantages_BT, low, high)


def luspo_loss(
    logprobs_BT: Tensor, old_logprobs_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """LUSPO (arXiv 2602.05261): GSPO's term times the length L_i, so that sequence_mean adds up tokens per sequence.

    It takes back GSPO's 1 / L_i, under which long wrong answers are pushed down more softly per token than short ones.
    Makes answers longer on its own; combine it with a length reward knowingly.
    """
    loss_BT, touched_BT = gspo_loss(logprobs_BT, old_logprobs_BT, advantages_BT, mask_BT, low, high)
    return loss_BT * mask_BT.sum(dim=1, keepdim=True), touched_BT


def cispo_loss(
    logprobs_BT: Tensor, old_logprobs_BT: Tensor, advantages_BT: Tensor, cap: float
) -> tuple[Tensor, Tensor]:
    """CISPO (MiniMax-M1, arXiv 2506.13585): -sg(min(r, cap)) A log p. No token loses its gradient.

    Sources differ on the bound (verl: both sides, around 1); here an upper one, absolute, as in ScaleRL's setting of 5.
    """
    ratio = torch.exp(logprobs_BT - old_logprobs_BT).detach()
    return -ratio.clamp(max=cap) * advantages_BT * logprobs_BT, ratio > cap


def high_covariance(logprobs: Sequence[np.ndarray], advantages: Tensor, keep_B: np.ndarray, share: float) -> Tensor:
    """KL-Cov's choice: the `share` of tokens with the largest (A - mean A) (log p - mean log p), bool [B, T].

    logprobs: [T_b] per row, of the policy that sampled; advantages [B] or [B, T]; means and choice run over all tokens of
    the rows in keep_B, at least one token is chosen. Of equal values the earlier one wins. verl chooses anew in every
    micro-batch, from the current log-probs; this choice is made once, so no split of the batch can change it.
    """
    width = max((len(row) for row in logprobs), default=0)
    values_BT = np.full((len(logprobs), width), np.nan)  # nan: no token there
    advantages_BT = advantages.double().reshape(len(logprobs), -1).expand(-1, width).cpu().numpy()
    for b in np.flatnonzero(keep_B):
        values_BT[b, : len(logprobs[b])] = logprobs[b]
    at = np.flatnonzero(~np.isnan(values_BT))
    chosen = np.zeros(values_BT.size, dtype=bool)
    if len(at) and share:
        logp_N, advantages_N = values_BT.ravel()[at], advantages_BT.ravel()[at]
        covariance_N = (advantages_N - advantages_N.mean()) * (logp_N - logp_N.mean())
        largest = np.argsort(-covariance_N, kind="stable")[: max(1, int(len(at) * share))]
        chosen[at[largest]] = True
    return torch.from_numpy(chosen.reshape(values_BT.shape))


def kl_cov_loss(
    logprobs_BT: Tensor, old_logprobs_BT: Tensor, advantages_BT: Tensor, chosen_BT: Tensor, coef: float
) -> tuple[Tensor, Tensor]:
    """KL-Cov (arXiv 2505.22617, as used by DOT): -r A for all tokens, plus coef |log p - log p_old| for the chosen ones."""
    log_ratio = logprobs_BT - old_logprobs_BT
    return -torch.exp(log_ratio) * advantages_BT + coef * chosen_BT * log_ratio.abs(), chosen_BT


def r2vpo_loss(
    logprobs_BT: Tensor, old_logprobs_BT: Tensor, advantages_BT: Tensor, lam: float
) -> tuple[Tensor, Tensor]:
    """R2VPO (arXiv 2601.03320; UNVERIFIED): no clip, but a price on the ratio's variance, -(r A - lam (r - 1)^2).

    The form is that of two third-party implementations. The paper adapts lam as a dual variable; see next_lam.
    """
    ratio = torch.exp(logprobs_BT - old_logprobs_BT)
    return -(ratio * advantages_BT - lam * (ratio - 1).square()), torch.zeros_like(ratio, dtype=torch.bool)


def next_lam(lam: float, variance: float, rate: float, target: float) -> float:
    """R2VPO's lam for the next step (UNVERIFIED: the rule is ours): up while mean((r - 1)^2) is above target, else down.

    >>> next_lam(1.0, variance=0.03, rate=2.0, target=0.01), next_lam(0.01, variance=0.0, rate=2.0, target=0.01)
    (1.04, 0.0)
    """
    return max(0.0, lam + rate * (variance - target))


def dhpo_loss(
    logprobs_BT: Tensor, old_logprobs_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor, weight: float,
    token_clip: tuple[float, float], sequence_clip: tuple[float, float],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """DHPO (January 2026, id not confirmed; UNVERIFIED, abstract only): token ratio r and sequence ratio s, each clipped in
    its own range before they are mixed. The mix is ours: m = w r + (1 - w) s, clipped m likewise, -min(m A, clipped m A).
    """
    r = torch.exp(logprobs_BT - old_logprobs_BT)
    s = sequence_ratio(logprobs_BT, old_logprobs_BT, mask_BT)
    unclipped = (weight * r + (1 - weight) * s) * advantages_BT
    r_clipped = r.clamp(1 - token_clip[0], 1 + token_clip[1])
    s_clipped = s.clamp(1 - sequence_clip[0], 1 + sequence_clip[1])
    clipped = (weight * r_clipped + (1 - weight) * s_clipped) * advantages_BT
    return -torch.minimum(unclipped, clipped), clipped < unclipped


def minpro_loss(
    logprobs_BT: Tensor, old_logprobs_BT: Tensor, advantages_BT: Tensor, low: float, high: float, dual_clip: float = 0.0
) -> tuple[Tensor, Tensor]:
    """MinPRO (arXiv 2601.22718; UNVERIFIED, abstract only): the smallest token ratio of the prefix stands in for their
    product. Ours: it multiplies the usual clipped term, without gradient, 1 at the first token and never above 1.
    """
    loss_BT, touched_BT = policy_loss(logprobs_BT, old_logprobs_BT, advantages_BT, low, high, dual_clip)
    ratio = torch.exp(logprobs_BT - old_logprobs_BT).detach()
    before = torch.cat([torch.ones_like(ratio[:, :1]), ratio[:, :-1]], dim=1)  # 1, r_1, r_2, ...
    return loss_BT * before.cummin(dim=1).values, touched_BT


def loss_of_kind(
    c: LossConfig,
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    chosen_BT: Tensor | None = None,
    lam: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss that loss.kind names: (loss_BT, touched_BT). chosen_BT is for kl_cov, lam for r2vpo."""
    three = logprobs_BT, old_logprobs_BT, advantages_BT
    if c.kind == "grpo":
        return policy_loss(*three, c.clip_low, c.clip_high, c.dual_clip)
    if c.kind == "gspo":
        return gspo_loss(*three, mask_BT, c.clip_low, c.clip_high)
    if c.kind == "luspo":
        return luspo_loss(*three, mask_BT, c.clip_low, c.clip_high)
    if c.kind == "cispo":
        return cispo_loss(*three, c.cispo_cap)
    if c.kind == "kl_cov":
        assert chosen_BT is not None, "Method.prepare_loss chooses KL-Cov's tokens; it must run before the loss"
        return kl_cov_loss(*three, chosen_BT, c.kl_cov_coef)
    if c.kind == "r2vpo":
        assert lam is not None
        return r2vpo_loss(*three, lam)
    if c.kind == "dhpo":
        clips = (c.clip_low, c.clip_high), (c.dhpo_clip_low, c.dhpo_clip_high)
        return dhpo_loss(*three, mask_BT, c.dhpo_weight, *clips)
    if c.kind == "minpro":
        return minpro_loss(*three, c.clip_low, c.clip_high, c.dual_clip)
    raise ValueError(f"unknown policy loss {c.kind!r}")


def acts_without_advantage(c: LossConfig) -> bool:
    """Has the loss a term on tokens whose advantage is 0? (A KL term; what kl_cov and r2vpo put on the ratio.)"""
    return c.kl_coef != 0 or c.kind in ("kl_cov", "r2vpo")


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
