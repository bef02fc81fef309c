"""DAPO, DLER, DA-DLER and ConciseR: shaping, filtering, batch-wise advantages, limits by group.

Run: python -m pytest tests/methods/test_dapo_dler.py
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import fill, make_config, make_rows

from nanolapo.config import UserError
from nanolapo.methods.base import Method
from nanolapo.methods.conciser import ConciseR
from nanolapo.methods.dapo import Dapo, overlong_penalty
from nanolapo.methods.dler import DaDler, Dler, batch_advantages
from nanolapo.ranks import Ranks
from nanolapo.rollouts import Rollouts
from nanolapo.sampling import regrade


def build(kind: type[Method], limit: int, steps: int = 100, **options: object) -> Method:
    return kind(make_config(rollout={"max_new_tokens": limit}, train={"steps": steps}, method={"options": options}))


def total(method: Method, rollouts: Rollouts) -> list[float]:
    return np.sum(list(method.reward(rollouts).values()), axis=0).tolist()


def advantage(method: Method, rollouts: Rollouts) -> torch.Tensor:
    rewards_PG = rollouts.by_group(np.array(total(method, rollouts)))
    return method.advantage(rollouts, torch.from_numpy(rewards_PG))


def keep(method: Method, rollouts: Rollouts) -> list[bool]:
    return method.keep_groups(rollouts, rollouts.by_group(np.array(total(method, rollouts)))).tolist()


# ---------------------------------------------------------------------------------------------------------- DAPO


def test_overlong_penalty_by_its_three_cases():
    for limit, cache in [(20480, 4096), (256, 51.2), (10, 10)]:
        for length in range(1, limit + 5, max(1, limit // 97)):
            expected = limit - cache
            if length <= expected:
                want = 0.0
            elif length <= limit:
                want = (expected - length) / cache
            else:
                want = -1.0
            assert overlong_penalty(np.array([length]), limit, cache)[0] == pytest.approx(want, abs=1e-12)


def test_dapo_reward_is_plus_or_minus_one_plus_shaping():
    """Limit 20,480 as published: 18,432 tokens cost one half, the limit costs one, right or wrong."""
    method = build(Dapo, 20480)
    rollouts = make_rows([100, 18432, 18432, 20480], 4, correct=[True, True, False, False], finished=[1, 1, 1, 0])
    assert total(method, rollouts) == [1.0, 0.5, -1.5, -2.0]
    assert method.reward(rollouts)["correct"].tolist() == [1, 1, 0, 0]
    for overlong in ("filter", "none"):
        assert total(build(Dapo, 20480, overlong=overlong), rollouts) == [1, 1, -1, -1]


def test_dapo_cache_scales_and_can_be_given():
    assert build(Dapo, 256).cache == pytest.approx(51.2)
    assert build(Dapo, 256, cache=10).cache == 10
    for cache in (0, 257):
        with pytest.raises(UserError, match="cache"):
            build(Dapo, 256, cache=cache)
    with pytest.raises(UserError, match="overlong"):
        build(Dapo, 256, overlong="hide")


def test_dapo_keeps_groups_of_both_classes_only():
    """Shaping makes an all-right group's rewards differ; it is dropped all the same: accuracy decides."""
    method = build(Dapo, 100)
    lengths = [50, 100, 50, 100, 50, 100]
    rollouts = make_rows(lengths, correct=[True, True, False, False, True, False])
    assert keep(method, rollouts) == [False, False, True]
    assert method.sampling(0).max_rounds == 4 and build(Dapo, 100, max_rounds=1).sampling(0).max_rounds == 1


def test_dapo_overlong_filter_takes_cut_answers_out_of_the_loss():
    """Out of what it is divided by, too. A row that was not kept before stays out."""
    rollouts = make_rows([50, 100, 50, 100], correct=[True, False, True, False], finished=[True, False, True, True])
    rollouts.rows[2].keep = False
    r = math.sqrt(0.5)
    assert advantage(build(Dapo, 100, overlong="none"), rollouts).tolist() == pytest.approx([r, -r, r, -r])
    assert [row.keep for row in rollouts.rows] == [True, True, False, True]
    assert advantage(build(Dapo, 100, overlong="filter"), rollouts).tolist() == pytest.approx([r, 0, r, -r])
    assert [row.keep for row in rollouts.rows] == [True, False, False, True]


