"""DRPO: the row weights, and the gradient of the whole update against autograd on the paper's formula.

Run: python -m pytest tests/methods/test_drpo.py
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny import CPU, fill, make_config, make_rows, score_rows

from nanolapo.config import UserError
from nanolapo.losses import LossInputs
from nanolapo.methods.drpo import Drpo, decoupled_weights
from nanolapo.microbatches import make_microbatch
from nanolapo.policy import Policy
from nanolapo.rollouts import Rollouts
from nanolapo.update import update_policy

LENGTHS = [3, 17, 8, 30, 12, 5, 1, 22, 9, 14, 6, 11]
CORRECT = [True, True, False, False, True, False, False, False, True, True, True, True]  # last group: one class


def config(model: object = "", **sections: dict) -> object:
    loss = {"aggregation": "sequence_mean"} | sections.pop("loss", {})
    return make_config(model, loss=loss, **sections)


def direct_loss(scores: list[torch.Tensor], rollouts: Rollouts, capacity: int, lam: float, tau: float) -> torch.Tensor:
    """-(1/n_prompts) sum_q J_q, word for word, with the log-mean-exp left to autograd."""
    size, total = rollouts.group_size, torch.zeros(())
    for g in range(len(rollouts.problems)):
        rows = range(g * size, (g + 1) * size)
        right = [b for b in rows if rollouts.correct_B[b]]
        wrong = [b for b in rows if not rollouts.correct_B[b]]
        if not right or not wrong:
            continue
        powers = {b: math.exp((1 - len(rollouts.response_ids[b]) / capacity) / lam) for b in right}
        gain = sum(powers[b] / sum(powers.values()) * scores[b] for b in right)
        mean_exp = sum(torch.exp(scores[b] / tau) for b in wrong) / len(wrong)
        total = total + gain - tau * torch.log(mean_exp)
    return -total / len(rollouts.problems)


def update_with_gradients(
    policy: Policy, method: Drpo, rollouts: Rollouts, advantages: torch.Tensor
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """What update_policy logs, and the gradients that its only optimizer step sees."""
    got: dict[str, torch.Tensor] = {}
    policy.optimizer.register_step_pre_hook(
        lambda *_: got.update({name: p.grad.clone() for name, p in policy.model.named_parameters()})
    )
    return update_policy(policy, method, rollouts, advantages), got


@pytest.mark.parametrize("tau", [10.0, 0.5])
@pytest.mark.parametrize("tokens", [4096, 40])
def test_update_has_the_gradient_of_the_papers_formula(tied_model, tau, tokens):
    """Through update_policy, in one micro-batch and in many that tear groups apart; at tau 0.5 the softmax is far from
    uniform, so weights that forget it would be seen."""
    options = {"tau": tau, "length_temperature": 0.1}
    c = config(
        tied_model,
        rollout={"max_new_tokens": 32, "group_size": 4, "prompts_per_step": 3},
        train={"microbatch_tokens": tokens, "grad_clip": 1e9},
        method={"options": options},
    )
    rollouts = make_rows(LENGTHS, 4, correct=CORRECT)
    policy, method = Policy(c, CPU), Drpo(c)
    score_rows(policy, rollouts)
    advantages = method.advantage(rollouts, torch.from_numpy(rollouts.by_group(rollouts.correct_B.astype(float))))
    before = Policy(c, CPU)
    logged, got = update_with_gradients(policy, method, rollouts, advantages)
    assert logged["penalty_strength"] == 0 and logged["drift"] == 0

    micro = make_microbatch(rollouts, range(12), CPU)
    logprobs_BT, _ = before.logprobs(micro)
    scores = [row[:length].mean() for row, length in zip(logprobs_BT, LENGTHS, strict=True)]
    direct_loss(scores, rollouts, 32, 0.1, tau).backward()
    for name, parameter in before.model.named_parameters():
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("tokens", [4096, 40])
def test_the_drift_penalty_is_on_all_rows(tied_model, tokens):
    """K is a mean over all tokens of the optimizer batch, however it is split. Here the drift is that of a group of one
    class, which J leaves out: both old log-probs of its rows are 0.05 above the policy's."""
    c = config(
        tied_model,
        rollout={"max_new_tokens": 32, "group_size": 4, "prompts_per_step": 3},
        train={"microbatch_tokens": tokens, "grad_clip": 1e9},
        loss={"old_logprobs": "sampler"},
        method={"options": {"beta": 30.0}},
    )
    rollouts = make_rows(LENGTHS, 4, correct=CORRECT)
    policy, before, method = Policy(c, CPU), Policy(c, CPU), Drpo(c)
    score_rows(policy, rollouts)
    for row in rollouts.rows[8:]:
        row.sampler_logprobs = row.sampler_logprobs + np.float32(0.05)
    advantages = method.advantage(rollouts, torch.zeros(3, 4))
    logged, got = update_with_gradients(policy, method, rollouts, advantages)
    drift = 0.05 * sum(LENGTHS[8:]) / sum(LENGTHS)
    assert logged["drift"] == pytest.approx(drift, rel=1e-3)
    assert logged["penalty_strength"] == pytest.approx(30 * (drift - 1e-4), rel=1e-3)

    logprobs_BT, _ = before.logprobs(make_microbatch(rollouts, range(12), CPU))
    rows = [row[:length] for row, length in zip(logprobs_BT, LENGTHS, strict=True)]
    old_minus_new = -sum(row.sum() for row in rows) / sum(LENGTHS)  # but for a constant
    loss = direct_loss([row.mean() for row in rows], rollouts, 32, 0.1, 10.0)
    (loss + 30 * (drift - 1e-4) * old_minus_new).backward()
    for name, parameter in before.model.named_parameters():
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-3, atol=1e-3 * scale)


