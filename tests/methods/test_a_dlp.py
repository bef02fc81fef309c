"""A-DLP: the price per token, how it moves, and what it does to a group.

Run: python -m pytest tests/methods/test_a_dlp.py
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tiny import make_config, make_rows

from nanolapo.config import UserError
from nanolapo.methods.a_dlp import ADlp, next_price
from nanolapo.rollouts import Rollouts


def make(base: float = 6229, **options: object) -> ADlp:
    return ADlp(make_config(rollout={"base_tokens": base}, method={"options": options}))


def batch(right: int) -> Rollouts:
    return make_rows([10, 20, 30, 40], 4, correct=[True] * right + [False] * (4 - right))


def test_every_answer_pays_for_its_tokens():
    parts = make(lam=0.01).reward(make_rows([10, 64, 20, 64], 4, correct=[1, 0, 0, 1], finished=[1, 0, 1, 1]))
    np.testing.assert_allclose(sum(parts.values()), [0.9, -0.64, -0.2, 0.36])
    assert parts["correct"].tolist() == [1, 0, 0, 1]
    np.testing.assert_allclose(parts["length"], [-0.1, -0.64, -0.2, -0.64])


def test_the_published_numbers_are_per_token_of_their_base():
    assert (make().lam, make().rate) == (pytest.approx(0.001), pytest.approx(0.001))
    small = make(62.29)
    assert (small.lam, small.rate) == (pytest.approx(0.1), pytest.approx(0.1))
    assert (make(0, lam=0.5, rate=0.25).lam, make(0, lam=0.5, rate=0.25).rate) == (0.5, 0.25)
    assert make(0, lam=0.0, rate=0.0).lam == 0  # a zero is a setting


def test_the_price_follows_accuracy_and_is_never_negative():
    """From 0.01, rate 0.1, reference 1/2: +0.05, +0.025, 0, -0.025, then down to 0 and not below."""
    method = make(lam=0.01, rate=0.1, reference=0.5)
    prices = []
    for right in (4, 3, 2, 1, 0, 0, 0, 4):
        logged = method.after_step(batch(right))
        prices.append(method.lam)
        assert set(logged) == {"a_dlp/lam"}
    assert prices == pytest.approx([0.06, 0.085, 0.085, 0.06, 0.01, 0, 0, 0.05])
    assert next_price(0.0, 1.0, 0.4, 0.4) == 0


def test_a_step_is_priced_by_the_lam_before_it_and_logs_that():
    method = make(lam=0.01, rate=0.1, reference=0.0)
    rollouts = batch(2)
    before = method.reward(rollouts)["length"]
    assert method.after_step(rollouts) == {"a_dlp/lam": 0.01}
    np.testing.assert_allclose(method.reward(rollouts)["length"], before * 6)  # 0.01 + 0.1 * 0.5


def test_without_a_reference_the_first_steps_accuracy_is_it():
    method = make(lam=0.01, rate=0.1)
    method.after_step(batch(3))
    assert (method.reference, method.lam) == (0.75, 0.01)
    method.after_step(batch(4))
    assert (method.reference, method.lam) == (0.75, pytest.approx(0.035))


def test_in_a_group_of_one_class_lam_only_decides_whether_there_is_a_signal():
    for right in (0, 4):
        rollouts, found = batch(right), []
        for lam in (0.0, 1e-9, 0.001, 0.1):
            rewards = sum(make(lam=lam).reward(rollouts).values())
            advantages = make(lam=lam).advantage(rollouts, torch.from_numpy(rollouts.by_group(rewards)))
            found.append(advantages.tolist())
        assert found[0] == found[1] == [0] * 4
        assert found[2] == pytest.approx(found[3], rel=1e-4) and found[2][0] > 1 > found[2][1] > found[2][3]


def test_ties_and_finite():
    rollouts = make_rows([7] * 4, 4, correct=[1] * 4)
    rewards = sum(make().reward(rollouts).values())
    assert make().advantage(rollouts, torch.from_numpy(rewards[None])).tolist() == [0] * 4


@pytest.mark.parametrize("options", [{"lam": -1.0}, {"rate": -1.0}, {"reference": 1.5}])
def test_impossible_settings_are_refused(options):
    with pytest.raises(UserError, match=next(iter(options))):
        make(**options)


def test_state_survives_a_resume():
    first, second = make(lam=0.01, rate=0.1), make(lam=0.01, rate=0.1)
    for right in (2, 4):
        first.after_step(batch(right))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert (second.lam, second.reference) == (first.lam, 0.5) and second.lam > 0.05
    assert first.after_step(batch(1)) == second.after_step(batch(1)) and first.lam == second.lam
    fresh = make(lam=0.01, rate=0.1)
    fresh.load_state_dict(make(lam=0.02).state_dict())  # saved before the first step: no reference yet
    assert (fresh.lam, fresh.reference) == (0.02, None)
