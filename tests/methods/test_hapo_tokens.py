"""The token-aware HAPO: normalised entropies, token-level group advantage, redistribution, adaptive clip.

Run: python -m pytest tests/methods/test_hapo_tokens.py
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny import CPU, make_config, make_rows, score_rows
from transformers import AutoModelForCausalLM

from nanolapo.config import UserError
from nanolapo.losses import LossInputs
from nanolapo.methods.hapo_tokens import (
    TokenHapo,
    entropy_scale,
    heterogeneous_loss,
    normalized_entropies,
    token_group_advantages,
)
from nanolapo.policy import Policy
from nanolapo.update import update_policy


def hapo(**options: object) -> TokenHapo:
    return TokenHapo(make_config(rollout={"max_new_tokens": 100}, method={"options": options}))


def slow_h(entropies: list[float], quantile: float) -> list[float]:
    """The published order of operations, the division by the spread included."""
    u = [math.log(max(value, 1e-8)) for value in entropies]
    pivot = sorted(u)[round(quantile * (len(u) - 1))]
    spread = math.sqrt(sum((x - pivot) ** 2 for x in u) / len(u))
    if spread == 0:
        return [0.0] * len(u)
    h = [(x - pivot) / spread for x in u]
    return [x / max(h) if x > 0 else x / abs(min(h)) if x < 0 else 0.0 for x in h]


def h_of(entropies: list[float], quantile: float) -> np.ndarray:
    array = np.array(entropies, dtype=np.float64)
    return normalized_entropies(torch.from_numpy(array), entropy_scale(array, quantile)).numpy()


@pytest.mark.parametrize("quantile", [0.8, 0.5])
def test_normalized_entropies(quantile):
    rng = np.random.default_rng(0)
    for size in (4, 11, 100):
        entropies = rng.exponential(size=size).tolist()
        got = h_of(entropies, quantile)
        np.testing.assert_allclose(got, slow_h(entropies, quantile), atol=1e-12)
        assert got.max() == 1 and got.min() == -1


def test_normalized_entropies_at_the_edges():
    assert h_of([0.3, 0.3, 0.3], 0.8).tolist() == [0, 0, 0]
    assert h_of([], 0.8).tolist() == []
    assert h_of([0.0, 1.0], 0.0).tolist() == [0, 1]  # nothing below the pivot
    assert h_of([0.0, 1.0], 1.0).tolist() == [-1, 0]  # nothing above it
    assert np.isfinite(h_of([0.0, 1e-12, 2.0], 0.8)).all()  # a certain token


def test_token_level_advantage_weighs_long_answers():
    """Lengths 10 and 30, rewards 1 and -1: m = -0.5, s = sqrt(0.25 * 2.25 + 0.75 * 0.25) = sqrt(0.75)."""
    got = token_group_advantages(torch.tensor([[1.0, -1.0]], dtype=torch.float64), torch.tensor([[10, 30]]))
    np.testing.assert_allclose(got[0], [1.5 / math.sqrt(0.75), -0.5 / math.sqrt(0.75)], rtol=1e-5)
    rng = np.random.default_rng(0)
    for _ in range(20):
        rewards, lengths = rng.random(4), rng.integers(5, 20, 4)
        tokens = np.concatenate([[r] * n for r, n in zip(rewards, lengths, strict=True)])
        want = (rewards - tokens.mean()) / (tokens.std() + 1e-6)
        got = token_group_advantages(torch.from_numpy(rewards)[None], torch.from_numpy(lengths)[None])
        np.testing.assert_allclose(got[0], want)


def test_extreme_groups_fall_back_to_ordinary_advantages():
    """One token right against 99 wrong: A = 0.99 / sqrt(0.0099) = 9.9, so the group is (1, -1) / sqrt(2)."""
    rewards = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    got = token_group_advantages(rewards, torch.tensor([[1, 99], [10, 30]]))
    np.testing.assert_allclose(got[0], [0.70710678, -0.70710678])
    np.testing.assert_allclose(got[1], [math.sqrt(3), -1 / math.sqrt(3)], rtol=1e-5)
    same = token_group_advantages(torch.full((1, 3), 1.7), torch.tensor([[1, 50, 1]]))
    assert same.tolist() == [[0, 0, 0]]


def slow_loss(r: float, a: float, h: float, low: float, high: float, dual: float) -> float:
    lo = low * (1 - h) if h < 0 else low
    hi = high * (1 + h) if h > 0 else high
    inside = 1 - lo / 2 < r < 1 + hi / 2
    redistributed = a * (1 + h)
    a = {(True, True): a, (True, False): redistributed, (False, True): redistributed, (False, False): a}[h > 0, inside]
    loss = -min(r * a, min(max(r, 1 - lo), 1 + hi) * a)
    return min(loss, -a * dual) if a < 0 else loss


def test_loss_over_a_grid():
    """Ratios on both sides of every border, both signs, unsure, neutral and sure tokens."""
    ratios = [0.3, 0.55, 0.65, 0.79, 0.81, 0.85, 0.89, 0.91, 1.0, 1.09, 1.11, 1.16, 1.19, 1.21, 1.39, 1.41, 9.0, 30.0]
    grid = [(r, a, h) for r in ratios for a in (2.0, -2.0, 0.0) for h in (-1.0, -0.5, 0.0, 0.5, 1.0)]
    r, a, h = (torch.tensor(column, dtype=torch.float64)[None] for column in zip(*grid, strict=True))
    got, clipped = heterogeneous_loss(r.log(), torch.zeros_like(r), a, h, 0.2, 0.2, 10.0)
    np.testing.assert_allclose(got[0], [slow_loss(*case, 0.2, 0.2, 10.0) for case in grid], atol=1e-12)
    assert clipped.any() and not clipped[a == 0].any()


def test_clip_opens_upward_for_unsure_and_downward_for_sure_tokens():
    """Where does the gradient end? h = 1: at 1.4 (A > 0); h = -1: at 0.6 (A < 0); the other bounds stay at 0.2."""
    up = [(1, 1, 1.39, True), (1, 1, 1.41, False), (-1, 1, 1.21, False), (-1, 1, 1.15, True)]
    down = [(-1, -1, 0.61, True), (-1, -1, 0.59, False), (1, -1, 0.79, False), (1, -1, 0.81, True)]
    for h, a, ratio, open_ in up + down:
        logp = torch.tensor([[math.log(ratio)]], requires_grad=True)
        loss, clipped = heterogeneous_loss(
            logp, torch.zeros(1, 1), torch.tensor([[float(a)]]), torch.tensor([[float(h)]]), 0.2, 0.2, 10.0
        )
        loss.sum().backward()
        assert (logp.grad.abs().item() > 0) == open_ == (not clipped.item()), (h, a, ratio)


def test_first_update_only_damps_sure_tokens():
    """r = 1: gradient -A for h >= 0, -A (1 + h) below: the surest token gets none."""
    logp = torch.zeros(1, 4, requires_grad=True)
    h = torch.tensor([[1.0, 0.0, -0.25, -1.0]])
    loss, _ = heterogeneous_loss(logp, torch.zeros(1, 4), torch.full((1, 4), 2.0), h, 0.2, 0.2, 10.0)
    loss.sum().backward()
    np.testing.assert_allclose(logp.grad[0], [-2, -2, -1.5, 0])


def test_statistics_are_those_of_the_whole_batch():
    """A micro-batch of one row is measured against all rows that are scored (group 1 has no signal and is not)."""
    method = hapo()
    rollouts = make_rows([2, 3, 1, 4], correct=[True, False, True, True])
    rollouts.old_entropies = {0: np.array([0.1, 2.0]), 1: np.array([1.0, 0.5, 0.2])}
    method.loss.prepare(rollouts, torch.zeros(4))
    want = slow_h([0.1, 2.0, 1.0, 0.5, 0.2], 0.8)
    ones, zeros, logp = torch.ones(1, 3), torch.zeros(1, 3), torch.zeros(1, 3, requires_grad=True)
    entropy_BT = torch.tensor([[1.0, 0.5, 0.2]])
    loss, logged = method.loss(LossInputs(logp, zeros, zeros, None, entropy_BT, ones, ones, [1], rollouts))
    loss.sum().backward()
    np.testing.assert_allclose(logp.grad[0], [-(1 + min(x, 0)) for x in want[2:]], rtol=1e-6)
    assert logged["unsure_fraction"].tolist() == [[0, 0, 0]]
    rollouts.old_entropies = {}
    method.loss.prepare(rollouts, torch.zeros(4))  # nothing to train on
    assert method.loss.scale == (0, 0, 0)


@pytest.mark.parametrize("tokens", [4096, 40])
@pytest.mark.parametrize("old", ["trainer", "sampler"])
def test_update_uses_the_entropies_of_the_whole_batch(tied_model, tokens, old):
    """Through update_policy, in one micro-batch or many: the gradient is -A (1 + min(h, 0)) per token over all tokens, with
    h from entropies that plain transformers gives."""
    lengths, advantages = [3, 17, 8, 30], [1.0, -0.5, 2.0, -1.5]
    c = make_config(
        tied_model, rollout={"group_size": 2}, train={"microbatch_tokens": tokens, "grad_clip": 1e9},
        loss={"old_logprobs": old},
    )  # fmt: skip
    rollouts = make_rows(lengths)
    policy, method = Policy(c, CPU), TokenHapo(c)
    score_rows(policy, rollouts)
    got: dict[str, torch.Tensor] = {}
    policy.optimizer.register_step_pre_hook(
        lambda *_: got.update({name: p.grad.clone() for name, p in policy.model.named_parameters()})
    )
    update_policy(policy, method, rollouts, torch.tensor(advantages))

    model = AutoModelForCausalLM.from_pretrained(tied_model, dtype=torch.float64).eval()
    rows = []
    for prompt, response in zip(rollouts.prompt_ids, rollouts.response_ids, strict=True):
        logp = model(torch.from_numpy(np.concatenate([prompt, response]))[None]).logits[0].log_softmax(-1)
        logp = logp[len(prompt) - 1 : -1]
        entropy = -(logp.exp() * logp).sum(-1).detach()
        rows.append((logp.gather(-1, torch.from_numpy(response)[:, None]).squeeze(-1), entropy))
    h = slow_h(torch.cat([entropy for _, entropy in rows]).tolist(), 0.8)
    factors = torch.tensor([1 + min(x, 0) for x in h], dtype=torch.float64).split(lengths)
    loss = sum(-a * (f * logp).sum() for a, f, (logp, _) in zip(advantages, factors, rows, strict=True)) / sum(lengths)
    loss.backward()
    for name, parameter in model.named_parameters():
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(got[name].double(), parameter.grad, rtol=1e-3, atol=1e-3 * scale)


def test_settings_that_its_loss_would_ignore_are_refused():
    for loss in ({"kl_coef": 0.1}, {"tis_cap": 2.0}, {"kind": "r2vpo"}):
        with pytest.raises(UserError, match="has its own policy loss"):
            TokenHapo(make_config(loss=loss))


def test_recipe_is_dapos():
    method = hapo()
    assert method.cache == pytest.approx(40) and method.loss.needs_entropy and method.sampling(0).max_rounds == 4
    rollouts = make_rows([80, 100, 10, 10], correct=[True, False, True, True], finished=[True, False, True, True])
    parts = method.reward(rollouts)
    np.testing.assert_allclose(sum(parts.values()), [0.5, -2.0, 1, 1])
    rewards_PG = rollouts.by_group(sum(parts.values()))
    assert method.keep_groups(rollouts, rewards_PG).tolist() == [True, False]
    filtered = hapo(overlong="filter")
    got = filtered.advantage(rollouts, torch.tensor([[1.0, -1.0], [1.0, 1.0]]))
    assert got[0] > 0 and got[1:].tolist() == [0, 0, 0]
