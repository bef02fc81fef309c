"""L1-Exact and L1-Max: budgets, sentences, Eq. 1 and 2.

Run: python -m pytest tests/methods/test_l1.py
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from tiny import fill, make_config, make_problems, make_rows

from nanolapo.config import UserError
from nanolapo.methods.l1 import L1Exact, exact_reward
from nanolapo.methods.l1_max import L1Max, max_reward


def make(kind: type[L1Exact], base: float = 6229, seed: int = 0, multiple: int = 1, **options: object) -> Any:
    prompt, rollout = {"length_multiple": multiple}, {"max_new_tokens": 4096, "base_tokens": base}
    return kind(make_config(run={"seed": seed}, prompt=prompt, rollout=rollout, method={"options": options}))


def test_eq1_exact_by_hand():
    """n = 2000: on target 1; 1000 off on either side costs 0.3; a wrong answer pays as well; nothing is clipped."""
    lengths, correct = np.array([2000, 1000, 3000, 2000, 4000, 6000]), np.array([1, 1, 1, 0, 0, 1])
    reward = exact_reward(lengths, correct, np.full(6, 2000.0))
    np.testing.assert_allclose(reward, [1.0, 0.7, 0.7, 0.0, -0.6, -0.2], atol=1e-12)


def test_eq2_max_by_hand():
    """n = 1000, slope 0.01, delta 0.5: full reward from 950 down, half at 1000, none from 1050 up; wrong answers 0."""
    lengths = np.array([1, 900, 950, 960, 1000, 1040, 1050, 1200, 900])
    correct = np.array([1, 1, 1, 1, 1, 1, 1, 1, 0])
    reward = max_reward(lengths, correct, np.full(9, 1000.0))
    np.testing.assert_allclose(reward, [1, 1, 1, 0.9, 0.5, 0.1, 0, 0, 0], atol=1e-12)


def test_rewards_of_a_batch_are_per_group_budget():
    """Two groups with budgets 1000 and 3000; a row without a budget has plain correctness (never a budget of 0)."""
    method = make(L1Exact)
    rollouts = make_rows([1000, 2000, 3000, 500], correct=[True, False, True, True], budgets=[1000, 1000, 3000, np.nan])
    parts = method.reward(rollouts)
    assert parts["correct"].tolist() == [1, 0, 1, 1]
    np.testing.assert_allclose(parts["length"], [0.0, -0.3, 0.0, 0.0], atol=1e-12)


def test_budgets_are_uniform_between_100_and_4000_and_fixed_by_seed_and_problem():
    method = make(L1Exact)
    problems = make_problems(3000)
    budgets = np.array([method.guidance(p, 0, 0).budget for p in problems])
    assert budgets.min() >= 100 and budgets.max() <= 4000 and (budgets == budgets.round()).all()
    shares = np.histogram(budgets, bins=np.linspace(100, 4000, 6))[0] / 3000  # five equal parts
    assert (abs(shares - 0.2) < 0.03).all()
    again = make(L1Exact)
    for p, budget in zip(problems[:20], budgets[:20], strict=True):
        assert {again.guidance(p, g, step).budget for g in range(4) for step in (0, 7)} == {budget}  # drawn once
    other = [make(L1Exact, seed=1).guidance(p, 0, 0).budget for p in problems[:20]]
    assert other != budgets[:20].tolist()
    redrawn = make(L1Exact, redraw=True)
    assert len({redrawn.guidance(problems[0], 0, step).budget for step in range(20)}) > 15
    assert redrawn.guidance(problems[0], 0, 3) == make(L1Exact, redraw=True).guidance(problems[0], 5, 3)


@pytest.mark.parametrize("kind", [L1Exact, L1Max])
def test_the_rewarded_length_is_the_printed_one(kind):
    """Where prompts state multiples of ten only, as the demo's, a budget is one: at this scale L1-Max falls from full
    reward to none within 6 tokens, so a hidden rest of up to 5 could not be learned."""
    method, exact = make(kind, base=390, multiple=10), make(kind, base=390)
    assert min(make(kind, base=100, multiple=10).budget(p.id, 0) for p in make_problems(300)) == 10  # from 2 tokens on
    for problem in make_problems(300):
        guidance, unrounded = method.guidance(problem, 0, 0), exact.guidance(problem, 0, 0).budget
        assert f" {guidance.budget:.0f} tokens." in guidance.outside and guidance.budget % 10 == 0
        assert abs(guidance.budget - unrounded) <= 5 and guidance.budget >= 10


def test_sentences_stand_outside_of_the_thought():
    problem = make_problems(1)[0]
    exact = make(L1Exact).guidance(problem, 0, 0)
    assert exact.inside == "" and exact.outside == f" Think for {exact.budget:.0f} tokens."
    limit = make(L1Max, max_fraction=1.0).guidance(problem, 0, 0)
    assert limit.inside == "" and limit.outside == f" Think for maximum {limit.budget:.0f} tokens."


def test_max_trains_on_both_kinds_of_prompt_and_rewards_each_by_its_own_equation():
    """The kind that a reward is given for is the kind that the prompt named, also when budgets are drawn anew."""
    for redraw in (False, True):
        method = make(L1Max, redraw=redraw)
        method.sampling(5)
        lengths, correct = [700] * 400, [True, False] * 200
        rollouts = make_rows(lengths, group_size=2, correct=correct)
        given = [method.guidance(p, g, 5) for p in rollouts.problems for g in range(2)]
        fill(rollouts, budget=np.array([g.budget for g in given], dtype=np.float64))
        reward = sum(method.reward(rollouts).values())
        num_max = 0
        for guidance, is_right, got in zip(given, correct, reward, strict=True):
            n = float(guidance.budget)
            if "maximum" in guidance.outside:
                want = is_right * min(1.0, max(0.0, 0.01 * (n - 700) + 0.5))
                num_max += 1
            else:
                want = is_right - 0.0003 * abs(n - 700)
            assert abs(got - want) < 1e-9
        assert 150 < num_max < 250


def test_lengths_scale_with_the_base_and_prices_with_its_inverse():
    method = make(L1Max, base=622.9)  # a tenth of the published base's mean
    assert (method.low, method.high) == (10, 400)
    assert method.max_alpha == pytest.approx(0.1) and method.alpha == pytest.approx(0.003)
    method = make(L1Exact, base=622.9, alpha=0.5, min_budget=20, max_budget=30)
    assert (method.alpha, method.low, method.high) == (0.5, 20, 30)
    with pytest.raises(UserError, match="min_budget=30, max_budget=20: need 1 <= min_budget <= max_budget"):
        make(L1Exact, min_budget=30, max_budget=20)


def test_no_right_answer_exact_still_ranks_max_does_not():
    rollouts = make_rows([100, 300, 1000, 1], group_size=4, budgets=[300.0] * 4)
    exact = sum(make(L1Exact).reward(rollouts).values())
    np.testing.assert_allclose(exact, [-0.06, 0.0, -0.21, -0.0897], atol=1e-12)
    assert (sum(make(L1Max, max_fraction=1.0).reward(rollouts).values()) == 0).all()


def test_obedience_is_logged_and_there_is_no_state():
    """Errors +1000 and -250 of 1000 and -500 of 2000: relative +1, -0.25, -0.25; only the first is off by more than 500."""
    method = make(L1Exact)
    rollouts = make_rows([2000, 750, 1500], group_size=1, budgets=[1000.0, 1000.0, 2000.0])
    assert method.after_step(rollouts) == pytest.approx({"budget/relative_error": 0.5 / 3, "budget/violated": 1 / 3})
    limits = make(L1Max, max_fraction=1.0)  # far below a limit is no violation
    assert limits.after_step(make_rows([100, 4000], group_size=1, budgets=[2000.0] * 2))["budget/violated"] == 0.5
    assert json.loads(json.dumps(method.state_dict())) == {}
