"""DDCA, DCA and the leave-one-out form: length as a second advantage among right answers.

Run: python -m pytest tests/methods/test_ddca.py
"""

from __future__ import annotations

import math
from statistics import mean, pstdev

import numpy as np
import pytest
import torch
from tiny import make_config, make_rows

from nanolapo.methods.ddca import Ddca, Options, ddca_advantages, length_scores


def formula(lengths: list[float], correct: list[bool], beta: float, rate: bool, loo: bool) -> list[float]:
    """As METHODS and the authors' code have it, answer by answer."""
    verdicts, size = [float(c) for c in correct], len(lengths)
    right = [i for i in range(size) if correct[i]]
    p = len(right) / size if rate else 1.0
    scores = {}
    for i in right:
        z = (lengths[i] - mean(lengths[j] for j in right)) / (max(pstdev([lengths[j] for j in right]), 1e-8) + 1e-8)
        scores[i] = 1 / (1 + math.exp(-max(-20.0, min(20.0, z))))
    out = []
    for i in range(size):
        if loo:
            a = verdicts[i] - mean(verdicts[j] for j in range(size) if j != i)
            others = [scores[j] for j in right if j != i]
        else:
            a = (verdicts[i] - mean(verdicts)) / (max(pstdev(verdicts), 1e-8) + 1e-8)
            others = [scores[j] for j in right]
        if i in scores and others:
            a -= beta * p * (scores[i] - mean(others))
        out.append(a)
    return out


@pytest.mark.parametrize("loo", [False, True])
@pytest.mark.parametrize("rate", [False, True])
def test_all_forms_against_the_formula(rate, loo):
    rng = np.random.default_rng(1)
    for trial in range(40):
        size = int(rng.integers(2, 9))
        lengths, correct = rng.integers(1, 300, size).astype(float), rng.random(size) < (trial % 5) / 4
        got = ddca_advantages(lengths, correct, Options(beta=0.7, by_pass_rate=rate, leave_one_out=loo))
        want = formula(lengths.tolist(), correct.tolist(), 0.7, rate, loo)
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-9)


def test_by_hand():
    """Right 100 and 300: z -1 and 1, s 0.2689 and 0.7311. p 1/2, accuracy advantages 1 and -1."""
    lengths, correct = np.array([100.0, 300, 20, 999]), np.array([True, True, False, False])
    spread = 1 / (1 + math.exp(-1)) - 0.5
    np.testing.assert_allclose(
        ddca_advantages(lengths, correct, Options(2.0)), [1 + spread, 1 - spread, -1, -1], atol=1e-6
    )
    dca = ddca_advantages(lengths, correct, Options(2.0, by_pass_rate=False))
    np.testing.assert_allclose(dca, [1 + 2 * spread, 1 - 2 * spread, -1, -1], atol=1e-6)
    loo = ddca_advantages(lengths, correct, Options(2.0, leave_one_out=True))  # c - 1/3 or 2/3; s minus the other's
    np.testing.assert_allclose(loo, [2 / 3 + 2 * spread, 2 / 3 - 2 * spread, -2 / 3, -2 / 3], atol=1e-6)


def test_a_group_right_throughout_has_a_signal_of_strength_beta():
    lengths, correct = np.array([42.0, 42, 78, 216]), np.full(4, True)
    one, three = (ddca_advantages(lengths, correct, Options(beta)) for beta in (1.0, 3.0))
    assert one[0] == one[1] > 0 > one[3] and one[1] > one[2] > one[3]
    np.testing.assert_allclose(three, 3 * one)  # the deviation does not cancel beta
    assert abs(one.sum()) < 1e-12


def test_wrong_answers_do_not_move_the_length_term():
    correct = np.array([True, True, False, False])
    short = ddca_advantages(np.array([50.0, 90, 1, 1]), correct, Options())
    long = ddca_advantages(np.array([50.0, 90, 4000, 4000]), correct, Options())
    np.testing.assert_array_equal(short, long)


@pytest.mark.parametrize("loo", [False, True])
def test_edges(loo):
    """None right, a lone right answer, equal lengths, a group of one: no length term, nothing that is not finite."""
    o = Options(leave_one_out=loo)
    assert ddca_advantages(np.array([5.0, 9, 30]), np.full(3, False), o).tolist() == [0, 0, 0]
    lone = ddca_advantages(np.array([5.0, 9, 30]), np.array([False, False, True]), o)
    np.testing.assert_allclose(lone, formula([5, 9, 30], [False, False, True], 0.0, True, loo), atol=1e-6)
    assert ddca_advantages(np.full(4, 77.0), np.full(4, True), o).tolist() == [0] * 4
    assert ddca_advantages(np.array([8.0]), np.array([True]), o).tolist() == [0]
    huge = ddca_advantages(np.array([1.0] * 7 + [1e9]), np.full(8, True), o)
    assert np.isfinite(huge).all()
    assert length_scores(np.array([80.0, 80.0])).tolist() == [0.5, 0.5]


def test_the_method_works_group_by_group_and_keeps_the_reward():
    method = Ddca(make_config(method={"options": {"beta": 0.5}}))
    rollouts = make_rows(
        [10, 30, 64, 64, 7, 7, 40, 64], 4, correct=[1, 1, 1, 0, 0, 0, 0, 0], finished=[1] * 3 + [0] * 5
    )
    parts = method.reward(rollouts)
    assert list(parts) == ["correct"]
    rewards = torch.from_numpy(rollouts.by_group(parts["correct"]))
    got = method.advantage(rollouts, rewards)
    assert got.shape == (8,) and got.dtype == rewards.dtype
    want = formula([10.0, 30, 64, 64], [True, True, True, False], 0.5, True, False) + [0.0] * 4
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-6, atol=1e-9)
    assert method.state_dict() == {}


def test_from_beta_1_on_a_long_right_answer_is_pushed_down_at_7_of_8():
    lengths, correct = np.array([42.0] * 6 + [216, 42]), np.array([True] * 7 + [False])
    assert ddca_advantages(lengths, correct, Options(0.9))[6] > 0 > ddca_advantages(lengths, correct, Options(1.0))[6]
