"""Alarms: the sampler/trainer mismatch that stops a run, and the warnings for runs that cannot learn.

Run: python -m pytest tests/test_alarms.py
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import CPU, fill, make_config, make_rows, same_tensors, score_rows, update, weights_of

from nanolapo.advantages import group_advantages
from nanolapo.alarms import Alarms, MismatchError
from nanolapo.config import RunStopped
from nanolapo.metrics import rollout_metrics
from nanolapo.policy import Policy
from nanolapo.rollouts import Rollouts

GROUP = {"group_size": 4, "prompts_per_step": 2}


def metrics_of(rollouts: Rollouts, reward: np.ndarray | None = None) -> dict[str, float]:
    rollouts.set_rewards({"correct": rollouts.correct_B.astype(float) if reward is None else reward})
    return rollout_metrics(rollouts)


def watch(rollouts: Rollouts, steps: int, alarms: Alarms | None = None) -> list[list[str]]:
    """The warnings of each of `steps` steps that look like this one."""
    alarms = alarms or Alarms(make_config(rollout=GROUP))
    return [alarms.check_learning(step, metrics_of(rollouts), rollouts.texts) for step in range(steps)]


# ------------------------------------------------------------------------------------------------------ rule zero


def test_A0_rule_zero_stops_the_run():
    """Far above the step-0 value (5 times, and above the floor of 0.02): stopped, and the message says both numbers."""
    alarms = Alarms(make_config())
    for value in (0.02, 0.09, 0.05, 0.1):
        alarms.check_mismatch(3, value)
    with pytest.raises(MismatchError, match="step 4.*0.11 against 0.02 at first .limit 0.1.") as error:
        alarms.check_mismatch(4, 0.11)
    assert isinstance(error.value, RunStopped)


def test_A0_exact_samplers_have_a_floor_and_nan_always_stops():
    alarms = Alarms(make_config())
    for value in (1e-6, 0.019):  # float32: 5 times almost nothing is no limit
        alarms.check_mismatch(1, value)
    for value in (0.021, math.nan, math.inf):
        with pytest.raises(MismatchError):
            alarms.check_mismatch(2, value)
    with pytest.raises(MismatchError, match="step 0: the trainer's log-probs are not finite"):
        Alarms(make_config()).check_mismatch(0, math.nan)
    with pytest.raises(RunStopped, match=r"= 0\.19 \(limit 0\.02\)"):  # its own first value is no excuse
        Alarms(make_config()).check_mismatch(0, 0.19)


@pytest.mark.parametrize(("model", "sampler"), [("bfloat16", ""), ("float32", "bfloat16"), ("bfloat16", "float32")])
def test_A0_bfloat16_may_differ_more_at_first(model, sampler):
    config = make_config(model={"dtype": model}, rollout={"dtype": sampler})
    Alarms(config).check_mismatch(0, 0.19)
    with pytest.raises(RunStopped, match="limit 0.2"):
        Alarms(config).check_mismatch(0, 0.21)


def test_A0_a_sampler_with_stale_weights_is_caught(tied_model):
    """End to end: the sampler keeps the log-probs of the first weights while the policy is trained."""
    policy, rollouts = Policy(make_config(tied_model), CPU), make_rows([20, 20])
    alarms = Alarms(policy.config)
    score_rows(policy, rollouts)
    alarms.check_mismatch(0, update(policy, rollouts, [1.0, -1.0])["mismatch"])
    stale = update(policy, rollouts, [1.0, -1.0])["mismatch"]  # not sampled again after the step: not synced
    with pytest.raises(MismatchError):
        alarms.check_mismatch(1, stale)
    score_rows(policy, rollouts)
    alarms.check_mismatch(1, update(policy, rollouts, [1.0, -1.0])["mismatch"])


def test_A0_step_0_is_remembered_across_a_resume():
    """A resumed run compares with the first step of the whole run, not with its own first step."""
    first = Alarms(make_config())
    first.check_mismatch(0, 0.01)
    first.lasted["truncated"] = 2
    resumed = Alarms(make_config())
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert resumed.lasted["truncated"] == 2
    with pytest.raises(MismatchError):
        resumed.check_mismatch(7, 0.5)


@pytest.mark.parametrize(
    ("same_engine", "values", "stopped"),
    [
        (True, [0.019, 0.03], "0.03 against 0.002 at first .limit 0.02."),
        (False, [0.03, 0.14, 0.16], "0.16 against 0.03 at first .limit 0.15."),
        (False, [0.25], r"= 0.25 .limit 0.2."),
    ],
)
def test_A0_another_engine_after_a_resume_is_measured_by_its_own_first_step(same_engine, values, stopped):
    """vLLM's 0.03 in bfloat16 is normal, but 15 times what the torch sampler had."""
    first, resumed = (Alarms(make_config(model={"dtype": "bfloat16"})) for _ in range(2))
    first.check_mismatch(0, 0.002)
    first.lasted["truncated"] = 2
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())), same_engine)
    assert resumed.lasted["truncated"] == 2
    for value in values[:-1]:
        resumed.check_mismatch(7, value)
    with pytest.raises(MismatchError, match=stopped):
        resumed.check_mismatch(7, values[-1])


