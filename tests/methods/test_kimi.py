r"""Kimi k1.5's length reward: linear within the group, after a warm-up.

Run: python -m pytest tests/methods/test_kimi.py
"""

from __future__ import annotations

import numpy as np
from tiny import fill, make_config, make_rows

from nanolapo.methods.kimi import KimiLength, kimi_length_reward

GOOD = r"x </think> \boxed{1}"


def make(steps: int = 100, **options: object) -> KimiLength:
    return KimiLength(make_config(train={"steps": steps}, method={"options": options}))


def test_by_hand():
    """Lengths 100 to 300: lam 0.5, 0.25, 0, -0.25, -0.5; a wrong answer never gains."""
    lengths = np.array([100.0, 150, 200, 250, 300])
    np.testing.assert_allclose(kimi_length_reward(lengths, np.full(5, True)), [0.5, 0.25, 0, -0.25, -0.5])
    np.testing.assert_allclose(kimi_length_reward(lengths, np.full(5, False)), [0, 0, 0, -0.25, -0.5])


def test_min_and_max_are_over_all_answers_right_or_wrong():
    got = kimi_length_reward(np.array([0.0, 100, 200, 400]), np.array([False, True, True, False]))
    np.testing.assert_allclose(got, [0, 0.25, 0, -0.5])


def test_equal_lengths_and_a_single_answer_have_no_length_term():
    assert kimi_length_reward(np.array([7.0, 7, 7]), np.array([True, False, True])).tolist() == [0, 0, 0]
    assert kimi_length_reward(np.array([1.0]), np.array([True])).tolist() == [0]


def test_weight_and_order_for_all_answers_also_malformed_ones():
    """An answer that is cut and shows no box is the longest of its group, so it must not be worth more than a wrong one."""
    method = make(warmup_fraction=0.0)
    rollouts = make_rows([10, 20, 40, 50], group_size=4, correct=[True, True, False, False])
    fill(rollouts, text=[GOOD, GOOD, GOOD, "x"])
    parts = method.reward(rollouts)
    np.testing.assert_allclose(parts["length"], [0.267 * 0.5, 0.267 * 0.25, 0.267 * -0.25, 0.267 * -0.5])
    total = sum(parts.values())
    assert total[1] > total[2] > total[3]


def test_warm_up_is_a_share_of_the_run():
    rollouts = make_rows([10, 20], correct=[True, True])
    fill(rollouts, text=[GOOD] * 2)
    method = make(steps=100)
    for step, want in [(0, [1, 1]), (9, [1, 1]), (10, [1.1335, 0.8665]), (99, [1.1335, 0.8665])]:
        method.progress = step / 100
        np.testing.assert_allclose(sum(method.reward(rollouts).values()), want)


def test_groups_are_separate_and_right_beats_wrong():
    method = make(warmup_fraction=0.0)
    rollouts = make_rows([10, 30, 1000, 3000], correct=[True, False, False, True])
    fill(rollouts, text=[GOOD] * 4)
    np.testing.assert_allclose(sum(method.reward(rollouts).values()), [1.1335, -0.1335, 0.0, 0.8665])
    assert method.state_dict() == {}