# ---------------------------------------------------------------------------------------------------------- DLER


def slow_batch_advantages(rewards: list[list[float]], weights: list[list[float]]) -> list[float]:
    """As its formula reads, over a list in which a rollout stands as often as its weight says."""
    centred = [[r - sum(group) / len(group) for r in group] for group in rewards]
    many = [
        c for cs, ws in zip(centred, weights, strict=True) for c, w in zip(cs, ws, strict=True) for _ in range(int(w))
    ]
    mean = sum(many) / len(many)
    std = math.sqrt(sum((c - mean) ** 2 for c in many) / (len(many) - 1))
    return [
        (c - mean) / std if w else 0.0
        for cs, ws in zip(centred, weights, strict=True)
        for c, w in zip(cs, ws, strict=True)
    ]


@pytest.mark.parametrize("whiten", ["sequences", "tokens"])
def test_dler_advantage_is_whitened_over_the_kept_batch(whiten):
    rng = np.random.default_rng(0)
    method = build(Dler, 40, whiten=whiten)
    for _ in range(20):
        lengths, correct = rng.integers(1, 40, 12).tolist(), (rng.random(12) < 0.5).tolist()
        correct[:4] = [True] * 4  # a group that is dropped, and must not enter the statistics
        correct[4:6] = [True, False]
        rollouts = make_rows(lengths, 4, correct=correct)
        rewards = [[float(c) for c in correct[g : g + 4]] for g in (0, 4, 8)]
        kept = [len(set(group)) > 1 for group in rewards]
        assert keep(method, rollouts) == kept
        weights = [[k * (length if whiten == "tokens" else 1) for length in lengths[g : g + 4]]
                   for g, k in zip((0, 4, 8), kept, strict=True)]  # fmt: skip
        got = advantage(method, rollouts)
        np.testing.assert_allclose(got, slow_batch_advantages(rewards, weights), atol=1e-9)


def test_dler_differs_from_group_normalisation():
    """A group solved once in four and one solved twice: the batch's std is shared, so their scales differ."""
    correct = [True, False, False, False, True, True, False, False]
    got = advantage(build(Dler, 40), make_rows([5] * 8, 4, correct=correct))
    # centred: 0.75, -0.25 x3, 0.5 x2, -0.5 x2; mean 0; sum of squares 0.5625 + 3/16 + 1 = 1.75; var 1.75/7 = 0.25
    assert got.tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5, 1, 1, -1, -1])


def test_dler_degenerate_batches_have_no_advantage():
    for rewards, weights in [([[1.0, 1.0]], [[1.0, 1.0]]), ([[1.0, 0.0]], [[0.0, 0.0]]), ([[1.0, 0.0]], [[1.0, 0.0]])]:
        got = batch_advantages(torch.tensor(rewards), torch.tensor(weights))
        assert got.tolist() == [[0.0, 0.0]]


def test_dler_reward_of_cut_answers():
    """The paper: 0. The code: a tenth, if the answer is right already; only then may a cut answer be graded as right."""
    rollouts = make_rows([9, 9, 9, 9], 4, correct=[True, False, True, False], finished=[True, True, False, False])
    code = build(Dler, 9, cut_reward=0.1)
    assert code.cut_answers_count and not build(Dler, 9).cut_answers_count
    assert total(code, rollouts) == pytest.approx([1, 0, 0.1, 0])
    assert code.reward(rollouts)["correct"].tolist() == [1, 0, 1, 0]
    fill(rollouts, correct=np.array([False, False, True, True]))
    fill(rollouts, finished=False)
    assert keep(code, make_rows([9, 9], correct=[True, True], finished=[False, False])) == [False]  # 0.1 and 0.1


def test_dler_limits():
    assert build(Dler, 4000).sampling(0).max_new_tokens == 4000
    assert build(Dler, 256, target=200).sampling(0).max_new_tokens == 200
    assert (build(DaDler, 4000).target, build(DaDler, 4000).short_target) == (4000, 2000)
    assert (build(DaDler, 256).target, build(DaDler, 256).short_target) == (256, 128)
    for options in ({"target": 300}, {"short_target": 0}, {"target": 10, "short_target": 20}, {"whiten": "rows"}):
        with pytest.raises(UserError, match="method.options"):
            build(DaDler, 256, **options)


