"""PALU and SPO: methods with a memory of every problem.

Run: python -m pytest tests/methods/test_palu_spo.py
"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from tiny import fill, make_config, make_problems, make_rows

from nanolapo.config import UserError
from nanolapo.methods.palu import Palu, next_budget
from nanolapo.methods.spo import Spo, first_counts, whiten


def palu(limit: int = 1000, **options: object) -> Palu:
    return Palu(make_config(rollout={"max_new_tokens": limit}, method={"options": options}))


def spo(prompts: int = 2, group: int = 2, problems: int = 6, **options: object) -> Spo:
    method = Spo(make_config(rollout={"prompts_per_step": prompts, "group_size": group}, method={"options": options}))
    method.start(make_problems(problems))
    return method


# ---------------------------------------------------------------------------------------------------------- PALU


def test_palu_budget_rule():
    """Worked by hand: four of five right (0.8 is enough), longest 900, median 500."""
    assert next_budget(1000, [300, 400, 600, 900, 5000], [True] * 4 + [False], 4096) == 1000 - (900 - 500)
    assert next_budget(1000, [300, 400, 600, 900, 5000], [True] * 4 + [False], 4096, tau=0.1) == pytest.approx(910)
    assert next_budget(1000, [300, 400, 600, 900], [True] * 3 + [False], 4096) == 4096  # 0.75: reset
    assert next_budget(1000, [300, 400], [False, False], 4096) == 4096  # nothing right: reset
    assert next_budget(700, [300, 1], [True, False], 4096, pass_rate=0.5) == 700  # one right answer: step 0
    assert next_budget(700, [300] * 4, [True] * 4, 4096) == 700  # equal lengths: step 0


def test_palu_budget_never_falls_below_what_sufficed():
    """With "right" meaning right within the budget, the budget stays at or above the (1 - tau) quantile, so above 0."""
    rng = np.random.default_rng(1)
    for _ in range(200):
        budget = float(rng.integers(1, 1000))
        lengths = rng.integers(1, budget + 1, 8)
        new = next_budget(budget, lengths, [True] * 8, 1000)
        assert np.median(lengths) - 1e-9 <= new <= budget


def test_palu_over_three_visits():
    """Visit 1 under the limit 1000; the budget of a visit is moved only after its rewards."""
    method = palu()
    rollouts = make_rows([300, 400, 600, 900], 4, correct=[True] * 4)
    assert sum(method.reward(rollouts).values()).tolist() == [1, 1, 1, 1]
    method.after_step(rollouts)
    assert method.budgets == {"demo:0": 1000 - (900 - 500)}
    assert sum(method.reward(rollouts).values()).tolist() == [1, 1, 1, 0]  # 900 > 600, 600 is within
    assert method.reward(rollouts)["correct"].tolist() == [1, 1, 1, 1]
    method.after_step(rollouts)  # 3 of 4 within the budget: below 0.8, reset
    assert method.budgets == {"demo:0": 1000}
    short = make_rows([1, 1, 1, 1], 4, correct=[True] * 4)
    method.after_step(short)
    assert method.budgets == {"demo:0": 1000}


def test_palu_problem_that_comes_twice_in_a_step_moves_once():
    """Fewer problems than prompts: both groups start from the budget before the step; the later one's word counts."""
    method = palu()
    twice = make_rows([300, 400, 600, 900, 100, 200, 300, 400], 4, correct=[True] * 8)
    fill(twice, problem=[twice.problems[0]] * 2)
    method.after_step(twice)
    assert method.budgets == {"demo:0": 1000 - (400 - 250)}


def test_palu_wrong_and_cut_answers_never_help():
    method = palu(pass_rate=0.5)
    rollouts = make_rows([10, 20, 1000, 500], 4, correct=[True, True, False, False], finished=[1, 1, 0, 1])
    metrics = method.after_step(rollouts)
    assert method.budgets["demo:0"] == 1000 - (20 - 15)
    assert metrics == {"palu/budget_mean": 995.0, "palu/reset_fraction": 0.0}


def test_palu_state_survives_json():
    first, second = palu(), palu()
    rollouts = make_rows([300, 400, 600, 900] * 2, 4, correct=[True] * 7 + [False])
    first.after_step(rollouts)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for _ in range(3):
        for name, values in first.reward(rollouts).items():
            np.testing.assert_array_equal(values, second.reward(rollouts)[name])
        assert first.after_step(rollouts) == second.after_step(rollouts)


# ---------------------------------------------------------------------------------------------------------- SPO


