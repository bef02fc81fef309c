"""AEPO: when which temperature is asked for, which answers are kept, and where they go.

Run: python -m pytest tests/methods/test_aepo.py
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tiny import fill, make_config, make_problems, make_rows

from nanolapo.config import UserError
from nanolapo.data.order import batch_indices
from nanolapo.methods.aepo import Aepo, pair_rows
from nanolapo.plan.dry_run import most_tokens
from nanolapo.rollouts import Rollouts


def aepo(prompts: int = 4, group: int = 4, entropy: float | None = 0.3, **options: object) -> Aepo:
    rollout = {"prompts_per_step": prompts, "group_size": group, "temperature": 1.0, "max_new_tokens": 64}
    method = Aepo(make_config(rollout=rollout, run={"seed": 5}, method={"options": options}))
    method.start(make_problems(20))
    method.entropy = entropy
    return method


def own(correct: list[bool], logprob: float = -0.4, group: int = 4) -> Rollouts:
    rollouts = make_rows([3] * len(correct), group, correct=correct)
    fill(rollouts, sampler_logprobs=[np.full(3, logprob, dtype=np.float32) for _ in correct])
    return rollouts


def extra_for(ids: list[int], correct: list[bool], group: int = 4) -> Rollouts:
    """Answers of length 9 + row at another temperature, to the problems with these numbers."""
    rollouts = make_rows([9 + b for b in range(len(correct))], group, seed=1, correct=correct)
    fill(rollouts, problem=[make_problems(20)[i] for i in ids])
    fill(rollouts, text=[f"extra {b}" for b in range(len(correct))])
    fill(rollouts, unmatched=True)  # as the loop marks another temperature
    return rollouts


def rewards_of(method: Aepo, rollouts: Rollouts) -> torch.Tensor:
    return torch.from_numpy(rollouts.by_group(method.reward(rollouts)["correct"]))


def test_temperature_goes_against_the_entropy():
    """A quarter of the step's own prompts, as many answers each; high below the target, low above; nothing at step 0."""
    assert aepo(entropy=None).monitor(0) is None
    for entropy, temperature in [(0.3, 1.2), (0.5, 1.2), (0.51, 0.8), (3.0, 0.8)]:
        plan = aepo(entropy=entropy).monitor(7)
        assert plan.temperature == temperature
        assert plan.problem_indices == (batch_indices(20, 7, 4, 5)[0],)
        assert (plan.group_size, plan.max_new_tokens) == (4, 64)
    assert aepo(prompts=8, entropy=0.3).monitor(7).problem_indices == tuple(batch_indices(20, 7, 8, 5)[:2])
    assert aepo(prompts=1, entropy=0.3).monitor(0).problem_indices == tuple(batch_indices(20, 0, 1, 5))  # at least one


def test_right_extra_answers_replace_rows_of_their_own_prompt():
    method = aepo(replace=3)
    extra = extra_for([2, 0], [True, False, True, False, True, True, True, True])  # group of 0: all right, advantage 0
    method.on_monitor(extra)
    rollouts = own([True] * 4 + [False] * 8 + [True, False, False, False])
    before = list(rollouts.response_ids)
    method.edit_rollouts(rollouts)
    assert method.replaced == [8, 9]  # rows of problem 2
    assert rollouts.lengths_B.tolist() == [3] * 8 + [9, 11] + [3] * 6
    for row, source in [(8, 0), (9, 2)]:
        assert rollouts.response_ids[row] is extra.response_ids[source]
        assert rollouts.prompt_ids[row] is extra.prompt_ids[source]
        assert rollouts.sampler_logprobs[row] is extra.sampler_logprobs[source]
        assert rollouts.texts[row] == f"extra {source}" and rollouts.correct_B[row]
    assert rollouts.unmatched_B.nonzero()[0].tolist() == [8, 9]  # their log-probs say nothing about the mismatch
    untouched = [row for row in range(16) if row not in (8, 9)]
    assert all(rollouts.response_ids[row] is before[row] for row in untouched)


def test_replaced_rows_have_advantage_one_and_do_not_move_their_group():
    """The group of problem 3 solved 1 of 4 by itself: its other rows keep the advantages of that."""
    method = aepo(replace=1)
    method.on_monitor(extra_for([3], [False, True, False, False]))
    rollouts = own([False] * 12 + [False, False, False, True])
    plain = super(Aepo, method).advantage(rollouts, torch.from_numpy(rollouts.by_group(rollouts.correct_B * 1.0)))
    method.edit_rollouts(rollouts)
    got = method.advantage(rollouts, rewards_of(method, rollouts))
    assert method.replaced == [12] and got[12] == 1
    np.testing.assert_allclose(np.delete(got, 12), np.delete(plain, 12))
    assert got[13] == pytest.approx(-0.5) and got[15] == pytest.approx(1.5)


