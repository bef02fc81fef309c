"""ALP: the form that prime-rl ships, and the paper's as notes have it.

Run: python -m pytest tests/methods/test_alp.py
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import make_config, make_rows

from nanolapo.methods.alp import Alp, paper_reward, shipped_reward
from nanolapo.rollouts import Rollouts


def make(normalize_std: bool = False, base: float = 6229, **options: object) -> Alp:
    rollout = {"base_tokens": base, "max_new_tokens": 8192}
    return Alp(make_config(rollout=rollout, loss={"normalize_std": normalize_std}, method={"options": options}))


def advantage(method: Alp, rollouts: Rollouts) -> list[float]:
    rewards = sum(method.reward(rollouts).values())
    return method.advantage(rollouts, torch.from_numpy(rollouts.by_group(rewards))).tolist()


def test_shipped_by_hand():
    """p 3/4, max 400 (a wrong answer's): an answer of L tokens pays 0.25 * 0.75 * L / 400, wrong ones as well."""
    got = shipped_reward(np.array([40.0, 80, 200, 400]), np.array([True, True, True, False]))
    np.testing.assert_allclose(got, [1 - 0.01875, 1 - 0.0375, 1 - 0.09375, -0.1875])
    np.testing.assert_allclose(shipped_reward(np.array([5.0, 10]), np.array([True, True]), 1.0), [0.5, 0.0])


def test_shipped_by_a_loop():
    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths, correct = rng.integers(1, 300, 6).astype(float), rng.random(6) < 0.5
        got = shipped_reward(lengths, correct, 0.25)
        for i in range(6):
            price = 0.25 * sum(correct.tolist()) / 6 / max(lengths.tolist())
            assert got[i] == pytest.approx((1.0 if correct[i] else 0.0) - price * lengths[i])


def test_the_advantage_is_reward_minus_mean_of_the_group():
    rollouts = make_rows([40, 80, 200, 400, 10, 30, 30, 10], 4, correct=[1, 1, 1, 0, 1, 1, 1, 1])
    rewards = rollouts.by_group(sum(make().reward(rollouts).values()))
    got = advantage(make(), rollouts)
    np.testing.assert_allclose(got, (rewards - rewards.mean(axis=1, keepdims=True)).flatten(), atol=1e-12)
    np.testing.assert_allclose(got[4:], [1 / 12, -1 / 12, -1 / 12, 1 / 12])  # all right: 0.25 * (1/3 or 1), mean 1/6


@pytest.mark.parametrize("lengths", [[40, 80, 200, 400], [128] * 4])
def test_without_a_right_answer_or_a_difference_there_is_no_signal(lengths):
    assert advantage(make(), make_rows(lengths, 4, correct=[0] * 4, finished=[n < 128 for n in lengths])) == [0] * 4
    assert advantage(make(), make_rows([9] * 4, 4, correct=[1] * 4)) == [0] * 4


def test_parts_are_the_verdict_and_the_length():
    parts = make().reward(make_rows([100, 200], correct=[1, 0]))
    assert list(parts) == ["correct", "length"] and parts["correct"].tolist() == [1, 0]
    np.testing.assert_allclose(parts["length"], [-0.0625, -0.125])


def test_paper_by_hand():
    """beta L max(p, 1/K), K 4: at p = 1/2 half of beta L; none right still pays a quarter."""
    lengths = np.array([100.0, 200, 300, 400])
    half = paper_reward(lengths, np.array([True, True, False, False]), 0.001)
    np.testing.assert_allclose(half, [0.95, 0.9, -0.15, -0.2])
    np.testing.assert_allclose(paper_reward(lengths, np.full(4, False), 0.001), -lengths * 0.001 / 4)
    np.testing.assert_allclose(paper_reward(lengths, np.full(4, True), 0.001), 1 - lengths * 0.001)


def test_the_papers_price_is_per_token_of_the_published_base():
    method = make(True, form="paper")
    assert method.beta == pytest.approx(1e-7) and make().beta is None
    assert make(True, base=62.29, form="paper").beta == pytest.approx(1e-5)
    rollouts = make_rows([1000, 3000], correct=[1, 1])
    np.testing.assert_allclose(sum(method.reward(rollouts).values()), [1 - 1e-4, 1 - 3e-4])


def test_the_papers_price_counts_where_the_deviation_divides_and_is_silent_within_1e_6():
    """All right: full advantages, of +-1/sqrt(2). 5 tokens apart the rewards differ by 5e-7: nothing."""
    for correct in ([1, 1], [0, 0]):
        got = advantage(make(True, form="paper"), make_rows([1000, 3000], correct=correct))
        assert got == pytest.approx([0.5**0.5, -(0.5**0.5)], rel=1e-4)  # none right: pushed to be short as well
        assert advantage(make(True, form="paper"), make_rows([1000, 1005], correct=correct)) == [0, 0]
    scaled = make(True, base=100, form="paper")  # 20 tokens of answers of 100: no guard silences it
    assert advantage(scaled, make_rows([80, 100], correct=[1, 1])) == pytest.approx([0.5**0.5, -(0.5**0.5)], rel=1e-4)
