"""Short-RL: a length term beyond a tolerance, only while accuracy holds.

Run: python -m pytest tests/methods/test_short_rl.py
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from tiny import make_config, make_rows

from nanolapo.methods.short_rl import ShortRl, bonus
from nanolapo.rollouts import Rollouts


def make(base: float = 8086, **options: object) -> ShortRl:
    return ShortRl(make_config(rollout={"base_tokens": base}, method={"options": options}))


def batch(right: int, of: int = 20) -> Rollouts:
    return make_rows(list(range(1, of + 1)), of, correct=[True] * right + [False] * (of - right))


def test_by_hand():
    """Right 100 to 500, tol 100: 100 and 200 have 0.5; 300 is half of the way, 500 all of it."""
    lengths = np.array([100.0, 200, 201, 300, 500, 10, 9999])
    got = bonus(lengths, np.array([True] * 5 + [False] * 2), 100)
    np.testing.assert_allclose(got, [0.5, 0.5, 0.5 - 101 / 400, 0, -0.5, 0, 0], atol=1e-6)


def test_by_a_loop():
    rng = np.random.default_rng(2)
    for _ in range(30):
        lengths, correct = rng.integers(1, 400, 8).astype(float), rng.random(8) < 0.6
        right = [n for n, c in zip(lengths, correct, strict=True) if c]
        for value, n, c in zip(bonus(lengths, correct, 50), lengths, correct, strict=True):
            want = 0.0
            if c:
                want = 0.5 if n <= min(right) + 50 else 0.5 - (n - min(right)) / (max(right) - min(right) + 1e-5)
            assert value == pytest.approx(want)


def test_edges():
    assert bonus(np.array([5.0, 9]), np.array([False, False]), 1).tolist() == [0, 0]
    assert bonus(np.array([5.0, 9]), np.array([False, True]), 1).tolist() == [0, 0.5]
    assert bonus(np.array([9.0, 9, 9]), np.full(3, True), 0).tolist() == [0.5] * 3  # ties, also without a tolerance
    assert bonus(np.array([9.0, 10]), np.full(2, True), 1.0).tolist() == [0.5, 0.5]  # at the tolerance


def test_reward_is_the_verdict_plus_the_term_and_right_stays_above_wrong():
    method = make(tol=0)
    rollouts = make_rows([10, 30, 64, 1, 1, 2, 64, 64], 4, correct=[1, 1, 0, 0] + [0] * 4, finished=[1, 1, 0, 1] * 2)
    parts = method.reward(rollouts)
    assert parts["correct"].tolist() == [1, 1] + [0] * 6
    np.testing.assert_allclose(parts["length"], [0.5, -0.5] + [0] * 6, atol=1e-6)
    total = sum(parts.values())
    assert total[:2].min() > 0.49 > total[2:].max()
    np.testing.assert_allclose(make(tol=0, weight=0.5).reward(rollouts)["length"][:2], [0.25, -0.25], atol=1e-6)


def test_the_tolerance_scales_with_the_base():
    assert make().tol == pytest.approx(100) and make(80.86).tol == pytest.approx(1) and make(0, tol=7).tol == 7


def test_the_term_is_off_while_accuracy_is_more_than_the_margin_below_its_best():
    """Best 0.8: 0.75 is just within 0.05, 0.7 is not; a new best moves the bar, a worse batch does not."""
    method = make()
    logged = [method.after_step(batch(right)) for right in (10, 16, 12)]
    assert [entry["short_rl/best_accuracy"] for entry in logged] == [0.5, 0.8, 0.8]
    assert [entry["short_rl/active"] for entry in logged] == [1, 1, 0]
    for right, on in [(15, True), (14, False), (20, True), (0, False)]:
        assert method.reward(batch(right))["length"].any() == on, right
    assert method.best == 0.8  # a reward changes nothing: only after_step does
    wide = make(margin=0.1)
    wide.after_step(batch(16))
    assert wide.reward(batch(14))["length"].any()


def test_the_first_batch_has_the_term():
    assert make().reward(batch(1))["length"].any()


def test_accuracy_is_of_the_whole_batch_and_not_of_a_group():
    method = make()
    method.after_step(batch(15))
    two = make_rows([5, 9] * 4, 4, correct=[1, 1, 1, 1, 0, 0, 0, 0])  # 1 and 0: 0.5 together
    assert not method.reward(two)["length"].any()


def test_state_survives_a_resume():
    first, second = make(), make()
    first.after_step(batch(16))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.best == 0.8 and not second.reward(batch(14))["length"].any()
    assert first.after_step(batch(18)) == second.after_step(batch(18))
