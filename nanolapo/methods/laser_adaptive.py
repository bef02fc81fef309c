r"""LASER-D and LASER-DE: LASER's bonus with a target length for each difficulty, updated every few steps.

Source: as for laser.py, arXiv 2505.15612; paper text and code were both read. On top of LASER's base score:

    LASER-D   + alpha if right and L <= L_A(d)                   d: easy, medium, hard by the group's pass rate
    LASER-DE  as D, and + alpha if wrong, well formed and L > L_A(d): a longer search costs nothing

L_A(d) is searched every 20 steps, first before step 0, on 500 training problems (at 128 prompts a step) sampled with the
run's own settings: the smallest of L_T, L_T + I, ... (4096, 1024; scaled as LASER's target, up to our limit; where I is
larger: L_T, I, 2 I, ...) within which one right answer of the bucket can be expected, see `adaptive_targets`.

Where paper and code differ: the least number of right answers of a bucket is rounded up, 6, 3, 1 of 8 (paper;
`floor_counts` gives the code's 5, 2, 1); without a candidate, or a bucket, the limit (code: the longest answer of the
batch); one difficulty rule everywhere (code: borders one off in monitoring). Their code also means to refuse DE's bonus to
repetitive answers, but looks tokens up as tensors, which are never found again: the rule never acts. Ours has none.

Edge cases: no right answer -> bucket hard, and only DE still gives a length signal. State: L_A of each bucket.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanolapo.config import Config, Positive
from nanolapo.data.problems import Problem
from nanolapo.methods import laser
from nanolapo.methods.base import MonitorPlan
from nanolapo.methods.tools import R1_DISTILL, scale
from nanolapo.rollouts import Measured, Rollouts

BUCKETS = ("easy", "medium", "hard")


def difficulty(correct: np.ndarray) -> str:
    """Bucket of one group: easy from a pass rate of 2/3, medium from 1/3, else hard.

    >>> [difficulty(np.array([1] * k + [0] * (6 - k))) for k in (6, 4, 3, 2, 1, 0)]
    ['easy', 'easy', 'medium', 'medium', 'hard', 'hard']
    """
    thirds = 3 * int(correct.sum())  # integers: 2/3 of a group must not fall to round-off
    return BUCKETS[0 if thirds >= 2 * len(correct) else 1 if thirds >= len(correct) else 2]


def adaptive_targets(
    lengths_PG: np.ndarray, correct_PG: np.ndarray, candidates: list[int], floor_counts: bool = False
) -> dict[str, int | None]:
    """L_A of each bucket: the smallest candidate l with (share of the bucket's answers with L <= l) * |C| >= 1.

    |C|, the least number of right answers of K in the bucket, is 2K/3, K/3, 1, rounded up. All answers count, wrong ones
    too. None: no candidate is enough, or the bucket is empty. With K = 3 all right, one answer in two must fit within l:

    >>> adaptive_targets(np.array([[10, 25, 40]]), np.ones((1, 3), dtype=bool), [20, 30, 50])
    {'easy': 30, 'medium': None, 'hard': None}
    """
    num = lengths_PG.shape[1]
    rounded = math.floor if floor_counts else math.ceil
    targets: dict[str, int | None] = {}
    for bucket, count in zip(BUCKETS, (rounded(2 * num / 3), rounded(num / 3), 1), strict=True):
        rows = [g for g, correct in enumerate(correct_PG) if difficulty(correct) == bucket]
        lengths = lengths_PG[rows].flatten()
        fits = (n for n in candidates if len(lengths) and (lengths <= n).sum() * count >= len(lengths))
        targets[bucket] = min(fits, default=None)
    return targets


@dataclass(frozen=True)
class Options(laser.Options):
    interval: Positive[int] | None = None  # I, tokens between candidates; None: 1024, scaled
    monitor_every: Positive[int] = 20  # N, steps between two searches
    monitor_problems: Positive[int] | None = None  # None: 500 at 128 prompts a step
    floor_counts: bool = False  # the code's rounding of |C|


class LaserD(laser.Laser):
    """A target per difficulty, updated every few steps."""

    Options: Any = Options
    published_target = 4096

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.limit, interval = config.rollout.max_new_tokens, self.options.interval
        interval = interval or max(1, round(1024 * scale(config, R1_DISTILL, "method.options.interval")))
        first = self.target + interval if self.target >= interval else interval
        self.candidates = [self.target, *range(first, self.limit + 1, interval)]
        self.adaptive = dict.fromkeys(BUCKETS, self.limit)  # until the first search
        self.monitored: tuple[int, ...] = ()

    def start(self, problems: list[Problem]) -> None:
        wanted = self.options.monitor_problems or max(1, round(500 / 128 * self.config.rollout.prompts_per_step))
        chance = random.Random(f"{self.config.run.seed}/laser")
        self.monitored = tuple(sorted(chance.sample(range(len(problems)), min(wanted, len(problems)))))

    def monitor(self, step: int) -> MonitorPlan | None:
        if step % self.options.monitor_every:
            return None
        r = self.config.rollout
        return MonitorPlan(self.monitored, r.group_size, r.temperature, r.max_new_tokens)

    def on_monitor(self, found: Measured | Rollouts) -> dict[str, float]:
        lengths, correct = found.by_group(found.lengths_B), found.by_group(found.correct_B)
        targets = adaptive_targets(lengths, correct, self.candidates, self.options.floor_counts)
        self.adaptive = {bucket: self.limit if n is None else n for bucket, n in targets.items()}
        return {f"laser/target_{bucket}": float(n) for bucket, n in self.adaptive.items()}

    def targets(self, rollouts: Rollouts) -> np.ndarray:
        buckets = [difficulty(correct) for correct in rollouts.by_group(rollouts.correct_B)]
        return np.repeat([self.adaptive[bucket] for bucket in buckets], rollouts.group_size)

    def state_dict(self) -> dict[str, Any]:
        return {"targets": dict(self.adaptive)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.adaptive = dict(state["targets"])


class LaserDE(LaserD):
    """LASER-D, and a wrong answer that searched beyond the target loses nothing."""

    def bonus(self, rollouts: Rollouts, formed: np.ndarray) -> np.ndarray:
        longer = formed & ~rollouts.correct_B & (rollouts.lengths_B > self.targets(rollouts))
        return super().bonus(rollouts, formed) | longer