def test_da_dler_halves_the_limit_where_half_is_solved():
    """Pass rates 2/4 (>= 0.5), 1/4 and 3/4; limits 50, 100, 50. Only answers above their limit are cut and regraded."""
    lengths = [20, 60, 50, 51, 20, 90, 100, 60, 40, 60, 70, 80]
    correct = [True, True, False, False, True, False, False, False, True, True, True, False]
    rollouts = make_rows(lengths, 4, correct=correct)
    before = [ids.copy() for ids in rollouts.response_ids]
    method = build(DaDler, 100)
    edited = method.edit_rollouts(rollouts)
    assert [row.text for row in edited] == [f"text {b}" for b in (1, 3, 9, 10, 11)]
    for row in edited:  # the loop's rule: a cut answer is wrong unless the method counts it
        row.correct = False
    assert rollouts.lengths_B.tolist() == [20, 50, 50, 50, 20, 90, 100, 60, 40, 50, 50, 50]
    assert [len(p) for p in rollouts.sampler_logprobs] == rollouts.lengths_B.tolist()
    assert rollouts.finished_B.tolist() == [True, False, True, False, *[True] * 5, False, False, False]
    assert total(method, rollouts) == [1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0]
    for ids, old in zip(rollouts.response_ids, before, strict=True):
        assert (ids == old[: len(ids)]).all()


def test_da_dler_grades_what_is_left_of_an_answer():
    """Through the loop's own regrade. The answer is token 7; rows 0-3 are right at the full limit of 8, so the limit is 4.
    Row 1 shows its 7 before the cut: 0.1 of the code's variant; row 2's lies behind it: nothing."""
    method = build(DaDler, 8, cut_reward=0.1)
    rollouts = make_rows([1] * 4, 4, correct=[True] * 4)
    fill(rollouts, response_ids=[np.array(ids) for ids in ([1, 7], [1, 7, 1, 1, 1, 1], [1, 1, 1, 1, 7], [1, 1, 1, 7])])
    fill(rollouts, sampler_logprobs=[np.zeros(len(ids), dtype=np.float32) for ids in rollouts.response_ids])
    grader = SimpleNamespace(grade_all=lambda texts, references: ["7" in text for text in texts], errors=0, total=8)
    data = SimpleNamespace(decode=lambda ids: "".join(map(str, ids)))
    session = SimpleNamespace(data=data, grader=grader, method=method, ranks=Ranks())
    regrade(session, method.edit_rollouts(rollouts))
    assert rollouts.texts[1:3] == ("1711", "1111")
    assert total(method, rollouts) == pytest.approx([1, 0.1, 0, 1])


def test_da_dler_leaves_short_batches_alone():
    rollouts = make_rows([1, 50, 50, 100], correct=[True, False, False, False])
    assert build(DaDler, 100).edit_rollouts(rollouts) == []
    assert rollouts.lengths_B.tolist() == [1, 50, 50, 100] and rollouts.finished_B.all()


# ---------------------------------------------------------------------------------------------------------- ConciseR


def test_conciser_length_counts_late_and_only_in_all_right_groups():
    method = build(ConciseR, 100, steps=10, first_stage=0.5, weight=2.0)
    rollouts = make_rows([10, 40, 10, 40, 10, 40], correct=[True, True, True, False, False, False])
    for step, first_group, kept in [(4, [1, 1], False), (5, [2.8, 2.2], True), (9, [2.8, 2.2], True)]:
        method.progress = step / 10
        assert method.sampling(step).max_rounds == 4
        assert total(method, rollouts) == pytest.approx([*first_group, 1, 0, 0, 0])
        assert keep(method, rollouts) == [kept, True, False]
        assert method.reward(rollouts)["correct"].tolist() == [1, 1, 1, 0, 0, 0]


def test_conciser_equal_lengths_and_immediate_start():
    method = build(ConciseR, 100, first_stage=0.0)
    rollouts = make_rows([40, 40, 100, 1], correct=[True] * 4)
    assert total(method, rollouts) == pytest.approx([1.6, 1.6, 1.0, 1.99])
    assert keep(method, rollouts) == [False, True]
    got = advantage(method, rollouts)
    assert got[:2].tolist() == [0, 0] and got[3] > 0 > got[2]
