r"""LASER, LASER-D, LASER-DE: base score, targets by difficulty, the target search, the repetition detector.

Run: python -m pytest tests/methods/test_laser.py
"""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from tiny import fill, make_config, make_problems, make_rows

from nanolapo.methods.base import MonitorPlan
from nanolapo.methods.hbpo import Hbpo
from nanolapo.methods.laser import Laser
from nanolapo.methods.laser_adaptive import LaserD, LaserDE, adaptive_targets, difficulty
from nanolapo.methods.tools import speaks_of_thought, well_formed
from nanolapo.rollouts import Rollouts

GOOD, NO_BOX, NO_END, OPEN_BOX = r"x </think> \boxed{1}", "x </think> 1", r"x \boxed{1}", r"x </think> \boxed{1"
EARLY_BOX = r"so \boxed{7} </think> The answer is seven."  # no answer for the grader


def make(
    kind: type[Laser], limit: int = 16384, group_size: int = 4, prompts: int = 4, base: float = 8086, **options: object
) -> Any:
    rollout = {"max_new_tokens": limit, "base_tokens": base, "group_size": group_size, "prompts_per_step": prompts}
    return kind(make_config(rollout=rollout, method={"options": options}))


def group(lengths: list[int], correct: list[bool], texts: list[str] | None = None, size: int = 0) -> Rollouts:
    rollouts = make_rows(lengths, group_size=size or len(lengths), correct=correct)
    fill(rollouts, text=texts or [GOOD] * len(lengths))
    return rollouts


# ---------------------------------------------------------------------------------------------------------- base score


def test_base_score_and_bonus_by_hand():
    """1 right, -0.5 wrong, -1 badly formed even when right; +0.5 for right within the target, the target included."""
    method = make(Laser, target=100)
    rollouts = group(
        [100, 101, 50, 50, 50, 50, 50, 50],
        [True, True, False, True, True, True, False, False],
        [GOOD, GOOD, GOOD, GOOD, NO_BOX, NO_END, NO_BOX, OPEN_BOX],
    )
    parts = method.reward(rollouts)
    assert sum(parts.values()).tolist() == [1.5, 1.0, -0.5, 1.5, -1.0, -1.0, -1.0, -1.0]
    assert parts["correct"].tolist() == [1, 1, 0, 1, 1, 1, 0, 0]  # the plain verdict


def test_think_tags_are_asked_for_where_the_prompt_names_them():
    rollouts = group([5, 5], [True, True], [GOOD, NO_END])
    plain = make_config(prompt={"template": "{question}"})
    assert speaks_of_thought(make_config()) and not speaks_of_thought(plain)
    assert not speaks_of_thought(make_config(prompt={"style": "chat"}))
    assert speaks_of_thought(make_config(prompt={"style": "chat", "think_prefix": "<think>"}))
    assert sum(Laser(plain).reward(rollouts).values()).tolist() == [1.5, 1.5]
    assert sum(make(Laser, think_tags=False).reward(rollouts).values()).tolist() == [1.5, 1.5]
    assert sum(make(Laser).reward(rollouts).values()).tolist() == [1.5, -1.0]
    assert well_formed(rollouts, True).tolist() == [True, False]
    assert well_formed(group([5], [True], [r"x [/THINK] \boxed{1}"]), True).tolist() == [True]


@pytest.mark.parametrize("kind", [Laser, LaserD, LaserDE, Hbpo])
@pytest.mark.parametrize("think_tags", [True, False])
def test_a_box_in_the_thought_is_no_answer(kind, think_tags):
    """As for the grader, which reads what stands behind the last </think>. So DE's bonus for long wrong answers is not for
    it either; their target is 3 here, and 5 tokens are longer."""
    rollout = {"group_size": 4, "prompts_per_step": 1, "base_tokens": 100}
    method = kind(make_config(rollout=rollout, method={"options": {"think_tags": think_tags}}))
    method.adaptive = dict.fromkeys(("easy", "medium", "hard"), 3)
    rollouts = fill(make_rows([5] * 4, 4), text=[EARLY_BOX] * 4, budget=8.0)
    assert sum(method.reward(rollouts).values()).tolist() == [-1.0] * 4
    assert not well_formed(rollouts, think_tags).any()
    assert well_formed(fill(rollouts, text=r"\boxed{7} </think> \boxed{7}"), think_tags).all()


