r"""Train Long, Think Short: the schedule, the triangular length reward, format.

Run: python -m pytest tests/methods/test_train_long.py
"""

from __future__ import annotations

import numpy as np
import pytest
from tiny import fill, make_config, make_problems, make_rows

from nanolapo.methods.train_long import TrainLongThinkShort, format_score, triangle


def make(prompt: dict | None = None, **options: object) -> TrainLongThinkShort:
    rollout = {"max_new_tokens": 512, "base_tokens": 258.4}  # the published base's mean
    return TrainLongThinkShort(make_config(prompt=prompt or {}, rollout=rollout, method={"options": options}))


def budgets_at(method: TrainLongThinkShort, steps: int, wanted: list[int]) -> list[int]:
    """The budgets at these steps of a run of `steps`."""
    found = []
    for step in wanted:
        method.progress = step / steps
        found.append(method.budget(step))
    return found


def test_main_schedule():
    """256, 179, 125, 87 of 600 steps, 150 each; the same in four equal parts of any other run."""
    four = [256, 256, 179, 179, 125, 125, 87, 87]
    assert budgets_at(make(), 600, [0, 149, 150, 299, 300, 449, 450, 599]) == four
    assert budgets_at(make(), 40, list(range(0, 40, 5))) == four
    assert budgets_at(make(), 6, list(range(6))) == [256, 256, 179, 125, 125, 87]


def test_a_budget_is_the_number_that_the_prompt_prints():
    """87, 60, 42, 29 in multiples of ten."""
    method = make(prompt={"length_multiple": 10}, start_budget=87)
    assert budgets_at(method, 4, [0, 1, 2, 3]) == [90, 60, 40, 30]
    assert method.guidance(make_problems(1)[0], 0, 3).budget == 30


def test_general_schedule():
    """T given; a final budget sets gamma = (S_f / S_0)^(1/n); never below one token."""
    assert [make(interval=10, gamma=0.5, start_budget=9).budget(s) for s in (9, 10, 25, 30, 40, 400)] == [
        9,
        4,
        2,
        1,
        1,
        1,
    ]
    method = make(start_budget=480, final_budget=120, decays=2)
    assert budgets_at(method, 300, [0, 99, 100, 200, 299]) == [480, 480, 240, 120, 120]


def test_triangle_by_hand():
    lengths = np.array([0, 25, 50, 99, 100, 101, 150, 200, 1000])
    want = [0, 0.25, 0.5, 0.99, 1.0, 0.99, 0.5, 0, 0]
    np.testing.assert_allclose(triangle(lengths, np.full(9, 100.0)), want, atol=1e-12)
    assert triangle(np.array([1, 2, 3]), np.full(3, 1.0)).tolist() == [1, 0, 0]  # a budget of one token


def test_reward_is_the_weighted_sum_also_for_wrong_answers():
    method = make()
    rollouts = make_rows([100, 50, 100, 300], correct=[True, True, False, False], budgets=[100.0] * 4)
    good, bad = r"x </think> \boxed{1}", "x"
    fill(rollouts, text=[good, good, good, bad])
    parts = method.reward(rollouts)
    np.testing.assert_allclose(sum(parts.values()), [0.6 + 0.3 + 0.1, 0.6 + 0.15 + 0.1, 0.3 + 0.1, 0.0])
    assert parts["correct"].tolist() == [1, 1, 0, 0]
    length_first = make(correct_weight=0.3, length_weight=0.6)
    np.testing.assert_allclose(sum(length_first.reward(rollouts).values()), [1.0, 0.7, 0.7, 0.0])


def test_default_weights_keep_right_above_wrong():
    method = make()
    lengths = [1, 50, 100, 150, 200, 4000] * 2
    rollouts = make_rows(lengths, group_size=12, correct=[True] * 6 + [False] * 6, budgets=[100.0] * 12)
    fill(rollouts, text=["x"] * 6 + [r"x </think> \boxed{1}"] * 6)  # format on the side of the wrong ones
    reward = sum(method.reward(rollouts).values())
    assert reward[:6].min() > reward[6:].max()


def test_a_prompt_without_a_budget_has_no_length_term():
    parts = make().reward(make_rows([1, 100], correct=[True, False], budgets=[np.nan, np.nan]))
    assert parts["length"].tolist() == [0, 0]


def test_format_halves():
    r"""One closed thought, one answer after it. <think> may stand in the prompt or in the answer, once."""
    box = r"\boxed{7}"
    for text, want in [
        (f"a </think> {box}", 1.0),
        (f"<think> a </think> {box}", 1.0),
        (f"[THINK] a [/THINK] {box}", 1.0),
        (f"<think> a <think> b </think> {box}", 0.5),  # nested
        (f"a </think> b </think> {box}", 0.5),  # closed twice
        (f"a </think> {box} <think>", 0.5),  # opened again
        (f"{box} </think>", 0.5),  # the answer only inside the thought
        (r"a </think> \boxed{7", 0.5),
        (box, 0.5),
        ("", 0.0),
    ]:
        assert format_score(text, answer_tags=False) == want, text
    for text, want in [
        ("a </think> <answer>7</answer>", 1.0),
        ("a </think> <answer>7</answer> <answer>8</answer>", 0.5),
        ("a </think> </answer>7<answer>", 0.5),
        (f"a </think> {box}", 0.5),
    ]:
        assert format_score(text, answer_tags=True) == want, text


def test_answer_tags_count_where_the_prompt_names_them():
    tagged = make(prompt={"template": "Use <think> and <answer>. User: {question} Assistant:"})
    assert tagged.answer_tags and not make().answer_tags
    rollouts = make_rows([5, 5], budgets=[5.0, 5.0])
    fill(rollouts, text=["a </think> <answer>7</answer>", r"a </think> \boxed{7}"])
    np.testing.assert_allclose(tagged.reward(rollouts)["format"], [0.1, 0.05])


def test_prompt_carries_the_budget_of_the_step():
    method = make()
    method.progress = 150 / 600
    method.sampling(150)
    guidance = method.guidance(make_problems(1)[0], 0, 150)
    assert (
        guidance.outside == " IMPORTANT: You should use exactly 179 tokens in your response." and guidance.inside == ""
    )
    assert guidance.budget == 179
    assert method.after_step(make_rows([1, 1])) == {"budget/now": 179.0}
    assert method.state_dict() == {}


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 41])
def test_short_runs_stay_inside_the_schedule(steps: int):
    budgets = budgets_at(make(), steps, list(range(steps)))
    assert budgets[0] == 256 and min(budgets) >= 87 and budgets == sorted(budgets, reverse=True)
