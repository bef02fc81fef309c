r"""LASER, LASER-D, LASER-DE: a bonus for right answers within a target length, targets by difficulty.

Source: Liu et al., "Learn to Reason Efficiently with Adaptive Length-based Reward Shaping", arXiv 2505.15612; code
hkust-nlp/Laser. Paper text and code were both read. R = base + bonus:

    base      1 right, -0.5 wrong, -1 badly formed (no box, or no end of the thought), right or not
    LASER     + alpha if right and L <= L_T                      alpha 0.5, L_T 8192 of 16,384 tokens
    LASER-D   + alpha if right and L <= L_A(d)                   d: easy, medium, hard by the group's pass rate
    LASER-DE  as D, and + alpha if wrong, well formed, L > L_A(d) and not repetitive: longer search is not punished there

L_A(d) is searched every 20 steps, first before step 0, on 500 training problems sampled with the run's own settings:
the smallest of L_T, L_T + I, ... (I = 1024) at which one right answer of the bucket is to be expected within it, as
`adaptive_targets` spells out. Lengths scale with the limit, the number of monitored problems with the prompts per step
(500 at 128).

Where paper and code differ: the least number of right answers of a bucket is rounded up, 6, 3, 1 of 8 (paper;
`floor_counts` gives the code's 5, 2, 1); no candidate good enough, or an empty bucket: the limit (the code takes the
longest answer of the training batch); one difficulty rule for training and monitoring (the code moves the borders by
one). Only the code has the repetition rule, `refuse_repetition`; it is strict on long text.

Edge cases: no right answer -> bucket hard, and only DE still gives a length signal. A cut answer mostly has no box and
is badly formed.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanolapo.config import Config
from nanolapo.methods.base import Method, MonitorPlan
from nanolapo.methods.tools import repetitive, scale, speaks_of_thought, well_formed
from nanolapo.problems import Problem
from nanolapo.rollouts import Rollouts

PAPER_LIMIT = 16384
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
    too. None: no candidate does, or the bucket is empty. With K = 3 all right, one answer in two must fit within l:

    >>> adaptive_targets(np.array([[10, 25, 40]]), np.ones((1, 3), dtype=bool), [20, 30, 50])
    {'easy': 30, 'medium': None, 'hard': None}
    """
    num = lengths_PG.shape[1]
    rounded = math.floor if floor_counts else math.ceil
    targets: dict[str, int | None] = {}
    for bucket, count in zip(BUCKETS, (rounded(2 * num / 3), rounded(num / 3), 1), strict=True):
        rows = [g for g, correct in enumerate(correct_PG) if difficulty(correct) == bucket]
        lengths = lengths_PG[rows].flatten()
        fits = [n for n in candidates if len(lengths) and (lengths <= n).sum() * count >= len(lengths)]
        targets[bucket] = min(fits, default=None)
    return targets


@dataclass(frozen=True)
class Options:
    alpha: float = 0.5  # the bonus
    target: int | None = None  # L_T in tokens; None: 8192 (D, DE: 4096) at a limit of 16,384
    think_tags: bool | None = None  # must an answer end its thought? None: where the config's prompt names <think>


@dataclass(frozen=True)
class AdaptiveOptions(Options):
    interval: int | None = None  # I, tokens between candidates; None: 1024 at a limit of 16,384
    monitor_every: int = 20  # N, steps between two searches
    monitor_problems: int | None = None  # None: 500 at 128 prompts a step
    floor_counts: bool = False  # the code's rounding of |C|
    refuse_repetition: bool = True  # DE: no bonus for a repetitive wrong answer (code; the paper does not mention it)


class Laser(Method):
    """One target for all problems."""

    Options: Any = Options
    paper_target = 8192

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        o, self.scale = self.options, scale(config, PAPER_LIMIT)
        self.target = max(1, round(self.paper_target * self.scale)) if o.target is None else o.target
        self.think_tags = speaks_of_thought(config) if o.think_tags is None else o.think_tags

    def targets(self, rollouts: Rollouts) -> np.ndarray:
        """Target length of each row, [B]."""
        return np.full(len(rollouts), self.target)

    def bonus(self, rollouts: Rollouts, formed: np.ndarray) -> np.ndarray:
        """Boolean [B]: who gets alpha."""
        return formed & rollouts.correct_B & (rollouts.lengths_B <= self.targets(rollouts))

    def reward(self, rollouts: Rollouts) -> dict[str, np.ndarray]:
        correct, formed = rollouts.correct_B, well_formed(rollouts, self.think_tags)
        base = np.where(~formed, -1.0, np.where(correct, 1.0, -0.5))
        verdict = correct.astype(np.float64)
        length = self.options.alpha * self.bonus(rollouts, formed)
        return {"correct": verdict, "format": base - verdict, "length": length}


class LaserD(Laser):
    """A target per difficulty, searched anew every few steps."""

    Options: Any = AdaptiveOptions
    paper_target = 4096

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        interval, limit = self.options.interval or max(1, round(1024 * self.scale)), config.rollout.max_new_tokens
        first = self.target + interval if self.target >= interval else interval
        self.candidates = [self.target, *range(first, limit + 1, interval)]
        self.adaptive = dict.fromkeys(BUCKETS, limit)  # until the first search
        self.monitored: tuple[int, ...] = ()

    def start(self, problems: list[Problem]) -> None:
        wanted = self.options.monitor_problems or max(1, round(500 / 128 * self.config.rollout.prompts_per_step))
        drawn = random.Random(f"{self.config.run.seed}/laser")
        self.monitored = tuple(sorted(drawn.sample(range(len(problems)), min(wanted, len(problems)))))

    def monitor(self, step: int) -> MonitorPlan | None:
        r = self.config.rollout
        if step % self.options.monitor_every:
            return None
        return MonitorPlan(self.monitored, r.group_size, r.temperature, r.max_new_tokens)

    def on_monitor(self, rollouts: Rollouts) -> dict[str, float]:
        lengths, correct = rollouts.by_group(rollouts.lengths_B), rollouts.by_group(rollouts.correct_B)
        found = adaptive_targets(lengths, correct, self.candidates, self.options.floor_counts)
        limit = self.config.rollout.max_new_tokens
        self.adaptive = {bucket: limit if n is None else n for bucket, n in found.items()}
        return {f"laser/target_{bucket}": float(n) for bucket, n in self.adaptive.items()}

    def targets(self, rollouts: Rollouts) -> np.ndarray:
        buckets = [difficulty(correct) for correct in rollouts.by_group(rollouts.correct_B)]
        return np.repeat([self.adaptive[bucket] for bucket in buckets], rollouts.group_size)

    def state_dict(self) -> dict[str, Any]:
        return {"targets": dict(self.adaptive)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.adaptive = dict(state["targets"])


class LaserDE(LaserD):
    """Also: a wrong answer that went on searching beyond the target loses nothing."""

    def bonus(self, rollouts: Rollouts, formed: np.ndarray) -> np.ndarray:
        longer = formed & ~rollouts.correct_B & (rollouts.lengths_B > self.targets(rollouts))
        if self.options.refuse_repetition:
            longer &= [
                not (wanted and repetitive(ids)) for wanted, ids in zip(longer, rollouts.response_ids, strict=True)
            ]
        return super().bonus(rollouts, formed) | longer
