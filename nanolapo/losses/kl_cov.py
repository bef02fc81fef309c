"""KL-Cov (arXiv 2505.22617, as used by DOT): no clip, and a KL term on the few tokens that narrow the policy most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanolapo.config import NotNegative, Share
from nanolapo.losses.grpo import Loss, LossInputs
from nanolapo.ranks import to_device
from nanolapo.rollouts import Rollouts

ROUNDING = 1e-4  # between two float32 passes of the same weights log-probs differ by less


@dataclass(frozen=True)
class KlCovOptions:
    share: Share = 0.002  # of the step's tokens that carry the KL term
    coef: NotNegative[float] = 1.0  # its weight


def high_covariance(logprobs: Sequence[np.ndarray], advantages: Tensor, keep_B: np.ndarray, share: float) -> Tensor:
    """Choose the `share` of tokens with the largest (A - mean A) (log p - mean log p), bool [B, T].

    logprobs: [T_b] per row, of the policy that sampled, nan where it did not; advantages [B] or [B, T]; means and choice
    run over all tokens of the rows in keep_B, at least one token is chosen. Of equal values the earlier one wins. verl
    chooses again in every micro-batch, from the current log-probs; this choice is made once, so no split of the batch can
    change it.
    """
    width = max((len(row) for row in logprobs), default=0)
    values_BT = np.full((len(logprobs), width), np.nan)  # nan: no token there
    advantages_BT = advantages.double().reshape(len(logprobs), -1)[:, :width].expand(-1, width).cpu().numpy()
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


class KlCov(Loss):
    """-r A for all tokens, plus coef |log p - log p_old| for the chosen ones. The choice needs the whole batch.

    The second term has the slope coef however small the difference is. Below ROUNDING it counts as none, or the first
    update after sampling, where both are equal, would follow the signs of rounding errors. loss.clip_low and clip_high do
    not act.
    """

    Options = KlCovOptions
    aggregations = ("token_mean", "sequence_mean")
    dual_clips = False
    acts_without_advantage = True
    chosen_BT: Tensor  # of this step, all rows

    def prepare(self, rollouts: Rollouts, advantages: Tensor) -> None:
        logprobs = [row.sampler_logprobs.copy() for row in rollouts.rows]
        for row, mine in zip(rollouts.rows, logprobs, strict=True):
            mine[: row.num_given] = np.nan  # no policy drew these
        self.chosen_BT = high_covariance(logprobs, advantages, rollouts.keep_B, self.options.share)

    def policy_term(self, x: LossInputs) -> tuple[Tensor, Tensor]:
        chosen_BT = to_device(self.chosen_BT[x.rows, : x.mask_BT.shape[1]], x.mask_BT.device)
        log_ratio = x.logprobs_BT - x.old_logprobs_BT
        moved_BT = chosen_BT & (log_ratio.abs() >= ROUNDING)
        return -torch.exp(log_ratio) * x.advantages_BT + self.options.coef * moved_BT * log_ratio.abs(), chosen_BT
