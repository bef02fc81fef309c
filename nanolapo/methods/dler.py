"""DLER and DA-DLER (Liu et al., "Doing Length pEnalty Right", arXiv 2510.15110; code NVlabs/DLER, built on DAPO's recipe).

The length penalty is the simplest possible: R = c if finished within the target, else 0. The optimisation matters more:

    advantage   A'_i = R_i - mean_group(R);  A_i = (A'_i - mean_batch(A')) / std_batch(A')   over the groups that are kept
    sampling    groups whose rewards are all equal are dropped and the batch is refilled (`max_rounds`, number ours)
    clip        0.2 / 0.28, in configs/methods/dler.yaml

DA-DLER continues from a DLER model with a limit per group: half of it if pass rate >= 0.5, else all of it. The
paper does not say when the pass rate is measured; here it is measured at the whole limit; then every answer above its
group's limit is cut there and graded again, so it gets 0.

Code and paper differ, both are options: the code gives a cut answer 0.1 if it is right already (`cut_reward`; it drops
groups by the verdict before the cut, ours by the reward), and takes mean_batch and std_batch over tokens, every answer
weighted by its length (`whiten: tokens`). The defaults are the paper's. Left out: update-selective merging (needs no
training).

The limit is the recipe's rollout.max_new_tokens and not scaled with the base. The published 4000 is half of the mean answer
of its base, R1-Distill-1.5B: where the limit is far above your base's answers, nothing is cut and nothing is learned.

Edge: nothing kept, or nothing that differs, gives advantage 0 everywhere (std_batch = 0). No state.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanolapo.advantages import batch_advantages
from nanolapo.config import Config, Positive, Share, UserError
from nanolapo.config_file import one_of
from nanolapo.methods.base import Method, SamplingPlan
from nanolapo.methods.dapo import mixed_groups
from nanolapo.methods.tools import shorten
from nanolapo.rollouts import Rollout, Rollouts


@dataclass(frozen=True)
class OptimiserOptions:
    whiten: str = "sequences"  # sequences (paper) | tokens (code)
    max_rounds: Positive[int] = 4  # rounds of sampling to fill a batch; 1: no refill


@dataclass(frozen=True)
class Options(OptimiserOptions):
    target: Positive[int] | None = None  # limit in tokens; None: rollout.max_new_tokens, the paper's 4000
    cut_reward: Share = 0.0  # a right answer that was cut; the code: 0.1


@dataclass(frozen=True)
class DaOptions(Options):
    short_target: Positive[int] | None = None  # the limit of groups solved at least half; None: half (2000 of 4000)


class Optimiser(Method):
    """DLER without its limit and its reward: the advantage, and the groups that are kept. lapo_dler.py uses it as well."""

    Options: type = OptimiserOptions
    uses_normalize_std = False

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        one_of(self.options.whiten, ("sequences", "tokens"), "method.options.whiten")

    def sampling(self, step: int) -> SamplingPlan:
        return replace(super().sampling(step), max_rounds=self.options.max_rounds)

    def keep_groups(self, rollouts: Rollouts, rewards_PG: np.ndarray) -> np.ndarray:
        return mixed_groups(rewards_PG)

    def advantage(self, rollouts: Rollouts, rewards_PG: Tensor) -> Tensor:
        by_tokens = self.options.whiten == "tokens"
        counts_PG = rollouts.by_group(rollouts.lengths_B if by_tokens else np.ones(len(rollouts)))
        kept_P = self.keep_groups(rollouts, rewards_PG.numpy())
        return batch_advantages(rewards_PG, torch.from_numpy(counts_PG * kept_P[:, None])).flatten()


class Dler(Optimiser):
    Options: Any = Options

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        o, limit = self.options, config.rollout.max_new_tokens
        self.target = limit if o.target is None else o.target
        self.cut_answers_count = o.cut_reward > 0
        if self.target > limit:
            raise UserError(f"method.options.target={self.target}: need 1 <= target <= rollout.max_new_tokens={limit}")

    def sampling(self, step: int) -> SamplingPlan:
        return replace(super().sampling(step), max_new_tokens=self.target)

    def reward(self, rollouts: Rollouts) -> dict[str, np.ndarray]:
        parts = super().reward(rollouts)  # without cut_reward, an answer that was cut is wrong already
        if self.cut_answers_count:
            parts["cut"] = parts["correct"] * ~rollouts.finished_B * (self.options.cut_reward - 1.0)
        return parts


class DaDler(Dler):
    """DLER with half the limit for groups that are solved at least half of the time."""

    Options = DaOptions

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        short = self.options.short_target
        self.short_target = max(1, self.target // 2) if short is None else short
        if self.short_target > self.target:
            raise UserError(
                f"method.options.short_target={self.short_target}, target={self.target}: need 1 <= short_target <= target "
                f"<= rollout.max_new_tokens={config.rollout.max_new_tokens}"
            )

    def edit_rollouts(self, rollouts: Rollouts) -> list[Rollout]:
        pass_rates_P = rollouts.by_group(rollouts.correct_B).mean(axis=1)
        limits_P = np.where(pass_rates_P >= 0.5, self.short_target, self.target)
        return shorten(rollouts, np.repeat(limits_P, rollouts.group_size))
