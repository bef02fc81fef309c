"""LAPO's two stages side by side (Wu et al., arXiv 2507.15758; released code ZJU-REAL/LAPO).

Discovery (stage 1) rewards right answers whose length is typical of the group's right answers, and records M(q), the
length that sufficed for problem q. Internalization (stage 2) states that length in the model's own thought and rewards
keeping to it. Policy loss and advantage are plain GRPO.

The paper's 100 and 120 tokens (decay, sigma) are scaled from DeepScaleR-1.5B-Preview to our base (rollout.base_tokens).

Where the paper and its code disagree, `lapo.fidelity` chooses between the rows of READINGS. docs/CONFIGURING.md explains
them, and says which differences are not copied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nanolapo.config import Config, UserError
from nanolapo.data.problems import Problem
from nanolapo.data.prompts import Guidance, exact_guidance, implicit_guidance, outside_guidance, range_guidance
from nanolapo.lengths import LengthMap, to_multiple, typical_range
from nanolapo.methods.base import Method, SamplingPlan
from nanolapo.methods.tools import DEEPSCALER, as_parts, each_group, scale
from nanolapo.rollouts import Rollouts


@dataclass(frozen=True)
class Readings:
    """One way to read the paper where text and code differ. The defaults are the recommended one."""

    beta: float = 0.8  # weight of the length reward in stage 2
    strict_range: bool = False  # stage 1: a range that is a single point gives no length reward
    unsolved_center: str = "group_median"  # stage 2, unsolved problem: Gaussian around that, or around the "limit"
    live_map: bool = True  # stage 2: prompts state the current M(q); False: stage 1's numbers
    round_target: bool = True  # the prompt states round(M); False: M cut to an integer
    half_limit: bool = False  # stage 2 samples at most half of max_new_tokens (2048 of 4096)
    cut_answers_count: bool = False  # an answer cut at the limit may be right if its box was already printed
    grader_rule: str = "math"  # or "exact_first_boxed": the code's first box up to the first brace, compared as text


READINGS = {
    "recommended": Readings(),
    "paper": Readings(beta=0.7, unsolved_center="limit", cut_answers_count=True),
    "code": Readings(
        strict_range=True,
        live_map=False,
        round_target=False,
        half_limit=True,
        cut_answers_count=True,
        grader_rule="exact_first_boxed",
    ),
}


def tokens_outside(lengths: Sequence[int] | np.ndarray, low: float, high: float) -> np.ndarray:
    """Return d of Eq. 5: by how many tokens each length misses the closed range, float64 [G].

    >>> tokens_outside([1000, 1220, 1500], 1220, 1460)
    array([220.,   0.,  40.])
    """
    lengths = np.asarray(lengths, dtype=np.float64)
    inside = (lengths >= low) & (lengths <= high)
    return np.where(inside, 0.0, np.minimum(abs(lengths - low), abs(lengths - high)))


def discovery_reward(
    lengths: Sequence[int] | np.ndarray,
    correct: Sequence[bool] | np.ndarray,
    alpha: float = 0.7,
    decay: float = 100.0,
    percentiles: tuple[float, float] = (30.0, 70.0),
    strict_range: bool = False,
) -> np.ndarray:
    """Eq. 4-5 on one group: R_D(i) = c_i + alpha * R1(i), float64 [G].

    R1 is 1 for a right answer inside [P30, P70] of the group's right lengths (Eq. 2, closed on both sides), falls linearly
    to 0 at `decay` tokens outside it, and is 0 for a wrong answer. No right answer in the group: all rewards are 0.

    >>> discovery_reward([1000, 1200, 1300, 1500, 2000], [True] * 5).round(3)   # P30 1220, P70 1460
    array([1.  , 1.56, 1.7 , 1.42, 1.  ])
    """
    lengths, correct = np.asarray(lengths, dtype=np.float64), np.asarray(correct, dtype=bool)
    rewards = correct.astype(np.float64)
    if not correct.any():
        return rewards
    low, high = typical_range(lengths[correct], percentiles)
    if strict_range and not low < high:
        return rewards
    return rewards + alpha * correct * np.maximum(0.0, 1.0 - tokens_outside(lengths, low, high) / decay)


def internalization_reward(
    lengths: Sequence[int] | np.ndarray,
    correct: Sequence[bool] | np.ndarray,
    target: float,
    beta: float = 0.8,
    sigma: float = 120.0,
) -> np.ndarray:
    """Eq. 6-7 on one group: R_I(i) = c_i + beta * c_i * exp(-(L_i - n)^2 / (2 sigma^2)), float64 [G].

    >>> internalization_reward([1300, 1420, 1540, 1300], [True, True, True, False], target=1300).round(4)
    array([1.8   , 1.4852, 1.1083, 0.    ])
    """
    lengths, correct = np.asarray(lengths, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    return correct + beta * correct * np.exp(-((lengths - target) ** 2) / (2 * sigma**2))


def stated_length(target: float | None, limit: int, multiple: int = 1, rounded: bool = True) -> int:
    """Return n, the tokens that a stage-2 prompt states: M(q), or the generation limit for an unsolved problem (Eq. 3).

    It is the nearest multiple of `multiple`, or (not rounded) the next one below. It is at least one multiple.

    >>> stated_length(1300.7, limit=4096), stated_length(1300.7, limit=4096, rounded=False), stated_length(None, limit=4096)
    (1301, 1300, 4096)
    >>> stated_length(1330.0, limit=4096, multiple=100)
    1300
    """
    tokens = limit if target is None else target
    return to_multiple(tokens, multiple) if rounded else max(multiple, int(tokens / multiple) * multiple)


class Lapo(Method):
    """What the two stages share: the map, the readings, and the lengths that may enter the map."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        c = config.lapo
        self.readings = READINGS[c.fidelity]
        self.grader_rule = self.readings.grader_rule
        self.cut_answers_count = self.readings.cut_answers_count
        self.beta = self.readings.beta if c.beta is None else c.beta
        self.length_map = LengthMap(c.statistic)

    def state_dict(self) -> dict[str, Any]:
        return {"length_map": self.length_map.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.length_map.load_state_dict(state["length_map"])

    def export(self, run_dir: Path) -> None:
        self.length_map.save(run_dir / "length_map.json")

    def lengths_by_problem(self, rollouts: Rollouts) -> list[tuple[Problem, np.ndarray]]:
        """Return per group the lengths of right answers that ended by themselves: a cut answer never enters the map."""
        usable = rollouts.by_group(rollouts.correct_B & rollouts.finished_B)
        lengths = rollouts.by_group(rollouts.lengths_B)
        return [(p, lengths[g][usable[g]]) for g, p in enumerate(rollouts.problems)]

    def map_metrics(self, problems: Sequence[Problem], before: Sequence[float | None]) -> dict[str, float]:
        """Measure the map: solved share, mean target, mean change on this step's problems; nan where there is none."""
        known = [t for t in self.length_map.entries.values() if t is not None]
        pairs = [(self.length_map.target(p.id), b) for p, b in zip(problems, before, strict=True)]
        moved = [t - b for t, b in pairs if t is not None and b is not None]
        return {
            "map/solved_fraction": len(known) / max(1, len(self.length_map)),
            "map/target_mean": float(np.mean(known)) if known else math.nan,
            "map/moved_mean": float(np.mean(moved)) if moved else math.nan,
        }


class Discovery(Lapo):
    """Stage 1: reward typical right lengths (Eq. 4-5), record M(q) (Eq. 3)."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        decay = config.lapo.decay
        self.decay = 100.0 * scale(config, DEEPSCALER, "lapo.decay") if decay is None else decay

    def start(self, problems: list[Problem]) -> None:
        if self.config.lapo.length_map:
            raise UserError("lapo.length_map is set, but stage 1 makes its own map: did you mean train_stage2.py?")

    def reward(self, rollouts: Rollouts) -> dict[str, np.ndarray]:
        c = self.config.lapo

        def one_group(lengths: np.ndarray, correct: np.ndarray) -> np.ndarray:
            return discovery_reward(lengths, correct, c.alpha, self.decay, c.percentiles, self.readings.strict_range)

        return as_parts(rollouts, each_group(rollouts, one_group))

    def after_step(self, rollouts: Rollouts) -> dict[str, float]:
        before = [self.length_map.target(p.id) for p in rollouts.problems]
        for problem, lengths in self.lengths_by_problem(rollouts):
            self.length_map.update_discovery(problem.id, lengths)
        return self.map_metrics(rollouts.problems, before)


class Internalization(Lapo):
    """Stage 2: put n = M(q) into the thought, reward keeping to it (Eq. 6-7), refine M(q) (Eq. 8)."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        sigma = config.lapo.sigma
        self.sigma = 120.0 * scale(config, DEEPSCALER, "lapo.sigma") if sigma is None else sigma

    def start(self, problems: list[Problem]) -> None:
        path = self.config.lapo.length_map
        if not path:
            raise UserError("lapo.length_map is empty: stage 2 needs the length_map.json of a stage-1 run directory")
        self.length_map = LengthMap.load(path)
        recorded, wanted = self.length_map.statistic, self.config.lapo.statistic
        if recorded != wanted:
            self.length_map = self.length_map.measured_by(wanted, path)
        self.length_map.check_covers([p.id for p in problems], path)

    def sampling(self, step: int) -> SamplingPlan:
        plan = super().sampling(step)
        return replace(plan, max_new_tokens=plan.max_new_tokens // 2) if self.readings.half_limit else plan

    def guidance(self, problem: Problem, rollout_index: int, step: int) -> Guidance:
        """State n = M(q) in the prompt, in the form that lapo.guidance names (Table 2)."""
        c = self.config
        target, multiple = self.length_map.target(problem.id), c.prompt.length_multiple
        n = stated_length(target, c.rollout.max_new_tokens, multiple, self.readings.round_target)
        if c.lapo.guidance == "range":
            known = self.length_map.typical_range(problem.id, c.lapo.percentiles)
            # An unsolved problem has no range; it gets the band in which the reward is above exp(-1/2)
            low, high = known or (max(1.0, n - self.sigma), n + self.sigma)
            return range_guidance(low, high, n)
        return {"exact": exact_guidance, "outside": outside_guidance, "implicit": implicit_guidance}[c.lapo.guidance](n)

    def center(self, problem: Problem, lengths_G: np.ndarray, correct_G: np.ndarray, budget: float) -> float:
        """Return n of Eq. 7 for one group: the number in its prompt (M(q) before this step's update). For an unsolved
        problem it is the median of the group's right lengths, unless the readings say "limit". nan: no length term."""
        if self.length_map.target(problem.id) is None and self.readings.unsolved_center == "group_median":
            # As the code, whatever statistic M(q) records
            return float(np.median(lengths_G[correct_G])) if correct_G.any() else math.nan
        return float(budget)

    def reward(self, rollouts: Rollouts) -> dict[str, np.ndarray]:
        lengths, correct = rollouts.by_group(rollouts.lengths_B), rollouts.by_group(rollouts.correct_B)
        budgets = rollouts.by_group(rollouts.budgets_B)
        total = []
        for g, problem in enumerate(rollouts.problems):
            target = self.center(problem, lengths[g], correct[g], budgets[g][0])
            if np.isnan(target):  # a prompt without a budget has no length term (never: a budget of 0)
                total.append(correct[g].astype(np.float64))
            else:
                total.append(internalization_reward(lengths[g], correct[g], target, self.beta, self.sigma))
        return as_parts(rollouts, np.concatenate(total))

    def after_step(self, rollouts: Rollouts) -> dict[str, float]:
        before = [self.length_map.target(p.id) for p in rollouts.problems]
        if self.readings.live_map:
            for problem, lengths in self.lengths_by_problem(rollouts):
                self.length_map.update_internalization(problem.id, lengths)
        budgets = rollouts.budgets_B
        gap = np.where(np.isnan(budgets), 0.0, budgets - rollouts.lengths_B)
        return self.map_metrics(rollouts.problems, before) | {
            "budget/missing": float(np.isnan(budgets).sum()),
            "budget/above_length": float(gap.mean()),  # > 0: M(q) lies above the current lengths and pulls up
        }