@pytest.mark.parametrize("tokens", [4096, 40])
def test_later_updates_have_one_drift_for_the_whole_batch(tied_model, tokens):
    """The second of two passes, in one micro-batch and in many: autograd on -sum(A mean(log p)) / rows + strength * K with
    the weights that one pass alone leaves behind. Rows drift apart, so the K of a micro-batch is another one."""

    def one_run(inner_epochs: int) -> tuple[Policy, Rollouts, torch.Tensor, dict, dict]:
        c = config(
            tied_model,
            rollout={"max_new_tokens": 32, "group_size": 4, "prompts_per_step": 3},
            train={"microbatch_tokens": tokens, "grad_clip": 1e9, "inner_epochs": inner_epochs, "learning_rate": 1e-3},
            method={"options": {"beta": 30.0}},
        )
        rollouts, policy, method = make_rows(LENGTHS, 4, correct=CORRECT), Policy(c, CPU), Drpo(c)
        score_rows(policy, rollouts)
        advantages = method.advantage(rollouts, torch.zeros(3, 4))
        return policy, rollouts, advantages, *update_with_gradients(policy, method, rollouts, advantages)

    _, _, _, logged, got = one_run(2)
    policy, rollouts, advantages, _, _ = one_run(1)
    logprobs_BT, _ = policy.logprobs(make_microbatch(rollouts, range(12), CPU))
    rows = [row[:length] for row, length in zip(logprobs_BT, LENGTHS, strict=True)]
    drift = sum(
        (torch.tensor(old) - new).sum() for old, new in zip(rollouts.sampler_logprobs, rows, strict=True)
    ) / sum(LENGTHS)
    strength = 30 * (float(drift.detach()) - 1e-4)
    assert strength > 0.1
    assert logged["penalty_strength"] == pytest.approx(
        strength / 2, rel=1e-3
    )  # mean over both passes; the first has none
    policy.model.zero_grad()
    objective = sum(a * row.mean() for a, row in zip(advantages.tolist(), rows, strict=True)) / 12
    (strength * drift - objective).backward()
    for name, parameter in policy.model.named_parameters():
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-3, atol=1e-3 * scale)


def test_weights_by_hand():
    """Lengths 100 and 200 of 1000 at lambda 0.1: exp(9) to exp(8); scores -1 and -3 at tau 2: exp(-0.5) to exp(-1.5)."""
    weights = decoupled_weights(
        np.array([100, 70, 200, 9]), np.array([1, 0, 1, 0]), np.array([0, -1, 0, -3]), 1000, 0.1, 2
    )
    share = 1 / (1 + math.exp(-1))
    np.testing.assert_allclose(weights, [share, -share, 1 - share, -(1 - share)])


