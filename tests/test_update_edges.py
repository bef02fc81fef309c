"""Steps without signal, masked rows, empty answers and numbers that are not finite: what the update must not do.

Run: python -m pytest tests/test_update_edges.py
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny import CPU, fill, make_config, make_rows, same_tensors, score_rows, update, weights_of

from nanolapo.advantages import group_advantages
from nanolapo.checkpoint import optimizer_tensors
from nanolapo.policy import BadStepsError, Policy
from nanolapo.rollouts import Rollouts

AGGREGATIONS = ["token_mean", "sequence_mean", "constant"]


def snapshot(policy: Policy) -> dict[str, torch.Tensor]:
    moments = {name: tensor.clone() for name, tensor in optimizer_tensors(policy).items()}
    return weights_of(policy) | moments


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
@pytest.mark.parametrize("train", [{}, {"batch_size": 2}, {"inner_epochs": 2}])
def test_B11_equal_rewards_leave_the_weights_bit_identical(tied_model, kl_coef, train):
    """After a real step (so that momentum exists), a step without signal: skipped and counted, nothing moves."""
    policy = Policy(make_config(tied_model, loss={"kl_coef": kl_coef}, train=train), CPU)
    rollouts = make_rows([3, 30, 8, 9])
    score_rows(policy, rollouts)
    update(policy, rollouts, [1.0, -1.0, 1.0, -1.0])
    before, steps = snapshot(policy), policy.num_steps
    score_rows(policy, rollouts)
    equal = group_advantages(torch.tensor([[1.7, 1.7], [0.0, 0.0]])).flatten()
    logged = update(policy, rollouts, equal)
    assert same_tensors(snapshot(policy), before) and policy.num_steps == steps
    assert logged["updates"] == 0 and logged["updates_skipped"] > 0 and logged["trained_tokens"] == 0
    assert logged["mismatch"] < 1e-4 and np.isfinite(list(logged.values())).all()  # still compared with the sampler


def test_B11_only_the_batch_with_signal_is_trained(tied_model):
    """Two optimizer batches, the first without signal: one step, equal to training on the second alone."""
    rollouts = make_rows([3, 30, 8, 9])
    both = Policy(make_config(tied_model, train={"batch_size": 2}), CPU)
    logged = update(both, rollouts, [0.0, 0.0, 1.0, -1.0])
    assert (logged["updates"], logged["updates_skipped"], logged["trained_tokens"]) == (1, 1, 17)
    alone = Policy(make_config(tied_model), CPU)
    update(alone, take(rollouts, [2, 3]), [1.0, -1.0])
    assert same_tensors(weights_of(both), weights_of(alone))


def take(rollouts, rows):
    """A batch of these rows only (whole groups)."""
    return Rollouts([rollouts.rows[row] for row in rows], rollouts.group_size)


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_B11_metrics_do_not_depend_on_padding(tied_model, kl_coef):
    """Equal lengths in one micro-batch (no padding) and each beside a long row (half padding): the same numbers."""
    logged = []
    for budget in (1, 10_000):
        config = make_config(tied_model, loss={"kl_coef": kl_coef, "tis_cap": 2.0}, train={"microbatch_tokens": budget})
        policy = Policy(config, CPU)
        rollouts = make_rows([4, 40, 5, 39])
        score_rows(policy, rollouts)
        fill(rollouts, sampler_logprobs=[row - 0.3 for row in rollouts.sampler_logprobs])
        logged.append(update(policy, rollouts, [1.0, -1.0, 1.0, -1.0]))
    assert logged[0] == pytest.approx(logged[1], rel=1e-4, abs=1e-6)
    assert logged[0]["mismatch"] == pytest.approx(0.3, rel=1e-3) and logged[0]["ratio"] == pytest.approx(1)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_B13_dropped_rows_equal_a_batch_without_them(tied_model, aggregation):
    """4 rows, 2 dropped: the weights after the step are those of the other 2 alone. Lengths stay as sampled."""
    rollouts, keep = make_rows([3, 30, 8, 9]), np.array([True, True, False, False])
    config = make_config(tied_model, loss={"aggregation": aggregation})
    masked, alone = Policy(config, CPU), Policy(config, CPU)
    advantages = [1.0, -1.0, 7.0, -7.0]
    logged = update(masked, rollouts, advantages, keep=keep)
    expected = update(alone, take(rollouts, [0, 1]), advantages[:2])
    assert logged["grad_norm"] == pytest.approx(
        expected["grad_norm"], rel=1e-5
    )  # AdamW's first step hides a denominator
    left, right = weights_of(masked), weights_of(alone)
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-6, atol=1e-7)
    assert logged["trained_tokens"] == 33 and rollouts.lengths_B.tolist() == [3, 30, 8, 9]
    assert np.isfinite(list(logged.values())).all()


@pytest.mark.parametrize("old_logprobs", ["trainer", "sampler"])
def test_B14_everything_masked_skips_the_step(tied_model, old_logprobs):
    policy = Policy(make_config(tied_model, train={"batch_size": 2}, loss={"old_logprobs": old_logprobs}), CPU)
    before = snapshot(policy)
    for unmatched in (False, True):
        rollouts = fill(make_rows([3, 30, 8, 9]), unmatched=unmatched)
        logged = update(policy, rollouts, [1.0, -1.0, 1.0, -1.0], keep=[False] * 4)
        assert (logged["updates"], logged["updates_skipped"]) == (0, 2)
        compared = {name: logged.pop(name) for name in ("mismatch", "mismatch_max")}
        assert (
            (logged["compared_tokens"] == 0) == unmatched == all(np.isnan(list(compared.values())))
        )  # means over nothing
        assert np.isfinite(list(logged.values())).all()
    assert same_tensors(snapshot(policy), before)


def test_a_step_without_a_signal_compares_rows_that_can_be_compared(tied_model):
    """Rule zero also holds where the first group was sampled at another temperature."""
    rollouts = fill(make_rows([3, 30, 8, 9]), unmatched=[True, True, False, False])
    logged = update(Policy(make_config(tied_model), CPU), rollouts, [0.0] * 4)
    assert (logged["updates"], logged["compared_tokens"]) == (0, 17) and np.isfinite(logged["mismatch"])


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_B15_empty_answers(tied_model, aggregation):
    """[] has no token to train; [EOS] has one. Alone, beside real answers, and with nothing else in the batch."""
    config = make_config(tied_model, loss={"aggregation": aggregation})
    for lengths, tokens in [([0, 1], 1), ([0, 0, 1, 7], 8), ([0, 5, 0, 3], 8)]:
        policy = Policy(config, CPU)
        logged = update(policy, make_rows(lengths), [1.0, -1.0] * (len(lengths) // 2))
        assert np.isfinite(list(logged.values())).all() and logged["trained_tokens"] == tokens
        assert all(torch.isfinite(tensor).all() for tensor in weights_of(policy).values())
    policy = Policy(config, CPU)
    before = snapshot(policy)
    logged = update(policy, make_rows([0, 0]), [1.0, -1.0])  # signal, but not a single token to carry it
    assert logged["updates"] == 0 and same_tensors(snapshot(policy), before)


def test_B17_not_finite_gradients_touch_nothing_and_abort(tied_model):
    """NaN or infinity in a reward: weights and optimizer bit-identical, an error after train.max_bad_steps in a row."""
    policy = Policy(make_config(tied_model, train={"max_bad_steps": 3}), CPU)
    rollouts = make_rows([3, 30, 8, 9])
    update(policy, rollouts, [1.0, -1.0, 0.5, -0.5])
    before, rate = snapshot(policy), policy.learning_rate()
    for bad in (math.nan, math.inf):
        logged = update(policy, rollouts, [bad, -1.0, 0.5, -0.5])
        assert (logged["updates"], logged["updates_bad"]) == (0, 1)
        assert same_tensors(snapshot(policy), before) and policy.learning_rate() == rate
    assert policy.bad_steps == 2
    with pytest.raises(BadStepsError, match="3 times in a row"):
        update(policy, rollouts, [math.nan, -1.0, 0.5, -0.5])
    assert same_tensors(snapshot(policy), before)


def test_B17_one_good_step_resets_the_count(tied_model):
    policy = Policy(make_config(tied_model, train={"max_bad_steps": 2}), CPU)
    rollouts = make_rows([3, 30])
    for value in (math.nan, 1.0, math.nan, 1.0):
        update(policy, rollouts, [value, -1.0])
    assert policy.bad_steps == 0 and policy.num_steps == 2
    assert all(torch.isfinite(tensor).all() for tensor in snapshot(policy).values())


def test_rows_without_signal_still_count_in_the_denominator(tied_model):
    """Rows with advantage 0 are not run through the model, yet the others weigh as if they had been."""
    rollouts = make_rows([10, 20, 100, 70])
    config = make_config(tied_model, train={"grad_clip": 1e9})
    alone, beside = Policy(config, CPU), Policy(config, CPU)
    norms = [
        update(alone, take(rollouts, [0, 1]), [1.0, -1.0])["grad_norm"],
        update(beside, rollouts, [1.0, -1.0, 0.0, 0.0])["grad_norm"],
    ]
    assert norms[1] == pytest.approx(norms[0] * 30 / 200, rel=1e-4)
