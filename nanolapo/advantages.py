"""Group advantages: how much better a rollout did than the other answers to the same question. Pure functions."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nanolapo.config import UserError

MIN_SPREAD = 1e-6  # rewards closer together than this carry no signal; float noise must not be blown up to O(1)


def group_statistics(rewards_PG: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and unbiased standard deviation of every group, float64 [P, 1] each. Statistics never cross a group."""
    rewards = rewards_PG.double()  # 8 numbers a group: double costs nothing and removes round-off from the mean
    return rewards.mean(dim=1, keepdim=True), rewards.std(dim=1, keepdim=True)


def group_advantages(rewards_PG: Tensor, normalize_std: bool = True) -> Tensor:
    """Standard GRPO advantage (arXiv 2402.03300): (R - mean(R)) / (std(R) + 1e-9) within each group, unbiased std.

    A group whose rewards agree to within 1e-6 gets exactly zero, and so does a single rollout (G = 1 has nothing to compare
    with). `normalize_std=False` is Dr. GRPO's R - mean(R).

    >>> group_advantages(torch.tensor([[1.0, 0.0], [0.35, 0.35]]))
    tensor([[ 0.7071, -0.7071],
            [ 0.0000,  0.0000]])
    """
    assert rewards_PG.ndim == 2, f"rewards must be [prompts, rollouts], got {tuple(rewards_PG.shape)}"
    if rewards_PG.shape[1] < 2:
        return torch.zeros_like(rewards_PG)
    rewards = rewards_PG.double()
    mean_P1, std_P1 = group_statistics(rewards)
    centred = rewards - mean_P1
    if normalize_std:
        centred = centred / (std_P1 + 1e-9)
    spread = rewards.amax(dim=1, keepdim=True) - rewards.amin(dim=1, keepdim=True)
    return torch.where(spread < MIN_SPREAD, torch.zeros_like(centred), centred).to(rewards_PG.dtype)


def batch_advantages(rewards_PG: Tensor, weights_PG: Tensor) -> Tensor:
    """Rewards centred in their group, then whitened over the batch: [P, G], like rewards_PG.

    weights_PG: how often a rollout counts in the batch's mean and (unbiased) variance: 1, or its number of tokens; 0 for a
    group that is not trained on, whose advantage is 0.

    >>> batch_advantages(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    tensor([[ 0.7071, -0.7071],
            [ 0.0000,  0.0000]])
    """
    assert rewards_PG.shape == weights_PG.shape, f"{tuple(rewards_PG.shape)}, {tuple(weights_PG.shape)}"
    weights = weights_PG.double()
    centred = rewards_PG.double() - rewards_PG.double().mean(dim=1, keepdim=True)
    count = weights.sum()
    if count <= 1:
        return torch.zeros_like(rewards_PG)
    centred = centred - (weights * centred).sum() / count
    std = ((weights * centred.square()).sum() / (count - 1)).sqrt()
    if std < MIN_SPREAD:
        return torch.zeros_like(rewards_PG)
    return (centred / std * (weights > 0)).to(rewards_PG.dtype)


def check_advantages(advantages: Tensor, lengths_B: np.ndarray, keep_B: np.ndarray) -> None:
    """Raises UserError for advantages of a method that are neither [B] nor [B, T], or not finite where a row counts."""
    rows, longest, shape = len(lengths_B), int(lengths_B.max()), tuple(np.shape(advantages))
    fits = shape == (rows,) or (len(shape) == 2 and shape[0] == rows and shape[1] >= longest)
    is_tensor = isinstance(advantages, Tensor)
    bad = int((~advantages[torch.tensor(keep_B)].isfinite()).sum()) if fits and is_tensor else 0
    if not fits or not is_tensor or bad:
        raise UserError(
            f"advantage: the method must give a tensor of finite numbers, one a rollout, [{rows}], or one a token, "
            f"[{rows}, {longest}]; it gave {type(advantages).__name__} of shape {list(shape)}, {bad} of them not finite"
        )