def test_lengths_scale_with_the_base():
    assert make(Laser).target == 8192 and make(LaserD).target == 4096
    assert make(Laser, limit=8192).target == 4096  # half the limit: near the limit no right answer would miss it
    assert make(Laser, limit=8192, target=8000).target == 8000
    small = make(LaserD, limit=256, base=8086 / 64)  # bound 64, interval 16
    assert small.candidates == list(range(64, 257, 16))
    assert make(LaserD).candidates == list(range(4096, 16385, 1024))
    assert make(LaserD, target=600).candidates == [600, *range(1024, 16385, 1024)]  # below I: the bound, then 1024, ...
    assert make(LaserD, target=1024).candidates[:2] == [1024, 2048]


# ---------------------------------------------------------------------------------------------------------- difficulty


def test_difficulty_borders_are_exact_for_every_group_size():
    for size in range(1, 25):
        for right in range(size + 1):
            rate = Fraction(right, size)
            want = "easy" if rate >= Fraction(2, 3) else "medium" if rate >= Fraction(1, 3) else "hard"
            assert difficulty(np.array([True] * right + [False] * (size - right))) == want


def test_each_group_has_the_target_of_its_own_difficulty():
    method = make(LaserD, group_size=3)
    method.adaptive = {"easy": 10, "medium": 20, "hard": 30}
    rollouts = group([15] * 9, [True] * 3 + [True, False, False] + [False] * 3, size=3)
    assert method.targets(rollouts).tolist() == [10] * 3 + [20] * 3 + [30] * 3
    assert sum(method.reward(rollouts).values()).tolist() == [1, 1, 1, 1.5, -0.5, -0.5, -0.5, -0.5, -0.5]


# ------------------------------------------------------------------------------------------------------- target search


def slow_search(lengths: np.ndarray, correct: np.ndarray, candidates: list[int], counts: tuple[int, int, int]) -> dict:
    """METHODS.md section 3, steps 1 to 4, with exact fractions."""
    pools: dict[str, list[int]] = {"easy": [], "medium": [], "hard": []}
    for row, right in zip(lengths.tolist(), correct.tolist(), strict=True):
        rate = Fraction(sum(right), len(right))
        name = "easy" if rate >= Fraction(2, 3) else "medium" if rate >= Fraction(1, 3) else "hard"
        pools[name] += row
    found: dict[str, int | None] = {}
    for (name, pool), count in zip(pools.items(), counts, strict=True):
        found[name] = None
        for candidate in sorted(candidates, reverse=True):
            if pool and Fraction(sum(n <= candidate for n in pool), len(pool)) * count >= 1:
                found[name] = candidate
    return found


def test_search_takes_the_smallest_length_with_one_expected_right_answer():
    """K = 8: coverage 1/6 for easy, 1/3 for medium, everything for hard problems."""
    easy = [100, 200, 300, 400, 500, 600, 700, 800]  # an eighth fits in 100, two eighths >= 1/6 in 200
    medium = [100, 200, 300, 400, 500, 600, 700, 800]  # three eighths >= 1/3 fit in 300
    lengths, correct = np.array([easy, medium, medium]), np.zeros((3, 8), dtype=bool)
    correct[0, :6] = correct[1, :3] = True
    candidates = list(range(50, 1001, 50))
    assert adaptive_targets(lengths, correct, candidates) == {"easy": 200, "medium": 300, "hard": 800}
    # The code's 5, 2, 1: coverage 1/5 and 1/2.
    floored = adaptive_targets(lengths, correct, candidates, floor_counts=True)
    assert floored == {"easy": 200, "medium": 400, "hard": 800}
    assert adaptive_targets(lengths, correct, [50, 750]) == {"easy": 750, "medium": 750, "hard": None}


