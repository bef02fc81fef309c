"""The policy loss and its parts against slow references in plain Python floats (float64).

Run: python -m pytest tests/losses/test_losses.py
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from nanolapo.advantages import group_advantages
from nanolapo.config import LossConfig
from nanolapo.losses import BatchTotals, policy_loss, row_weights
from nanolapo.losses.grpo import kl_penalty, tis_weights


def slow_policy_loss(
    logprob: float, old: float, advantage: float, low: float, high: float
) -> tuple[float, bool, float]:
    """(loss, clipped, d loss / d logprob) of one token, written out case by case."""
    ratio = math.exp(logprob - old)
    if advantage > 0 and ratio > 1 + high:
        return -(1 + high) * advantage, True, 0.0
    if advantage < 0 and ratio < 1 - low:
        return -(1 - low) * advantage, True, 0.0
    return -ratio * advantage, False, -ratio * advantage


def test_policy_loss_equals_the_slow_reference():
    rng = np.random.default_rng(0)
    for low, high in [(0.2, 0.2), (0.2, 0.28), (0.0, 1.0)]:
        logprobs, old = rng.normal(-2, 0.4, (2, 7, 50))
        advantages = rng.normal(0, 1, (7, 50))
        x = torch.tensor(logprobs, requires_grad=True)
        loss, clipped = policy_loss(x, torch.tensor(old), torch.tensor(advantages), low, high)
        loss.sum().backward()
        for index in np.ndindex(logprobs.shape):
            want = slow_policy_loss(logprobs[index], old[index], advantages[index], low, high)
            assert loss[index].item() == pytest.approx(want[0], rel=1e-12)
            assert clipped[index].item() == want[1]
            assert x.grad is not None and x.grad[index].item() == pytest.approx(want[2], rel=1e-12)
        assert clipped.any() and not clipped.all()


def test_B7_clip_side_and_clip_counter():
    """ratio 1.3, eps 0.2: A = +1 is counted and has no gradient; A = -1 is not counted and its gradient flows."""
    for ratio, advantage, is_clipped in [(1.3, 1, True), (1.3, -1, False), (0.7, 1, False), (0.7, -1, True)]:
        x = torch.tensor([[math.log(ratio)]], requires_grad=True)
        loss, clipped = policy_loss(x, torch.zeros(1, 1), torch.tensor([[float(advantage)]]))
        loss.backward()
        assert clipped.item() is is_clipped
        assert x.grad is not None and x.grad.item() == pytest.approx(0 if is_clipped else -ratio * advantage)
    # A masked token reaches the loss as log-probs 0 and advantage 0: never counted.
    assert not policy_loss(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1))[1].any()
    assert not policy_loss(torch.ones(1, 1), torch.zeros(1, 1), torch.zeros(1, 1))[1].any()


def test_B9_one_ratio_per_token():
    """Token ratios 1.1, 0.9, 1.5 with eps 0.2 and A = 1: 1.1, 0.9, 1.2 are used."""
    ratios = torch.tensor([[1.1, 0.9, 1.5]], dtype=torch.float64)
    loss, clipped = policy_loss(ratios.log(), torch.zeros_like(ratios), torch.ones_like(ratios))
    np.testing.assert_allclose(-loss, [[1.1, 0.9, 1.2]])
    assert clipped.tolist() == [[False, False, True]]


def test_policy_loss_refuses_shapes_that_would_broadcast():
    with pytest.raises(AssertionError, match=r"\(2, 3\)"):
        policy_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 1))


# ------------------------------------------------------------------------------------------------------ KL


def categorical(logits: Tensor, ref_logits: Tensor, kind: str) -> tuple[float, Tensor]:
    """Expected value and expected gradient of the estimator on samples of the policy, by enumerating all tokens."""
    logits = logits.clone().requires_grad_()
    logp, logref = logits.log_softmax(0), ref_logits.log_softmax(0)
    value = (logp.exp().detach() * kl_penalty(logp, logref, kind)).sum()  # samples carry no gradient
    value.backward()
    assert logits.grad is not None
    return value.item(), logits.grad


def true_kl_gradient(logits: Tensor, ref_logits: Tensor, reverse: bool) -> tuple[float, Tensor]:
    logits = logits.clone().requires_grad_()
    p, q = logits.log_softmax(0), ref_logits.log_softmax(0)
    kl = (q.exp() * (q - p)).sum() if reverse else (p.exp() * (p - q)).sum()
    kl.backward()
    assert logits.grad is not None
    return kl.item(), logits.grad


def test_B10_kl_estimators_by_exact_enumeration():
    """5 tokens: value and gradient are those that the docstring of kl_penalty claims."""
    torch.manual_seed(0)
    logits, ref = torch.randn(2, 5, dtype=torch.float64)
    kl, kl_gradient = true_kl_gradient(logits, ref, reverse=False)
    _, reverse_gradient = true_kl_gradient(logits, ref, reverse=True)
    assert (kl_gradient - reverse_gradient).abs().max() > 0.01  # the two directions can be told apart
    k1, k1_gradient = categorical(logits, ref, "k1")
    assert k1 == pytest.approx(kl)
    assert k1_gradient.abs().max() < 1e-12  # unbiased value, no gradient at all
    _, k2_gradient = categorical(logits, ref, "k2")
    np.testing.assert_allclose(k2_gradient, kl_gradient, atol=1e-12)
    k3, k3_gradient = categorical(logits, ref, "k3")
    assert k3 == pytest.approx(kl)
    np.testing.assert_allclose(k3_gradient, reverse_gradient, atol=1e-12)


def test_kl_values_and_zero_at_equality():
    d = torch.tensor([0.5, -0.5, 0.0], dtype=torch.float64)  # log p_ref - log p
    for kind, want in [("k1", [-0.5, 0.5, 0]), ("k2", [0.125, 0.125, 0]), ("k3", [0.14872127, 0.10653066, 0])]:
        np.testing.assert_allclose(kl_penalty(-d, torch.zeros(3), kind), want, atol=1e-8)
    with pytest.raises(ValueError, match="k4"):
        kl_penalty(d, d, "k4")


# ------------------------------------------------------------------------------------------------------ aggregation


@pytest.mark.parametrize(
    ("aggregation", "short", "long"),
    [
        ("token_mean", 1 / 303, 1 / 303),  # the default: every token alike
        ("sequence_mean", 1 / 6, 1 / 600),  # a token of the short answer weighs 100 times as much
        ("constant", 1 / 1000, 1 / 1000),  # max_new_tokens 500 x 2 rows
    ],
)
def test_B12_golden_numbers_for_rows_of_3_and_300_tokens(aggregation, short, long):
    weights = row_weights(torch.tensor([3, 300]), aggregation, BatchTotals(303, 2, 500))
    np.testing.assert_allclose(weights, [short, long], rtol=1e-6)
    loss_BT = torch.zeros(2, 300)
    loss_BT[0, :3], loss_BT[1] = 1.0, 2.0
    loss = (loss_BT * weights[:, None]).sum().item()
    want = {"token_mean": 603 / 303, "sequence_mean": 1.5, "constant": 0.603}[aggregation]
    assert loss == pytest.approx(want, rel=1e-6)


def test_B12_default_is_token_mean():
    assert LossConfig().aggregation == "token_mean"
    with pytest.raises(ValueError, match="tokenmean"):
        row_weights(torch.tensor([3]), "tokenmean", BatchTotals(3, 1, 8))


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
def test_B13_masked_rows_leave_the_denominators(aggregation):
    """4 rows of which 2 are masked (length 0, not in the totals) weigh like the other 2 alone."""
    four = row_weights(torch.tensor([3, 0, 5, 0]), aggregation, BatchTotals(8, 2, 16))
    two = row_weights(torch.tensor([3, 5]), aggregation, BatchTotals(8, 2, 16))
    assert torch.equal(four[[0, 2]], two) and torch.isfinite(four).all()


def test_tis_weights_are_capped_and_carry_no_gradient():
    """w = min(exp(logp_old - logp_sampler), cap): 0.5 stays, 1.5 stays, 3 becomes 2."""
    sampler = torch.zeros(1, 3)
    old = torch.tensor([[0.5, 1.5, 3.0]]).log().requires_grad_()
    weights = tis_weights(old, sampler, cap=2.0)
    np.testing.assert_allclose(weights, [[0.5, 1.5, 2.0]], rtol=1e-6)
    assert not weights.requires_grad


def test_B8_two_armed_bandit_learns_the_good_arm():
    """Sampling, group advantages, clipped loss, 50 steps: the arm that pays ends above 0.9, whichever it is."""
    for good in (0, 1):
        torch.manual_seed(0)
        logits = torch.zeros(2, requires_grad=True)
        for _ in range(50):
            logp = logits.log_softmax(0)
            arms = torch.multinomial(logp.exp().detach(), 8, replacement=True)
            advantages = group_advantages((arms == good).float()[None]).T
            chosen = logp[arms][:, None]
            loss, _ = policy_loss(chosen, chosen.detach(), advantages)
            weights = row_weights(torch.ones(8), "token_mean", BatchTotals(8, 8, 1))
            (gradient,) = torch.autograd.grad((loss * weights[:, None]).sum(), logits)
            logits.data -= 0.2 * gradient
        assert logits.softmax(0)[good] > 0.9
