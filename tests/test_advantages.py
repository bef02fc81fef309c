"""Group advantages against a slow reference, and the groups in which float noise or a batch mean would do harm.

Run: python -m pytest tests/test_advantages.py
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from round_methods import make_base, make_run

from nanolapo.advantages import check_advantages, group_advantages
from nanolapo.config import UserError
from nanolapo.loop import train
from nanolapo.methods.base import Method
from nanolapo.rollouts import Rollouts

LENGTHS_B = np.array([3, 5, 0, 2])  # tokens
KEEP_B = np.array([True, True, False, True])


def test_equals_the_slow_reference():
    rng = np.random.default_rng(0)
    rewards = rng.normal(1, 0.5, (6, 8))
    got, without_std = (group_advantages(torch.tensor(rewards), normalize_std=flag) for flag in (True, False))
    for p, group in enumerate(rewards.tolist()):
        mean, std = statistics.mean(group), statistics.stdev(group)  # unbiased: divides by G - 1
        np.testing.assert_allclose(got[p], [(r - mean) / (std + 1e-9) for r in group], rtol=1e-9)
        np.testing.assert_allclose(without_std[p], [r - mean for r in group], rtol=1e-9)


@pytest.mark.parametrize("normalize_std", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_B3_zero_variance_groups(dtype, normalize_std):
    """Equal rewards give exactly 0, also where seven are equal and one is off by 1e-8, and for G = 1."""
    for group in ([0.35] * 8, [1.7] * 7, [0.35] * 7 + [0.35 + 1e-8], [0.1 + 0.2, 0.3], [1.7], [0.0]):
        advantages = group_advantages(torch.tensor([group], dtype=dtype), normalize_std)
        assert advantages.tolist() == [[0.0] * len(group)], group


def test_B3_advantages_are_at_most_the_root_of_the_group_size():
    for size in (2, 4, 8, 64):
        rewards = torch.zeros(1, size)
        rewards[0, 0] = 1.0
        advantages = group_advantages(rewards)
        assert advantages.abs().max() <= size**0.5
        assert advantages.mean().abs() < 1e-6
    barely = group_advantages(torch.tensor([[1.0, 1.0, 1.0, 1.00001]], dtype=torch.float64))
    assert torch.isfinite(barely).all() and 1 < barely.max() <= 2  # 1e-5 apart is signal, 1e-8 is noise


def test_B4_statistics_never_cross_a_group():
    """Groups [0, 1] and [10, 11]: the same advantages in both, whatever their order and whoever else is there."""
    rewards = torch.tensor([[0.0, 1.0], [10.0, 11.0], [10.0, 10.0]])
    advantages = group_advantages(rewards)
    want = [[-0.70710677, 0.70710677]]
    np.testing.assert_allclose(advantages, [*want, *want, [0, 0]], rtol=1e-6)
    order = torch.tensor([2, 0, 1])
    assert torch.equal(group_advantages(rewards[order]), advantages[order])
    assert torch.equal(group_advantages(rewards.flip(1)), advantages.flip(1))
    halves = torch.cat([group_advantages(rewards[0::2]), group_advantages(rewards[1::2])])  # as two ranks would
    assert torch.equal(halves, advantages[[0, 2, 1]])


def test_shape_and_dtype():
    assert group_advantages(torch.zeros(3, 4)).dtype == torch.float32
    with pytest.raises(AssertionError, match=r"got \(4,\)"):
        group_advantages(torch.zeros(4))


@pytest.mark.parametrize("shape", [(4,), (4, 5), (4, 7)])
def test_advantages_of_a_method_may_be_one_a_rollout_or_one_a_token(shape: tuple[int, ...]) -> None:
    given = torch.zeros(shape)
    given[2] = math.nan  # a row that does not count
    check_advantages(given, LENGTHS_B, KEEP_B)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (torch.zeros(2, 2), r"shape \[2, 2\], 0 of them"),  # [P, G], the likeliest slip
        (torch.zeros(3), r"shape \[3\], 0 of them"),
        (torch.zeros(4, 4), r"shape \[4, 4\], 0 of them"),  # shorter than the longest answer
        (torch.zeros(4, 5, 1), r"shape \[4, 5, 1\], 0 of them"),
        (torch.tensor([0.0, math.nan, math.inf, 1.0]), r"shape \[4\], 1 of them"),
        (torch.full((4, 5), -math.inf), r"shape \[4, 5\], 15 of them"),
    ],
)
def test_advantages_that_cannot_be_trained_on_are_named(given: torch.Tensor, words: str) -> None:
    with pytest.raises(UserError, match=rf"^advantage: .* \[4\], or .* \[4, 5\]; it gave Tensor of {words} not finite"):
        check_advantages(given, LENGTHS_B, KEEP_B)


@pytest.mark.parametrize("given", [np.zeros(4), [0.0] * 4, None])
def test_advantages_are_a_tensor(given: object) -> None:
    with pytest.raises(UserError, match="must give a tensor .* it gave (ndarray|list|NoneType) of shape"):
        check_advantages(given, LENGTHS_B, KEEP_B)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_run_whose_advantages_are_not_finite_ends_in_its_first_step(tmp_path: Path) -> None:
    """Without the check a short run ended as complete, with the weights it began with."""

    class Wrong(Method):
        def advantage(self, rollouts: Rollouts, rewards_PG: torch.Tensor) -> torch.Tensor:
            return super().advantage(rollouts, rewards_PG) + math.nan

    config = make_run(make_base(tmp_path / "base"), tmp_path, train={"steps": 1})
    with pytest.raises(UserError, match="advantage: .*; it gave Tensor of shape .* of them not finite"):
        train(config, Wrong(config))
    assert not (config.run_dir / "model").exists()