# ------------------------------------------------------------------------------------------------------ learning


def test_healthy_batches_are_silent():
    rollouts = make_rows([5, 9, 20, 7, 11, 30, 8, 6], group_size=4, correct=[True, False] * 4)
    assert watch(rollouts, 30) == [[]] * 30


def test_C13_flat_reward_warns_with_three_completions():
    """Five steps in a row with one and the same reward, all wrong or all right; a single other reward resets it."""
    for verdict in (False, True):
        rollouts = make_rows([5, 9, 20, 7], group_size=4, correct=[verdict] * 4)
        said = watch(rollouts, 10)
        assert [len(warnings) for warnings in said] == [0, 0, 0, 0, 1, 0, 0, 0, 0, 1]
        assert "WARNING step 4: for 5 steps the rewards of every group were all equal" in said[4][0]
        assert "text 0 | text 1 | text 2" in said[4][0] and "text 3" not in said[4][0]
    alarms = Alarms(make_config(rollout=GROUP))
    assert watch(rollouts, 4, alarms) == [[]] * 4
    rollouts.rows[0].correct = not rollouts.correct_B[0]
    assert watch(rollouts, 1, alarms) == [[]]
    rollouts.rows[0].correct = not rollouts.correct_B[0]
    assert watch(rollouts, 4, alarms) == [[]] * 4


def test_E10_all_cut_warns_naming_the_limit_and_nothing_is_learned(tied_model):
    rollouts = make_rows([9, 9, 9, 9], finished=[False] * 4)
    alarms = Alarms(make_config(rollout={"max_new_tokens": 9}))
    said = watch(rollouts, 3, alarms)
    assert said[:2] == [[], []] and "rollout.max_new_tokens=9" in said[2][0]
    rollouts.rows[0].finished = True
    assert watch(rollouts, 1, alarms) == [[]]  # three quarters cut are bad, but not hopeless
    # all cut means all wrong, equal rewards, and no update
    policy = Policy(make_config(tied_model), CPU)
    before = weights_of(policy)
    rewards_PG = rollouts.by_group(np.zeros(4))
    logged = update(policy, rollouts, group_advantages(torch.from_numpy(rewards_PG)).flatten())
    assert logged["updates"] == 0 and same_tensors(weights_of(policy), before)


@pytest.mark.parametrize(("num_cut", "warns"), [(10, True), (9, True), (8, False)])
def test_a_limit_that_cuts_nearly_everything_warns_as_well(num_cut, warns):
    """One answer of ten that ends in time does not make the limit right. The line says how many were cut."""
    rollouts = make_rows(
        [9] * 10, finished=[i >= num_cut for i in range(10)], correct=[i >= num_cut for i in range(10)]
    )
    said = watch(rollouts, 3)
    found = [warning for warning in said[2] if "rollout.max_new_tokens" in warning]
    assert bool(found) == warns
    assert not warns or f"for 3 steps {10 * num_cut} % of the answers were cut at rollout.max_new_tokens=64" in found[0]


@pytest.mark.parametrize(("num_spread", "warns"), [(0, True), (1, True), (2, False)])
def test_groups_that_are_nearly_all_copies_warn_as_well(num_spread, warns):
    """Of ten groups of four, one with two different answers is no diversity."""
    alarms, metrics = Alarms(make_config(rollout=GROUP)), metrics_of(make_rows([5, 6, 7, 8], group_size=4))
    said = [
        alarms.check_learning(step, metrics | {"unique_per_group": 1 + num_spread / 10, "no_signal": 0.9}, [""] * 4)
        for step in range(5)
    ]
    assert any("all answers were the same" in warning for warning in said[4]) == warns


