"""GFPO: which answers are kept, advantages within them, and what the loss divides by.

Run: python -m pytest tests/methods/test_gfpo.py
"""

from __future__ import annotations

import json
from statistics import mean, stdev

import numpy as np
import pytest
import torch
from tiny import CPU, copied, make_config, make_rows
from transformers import AutoModelForCausalLM

from nanolapo.config import UserError
from nanolapo.methods.gfpo import Gfpo, best_of, quarter
from nanolapo.policy import Policy
from nanolapo.rollouts import Rollouts
from nanolapo.update import update_policy


def make(size: int = 8, path: object = "", loss: dict | None = None, train: dict | None = None, **options) -> Gfpo:
    rollout = {"group_size": size, "max_new_tokens": 128}
    sections = {"loss": loss or {}, "train": {"grad_clip": 1e9} | (train or {})}
    return Gfpo(make_config(path, rollout=rollout, method={"options": options}, **sections))


def advantage(method: Gfpo, rollouts: Rollouts) -> list[float]:
    rewards = sum(method.reward(rollouts).values())
    return method.advantage(rollouts, torch.from_numpy(rollouts.by_group(rewards))).tolist()


def kept(lengths: list[int], right: list[int], k: int, score: str) -> list[int]:
    return np.flatnonzero(best_of(np.array(lengths), np.array(right, dtype=float), k, score)).tolist()


def test_the_shortest_are_kept_right_or_wrong():
    lengths, right = [80, 10, 20, 30, 70, 50, 60, 40], [1, 0, 0, 1, 1, 1, 1, 0]
    assert kept(lengths, right, 4, "shortest") == [1, 2, 3, 7]
    assert kept(lengths, right, 8, "shortest") == list(range(8))


def test_the_efficient_are_the_right_ones_by_length_then_the_longer_wrong_ones():
    """R / L of the right: 1/80, 1/30, 1/70; of the wrong 0, where the longer one comes first, as with a negative R."""
    lengths, right = [80, 20, 10, 30, 70], [1, 0, 0, 1, 1]
    order = [3, 4, 0, 1, 2]
    for k in range(1, 6):
        assert kept(lengths, right, k, "efficiency") == sorted(order[:k])
        below = [r or -1 for r in right]
        assert kept(lengths, below, k, "efficiency") == sorted(order[:k])


def test_of_equal_scores_the_earlier_is_kept():
    assert kept([5, 5, 5, 5], [1, 0, 1, 0], 2, "shortest") == [0, 1]
    assert kept([5, 5, 5, 5], [0, 1, 0, 1], 3, "efficiency") == [0, 1, 3]


def test_advantages_are_those_of_the_kept_alone():
    """Two groups of 8, 4 kept: (R - mean) / std of each four, 0 elsewhere; the other groups and answers do not count."""
    method = make()
    lengths = [80, 10, 20, 30, 70, 50, 60, 40] + [9, 8, 7, 6, 5, 4, 3, 2]
    right = [1, 0, 0, 1, 1, 1, 1, 0] + [0, 0, 0, 0, 1, 1, 0, 1]
    rollouts = make_rows(lengths, 8, correct=right)
    want = [0.0] * 16
    for rows in ([1, 2, 3, 7], [12, 13, 14, 15]):
        rewards = [right[b] for b in rows]
        for b in rows:
            want[b] = (right[b] - mean(rewards)) / stdev(rewards)
    assert advantage(method, rollouts) == pytest.approx(want, abs=1e-6)
    assert rollouts.keep_B.all(), "the others stay in the divisors"
    plain = make(loss={"normalize_std": False})
    assert advantage(plain, copied(rollouts, keep=True))[1] == pytest.approx(-0.25)


def test_kept_answers_of_one_class_have_no_signal_though_the_group_has_both():
    for right in ([1] * 4 + [0] * 4, [0] * 4 + [1] * 4, [1] * 8, [0] * 8):
        rollouts = make_rows([1, 2, 3, 4, 50, 60, 70, 80], 8, correct=right)
        assert advantage(make(), rollouts) == [0.0] * 8, right
    one = advantage(make(score="efficiency"), make_rows([1, 2, 3, 4, 50, 60, 70, 80], 8, correct=[0] * 7 + [1]))
    assert one[7] == pytest.approx(1.5) and one[4:7] == pytest.approx([-0.5] * 3) and one[:4] == [0] * 4


