"""O1-Pruner: the harmonizing reward as advantage, and where its reference comes from.

Run: python -m pytest tests/methods/test_o1_pruner.py
"""

from __future__ import annotations

import json
import math

import numpy as np
import torch
from tiny import make_config, make_problems, make_rows

from nanolapo.methods.base import MonitorPlan
from nanolapo.methods.o1_pruner import O1Pruner, cut_and_standardize, harmonizing_reward


def make(**options: object) -> O1Pruner:
    return O1Pruner(make_config(method={"options": options}))


def test_formula_by_hand():
    """Reference 600 tokens, accuracy 0.25: half the length +1, twice -0.5; right +1.5, wrong -0.5."""
    got = harmonizing_reward(np.array([300, 600, 1200, 300]), np.array([True, True, False, False]), 600.0, 0.25)
    np.testing.assert_allclose(got, [2.5, 1.5, -1.0, 0.5])
    got = harmonizing_reward(np.array([300]), np.array([True]), 600.0, 0.25, weight=5.0)
    np.testing.assert_allclose(got, [4.75])
    assert harmonizing_reward(np.array([0, 1]), np.array([False, False]), 600.0, 0.0).tolist() == [599, 599]


def test_cut_and_standardize_by_hand():
    """99, 1, -9 become 4, 1, -2: mean 1, population std sqrt(6)."""
    want = [3 / math.sqrt(6), 0, -3 / math.sqrt(6)]
    np.testing.assert_allclose(cut_and_standardize(np.array([99.0, 1, -9])), want)
    assert cut_and_standardize(np.array([99.0, 1, -9]), standardize=False).tolist() == [4, 1, -2]
    assert cut_and_standardize(np.full(4, 0.3)).tolist() == [0, 0, 0, 0]  # nothing to tell apart


def test_pre_pass_asks_once_for_every_problem():
    method = make(reference_samples=3)
    method.start(make_problems(5))
    assert method.monitor(0) == MonitorPlan((0, 1, 2, 3, 4), 3, 1.0, 64)
    assert method.monitor(1) is None and make(reference_samples=0).monitor(0) is None


def test_pre_pass_is_the_reference_of_all_later_steps():
    method = make()
    logged = method.on_monitor(make_rows([100, 300, 40, 60], correct=[True, False, False, False]))
    assert method.reference == {"demo:0": (200.0, 0.5), "demo:1": (50.0, 0.0)}
    assert logged == {"reference/length": 125.0, "reference/accuracy": 0.25}
    rollouts = make_rows([100, 400, 50, 25], correct=[True, False, True, False])
    for _ in range(2):  # the second time after a step: the reference has not moved
        parts = method.reward(rollouts)
        np.testing.assert_allclose(sum(parts.values()), [1 + 1, -0.5 - 1, 0 + 2, 1 + 0])
        assert parts["correct"].tolist() == [1, 0, 1, 0]
        np.testing.assert_allclose(parts["length"], [1, -0.5, 0, 1])
        method.after_step(rollouts)
    assert method.reference == {"demo:0": (200.0, 0.5), "demo:1": (50.0, 0.0)}


def test_first_visit_is_the_reference_without_a_pre_pass():
    method = make(reference_samples=0)
    first = make_rows([100, 300], correct=[True, False])
    np.testing.assert_allclose(sum(method.reward(first).values()), [1 + 1, -1 / 3 - 1])  # own group: 200 tokens, 0.5
    method.after_step(first)
    second = make_rows([50, 50], correct=[True, True])
    np.testing.assert_allclose(sum(method.reward(second).values()), [3 + 1, 3 + 1])  # still 200 tokens, 0.5
    method.after_step(second)
    assert method.reference == {"demo:0": (200.0, 0.5)}


def test_the_reward_is_the_advantage_without_a_group_mean():
    """Two groups, one good and one bad throughout: group-relative advantages would be 0, these are not."""
    method = make()
    method.reference = {"demo:0": (100.0, 0.5), "demo:1": (100.0, 0.5)}
    rollouts = make_rows([50, 50, 200, 200], correct=[True, True, False, False])
    rewards = torch.from_numpy(rollouts.by_group(sum(method.reward(rollouts).values())))
    advantages = method.advantage(rollouts, rewards)
    np.testing.assert_allclose(advantages, [1, 1, -1, -1])
    plain = make(standardize=False).advantage(rollouts, rewards)
    np.testing.assert_allclose(plain, [2, 2, -1.5, -1.5])


def test_extremes_are_finite():
    method = make()
    method.reference = {"demo:0": (4096.0, 0.0)}
    rollouts = make_rows([1, 4096], correct=[True, False])
    rewards = torch.from_numpy(rollouts.by_group(sum(method.reward(rollouts).values())))
    assert rewards[0, 0] == 4097 and torch.isfinite(method.advantage(rollouts, rewards)).all()
    assert make(standardize=False).advantage(rollouts, rewards).tolist() == [4, 0]


def test_state_survives_json_and_gives_the_same_rewards():
    method, again = make(), make()
    method.on_monitor(make_rows([100, 301, 40, 63], correct=[True, False, False, True]))
    again.load_state_dict(json.loads(json.dumps(method.state_dict())))
    rollouts = make_rows([90, 41, 17, 60], correct=[True, False, True, False])
    one, other = (sum(m.reward(rollouts).values()).tolist() for m in (method, again))
    assert one == other and again.state_dict() == method.state_dict()