def test_spo_samples_single_answers_by_uncertainty():
    method = spo()
    plan = method.sampling(0)
    assert (plan.num_prompts, plan.group_size) == (4, 1)
    np.testing.assert_allclose(plan.weights, [1 / 6] * 6)
    method.counts = {"demo:0": (9.0, 1.0), "demo:1": (0.0, 4.0)}
    raw = np.array([math.sqrt(0.9 * 0.1) + 0.05, 0.05, 0.55, 0.55, 0.55, 0.55])
    np.testing.assert_allclose(method.sampling(3).weights, raw / raw.sum())


def test_spo_needs_enough_problems_and_a_sound_rho():
    with pytest.raises(UserError, match="= 6 different problems"):
        spo(prompts=3, group=2, problems=5)
    with pytest.raises(UserError, match="rho"):
        spo(rho=1.0)


def test_spo_advantage_uses_the_value_before_the_update():
    """Values 0.5, 0.5, 0.9, 0.1 and rewards 1, 0, 1, 0: differences 0.5, -0.5, 0.1, -0.1; mean 0, var 0.52/3."""
    method = spo(prompts=4, group=1)
    method.counts = {"demo:2": (9.0, 1.0), "demo:3": (1.0, 9.0)}
    rollouts = make_rows([5, 6, 7, 8], 1, correct=[True, False, True, False])
    rewards = torch.from_numpy(rollouts.by_group(method.reward(rollouts)["correct"]))
    got = method.advantage(rollouts, rewards)
    std = math.sqrt(0.52 / 3)
    assert got.tolist() == pytest.approx([0.5 / std, -0.5 / std, 0.1 / std, -0.1 / std])
    method.after_step(rollouts)
    assert method.counts["demo:0"] == pytest.approx((0.875 * 0.5 + 1, 0.875 * 0.5))
    assert method.counts["demo:1"] == pytest.approx((0.875 * 0.5, 0.875 * 0.5 + 1))
    assert method.counts["demo:2"] == pytest.approx((0.875 * 9 + 1, 0.875))
    assert method.counts["demo:3"] == pytest.approx((0.875, 0.875 * 9 + 1))
    assert method.value("demo:0") == pytest.approx(1.4375 / 1.875)


def test_spo_value_follows_a_problem_that_gets_solved():
    method = spo(prompts=1, group=1, problems=1)
    values = []
    for right in [False] * 10 + [True] * 10:
        method.after_step(make_rows([5], 1, correct=[right]))
        values.append(method.value("demo:0"))
    assert values[9] < 0.1 and values[19] > 0.6 and values[10:] == sorted(values[10:])
    assert sum(method.counts["demo:0"]) == pytest.approx(8 - 7 * 0.875**20)  # from 1 towards 1 / (1 - rho) = 8


def test_spo_equal_or_single_answers_have_no_advantage():
    assert whiten(torch.tensor([0.5, 0.5, 0.5])).tolist() == [0, 0, 0]
    assert whiten(torch.tensor([0.5])).tolist() == [0]
    assert whiten(torch.zeros(0)).tolist() == []


def test_spo_first_samples():
    """N0 = 8, n0 = 8, six right: a = 8 * 6.5 / 9, b = 8 * 2.5 / 9. Only before step 0, and only if asked for."""
    assert first_counts(6, 8, 0.875) == pytest.approx((8 * 6.5 / 9, 8 * 2.5 / 9))
    assert spo(first_samples=0).monitor(0) is None
    method = spo()  # as published
    assert method.monitor(1) is None
    plan = method.monitor(0)
    assert plan.problem_indices == tuple(range(6)) and plan.group_size == 8
    assert (plan.temperature, plan.max_new_tokens) == (1.0, 64)
    metrics = method.on_monitor(make_rows([5] * 16, 8, correct=[True] * 6 + [False] * 10))
    assert metrics == {"spo/first_accuracy": 6 / 16}
    assert method.value("demo:0") == pytest.approx(6.5 / 9) and method.value("demo:1") == pytest.approx(0.5 / 9)


def test_spo_state_survives_json():
    first, second = spo(prompts=4, group=1), spo(prompts=4, group=1)
    rollouts = make_rows([5, 6, 7, 8], 1, correct=[True, False, True, True])
    first.after_step(rollouts)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    rewards = torch.from_numpy(rollouts.by_group(first.reward(rollouts)["correct"]))
    for _ in range(2):
        assert torch.equal(first.advantage(rollouts, rewards), second.advantage(rollouts, rewards))
        np.testing.assert_array_equal(first.sampling(1).weights, second.sampling(1).weights)
        assert first.after_step(rollouts) == second.after_step(rollouts)