@pytest.mark.parametrize(
    ("key", "words", "warns", "is_silent"),
    [
        ("truncated", "0.9 or more for three steps", 0.9, 0.89),
        ("no_signal", "1.0 for five steps", 1.0, 0.99),
        ("empty", "above 0.5 for three steps", 0.51, 0.5),
        ("repetition", "above 0.8 for three steps", 0.81, 0.8),
        ("unique_per_group", "at most 1.1 for five steps", 1.1, 1.11),
    ],
)
def test_the_page_of_the_metrics_says_when_a_warning_comes(key, words, warns, is_silent):
    page = (Path(__file__).parents[1] / "docs/METRICS.md").read_text(encoding="utf-8")
    assert any(words in line for line in page.splitlines() if line.startswith(f"| `{key}` |"))
    healthy = {
        "truncated": 0.0,
        "no_signal": 0.0,
        "empty": 0.0,
        "repetition": 0.0,
        "unique_per_group": 4.0,
    }
    steps = {"three": 3, "five": 5}[words.split()[-2]]
    for value, wanted in ((warns, 1), (is_silent, 0)):
        alarms = Alarms(make_config(rollout=GROUP))
        found = [len(alarms.check_learning(step, healthy | {key: value}, ["text"])) for step in range(steps)]
        assert found == [0] * (steps - 1) + [wanted]


def test_one_group_with_a_signal_is_enough_to_learn():
    """Groups without signal are normal in any number: what the others teach is used. Only none at all is a symptom."""
    alarms, metrics = Alarms(make_config(rollout=GROUP)), metrics_of(make_rows([5, 6, 7, 8], group_size=4))
    for step in range(6):
        assert (
            alarms.check_learning(step, metrics | {"no_signal": 0.99, "updates": 1.0, "unique_per_group": 4.0}, [])
            == []
        )


@pytest.mark.parametrize(
    ("name", "ids", "words"),
    [
        ("empty", [[], [1], [1], [5, 6, 7]], "at most one token"),
        ("looping", [[3, 4] * 30, [7] * 50, [1, 2, 3] * 20, [9] * 40], "stuck in loops"),
        ("copies", [[3, 9, 1, 4]] * 4, "all answers were the same"),
    ],
)
def test_E9_collapse_is_said_in_words(name, ids, words):
    rollouts = make_rows([1] * 4, group_size=4, correct=[True, False, True, False])
    fill(rollouts, response_ids=[np.array(row, dtype=np.int64) for row in ids])
    fill(rollouts, sampler_logprobs=[np.full(len(row), -0.5, dtype=np.float32) for row in ids])
    said = watch(rollouts, 5)
    assert any(words in warning for warnings in said for warning in warnings)
    assert not said[0] and not said[1]


def test_groups_of_one_are_no_collapse():
    """SPO samples one answer a problem: rewards agree and answers are unlike in every group, and still it learns."""
    config = make_config()
    alarms, metrics = Alarms(config), metrics_of(make_rows([5, 6, 7, 8], group_size=1, correct=[True, False] * 2))
    for step in range(12):
        assert alarms.check_learning(step, metrics | {"updates": 2.0}, [""]) == []
    flat = [alarms.check_learning(step, metrics | {"updates": 0.0}, [""]) for step in range(5)]
    assert "no signal" in flat[4][0]


def test_E9_numbers_of_collapse_are_logged_at_every_step():
    """empty, truncated, repetition, unique answers, entropy and groups without signal, by hand."""
    rollouts = make_rows([1] * 4, correct=[True, False, True, True], finished=[True, True, True, False])
    fill(rollouts, response_ids=[np.array(row) for row in ([2], [5, 6, 7, 8, 5, 6, 7, 8], [3, 3, 3], [3, 3, 3])])
    fill(
        rollouts,
        sampler_logprobs=[np.full(len(ids), p) for ids, p in zip(rollouts.response_ids, [-1, -2, -3, -9], strict=True)],
    )
    rollouts.rows[3].unmatched = True  # left out of the entropy
    metrics = metrics_of(rollouts)
    assert metrics["empty"] == 0.25 and metrics["truncated"] == 0.25
    assert metrics["repetition"] == pytest.approx(0.2 / 4)  # 4 of 5 4-grams of row 1 are new
    assert metrics["unique_per_group"] == 1.5 and metrics["no_signal"] == 0.5
    assert metrics["entropy"] == pytest.approx((1 * 1 + 8 * 2 + 3 * 3) / 12)
    assert metrics["reward_spread"] == 1 and metrics["accuracy"] == 0.75 and metrics["length_correct"] == 7 / 3
