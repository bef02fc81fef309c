r"""GFPO: sample many answers, train on the few that are short (or efficient).

Source: "Sample More to Think Less", arXiv 2508.09726. UNVERIFIED: from third-party notes, the paper's text was not read.

    S = the k answers of the group with the best score: -L (shortest), or R / L (efficiency)
    A = (R - mean_S(R)) / std_S(R) in S, 0 outside

G is rollout.group_size (published: 16 to 24, k = 8), R is c. `adaptive` keeps fewer answers of easier questions: k = 4, 6,
8, 8 of 16 from the easiest quarter of the pass rates to the hardest. The quarters are those of all groups of the steps
before this one; the first step has none and takes the hardest's k (the estimate is ours).

Answers outside S leave the loss and its denominators as well: token mean is over the kept answers' tokens. Our source does
not say which tokens divide. With KL 0 the other reading only scales the step.

Edge cases: "shortest" keeps wrong answers too. An S of one class gives 0, also where the group has both. Equal scores:
the shorter answer first (so wrong answers, R / L = 0, are in the order of their lengths), then the earlier. A cut answer is
wrong and as long as the limit, so it is kept last. State: how often each number of right answers was seen in a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from nanolapo.advantages import group_advantages
from nanolapo.config import Config, UserError
from nanolapo.methods.base import Method
from nanolapo.rollouts import Rollouts

SHARES = (8 / 16, 8 / 16, 6 / 16, 4 / 16)  # k / G, from the hardest quarter to the easiest


@dataclass(frozen=True)
class Options:
    score: Literal["shortest", "efficiency"] = "shortest"
    k: int | None = None  # answers to keep; None: half of the group (8 of 16)
    adaptive: bool = False  # True: k by the question's difficulty


def best_of(lengths_G: np.ndarray, rewards_G: np.ndarray, k: int, score: str = "shortest") -> np.ndarray:
    """Boolean [G]: the k answers to train on.

    >>> lengths, rewards = np.array([30, 10, 20, 40]), np.array([1.0, 0.0, 1.0, 1.0])
    >>> best_of(lengths, rewards, 2), best_of(lengths, rewards, 2, "efficiency")
    (array([False,  True,  True, False]), array([ True, False,  True, False]))
    """
    scores = -lengths_G if score == "shortest" else rewards_G / np.maximum(lengths_G, 1)
    kept = np.zeros(len(lengths_G), dtype=bool)
    kept[np.lexsort((lengths_G, -scores))[:k]] = True
    return kept


def quarter(rate: float, seen: np.ndarray) -> int:
    """0 for the hardest quarter of the pass rates seen before, 3 for the easiest. seen: [groups].

    >>> [quarter(rate, np.array([0.0, 0.25, 0.5, 0.75, 1.0])) for rate in (0.0, 0.25, 0.6, 0.75, 1.0)]
    [0, 1, 2, 3, 3]
    """
    return int((np.quantile(seen, (0.25, 0.5, 0.75)) <= rate).sum()) if len(seen) else 0


class Gfpo(Method):
    """Group advantages among the k best answers of a group; the others are not trained on."""

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

    def group_k(self, right: int) -> int:
        """The k of a group with so many right answers."""
        if not self.options.adaptive:
            return self.k
        size = self.config.rollout.group_size
        seen = np.repeat(np.arange(size + 1), self.times_seen)
        return max(2, round(SHARES[quarter(right, seen)] * size))

    def advantage(self, rollouts: Rollouts, rewards_PG: Tensor) -> Tensor:
        lengths_PG, right_P = rollouts.by_group(rollouts.lengths_B), rollouts.by_group(rollouts.correct_B).sum(axis=1)
        kept_PG = np.stack([
            best_of(lengths, rewards, self.group_k(right), self.options.score)
            for lengths, rewards, right in zip(lengths_PG, rewards_PG.numpy(), right_P.tolist(), strict=True)
        ])  # fmt: skip
        for row, kept in zip(rollouts.rows, kept_PG.flatten().tolist(), strict=True):
            row.keep = row.keep and kept  # a row that is not kept is in no denominator either
        advantages_PG = torch.zeros_like(rewards_PG)
        for p, kept_G in enumerate(torch.from_numpy(kept_PG)):
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
