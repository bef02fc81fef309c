"""HAPO, the token-aware one ("From Uniform to Heterogeneous", arXiv 2509.16591; code starriver030515/HAPO).

This is not the history-aware HAPO. All depends on how unsure the policy was at a token: entropies H of the old policy over
the batch give u = log(max(H, 1e-8)), a pivot (the 0.8 quantile of u, nearest), h = (u - pivot) / sqrt(mean((u - pivot)^2)),
then positive h are divided by their maximum and negative ones by the size of their minimum: h in [-1, 1].

    2. advantage       A = (R - m) / (s + 1e-6), m and (population) s over the group's tokens: long answers weigh more.
                       Any |A| >= 5 in a group: ordinary group advantage there
    3. redistribution  A_ent = A (1 + h). Neutral zone: 1 - low/2 < r < 1 + high/2, with the widths of part 4.
                       h > 0: A inside the zone, A_ent outside; otherwise: A_ent inside, A outside
    4. clip            low (1 - h) where h < 0, high (1 + h) where h > 0; token mean, dual clip at 10

NOT here: part 1, another temperature for every token while sampling, T (1 + 0.05 h). The engines take one temperature per
request, so this is three quarters of the method. The rest of the recipe is DAPO's: overlong shaping over the last 4096 of
10,240 tokens (that share of our limit), dynamic sampling, reward +1 / -1.

The text is the paper's. The released code is not imitated where it differs: it divides negative h by their negative
minimum, so no h is below 0; it takes the entropies of the policy as it is now, per micro-batch; it drops no groups;
and it clips at 0.2 on both sides. It samples at most 16 rounds, here 4.

Edge: equal rewards: A 0. Equal entropies: h 0, which leaves plain clipping. With one update per step r is 1, so every token
is inside the zone: unsure tokens get A, sure ones A (1 + h). No state (the sampler of part 1 would need some).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanolapo.advantages import MIN_SPREAD, group_advantages
from nanolapo.config import Config, Share, UserError
from nanolapo.losses import Loss, LossInputs, clipped_surrogate
from nanolapo.methods import dapo
from nanolapo.rollouts import Rollouts


@dataclass(frozen=True)
class Options(dapo.Options):
    quantile: Share = 0.8  # of log-entropy: the pivot between sure and unsure tokens


def entropy_scale(entropies_N: np.ndarray, quantile: float) -> tuple[float, float, float]:
    """(pivot, largest distance above it, largest below it) of log-entropy, over all tokens of the batch."""
    if not len(entropies_N):
        return 0.0, 0.0, 0.0
    u = np.log(np.maximum(np.asarray(entropies_N, dtype=np.float64), 1e-8))
    pivot = float(np.quantile(u, quantile, method="nearest"))
    return pivot, float(u.max()) - pivot, pivot - float(u.min())


def normalized_entropies(entropy_BT: Tensor, scale: tuple[float, float, float]) -> Tensor:
    """h of every token, in [-1, 1]. Dividing by sqrt(mean((u - pivot)^2)) first, as published, would cancel out.

    >>> entropies = np.exp(np.array([-4.0, -2.0, 0.0, 1.0, 2.0]))
    >>> normalized_entropies(torch.from_numpy(entropies), entropy_scale(entropies, quantile=0.5)).tolist()
    [-1.0, -0.5, 0.0, 0.5, 1.0]
    """
    pivot, top, bottom = scale
    distance = entropy_BT.clamp(min=1e-8).log() - pivot
    return torch.where(distance > 0, distance / (top or 1.0), distance / (bottom or 1.0)).clamp(-1, 1)


def token_group_advantages(rewards_PG: Tensor, lengths_PG: Tensor) -> Tensor:
    """Part 2, [P, G].

    >>> token_group_advantages(torch.tensor([[1.0, 0.0]]), torch.tensor([[10, 30]]))    # m = 0.25, s = sqrt(3)/4
    tensor([[ 1.7320, -0.5773]])
    """
    rewards = rewards_PG.double()
    shares = lengths_PG.double() / lengths_PG.double().sum(dim=1, keepdim=True).clamp(min=1)
    centred = rewards - (shares * rewards).sum(dim=1, keepdim=True)
    std = (shares * centred.square()).sum(dim=1, keepdim=True).sqrt()
    by_token = torch.where(rewards.amax(1, True) - rewards.amin(1, True) < MIN_SPREAD, 0.0, centred / (std + 1e-6))
    extreme = (by_token.abs() >= 5).any(dim=1, keepdim=True)
    return torch.where(extreme, group_advantages(rewards), by_token).to(rewards_PG.dtype)


def heterogeneous_loss(
    logprobs_BT: Tensor, old_BT: Tensor, advantages_BT: Tensor, h_BT: Tensor, low: float, high: float, dual_clip: float
) -> tuple[Tensor, Tensor]:
    """Parts 3 and 4 per token: (loss_BT, clipped_BT)."""
    ratio = torch.exp(logprobs_BT - old_BT)
    low_BT, high_BT = low * (1 - h_BT.clamp(max=0)), high * (1 + h_BT.clamp(min=0))
    neutral = (ratio > 1 - low_BT / 2) & (ratio < 1 + high_BT / 2)
    a = torch.where((h_BT > 0) == neutral, advantages_BT, advantages_BT * (1 + h_BT))
    return clipped_surrogate(ratio, a, low_BT, high_BT, dual_clip)


class TokenHapoLoss(Loss):
    """heterogeneous_loss, measured against the entropies of the whole batch."""

    needs_entropy = True

    def __init__(self, config: Config, quantile: float) -> None:
        super().__init__(config)
        self.quantile = quantile

    def prepare(self, rollouts: Rollouts, advantages: Tensor) -> None:
        entropies = [rollouts.old_entropies[row] for row in sorted(rollouts.old_entropies)]
        self.scale = entropy_scale(np.concatenate([*entropies, np.zeros(0)]), self.quantile)

    def __call__(self, x: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        assert x.entropy_BT is not None
        h_BT, c = normalized_entropies(x.entropy_BT, self.scale), self.config
        loss_BT, clipped_BT = heterogeneous_loss(
            x.logprobs_BT, x.old_logprobs_BT, x.advantages_BT, h_BT, c.clip_low, c.clip_high, c.dual_clip
        )
        return loss_BT, {"clip_fraction": clipped_BT.float(), "unsure_fraction": (h_BT > 0).float()}


class TokenHapo(dapo.Dapo):
    Options = Options
    uses_normalize_std = False
    cache_share = 4096 / 10240

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.loss.kind != "grpo" or config.loss.kl_coef or config.loss.reweighs:
            raise UserError(
                "hapo_tokens:TokenHapo has its own policy loss: needs loss.kind=grpo, loss.kl_coef=0, loss.tis_cap=0, and "
                "no loss.sequence_mask or loss.mastered_mask (configs/methods/hapo-tokens.yaml)"
            )
        self.loss = TokenHapoLoss(config, self.options.quantile)

    def advantage(self, rollouts: Rollouts, rewards_PG: Tensor) -> Tensor:
        lengths_PG = torch.from_numpy(rollouts.by_group(rollouts.lengths_B))
        return self.filtered(rollouts, token_group_advantages(rewards_PG, lengths_PG).flatten())
