r"""HBPO: budgets within a group, the reward of each, advantage between and within budgets.

Run: python -m pytest tests/methods/test_hbpo.py
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny import fill, make_config, make_problems, make_rows

from nanolapo.config import UserError
from nanolapo.methods.hbpo import Hbpo, budget_reward, hierarchical_reward, intra_advantages
from nanolapo.rollouts import Rollouts

GOOD = r"x </think> \boxed{1}"


def make(base: float = 6229, group_size: int = 4, multiple: int = 1, limit: int = 4096, **options: object) -> Hbpo:
    rollout = {"max_new_tokens": limit, "base_tokens": base, "group_size": group_size, "prompts_per_step": 1}
    return Hbpo(make_config(rollout=rollout, prompt={"length_multiple": multiple}, method={"options": options}))


def group(lengths: list[int], correct: list[bool], budgets: list[float], size: int = 0) -> Rollouts:
    rollouts = make_rows(lengths, group_size=size or len(lengths), correct=correct, budgets=budgets)
    fill(rollouts, text=[GOOD] * len(lengths))
    return rollouts


def test_group_is_split_evenly_over_the_budgets():
    for size in (4, 8, 16):
        method = make(group_size=size)
        budgets = [method.guidance(make_problems(1)[0], g, 0).budget for g in range(size)]
        assert budgets == [b for b in (512, 1024, 2048, 2560) for _ in range(size // 4)]
    assert make(6229 / 16).budgets == (32, 64, 128, 160)
    assert make(budgets=[10, 20]).budgets == (10, 20)
    with pytest.raises(UserError, match=r"method.options.budgets=\[512, .*2560\]: at rollout.max_new_tokens=2560"):
        make(limit=2560)  # cos(pi / 2): a right answer of the last budget would earn nothing
    assert max(make(limit=2561).budgets) == 2560
    with pytest.raises(UserError, match="multiple of 4"):
        make(group_size=6)


def test_a_budget_is_the_number_that_the_prompt_prints():
    """Multiples of ten: 32, 64, 128 are printed, and rewarded, as 30, 60, 130; never as 0."""
    assert make(6229 / 16, multiple=10).budgets == (30, 60, 130, 160)
    assert make(multiple=10, budgets=[2, 27]).budgets == (10, 30)


def test_wording_stands_inside_the_thought():
    problem = make_problems(1)[0]
    assert make().guidance(problem, 0, 0).inside == " I will answer the question within 512 tokens."
    assert make().guidance(problem, 0, 0).inside_is_answer  # it counts in the length and is trained
    assert make(wording="with").guidance(problem, 0, 0).inside == " I will answer the question with 512 tokens."
    with pytest.raises(UserError, match="wording"):
        make(wording="in")
    with pytest.raises(UserError, match="hbpo: nobody has drawn the budget's sentence.*set loss.old_logprobs=trainer"):
        Hbpo(make_config(loss={"old_logprobs": "sampler"}, rollout={"base_tokens": 100, "group_size": 4}))


def test_reward_by_hand():
    """L_max 4096, b = 1024: within it 4 cos(22.5 deg); 2048 tokens: 4 cos(45 deg) - 1/4; 4096: 0 - 3/4."""
    lengths = np.array([1, 1024, 2048, 4096, 100, 100, 100])
    correct, formed = np.array([1, 1, 1, 1, 0, 1, 0.0]), np.array([True] * 5 + [False] * 2)
    reward = hierarchical_reward(lengths, correct, formed, np.full(7, 1024.0), 4096)
    inside = 4 * math.cos(math.radians(22.5))
    want = [inside, inside, 4 * math.sqrt(0.5) - 0.25, -0.75, 0.0, -1.0, -1.0]
    np.testing.assert_allclose(reward, want, atol=1e-12)
    np.testing.assert_allclose(budget_reward(np.array([2048.0]), 4096), [4 * math.sqrt(0.5)])


def test_the_same_shares_of_the_limit_give_the_same_reward_at_every_limit():
    for limit in (256, 4096):
        lengths, budgets = np.array([limit // 2, limit // 8]), np.array([limit // 4, limit // 4])
        reward = hierarchical_reward(lengths, np.ones(2), np.ones(2, dtype=bool), budgets, limit)
        np.testing.assert_allclose(reward, [2.5784271, 3.6955181], atol=1e-7)


def test_smaller_budgets_pay_more_and_overrunning_pays_less():
    rewards = budget_reward(np.array([512, 1024, 2048, 2560]), 4096)
    assert (np.diff(rewards) < 0).all()
    over = hierarchical_reward(np.arange(512, 4097, 64), np.ones(57), np.ones(57, dtype=bool), np.full(57, 512.0), 4096)
    assert (np.diff(over) < 0).all()


def test_malformed_answers_get_minus_one_and_parts_add_up():
    method = make()
    rollouts = group([100, 100, 100, 100], [True, True, False, False], [512.0] * 4)
    rollouts.rows[1].text, rollouts.rows[3].text = r"\boxed{1}", "x </think> 1"
    parts = method.reward(rollouts)
    np.testing.assert_allclose(sum(parts.values()), [4 * math.cos(math.pi / 16), -1, 0, -1])
    assert parts["correct"].tolist() == [1, 1, 0, 0] and parts["format"].tolist() == [0, -2, 0, -1]


def test_a_prompt_without_a_budget_gets_plain_correctness():
    method = make(group_size=2, budgets=[512])
    rollouts = group([100, 100], [True, False], [np.nan, np.nan])
    assert sum(method.reward(rollouts).values()).tolist() == [1, 0]
    rewards = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    np.testing.assert_allclose(method.advantage(rollouts, rewards), [math.sqrt(0.5), -math.sqrt(0.5)])


def test_advantage_by_hand():
    """Two budgets of two rollouts each. A_inter over all four (unbiased std), A_intra per budget, added once."""
    budgets = [1024.0, 1024.0, 2048.0, 2048.0]
    rollouts = group([500, 500, 2000, 2000], [True, False, True, True], budgets)
    f1024, f2048 = 4 * math.cos(math.pi / 8), 4 * math.cos(math.pi / 4)
    rewards = [f1024, 0.0, f2048, f2048]
    mean = sum(rewards) / 4
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / 3)
    inter = [(r - mean) / std for r in rewards]
    intra = [f1024 / 2 - f1024] * 2 + [0.0] * 2
    tensor = torch.tensor([rewards], dtype=torch.float64)
    for method, weight in [(make(), 1), (make(intra_weight=2), 2), (make(intra_weight=0), 0)]:
        got = method.advantage(rollouts, tensor)
        assert got.shape == (4,)
        np.testing.assert_allclose(got, [a + weight * b for a, b in zip(inter, intra, strict=True)], atol=1e-7)


def test_intra_stays_inside_group_and_budget_and_is_never_positive():
    rng = np.random.default_rng(0)
    budgets = np.tile([512.0, 512.0, 2048.0, 2048.0], (3, 1))
    lengths, correct, formed = rng.integers(1, 4097, (3, 4)), rng.random((3, 4)) < 0.5, rng.random((3, 4)) < 0.8
    rewards = hierarchical_reward(lengths, correct.astype(float), formed, budgets, 4096)
    intra = intra_advantages(rewards, budgets, 4096)
    assert intra.max() <= 1e-12
    for g in range(3):
        for half, b in ((slice(0, 2), 512), (slice(2, 4), 2048)):
            want = rewards[g, half].sum() / 2 - 4 * math.cos(math.pi * b / 8192)
            np.testing.assert_allclose(intra[g, half], [want, want])


def test_flat_groups():
    """All right within budget: no signal. All wrong: A_inter is 0, and each budget is pushed down by what it could pay."""
    method = make()
    budgets = [512.0, 1024.0, 2048.0, 2560.0]
    for correct, want in [(False, [-4 * math.cos(math.pi * b / 8192) for b in budgets])]:
        rollouts = group([10] * 4, [correct] * 4, budgets)
        rewards = torch.from_numpy(rollouts.by_group(sum(method.reward(rollouts).values())))
        np.testing.assert_allclose(method.advantage(rollouts, rewards), want)
    rollouts = group([10] * 4, [True] * 4, [512.0] * 4)
    rewards = torch.from_numpy(rollouts.by_group(sum(method.reward(rollouts).values())))
    np.testing.assert_allclose(method.advantage(rollouts, rewards), 0.0, atol=1e-12)
