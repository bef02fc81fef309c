"""Plain truncation and ThinkPrune: which limit when, and what the prompt says.

Run: python -m pytest tests/methods/test_thinkprune.py
"""

from __future__ import annotations

import pytest
from tiny import make_config, make_problems, make_rows

from nanolapo.config import UserError
from nanolapo.data.prompts import Prompter
from nanolapo.demo.pretrain import make_tokenizer
from nanolapo.methods.thinkprune import ThinkPrune4k, ThinkPruneIterative, Truncation


def build(kind: type, limit: int = 4000, steps: int = 90, base: float = 6229, **options: object) -> Truncation:
    rollout = {"max_new_tokens": limit, "base_tokens": base}
    return kind(make_config(rollout=rollout, train={"steps": steps}, method={"options": options}))


def limits(method: Truncation, steps: list[int]) -> list[int]:
    found = []
    for step in steps:
        method.progress = step / method.config.train.steps
        found.append(method.sampling(step).max_new_tokens)
    return found


def test_published_limits():
    assert limits(build(ThinkPrune4k), [0, 50, 89]) == [4000] * 3
    assert limits(build(ThinkPruneIterative), [0, 29, 30, 59, 60, 89]) == [4000, 4000, 3000, 3000, 2000, 2000]
    assert limits(build(Truncation, 16384), [0, 89]) == [4000] * 2


def test_limits_scale_with_the_base_and_stay_below_the_runs_own():
    """0.64, 0.48 and 0.32 of the base's mean; never below one token, and the rest of the plan is the recipe's."""
    method = build(ThinkPruneIterative, 256, base=100)
    assert limits(method, [0, 30, 60]) == [64, 48, 32]
    assert limits(build(ThinkPruneIterative, 50, base=100), [0, 30, 60]) == [50, 48, 32]
    assert limits(build(ThinkPruneIterative, 256, base=0.1), [0, 30, 60]) == [1, 1, 1]
    plan = method.sampling(60)
    assert (plan.num_prompts, plan.group_size, plan.temperature) == (4, 2, 1.0)


@pytest.mark.parametrize(
    ("limit", "base", "given", "want"),
    [
        (256, 100, None, [60, 50, 30]),  # of 64, 48, 32
        (55, 100, None, [50, 50, 30]),  # 55 would be printed as 60, or 50
        (256, 0.1, None, [10, 10, 10]),
        (256, 100, [256, 77, 4], [250, 80, 10]),
    ],
)
def test_the_limit_is_the_number_that_the_prompt_prints(limit, base, given, want):
    """In multiples of 10: what is printed, what is sampled and what is recorded as the budget are one number."""
    rollout = {"max_new_tokens": limit, "base_tokens": base}
    config = make_config(rollout=rollout, prompt={"length_multiple": 10}, method={"options": {"limits": given}})
    method, prompter = ThinkPruneIterative(config), Prompter(make_tokenizer(), config.prompt)
    for stage, n in enumerate(want):
        method.progress = stage / 3
        guidance = method.guidance(make_problems(1)[0], 0, 0)
        assert method.sampling(0).max_new_tokens == guidance.budget == n
        assert f" within {n} tokens." in prompter.render("q", guidance)
    if given:  # plain truncation prints nothing, so its limit is as given
        assert Truncation(config).limits == tuple(given)


def test_steps_that_do_not_divide():
    """Ten steps in thirds begin at 0, 4 and 7, the first step that is past the third; one step has the first limit."""
    assert limits(build(ThinkPruneIterative, 4000, 10), list(range(10))) == [4000] * 4 + [3000] * 3 + [2000] * 3
    assert limits(build(ThinkPruneIterative, 4000, 1), [0]) == [4000]


def test_own_limits_and_steps():
    method = build(ThinkPruneIterative, limits=[3500, 700], first_steps=[0, 80])
    assert limits(method, [0, 79, 80, 500]) == [3500, 3500, 700, 700]


def test_a_run_too_short_for_its_rounding_is_refused():
    config = make_config(rollout={"max_new_tokens": 8}, prompt={"length_multiple": 10})
    with pytest.raises(UserError, match="prompt.length_multiple=10: need both to be at most rollout.max_new_tokens=8"):
        ThinkPrune4k(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limits": [5000]}, "limits"),
        ({"limits": [0]}, "limits"),
        ({"limits": [4000], "limit": 3999}, "limits"),
        ({"limits": [400, 300], "first_steps": [0]}, "first_steps"),
        ({"limits": [400, 300], "first_steps": [5, 9]}, "first_steps"),
        ({"limits": [400, 300, 200], "first_steps": [0, 9, 3]}, "first_steps"),
    ],
)
def test_impossible_schedules_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        build(ThinkPruneIterative, **options)


def test_the_prompt_says_the_stage_limit():
    problem = make_problems(1)[0]
    method = build(ThinkPruneIterative)
    for step, limit in [(0, 4000), (30, 3000), (89, 2000)]:
        method.progress = step / 90
        guidance = method.guidance(problem, 0, step)
        assert guidance.outside == f" The output of the assistant should be within {limit} tokens."
        assert guidance.budget == limit and guidance.inside == ""
    assert build(Truncation).guidance(problem, 0, 0).outside == ""


def test_reward_is_plain_and_a_group_over_the_limit_has_no_signal():
    import torch

    method = build(ThinkPrune4k)
    rollouts = make_rows(
        [10, 4000, 4000, 4000], correct=[True, False, False, False], finished=[True, False, False, False]
    )
    parts = method.reward(rollouts)
    assert list(parts) == ["correct"] and parts["correct"].tolist() == [1, 0, 0, 0]
    advantages = method.advantage(rollouts, torch.from_numpy(rollouts.by_group(parts["correct"])))
    assert advantages[0] > 0 > advantages[1] and advantages[2:].tolist() == [0, 0]
    assert not method.cut_answers_count
    assert method.state_dict() == {}