def test_cut_answers_are_the_last_to_be_kept():
    rollouts = make_rows([128, 128, 5, 9], 4, correct=[0, 0, 1, 0], finished=[0, 0, 1, 1])
    assert advantage(make(4), rollouts) == pytest.approx([0, 0, 0.5**0.5, -(0.5**0.5)])


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
@pytest.mark.parametrize("kl_coef", [0.0, 0.5])
def test_the_others_count_as_answers_without_advantage(tied_model, aggregation, kl_coef):
    """Divisors and KL are those of all sampled answers (Eq. 2): in plain autograd, -A log p and k3 over all tokens."""
    method = make(4, tied_model, {"aggregation": aggregation, "kl_coef": kl_coef})
    rollouts = make_rows([30, 90, 10, 20, 100, 40, 7, 60], 4, correct=[1, 1, 0, 1, 1, 1, 0, 0])
    advantages = advantage(method, rollouts)
    assert [b for b, a in enumerate(advantages) if a] == [2, 3, 5, 6]
    policy, seen = Policy(method.config, CPU), []
    reference = AutoModelForCausalLM.from_pretrained(tied_model, dtype=torch.float64).eval()
    model = AutoModelForCausalLM.from_pretrained(tied_model, dtype=torch.float64).eval()
    with torch.no_grad():  # away from the reference, so that KL has a gradient
        for p in [*policy.model.parameters(), *model.parameters()]:
            p.mul_(1.05)
    policy.optimizer.register_step_pre_hook(
        lambda *_: seen.append({name: p.grad.clone() for name, p in policy.model.named_parameters()})
    )
    update_policy(policy, method, rollouts, torch.tensor(advantages))

    total = torch.zeros((), dtype=torch.float64)
    for row, a in zip(rollouts.rows, advantages, strict=True):
        ids = torch.from_numpy(np.concatenate([row.prompt_ids, row.response_ids]))[None]
        at = slice(len(row.prompt_ids) - 1, -1)
        logp, ref = (
            m(ids).logits[0, at].log_softmax(-1).gather(-1, ids[0, len(row.prompt_ids) :, None])[:, 0]
            for m in (model, reference)
        )
        k3 = torch.exp(ref.detach() - logp) - (ref.detach() - logp) - 1
        divisor = {"token_mean": 357, "sequence_mean": 8 * len(logp), "constant": 8 * 128}[aggregation]
        total = total + (-a * torch.exp(logp - logp.detach()) + kl_coef * k3).sum() / divisor
    total.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(seen[0][name].double(), p.grad, rtol=1e-3, atol=1e-6)


def test_quarters_of_the_pass_rates():
    """Quartiles of 0, 1, 2, 3, 4 are 1, 2, 3; a rate at an edge belongs to the easier side."""
    seen = np.array([3, 0, 4, 1, 2])
    assert [quarter(rate, seen) for rate in range(5)] == [0, 1, 2, 3, 3]
    assert quarter(8, np.full(9, 8)) == 3


def test_adaptive_keeps_8_8_6_4_of_16_from_hard_to_easy():
    method = make(16, adaptive=True)
    assert method.group_k(np.array([0, 16])) == [8, 8]  # the first step knows nothing
    rights = (0, 4, 8, 12, 16)  # the first answer of a group is right, then come the wrong ones
    rollouts = make_rows([5] * 80, 16, correct=sum(([1][:n] + [0] * (16 - n) + [1] * (n - 1) for n in rights), []))
    assert method.after_step(rollouts) == {}
    assert method.times_seen == [1 if n in rights else 0 for n in range(17)]
    assert method.group_k(np.array(rights)) == [8, 8, 6, 4, 4]  # quartiles 4, 8, 12, of both steps together
    kept = np.count_nonzero(np.reshape(advantage(method, rollouts), (5, 16)), axis=1)
    assert kept.tolist() == [0, 8, 6, 4, 0]
    # This step's own groups count: the quartiles of the ten are 9, 16 and 16 here, and 9, 14 and 16 below
    assert method.group_k(np.array([16] * 5)) == [4] * 5
    assert method.group_k(np.array([12, 16, 16, 16, 16])) == [8, 4, 4, 4, 4]
    assert make(16).group_k(np.array([16])) == [8] and make(24, k=8).group_k(np.array([0])) == [8]
    small = make(4, adaptive=True)
    small.times_seen = [1] * 5
    assert small.group_k(np.arange(5)) == [2, 2, 2, 2, 2]  # never one answer: it would teach nothing


def test_state_survives_a_resume():
    first, second = make(adaptive=True), make(adaptive=True)
    rollouts = make_rows([7, 6, 5, 4, 3, 2, 1, 9] * 2, 8, correct=[1] * 7 + [0] + [1] + [0] * 7)
    first.after_step(rollouts)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.state_dict() == first.state_dict() and second.times_seen is not first.times_seen
    rights = np.arange(9)
    assert second.group_k(rights) == first.group_k(rights) != [4] * 9
    assert advantage(first, copied(rollouts)) == advantage(second, copied(rollouts))


@pytest.mark.parametrize(("size", "options"), [(8, {"k": 1}), (8, {"k": 9}), (8, {"k": 4, "adaptive": True})])
def test_what_cannot_work_is_refused_in_one_line(size, options):
    with pytest.raises(UserError, match=r"method\.options\.k"):
        make(size, **options)
