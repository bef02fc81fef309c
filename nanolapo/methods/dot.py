"""DOT: Dynamic Outlier Truncation (Wu et al., "Anti-Length Shift", arXiv 2601.03969; official code read).

Length costs nothing, except where all answers of a group are right and one is far longer than the others:

    T(q)      = floor(mean(L) + a * std(L))      groups whose answers are all right; unbiased std over all G answers; a = 3
    cut       an answer with L_i - T >= m keeps its first T tokens     m = 32 tokens; below 1 a share of L_i, at least 16
    reward    the verdict on what is left. A cut answer has normally lost its box and gets 0, so a group that had
              nothing to teach pushes the overlong beginning down and the other answers a little up
    groups    whose rewards are all equal are dropped
    sampling  floor(prompts_per_step * clip((1 + std(p)) / mean(p), 1.2, 5.0)) prompts in one round, 1.5 times at first; p:
              the shares of groups that differ in the last 20 steps. The first prompts_per_step of these are trained on
    loss      KL-Cov, sequence mean (configs/methods/dot.yaml)

With the unbiased std no answer lies more than (G - 1) / sqrt(G) of them above the mean: 2.47 for G = 8, 3.75 for 16. The
published a = 3, with G = 32, would never cut anything for G <= 10 and is refused there. m and the 16 scale with the base's
mean length (published on R1-Distill-1.5B).

Deviations: every step draws from all problems, each once; the order of epochs assumes steps of equal size and could bring
the same problems twice in a row. A step of too few groups is not filled up. KL-Cov's tokens are chosen once per step. Ours,
not stated: the population std of p. As their verifier sees only text, an answer cut at the limit may be right. The upper
bound that --dry-run prints assumes 1.5 in every step. Edge: equal lengths: nothing is cut. State: the last 20 shares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nanolapo.config import Config, Positive, UserError
from nanolapo.data.problems import Problem
from nanolapo.methods.base import Method, SamplingPlan
from nanolapo.methods.dapo import mixed_groups
from nanolapo.methods.tools import R1_DISTILL, scale, shorten
from nanolapo.rollouts import Rollout, Rollouts

REMEMBERED = 20  # steps


@dataclass(frozen=True)
class Options:
    spread: Positive[float] = 3.0  # a, standard deviations above the mean
    min_cut: Positive[float] | None = None  # m, tokens, or a share of the answer below 1; None: 32 tokens (scaled)


def outlier_limits(
    lengths_PG: np.ndarray, correct_PG: np.ndarray, spread: float, min_cut: float, min_tokens: float = 16.0
) -> np.ndarray:
    """Return the length to which each answer is cut, int64 [P, G]: its full length where nothing is cut.

    >>> lengths = np.array([[10, 10, 10, 90], [10, 10, 10, 90]])   # mean 30, std 40: T = 70 for a = 1
    >>> outlier_limits(lengths, np.array([[1, 1, 1, 1], [0, 1, 1, 1]]), spread=1.0, min_cut=16)
    array([[10, 10, 10, 70],
           [10, 10, 10, 90]])
    """
    lengths = np.asarray(lengths_PG, dtype=np.float64)
    limits_P1 = np.floor(lengths.mean(axis=1, keepdims=True) + spread * lengths.std(axis=1, ddof=1, keepdims=True))
    smallest = min_cut if min_cut >= 1 else np.maximum(min_cut * lengths, min_tokens)
    solved_P1 = np.asarray(correct_PG, dtype=bool).all(axis=1, keepdims=True)
    return np.where(solved_P1 & (lengths - limits_P1 >= smallest), limits_P1, lengths).astype(np.int64)


def oversampling(kept_shares: Sequence[float]) -> float:
    """Return the factor on the number of sampled prompts with which about prompts_per_step groups are kept.

    >>> oversampling([]), oversampling([0.5, 0.5]), round(oversampling([0.4, 0.6]), 3), oversampling([0.0])
    (1.5, 2.0, 2.2, 5.0)
    """
    if not kept_shares:
        return 1.5
    mean = max(float(np.mean(kept_shares)), 1e-9)
    return float(np.clip((1.0 + np.std(kept_shares)) / mean, 1.2, 5.0))


class Dot(Method):
    Options = Options
    cut_answers_count = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.min_cut, self.min_tokens, group_size = self.options.min_cut, 1.0, config.rollout.group_size
        if self.min_cut is None:
            self.min_cut = max(1.0, 32 * scale(config, R1_DISTILL, "method.options.min_cut"))
        elif self.min_cut < 1:
            self.min_tokens = max(1.0, 16 * scale(config, R1_DISTILL, "method.options.min_cut in tokens, 1 or more"))
        self.kept_shares: list[float] = []
        bound = (group_size - 1) / math.sqrt(group_size)
        if self.options.spread >= bound:
            raise UserError(
                f"method.options.spread={self.options.spread}: with rollout.group_size={group_size} no answer lies "
                f"{bound:.2f} standard deviations above its group's mean; give well below that"
            )

    def start(self, problems: list[Problem]) -> None:
        self.num_problems = len(problems)

    def sampling(self, step: int) -> SamplingPlan:
        plan = super().sampling(step)
        num_prompts = int(plan.num_prompts * oversampling(self.kept_shares) + 1e-9)
        return replace(plan, num_prompts=num_prompts, weights=np.ones(self.num_problems))

    def edit_rollouts(self, rollouts: Rollouts) -> list[Rollout]:
        lengths, correct = rollouts.by_group(rollouts.lengths_B), rollouts.by_group(rollouts.correct_B)
        limits_PG = outlier_limits(lengths, correct, self.options.spread, self.min_cut, self.min_tokens)
        cut = shorten(rollouts, limits_PG.flatten())
        self.num_cut = len(cut)
        return cut

    def keep_groups(self, rollouts: Rollouts, rewards_PG: np.ndarray) -> np.ndarray:
        kept_P = mixed_groups(rewards_PG)
        kept_P[np.flatnonzero(kept_P)[self.config.rollout.prompts_per_step :]] = False
        return kept_P

    def after_step(self, rollouts: Rollouts) -> dict[str, float]:
        kept = float(mixed_groups(rollouts.by_group(rollouts.correct_B)).mean())
        self.kept_shares = [*self.kept_shares, kept][-REMEMBERED:]
        return {"dot/cut": self.num_cut / len(rollouts), "dot/kept_share": kept}

    def state_dict(self) -> dict[str, Any]:
        return {"kept_shares": self.kept_shares}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kept_shares = list(state["kept_shares"])
