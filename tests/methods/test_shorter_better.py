"""ShorterBetter: distance to the shortest right answer of the group.

Run: python -m pytest tests/methods/test_shorter_better.py
"""

from __future__ import annotations

import numpy as np
import pytest
from tiny import make_config, make_rows

from nanolapo.methods.shorter_better import ShorterBetter, shortest_reward


def reward(lengths: list[int], correct: list[bool]) -> np.ndarray:
    return shortest_reward(np.array(lengths, dtype=float), np.array(correct))


def test_by_hand():
    """SOL 600: right 600, 1600 -> 2, 1; wrong 600, 100, 2600 -> 0, -0.5, -2. A shorter wrong answer does not set SOL."""
    got = reward([600, 1600, 600, 100, 2600], [True, True, False, False, False])
    np.testing.assert_allclose(got, [2, 1, 0, -0.5, -2], atol=1e-12)


def test_no_right_answer_pulls_to_the_mean():
    np.testing.assert_allclose(reward([100, 200, 600], [False] * 3), [-0.2, -0.1, -0.3], atol=1e-12)  # mean 300


def test_one_right_answer_ties_and_a_single_token():
    np.testing.assert_allclose(reward([500, 100], [True, False]), [2, -0.4])
    np.testing.assert_allclose(reward([500, 500, 500], [True] * 3), 2)
    np.testing.assert_allclose(reward([1, 1], [False, False]), 0)


def test_shorter_right_answers_get_more_and_equal_lengths_are_told_apart_by_correctness():
    got = reward([300, 400, 500, 300, 400, 500], [True] * 3 + [False] * 3)
    assert (np.diff(got[:3]) < 0).all() and (got[:3] > got[3:]).all()


def test_price_scales_with_the_inverse_of_the_bases_length_and_groups_are_separate():
    method = ShorterBetter(make_config(rollout={"base_tokens": 808.6}))  # a tenth of the published base's mean
    assert method.beta == pytest.approx(0.01)
    rollouts = make_rows([10, 110, 40, 60], correct=[True, True, False, False])
    parts = method.reward(rollouts)
    np.testing.assert_allclose(sum(parts.values()), [2, 1, -0.1, -0.1], atol=1e-12)
    assert parts["correct"].tolist() == [1, 1, 0, 0] and parts["correct_extra"].tolist() == [1, 1, 0, 0]
    np.testing.assert_allclose(parts["length"], [0, -1, -0.1, -0.1], atol=1e-12)
    absolute = ShorterBetter(make_config(method={"options": {"alpha": 1.0, "beta": 0.002}}))
    np.testing.assert_allclose(sum(absolute.reward(rollouts).values()), [1, 0.8, -0.02, -0.02], atol=1e-12)