def test_no_right_answer_is_pushed_down_and_shorter_is_better():
    rng = np.random.default_rng(0)
    for _ in range(100):
        lengths, correct = rng.integers(1, 256, 8), rng.random(8) < 0.5
        weights = decoupled_weights(lengths, correct, rng.normal(size=8), 256, 0.1, 10)
        assert np.isfinite(weights).all()
        if correct.all() or not correct.any():
            assert (weights == 0).all()
            continue
        assert (weights[correct] > 0).all() and (weights[~correct] < 0).all()
        assert weights[correct].sum() == pytest.approx(1) and weights[~correct].sum() == pytest.approx(-1)
        order = np.argsort(lengths[correct], kind="stable")
        assert (np.diff(weights[correct][order]) <= 1e-12).all()


def test_edge_groups():
    one = decoupled_weights(np.array([9, 5, 7]), np.array([False, True, False]), np.zeros(3), 64, 0.1, 10)
    np.testing.assert_allclose(one, [-0.5, 1, -0.5])
    ties = decoupled_weights(np.array([5, 5, 5]), np.array([True, True, False]), np.zeros(3), 64, 0.1, 10)
    np.testing.assert_allclose(ties, [0.5, 0.5, -1])
    far = decoupled_weights(
        np.array([1, 8192, 1]), np.array([True, True, False]), np.array([0, 0, -1e4]), 8192, 1e-4, 1e-3
    )
    assert np.isfinite(far).all()  # a sharp softmax does not overflow
    endless = decoupled_weights(np.array([1, 60, 1]), np.array([True, True, False]), np.zeros(3), 64, 1e9, 10)
    np.testing.assert_allclose(endless, [0.5, 0.5, -1], atol=1e-6)  # lambda to infinity: no length control


def test_an_empty_row_does_not_spoil_its_group():
    method = Drpo(config(rollout={"group_size": 4, "prompts_per_step": 1}))
    rollouts = make_rows([5, 0, 7, 3], 4, correct=[True, False, False, False])
    got = method.advantage(rollouts, torch.zeros(1, 4))
    assert torch.isfinite(got).all() and got[0] == 4


def inputs(drift: list[list[float]], advantages: list[float], rollouts: Rollouts, rows: list[int]) -> LossInputs:
    mask = torch.tensor([[1.0] * len(d) + [0.0] * (3 - len(d)) for d in drift])
    logprobs = torch.tensor([d + [0.0] * (3 - len(d)) for d in drift]).neg().requires_grad_()
    advantages_BT = torch.tensor(advantages)[:, None] * mask
    return LossInputs(logprobs, torch.zeros(2, 3), torch.zeros(2, 3), None, None, advantages_BT, mask, rows, rollouts)


def test_drift_penalty_above_delta_only():
    """K = 0.04 over all tokens, as update_policy says; strength 1000 * (0.04 - 1e-4) = 39.9. A dropped row has no part in
    the mean length."""
    method = Drpo(config())
    rollouts = make_rows([5, 1, 4, 2, 90], 5, correct=[True] * 5)  # mean length 3 of the first four
    fill(rollouts, keep=[True] * 4 + [False])
    method.loss.prepare(rollouts, torch.zeros(5))
    method.loss.drift = 0.04
    x = inputs([[0.02], [0.04, 0.06]], [0.0, 0.0], rollouts, [1, 3])
    loss_BT, logged = method.loss(x)
    weights_B1 = 1 / torch.tensor([[1.0], [2.0]]) / 4  # sequence_mean of 4 rows
    (loss_BT * x.mask_BT * weights_B1).sum().backward()
    assert logged["penalty_strength"].max() == pytest.approx(39.9, rel=1e-5)
    want = -39.9 / 12 * x.mask_BT  # d/dlogp of 39.9 * sum(old - logp) / (4 rows * mean length 3 = 12 tokens)
    torch.testing.assert_close(x.logprobs_BT.grad, want)
    for drift in (-0.02, 1e-5):
        method.loss.drift = drift
        loss_BT, logged = method.loss(inputs([[0.02], [0.04, 0.06]], [0.0, 0.0], rollouts, [1, 3]))
        assert logged["penalty_strength"].abs().max() == 0 and loss_BT.abs().max() == 0


def test_settings_that_would_be_another_loss_are_refused():
    with pytest.raises(UserError, match="sequence_mean"):
        Drpo(config(loss={"aggregation": "token_mean"}))
    for loss in ({"kl_coef": 0.1}, {"tis_cap": 2.0}, {"kind": "r2vpo"}, {"dual_clip": 10.0}):
        with pytest.raises(UserError, match="has its own policy loss"):
            Drpo(config(loss=loss))
