"""HAPO, history-aware: both shapes, the order of reward and update, what enters the history.

Run: python -m pytest tests/methods/test_hapo.py
"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from tiny import make_config, make_rows

from nanolapo.config import UserError
from nanolapo.methods.hapo import Hapo, cosine_shape, linear_shape


def make(**options: object) -> Hapo:
    return Hapo(make_config(method={"options": options}))


def test_cosine_by_hand():
    """h = 90: 30 tokens cos(30 deg), 60 cos(60 deg), 90 zero, 120 cos(120 deg), from 180 on -1, cut at -0.7 when right."""
    lengths = np.array([30, 60, 90, 120, 180, 1000])
    right = cosine_shape(lengths, np.full(6, True), 90.0)
    np.testing.assert_allclose(right, [0.8660254, 0.5, 0.0, -0.5, -0.7, -0.7], atol=1e-7)
    wrong = cosine_shape(lengths, np.full(6, False), 90.0)
    np.testing.assert_allclose(wrong, [0.0, 0.0, 0.0, -0.5, -1.0, -1.0], atol=1e-7)


def test_linear_by_hand():
    """h = 100: 1 - L/h below it, nothing up to 110, then the excess in units of h, cut at 0.7 (right) or 1 (wrong)."""
    lengths = np.array([25, 100, 110, 140, 180, 500])
    right = linear_shape(lengths, np.full(6, True), 100.0)
    np.testing.assert_allclose(right, [0.75, 0.0, 0.0, -0.3, -0.7, -0.7], atol=1e-12)
    wrong = linear_shape(lengths, np.full(6, False), 100.0)
    np.testing.assert_allclose(wrong, [0.0, 0.0, 0.0, -0.3, -0.7, -1.0], atol=1e-12)


@pytest.mark.parametrize("shape", [cosine_shape, linear_shape])
def test_right_is_at_least_0_3_and_wrong_at_most_0(shape):
    lengths = np.arange(1, 2000)
    for h in (1.0, 37.0, 500.0, 3000.0):
        right, wrong = 1 + shape(lengths, np.full(1999, True), h), shape(lengths, np.full(1999, False), h)
        assert right.min() >= 0.3 - 1e-12 and wrong.max() <= 0 and wrong.min() >= -1 and right.max() <= 2


def test_history_is_read_before_and_written_after_the_rewards():
    method = make()
    first = make_rows([80, 60, 100, 90], correct=[True, True, False, False])
    assert sum(method.reward(first).values()).tolist() == [1, 1, 0, 0]  # no history yet: plain correctness
    logged = method.after_step(first)
    assert {k: h for k, (h, _) in method.history.items()} == {"demo:0": 60.0}  # the unsolved problem has none
    assert logged == {"history/known": 1.0, "history/mean": 60.0}

    second = make_rows([40, 120, 10, 90], correct=[True, False, True, False])
    parts = method.reward(second)
    assert parts["correct"].tolist() == [1, 0, 1, 0]
    np.testing.assert_allclose(parts["length"], [0.5, -1.0, 0.0, 0.0], atol=1e-12)  # cos(60 deg) against 60, -1 at 2h
    method.after_step(second)
    method.after_step(make_rows([400, 400, 5, 400], correct=[True, False, False, True]))  # longer: h stays
    assert {k: h for k, (h, _) in method.history.items()} == {"demo:0": 40.0, "demo:1": 10.0}


def test_mean_mode_weighs_by_count():
    method = make(mode="mean")
    method.after_step(make_rows([10, 20, 30], group_size=3, correct=[True] * 3))
    method.after_step(make_rows([100, 40, 7], group_size=3, correct=[True, True, False]))
    assert method.history["demo:0"] == (40.0, 5)  # (10 + 20 + 30 + 100 + 40) / 5
    method.after_step(make_rows([7, 7, 7], group_size=3, correct=[False] * 3))
    assert method.history["demo:0"] == (40.0, 5)


def test_cut_answers_never_enter_the_history():
    method = make()
    rollouts = make_rows([50, 20, 30, 40], group_size=4, correct=[True] * 4, finished=[True, False, True, True])
    method.after_step(rollouts)
    assert method.history["demo:0"] == (30.0, 3)


def test_a_history_of_one_token_stays_finite():
    method = make()
    method.after_step(make_rows([1, 5], correct=[True, False]))
    for correct in ([True, True], [False, False]):
        reward = sum(method.reward(make_rows([1, 4096], correct=correct)).values())
        assert np.isfinite(reward).all() and math.isclose(reward[0], correct[0], abs_tol=1e-12)


def test_weight_scales_the_length_part_only():
    for weight in (0.0, 0.5):
        method = make(weight=weight)
        method.history = {"demo:0": (100.0, 1)}
        parts = method.reward(make_rows([50, 300], correct=[True, False]))
        np.testing.assert_allclose(parts["length"], [weight * math.sqrt(0.5), -weight], atol=1e-12)


def test_state_survives_json_and_gives_the_same_next_rewards():
    for mode in ("min", "mean"):
        method, again = make(mode=mode), make(mode=mode)
        method.after_step(make_rows([10, 21, 30, 7], correct=[True, True, False, False]))
        again.load_state_dict(json.loads(json.dumps(method.state_dict())))
        for seed in range(3):
            rollouts = make_rows([12, 15, 9, 33], seed=seed, correct=[True, False, True, True])
            one, other = (sum(m.reward(rollouts).values()).tolist() for m in (method, again))
            assert one == other
            assert method.after_step(rollouts) == again.after_step(rollouts)
        assert method.state_dict() == again.state_dict()


def test_a_misspelt_option_is_refused():
    for options in ({"shape": "cosin"}, {"mode": "median"}):
        with pytest.raises(UserError, match="cosine or linear"):
            make(**options)
