"""Efficient reasoning and GRPO-lambda, which share one formula.

Run: python -m pytest tests/methods/test_efficient_reasoning.py
"""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch
from tiny import make_config, make_rows

from nanolapo.methods.efficient_reasoning import EfficientReasoning, sigmoid_reward
from nanolapo.methods.grpo_lambda import GrpoLambda, best_groups


def slow_reward(lengths: list[int], correct: list[bool], a: float) -> list[float]:
    right = [n for n, c in zip(lengths, correct, strict=True) if c]
    if not right:
        return [0.0] * len(lengths)
    mean = sum(right) / len(right)
    std = math.sqrt(sum((n - mean) ** 2 for n in right) / len(right))
    return [
        (1 - a / (1 + math.exp(-((n - mean) / std if std else 0.0)))) if c else 0.0
        for n, c in zip(lengths, correct, strict=True)
    ]


def test_formula_by_hand_and_against_a_slow_loop():
    """Right answers 100 and 300: z = -1 and 1, sigmoid 0.26894 and 0.73106; the wrong ones enter no statistic."""
    reward = sigmoid_reward(np.array([100.0, 300.0, 9000.0]), np.array([True, True, False]), 0.4)
    np.testing.assert_allclose(reward, [1 - 0.4 * 0.2689414, 1 - 0.4 * 0.7310586, 0.0], atol=1e-7)
    rng = np.random.default_rng(0)
    for _ in range(50):
        lengths, correct = rng.integers(1, 200, 6), rng.random(6) < 0.5
        got = sigmoid_reward(lengths.astype(float), correct, 0.3)
        np.testing.assert_allclose(got, slow_reward(lengths.tolist(), correct.tolist(), 0.3), atol=1e-12)


def test_edges_no_right_answer_one_ties_and_an_outlier():
    assert sigmoid_reward(np.array([3.0, 4.0]), np.array([False, False]), 0.4).tolist() == [0, 0]
    assert sigmoid_reward(np.array([3.0, 400.0]), np.array([True, False]), 0.4).tolist() == [
        0.8,
        0,
    ]  # z = 0, not all of a
    assert sigmoid_reward(np.array([7.0, 7.0]), np.array([True, True]), 0.4).tolist() == [0.8, 0.8]
    with np.errstate(all="raise"):  # a wrong answer 16,000 tokens beyond two right ones must not overflow
        reward = sigmoid_reward(np.array([1.0, 2.0, 16384.0]), np.array([True, True, False]), 0.4)
    assert np.isfinite(reward).all()


def test_every_right_answer_beats_every_wrong_one_and_shorter_beats_longer():
    lengths, correct = np.array([1.0, 50.0, 200.0, 16384.0, 5.0]), np.array([True, True, True, True, False])
    reward = sigmoid_reward(lengths, correct, 0.6)
    assert (np.diff(reward[:4]) < 0).all() and reward[:4].min() > reward[4] == 0


def test_groups_are_separate():
    method = EfficientReasoning(make_config(method={"options": {"weight": 0.4}}))
    rollouts = make_rows([100, 300, 1000, 3000], correct=[True] * 4)
    parts = method.reward(rollouts)
    assert parts["correct"].tolist() == [1, 1, 1, 1]
    want = slow_reward([100, 300], [True] * 2, 0.4) + slow_reward([1000, 3000], [True] * 2, 0.4)
    np.testing.assert_allclose(sum(parts.values()), want)


def test_the_advantage_is_rloo_whitened_over_the_tokens_of_the_step():
    """Three groups of four, by a loop over every single token: each reward minus the mean of the other three, then minus
    the mean and divided by the deviation over all tokens."""
    method = EfficientReasoning(make_config(method={"options": {"weight": 0.2}}))
    lengths = [5, 9, 30, 2, 8, 8, 40, 3, 7, 11, 6, 6]
    rollouts = make_rows(lengths, 4, correct=[True] * 4 + [True, False, True, False] + [False] * 4)
    rewards = sum(method.reward(rollouts).values())
    others = [(sum(rewards[g : g + 4]) - rewards[b]) / 3 for g in (0, 4, 8) for b in range(g, g + 4)]
    tokens = [rewards[b] - others[b] for b in range(12) for _ in range(lengths[b])]
    mean, deviation = statistics.mean(tokens), statistics.stdev(tokens)
    want = [(rewards[b] - others[b] - mean) / deviation for b in range(12)]
    got = method.advantage(rollouts, torch.from_numpy(rewards).view(3, 4))
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)
    assert len(set(got[8:].tolist())) == 1 and got[8] != 0  # a group without signal has what the step's mean leaves


def test_the_weight_decides_how_much_length_counts():
    """In a group that is right throughout: twice the weight, about twice the advantage beside a group that is not."""
    sizes = []
    for weight in (0.1, 0.2):
        method = EfficientReasoning(make_config(method={"options": {"weight": weight}}))
        rollouts = make_rows([100, 300, 200, 200], correct=[True, True, True, False])
        advantages = method.advantage(
            rollouts, torch.from_numpy(rollouts.by_group(sum(method.reward(rollouts).values())))
        )
        sizes.append(float((advantages[0] - advantages[1]) / (advantages[2] - advantages[3])))
    assert sizes[0] == pytest.approx(0.1 * 0.4621 / 0.95, rel=1e-3) and sizes[1] == pytest.approx(
        0.2 * 0.4621 / 0.9, rel=1e-3
    )


# --------------------------------------------------------------------------------------------------------- GRPO-lambda


def test_best_groups_by_pass_rate_at_least_one_rounded_up_ties_in_order():
    rates = [0, 2, 1, 2, 2, 0, 1, 0, 0, 0]
    correct = np.array([[1] * k + [0] * (2 - k) for k in rates])
    for share, want in [
        (0.2, [1, 3]),
        (0.0, [1]),
        (0.21, [1, 3, 4]),
        (0.3, [1, 3, 4]),
        (0.4, [1, 2, 3, 4]),
        (1.0, range(10)),
    ]:
        assert np.flatnonzero(best_groups(correct, share)).tolist() == list(want)
    assert (
        best_groups(np.ones((25, 2), dtype=int), 0.28).sum() == 7
    )  # 0.28 * 25 is a little more than 7 in floating point


def test_only_the_best_groups_pay_for_length():
    """Three groups of two; lambda 0.2 of 3 is one group: the first with both right. Its wrong answers would get 0."""
    method = GrpoLambda(make_config())
    rollouts = make_rows([10, 30, 10, 30, 10, 30], correct=[True, False, True, True, True, True])
    reward = sum(method.reward(rollouts).values())
    np.testing.assert_allclose(reward, [1, 0, *slow_reward([10, 30], [True, True], 0.2), 1, 1])
    single = make_rows([10, 30], correct=[True, False])  # the best group of one, with a wrong answer in it
    np.testing.assert_allclose(sum(method.reward(single).values()), [0.9, 0.0])
    nothing = make_rows([10, 30, 5, 5], correct=[False] * 4)
    assert (sum(method.reward(nothing).values()) == 0).all()


def test_share_one_is_efficient_reasoning():
    rollouts = make_rows([10, 30, 20, 30, 10, 40], correct=[True, False, True, True, False, False])
    one = GrpoLambda(make_config(method={"options": {"share": 1.0, "weight": 0.3}})).reward(rollouts)
    other = EfficientReasoning(make_config(method={"options": {"weight": 0.3}})).reward(rollouts)
    np.testing.assert_array_equal(sum(one.values()), sum(other.values()))
