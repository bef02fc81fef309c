"""GFPO: which answers are kept, advantages within them, and what the loss divides by.

Run: python -m pytest tests/methods/test_gfpo.py
"""

from __future__ import annotations

import json
from statistics import mean, stdev

import numpy as np
import pytest
import torch
from tiny import CPU, copied, fill, make_config, make_rows

from nanolapo.config import UserError
from nanolapo.methods.gfpo import Gfpo, best_of, quarter
from nanolapo.policy import Policy
from nanolapo.ranks import Ranks
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


def test_the_efficient_are_the_right_ones_by_length_then_the_shorter_wrong_ones():
    """R / L of the right: 1/80, 1/30, 1/70; of the wrong 0, where the shorter one comes first."""
    lengths, right = [80, 20, 10, 30, 70], [1, 0, 0, 1, 1]
    order = [3, 4, 0, 2, 1]
    for k in range(1, 6):
        assert kept(lengths, right, k, "efficiency") == sorted(order[:k])


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
    assert np.flatnonzero(rollouts.keep_B).tolist() == [1, 2, 3, 7, 12, 13, 14, 15]
    plain = make(loss={"normalize_std": False})
    assert advantage(plain, copied(rollouts, keep=True))[1] == pytest.approx(-0.25)


def test_kept_answers_of_one_class_have_no_signal_though_the_group_has_both():
    for right in ([1] * 4 + [0] * 4, [0] * 4 + [1] * 4, [1] * 8, [0] * 8):
        rollouts = make_rows([1, 2, 3, 4, 50, 60, 70, 80], 8, correct=right)
        assert advantage(make(), rollouts) == [0.0] * 8, right
    one = advantage(make(score="efficiency"), make_rows([1, 2, 3, 4, 50, 60, 70, 80], 8, correct=[0] * 7 + [1]))
    assert one[7] == pytest.approx(1.5) and one[:3] == pytest.approx([-0.5] * 3) and one[3:7] == [0] * 4


def test_cut_answers_are_the_last_to_be_kept():
    rollouts = make_rows([128, 128, 5, 9], 4, correct=[0, 0, 1, 0], finished=[0, 0, 1, 1])
    assert advantage(make(4), rollouts)[:2] == [0, 0] and rollouts.keep_B.tolist() == [False, False, True, True]


def test_a_row_that_was_not_kept_before_stays_so():
    rollouts = fill(make_rows([5, 6, 7, 8], 4, correct=[1, 0, 1, 0]), keep=False)
    advantage(make(4), rollouts)
    assert not rollouts.keep_B.any()


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
@pytest.mark.parametrize("kl_coef", [0.0, 0.5])
def test_the_gradient_is_that_of_a_batch_of_the_kept_alone(tied_model, aggregation, kl_coef):
    """Denominators and KL leave out the other rows: sampling 4 and keeping 2 is the same as having sampled those 2."""
    method = make(4, tied_model, {"aggregation": aggregation, "kl_coef": kl_coef})
    rollouts = make_rows([30, 90, 10, 20, 100, 40, 7, 60], 4, correct=[1, 1, 0, 1, 1, 1, 0, 0])
    advantages = advantage(method, rollouts)
    rows = [2, 3, 5, 6]
    assert np.flatnonzero(rollouts.keep_B).tolist() == rows and all(advantages[b] for b in rows)
    alone = Rollouts([rollouts.rows[b] for b in rows], 2)

    def gradient(batch: Rollouts, values: list[float]) -> torch.Tensor:
        policy, seen = Policy(method.config, CPU), []
        with torch.no_grad():  # away from the reference, so that KL has a gradient
            for p in policy.model.parameters():
                p.mul_(1.05)
        policy.optimizer.register_step_pre_hook(
            lambda *_: seen.append(torch.cat([p.grad.flatten() for p in policy.model.parameters()]))
        )
        update_policy(policy, method, batch, torch.tensor(values), batch.keep_B, Ranks())
        return seen[0]

    torch.testing.assert_close(
        gradient(rollouts, advantages), gradient(alone, [advantages[b] for b in rows]), rtol=1e-4, atol=1e-6
    )


def test_quarters_of_the_pass_rates():
    """Quartiles of 0, 1, 2, 3, 4 are 1, 2, 3; a rate at an edge belongs to the easier side; without a past: hardest."""
    seen = np.array([3, 0, 4, 1, 2])
    assert [quarter(rate, seen) for rate in range(5)] == [0, 1, 2, 3, 3]
    assert quarter(8, np.zeros(0)) == 0
    assert quarter(8, np.full(9, 8)) == 3


def test_adaptive_keeps_8_8_6_4_of_16_from_hard_to_easy():
    method = make(16, adaptive=True)
    assert [method.group_k(right) for right in (0, 16)] == [8, 8]  # the first step knows nothing
    rollouts = make_rows([5] * 80, 16, correct=sum(([1] * n + [0] * (16 - n) for n in (0, 4, 8, 12, 16)), []))
    assert method.after_step(rollouts) == {}
    assert method.times_seen == [1 if n in (0, 4, 8, 12, 16) else 0 for n in range(17)]
    assert [method.group_k(right) for right in (0, 3, 4, 7, 8, 11, 12, 16)] == [8, 8, 8, 8, 6, 6, 4, 4]
    advantage(method, rollouts)
    assert rollouts.by_group(rollouts.keep_B).sum(axis=1).tolist() == [8, 8, 6, 4, 4]
    assert make(16).group_k(16) == 8 and make(24, k=8).group_k(0) == 8
    small = make(4, adaptive=True)
    small.times_seen = [1] * 5
    assert [small.group_k(right) for right in range(5)] == [2, 2, 2, 2, 2]  # never one answer: it would teach nothing


def test_state_survives_a_resume():
    first, second = make(adaptive=True), make(adaptive=True)
    rollouts = make_rows([7, 6, 5, 4, 3, 2, 1, 9] * 2, 8, correct=[1] * 7 + [0] + [1] + [0] * 7)
    first.after_step(rollouts)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.state_dict() == first.state_dict() and second.times_seen is not first.times_seen
    assert [second.group_k(n) for n in range(9)] == [first.group_k(n) for n in range(9)] != [4] * 9
    assert advantage(first, copied(rollouts)) == advantage(second, copied(rollouts))


@pytest.mark.parametrize(("size", "options"), [(8, {"k": 1}), (8, {"k": 9}), (1, {}), (8, {"k": 4, "adaptive": True})])
def test_what_cannot_work_is_refused_in_one_line(size, options):
    with pytest.raises(UserError, match=r"method\.options\.k"):
        make(size, **options)
