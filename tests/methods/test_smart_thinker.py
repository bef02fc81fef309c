"""SmartThinker: calibrated length in every case, and what its weight promises.

Run: python -m pytest tests/methods/test_smart_thinker.py
"""

from __future__ import annotations

import statistics

import numpy as np
import torch
from tiny import make_config, make_rows

from nanolapo.advantages import group_advantages
from nanolapo.methods.smart_thinker import SmartThinker, calibrated_length, calibrated_reward


def length(lengths: list[float], correct: list[bool]) -> float:
    return calibrated_length(np.array(lengths, dtype=float), np.array(correct))


def slow_length(lengths: list[float], correct: list[bool]) -> float:
    right = [n for n, c in zip(lengths, correct, strict=True) if c]
    if len(right) == len(lengths):
        return min(lengths)
    if not right:
        return max(lengths)
    m1, v1 = statistics.fmean(lengths), statistics.pvariance(lengths)
    m2, v2 = statistics.fmean(right), statistics.pvariance(right)
    if abs(v1 - v2) < 1e-6:
        return max(lengths) if m2 >= m1 else min(lengths)
    if v2 > v1:
        return min(lengths)
    return min(max((v1 * m2 - v2 * m1) / (v1 - v2), min(lengths)), max(lengths))


def test_calibrated_length_by_hand():
    """All 0, 20, 40, 60: m1 30, v1 500. Right 0, 20: m2 10, v2 100: (500*10 - 100*30)/400 = 5."""
    assert length([0, 20, 40, 60], [True, True, False, False]) == 5
    # Right 40, 60: m2 50, v2 100: (500*50 - 100*30)/400 = 55.
    assert length([0, 20, 40, 60], [False, False, True, True]) == 55
    # Right 0, 0, 100 of 0, 0, 100, 100, 100: v1 2400, v2 2222: l* far below, clipped to the shortest.
    assert length([0, 0, 100, 100, 100], [True, True, True, False, False]) == 0


def test_calibrated_length_in_the_other_cases():
    assert length([10, 30, 50], [True] * 3) == 10 and length([10, 30, 50], [False] * 3) == 50
    assert length([10, 50, 30], [True, True, False]) == 10  # right answers spread more: the shortest
    assert length([10, 30, 80], [False, True, False]) == 30  # one right answer: its own length
    assert length([7, 7, 7], [True, False, False]) == 7


def test_equal_variances_follow_the_model_not_the_code():
    """v1 = v2: right answers longer than average -> the longest, shorter -> the shortest (the code has them swapped).

    Right 10 and 30, variance 100. A third at distance d from their middle gives (200 + 2/3 d^2) / 3: 100 for d^2 = 150.
    """
    for third, want in [(20 - 150**0.5, 30.0), (20 + 150**0.5, 10.0)]:
        group = [10.0, 30.0, third]
        assert abs(statistics.pvariance(group) - 100) < 1e-9
        assert length(group, [True, True, False]) == want


def test_against_a_slow_version():
    rng = np.random.default_rng(0)
    for _ in range(300):
        lengths, correct = rng.integers(1, 60, 6).astype(float).tolist(), (rng.random(6) < 0.5).tolist()
        assert abs(length(lengths, correct) - slow_length(lengths, correct)) < 1e-6


def test_reward_by_hand():
    """All 0, 20, 40, 60, right 0 and 20, l* = 5: s = 0, -15, 0, 0; Lam = 0.5 / (-3.75 + 15) = 0.04444; 20 gets 1/3."""
    got = calibrated_reward(np.array([0.0, 20, 40, 60]), np.array([True, True, False, False]))
    np.testing.assert_allclose(got, [1, 1 / 3, 0, 0], atol=1e-6)


def test_no_right_answer_or_only_right_answers_is_plain_correctness():
    assert calibrated_reward(np.array([10.0, 30]), np.array([True, True])).tolist() == [1, 1]
    assert calibrated_reward(np.array([10.0, 30]), np.array([False, False])).tolist() == [0, 0]


def test_right_answers_never_fall_below_the_mean_and_the_longest_lands_on_it():
    rng = np.random.default_rng(1)
    pressed = 0
    for _ in range(300):
        lengths, correct = rng.integers(1, 4096, 8).astype(float), rng.random(8) < rng.random()
        reward = calibrated_reward(lengths, correct)
        assert np.isfinite(reward).all() and (reward[~correct] == 0).all()
        if not correct.any() or correct.all():
            continue
        advantages = group_advantages(torch.from_numpy(reward[None]))[0].numpy()
        assert advantages[correct].min() > -1e-4 and advantages[~correct].max() < 1e-4
        if reward[correct].min() < 1:
            pressed += 1
            worst = np.flatnonzero(correct)[lengths[correct].argmax()]
            assert abs(reward[worst] - reward.mean()) < 1e-4 and reward[worst] == reward[correct].min()
    assert pressed > 50


def test_groups_are_separate_and_a_constant_group_is_finite():
    method = SmartThinker(make_config(rollout={"group_size": 4, "prompts_per_step": 2}))
    rollouts = make_rows([1, 21, 41, 61, 7, 7, 7, 7], group_size=4, correct=[True, True, False, False] * 2)
    parts = method.reward(rollouts)
    np.testing.assert_allclose(sum(parts.values()), [1, 1 / 3, 0, 0, 1, 1, 0, 0], atol=1e-6)
    assert parts["correct"].tolist() == [1, 1, 0, 0] * 2