def test_search_equals_a_slow_one():
    rng = np.random.default_rng(0)
    for size, ceil, floor in [(8, (6, 3, 1), (5, 2, 1)), (16, (11, 6, 1), (10, 5, 1)), (6, (4, 2, 1), (4, 2, 1))]:
        for _ in range(40):
            lengths = rng.integers(1, 300, (9, size))
            correct = rng.random((9, size)) < rng.random((9, 1))
            candidates = [20, *range(64, 257, 32)]
            assert adaptive_targets(lengths, correct, candidates) == slow_search(lengths, correct, candidates, ceil)
            floored = adaptive_targets(lengths, correct, candidates, floor_counts=True)
            assert floored == slow_search(lengths, correct, candidates, floor)


def test_monitor_runs_before_training_and_every_20_steps_on_the_same_problems():
    method = make(LaserD, limit=256, base=126, group_size=8, prompts=32)
    method.start(make_problems(350))
    plans = {step: method.monitor(step) for step in range(41)}
    assert [step for step, plan in plans.items() if plan] == [0, 20, 40]
    plan = plans[0]
    assert plan == plans[20] == MonitorPlan(plan.problem_indices, 8, 1.0, 256)
    assert len(plan.problem_indices) == 125 == len(set(plan.problem_indices))  # 500 at 128 prompts a step
    assert min(plan.problem_indices) >= 0 and max(plan.problem_indices) < 350
    few = make(LaserD, monitor_problems=500)
    few.start(make_problems(7))
    assert few.monitor(0).problem_indices == tuple(range(7))


def test_on_monitor_sets_the_targets_and_falls_back_to_the_limit():
    method = make(LaserD, limit=256, base=126, group_size=3, target=16)
    assert set(method.adaptive.values()) == {256}  # before the first search
    logged = method.on_monitor(group([20, 40, 90, 10, 10, 10], [True] * 3 + [False] * 3, size=3))
    # Easy: |C| = 2, half of {20, 40, 90} within 48. Hard: all of {10, 10, 10} within 16. Medium: no group.
    assert method.adaptive == {"easy": 48, "medium": 256, "hard": 16}
    assert logged == {"laser/target_easy": 48.0, "laser/target_medium": 256.0, "laser/target_hard": 16.0}
    method.on_monitor(group([20, 40, 90], [False] * 3))  # targets can grow again
    assert method.adaptive == {"easy": 256, "medium": 256, "hard": 96}


def test_state_survives_json_and_gives_the_same_rewards():
    method, again = (make(LaserD, limit=256, base=126, group_size=3, target=16) for _ in range(2))
    method.on_monitor(group([20, 40, 90, 10, 10, 10], [True] * 3 + [False] * 3, size=3))
    again.load_state_dict(json.loads(json.dumps(method.state_dict())))
    rollouts = group([30, 50, 60], [True] * 3)
    assert (
        sum(again.reward(rollouts).values()).tolist() == sum(method.reward(rollouts).values()).tolist() == [1.5, 1, 1]
    )


# ------------------------------------------------------------------------------------------------------------ LASER-DE


def test_DE_forgives_long_wrong_answers_that_are_well_formed():
    rollouts = group([20] * 6, [False] * 6)
    rollouts.rows[1].response_ids = np.arange(10)  # not longer than the target
    rollouts.rows[2].response_ids = np.tile([1, 2, 3, 4], 5)  # repetitive: theirs means to refuse it, and never does
    rollouts.rows[3].text = NO_BOX
    rollouts.rows[4].correct = True  # right, but too long
    rollouts.rows[5].correct, rollouts.rows[5].response_ids = True, np.arange(5)
    method = make(LaserDE, group_size=6)
    method.adaptive = dict.fromkeys(method.adaptive, 10)
    assert sum(method.reward(rollouts).values()).tolist() == [0, -0.5, 0, -1, 1, 1.5]
    method = make(LaserD, group_size=6)
    method.adaptive = dict.fromkeys(method.adaptive, 10)
    assert sum(method.reward(rollouts).values()).tolist() == [-0.5, -0.5, -0.5, -1, 1, 1.5]