@pytest.mark.parametrize(("entropy", "want"), [(0.3, 4), (0.7, 2)])
def test_half_as_many_are_replaced_above_the_target(entropy, want):
    method = aepo(entropy=entropy, replace=4)
    method.on_monitor(extra_for([0, 1], [True, True, True, False] * 2))
    rollouts = own([False] * 16)
    method.edit_rollouts(rollouts)
    assert method.replaced == [0, 1, 2, 4][:want]
    assert method.after_step(rollouts)["aepo/replaced"] == want


def test_number_replaced_scales_with_the_batch_and_is_halved_after_the_cap():
    method = aepo()
    assert [method.num_replaced(999, rows) for rows in (2560, 256, 1024, 16)] == [60, 6, 24, 1]
    assert method.num_replaced(5, 2560) == 5
    method.entropy = method.options.target
    assert method.num_replaced(999, 2560) == 60  # at the target as below it
    method.entropy = 0.9
    assert [method.num_replaced(999, rows) for rows in (2560, 256, 16)] == [30, 3, 0]
    assert [method.num_replaced(pairs, 2560) for pairs in (59, 5, 1, 0)] == [29, 2, 0, 0]


def test_pair_rows_stays_inside_groups():
    assert pair_rows([1, 1, 1, 0], group_size=2) == [(2, 0), (3, 1), (0, 3)]
    assert pair_rows([], 2) == []


def test_nothing_to_put_in_is_plain_grpo():
    """No extra pass, no right extra answer, or problems that are not in this step."""
    correct = [True, False, False, False] * 4
    for extra in (
        None,
        extra_for([0], [False] * 4),
        extra_for([0], [True] * 4),
        extra_for([19], [True, False, False, False]),
    ):
        method = aepo(replace=4)
        if extra is not None:
            method.on_monitor(extra)
        rollouts = own(correct)
        method.edit_rollouts(rollouts)
        assert method.replaced == [] and rollouts.lengths_B.tolist() == [3] * 16
        got = method.advantage(rollouts, rewards_of(method, rollouts))
        np.testing.assert_allclose(got.reshape(4, 4), [[1.5, -0.5, -0.5, -0.5]] * 4, rtol=1e-6)


def test_entropy_is_estimated_from_the_steps_own_samples():
    """-mean(logp) per token, before any row is replaced; rows of another temperature do not count."""
    uneven = make_rows([2, 1, 1, 0], 4)
    fill(uneven, sampler_logprobs=[np.array(p) for p in ([-1.0, -2.0], [-6.0], [-99.0], [])])
    uneven.rows[2].unmatched = True
    assert uneven.mean_entropy == 3.0
    fill(uneven, unmatched=True)
    assert np.isnan(uneven.mean_entropy)
    method = aepo(entropy=None, replace=4)
    method.on_monitor(extra_for([0], [True, False, False, False]))
    rollouts = own([False] * 16, logprob=-0.6)
    method.edit_rollouts(rollouts)
    method.after_step(rollouts)
    assert method.entropy == pytest.approx(0.6)
    assert method.monitor(1).temperature == 0.8 and method.extra is None
    method.edit_rollouts(uneven)  # nothing usable was sampled: as at step 0, no extra pass
    method.after_step(uneven)
    assert method.entropy is None and method.monitor(2) is None


def test_an_extra_pass_is_used_once():
    method = aepo(replace=4)
    method.on_monitor(extra_for([0], [True, False, False, False]))
    method.edit_rollouts(own([False] * 16))
    assert method.replaced
    method.after_step(own([False] * 16))
    method.entropy = None
    assert method.monitor(1) is None
    method.edit_rollouts(own([False] * 16))
    assert method.replaced == []


def test_sampling_log_probs_of_another_temperature_are_refused():
    for loss in ({"old_logprobs": "sampler"}, {"tis_cap": 2.0}):
        with pytest.raises(UserError, match="old_logprobs=trainer"):
            Aepo(make_config(loss=loss))


def test_state_survives_json():
    first, second = aepo(entropy=None), aepo(entropy=None)
    assert json.loads(json.dumps(first.state_dict())) == {"entropy": None}
    rollouts = own([False] * 16, logprob=-0.45)
    first.edit_rollouts(rollouts)
    first.after_step(rollouts)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert first.monitor(1) == second.monitor(1) is not None


def test_dry_run_counts_an_extra_pass_in_every_step_but_the_first():
    """A quarter of 4 prompts x 4 answers x 64 tokens on top of 4 x 4 x 64, whatever the entropy will be."""
    method = aepo(entropy=None)
    assert [most_tokens(method, step) for step in (0, 1, 7)] == [1024, 1280, 1280]
    method.entropy = 0.3
    assert method.possible_monitor(7).problem_indices == method.monitor(7).problem_indices
