r"""GFPO: sample many answers, train on the few that are short (or efficient).

Source: "Sample More to Think Less", arXiv 2508.09726, section 3, Eq. 2 and Algorithms 1 and 2.

    S = the k answers of the group with the best score: -L (shortest), or R / L (efficiency)
    A = (R - mean_S(R)) / std_S(R) in S, 0 outside

G is rollout.group_size (published: 8, 16, 24; k at most 8). `adaptive` keeps fewer answers of easier questions: k = 4, 6,
8, 8 of 16 from the easiest quarter of the pass rates to the hardest. The quarters are those of all groups so far, this
step's included; in the first few steps (here: the first) all groups have the hardest quarter's k. Answers outside S stay
in the divisors and in the KL term.

R is c here (ours). The paper's is between -1 and 1: right answers lose by their length, and repetition costs. We read it
so that wrong answers are negative, and among them R / L prefers the longer: where R is 0 the longer answer comes first.

Edge cases: "shortest" keeps wrong answers too. An S of one class gives 0, also where the group has both. Equal scores
otherwise: the earlier answer. State: how often each number of right answers was seen in a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from nanolapo.advantages import group_advantages
from nanolapo.config import Config, Positive, UserError
from nanolapo.methods.base import Method
from nanolapo.rollouts import Rollouts

SHARES = (8 / 16, 8 / 16, 6 / 16, 4 / 16)  # k / G, from the hardest quarter to the easiest


@dataclass(frozen=True)
class Options:
    score: Literal["shortest", "efficiency"] = "shortest"
    k: Positive[int] | None = None  # answers to keep; None: half of the group (8 of 16)
    adaptive: bool = False  # True: k by the question's difficulty


def best_of(lengths_G: np.ndarray, rewards_G: np.ndarray, k: int, score: str = "shortest") -> np.ndarray:
    """Boolean [G]: the k answers to train on.

    >>> lengths, rewards = np.array([30, 10, 20, 40]), np.array([1.0, 0.0, 1.0, 1.0])
    >>> best_of(lengths, rewards, 2), best_of(lengths, rewards, 2, "efficiency")
    (array([False,  True,  True, False]), array([ True, False,  True, False]))
    """
    scores = -lengths_G if score == "shortest" else rewards_G / np.maximum(lengths_G, 1)
    kept = np.zeros(len(lengths_G), dtype=bool)
    kept[np.lexsort((-lengths_G, -scores))[:k]] = True
    return kept


def quarter(rate: float, seen: np.ndarray) -> int:
    """0 for the hardest quarter of the pass rates seen so far, 3 for the easiest. seen: [groups].

    >>> [quarter(rate, np.array([0.0, 0.25, 0.5, 0.75, 1.0])) for rate in (0.0, 0.25, 0.6, 0.75, 1.0)]
    [0, 1, 2, 3, 3]
    """
    return int((np.quantile(seen, (0.25, 0.5, 0.75)) <= rate).sum())


class Gfpo(Method):
    """Group advantages among the k best answers of a group; the others have none."""

    Options = Options

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        size = config.rollout.group_size
        self.k = max(2, size // 2) if self.options.k is None else self.options.k
        if not 2 <= self.k <= size:
            raise UserError(f"method.options.k={self.k}: give 2 to rollout.group_size={size}")
        if self.options.adaptive and self.options.k is not None:
            raise UserError(
                "method.options.k: with method.options.adaptive the question's difficulty decides; leave it out"
            )
        self.times_seen = [0] * (size + 1)  # groups with 0, 1, ..., G right answers

    def group_k(self, right_P: np.ndarray) -> list[int]:
        """The k of each group of a step, given how many right answers each has."""
        if not self.options.adaptive or not any(self.times_seen):
            return [self.k] * len(right_P)
        size = self.config.rollout.group_size
        seen = np.concatenate([np.repeat(np.arange(size + 1), self.times_seen), right_P])
        return [max(2, round(SHARES[quarter(right, seen)] * size)) for right in right_P.tolist()]

    def advantage(self, rollouts: Rollouts, rewards_PG: Tensor) -> Tensor:
        lengths_PG, right_P = rollouts.by_group(rollouts.lengths_B), rollouts.by_group(rollouts.correct_B).sum(axis=1)
        advantages_PG = torch.zeros_like(rewards_PG)
        for p, k in enumerate(self.group_k(right_P)):
            rewards_G, score = rewards_PG[p].numpy(), self.options.score
            kept_G = torch.from_numpy(best_of(lengths_PG[p], rewards_G, k, score))
            within_1K = group_advantages(rewards_PG[p : p + 1, kept_G], self.config.loss.normalize_std)
            advantages_PG[p, kept_G] = within_1K[0]
        return advantages_PG.flatten()

    def after_step(self, rollouts: Rollouts) -> dict[str, float]:
        for right in rollouts.by_group(rollouts.correct_B).sum(axis=1).tolist():
            self.times_seen[right] += 1
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"times_seen": list(self.times_seen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.times_seen = list(state["times_seen"])
