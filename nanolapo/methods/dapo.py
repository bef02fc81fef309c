"""DAPO (Yu et al., arXiv 2503.14476; formulas from the code of its recipe in verl).

Reward +1 for a right answer and -1 otherwise, plus overlong shaping; dynamic sampling; clip-higher and token mean (both in
configs/methods/dapo.yaml). Overlong shaping punishes softly before the limit L_max, from L_exp = L_max - L_cache on:

    0                          L <= L_exp
    (L_exp - L) / L_cache      L_exp < L <= L_max       0 down to -1
    -1                         L > L_max                (cannot be sampled here)

Dynamic sampling drops groups whose accuracy is 0 or 1 and refills the batch for at most `max_rounds` rounds (number ours).
Overlong filtering is the alternative to shaping: answers that were cut leave the loss, and what it is divided by.

L_cache is a share of the limit (4096 of 20,480) and not scaled with the base: shaping warns of the limit. The limit itself
is the recipe's rollout.max_new_tokens.

Edge: a group of one class has no signal and is dropped, even where shaping makes its rewards differ. No state.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from nanolapo.advantages import MIN_SPREAD
from nanolapo.config import Config, Positive, UserError
from nanolapo.methods.base import Method, SamplingPlan
from nanolapo.methods.tools import refuse_unused
from nanolapo.rollouts import Rollouts


@dataclass(frozen=True)
class Options:
    cache: Positive[int] | None = None  # L_cache, tokens; None: a fifth of the limit, as published
    overlong: str = "shape"  # shape | filter | none
    max_rounds: Positive[int] = 4  # rounds of sampling to fill a batch; 1: no refill


def overlong_penalty(lengths_B: np.ndarray, limit: int, cache: float) -> np.ndarray:
    """The soft length punishment, float64 [B], from 0 down to -1.

    >>> overlong_penalty(np.array([100, 16384, 18432, 20480]), 20480, 4096)
    array([ 0. ,  0. , -0.5, -1. ])
    """
    return np.clip((limit - cache - np.asarray(lengths_B, dtype=np.float64)) / cache, -1.0, 0.0) + 0.0  # no -0.0


def mixed_groups(rewards_PG: np.ndarray) -> np.ndarray:
    """Boolean [P]: groups whose rewards are not all equal."""
    return np.ptp(np.asarray(rewards_PG, dtype=np.float64), axis=1) >= MIN_SPREAD


class Dapo(Method):
    Options = Options
    cache_share = 4096 / 20480  # of the limit

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        limit = config.rollout.max_new_tokens
        self.cache = self.cache_share * limit if self.options.cache is None else self.options.cache
        if not 0 < self.cache <= limit:
            raise UserError(f"method.options.cache={self.cache}: give 1 to rollout.max_new_tokens={limit}")
        if self.options.overlong not in ("shape", "filter", "none"):
            raise UserError(f"method.options.overlong={self.options.overlong!r}: give shape, filter or none")
        if self.options.overlong != "shape":
            refuse_unused(self.options, ["cache"], f"with overlong={self.options.overlong}")

    def sampling(self, step: int) -> SamplingPlan:
        return replace(super().sampling(step), max_rounds=self.options.max_rounds)

    def reward(self, rollouts: Rollouts) -> dict[str, np.ndarray]:
        parts = super().reward(rollouts)
        parts["wrong"] = parts["correct"] - 1.0
        if self.options.overlong == "shape":
            parts["overlong"] = overlong_penalty(rollouts.lengths_B, self.config.rollout.max_new_tokens, self.cache)
        return parts

    def keep_groups(self, rollouts: Rollouts, rewards_PG: np.ndarray) -> np.ndarray:
        return mixed_groups(rollouts.by_group(rollouts.correct_B))

    def advantage(self, rollouts: Rollouts, rewards_PG: Tensor) -> Tensor:
        return self.filtered(rollouts, super().advantage(rollouts, rewards_PG))

    def filtered(self, rollouts: Rollouts, advantages_B: Tensor) -> Tensor:
        """Overlong filtering, where it is chosen."""
        if self.options.overlong != "filter":
            return advantages_B
        for row in rollouts.rows:
            row.keep = row.keep and row.finished  # a row that is not kept is in no denominator either
        return advantages_B * torch.tensor(rollouts.finished_B)
