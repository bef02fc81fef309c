"""Our Muon takes the steps of the library's, and its steps are orthogonal.

Run: python -m pytest tests/demo/test_muon.py
"""

from __future__ import annotations

import pytest
import torch

from nanolapo.demo.muon import Muon, orthogonal

SHAPES = [(32, 32), (96, 32), (32, 96)]


@pytest.mark.parametrize("shape", SHAPES)
def test_five_steps_are_those_of_the_library(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients differ from step to step, so the momentum and the learning rate of each step show. The library computes
    in float32 here as well."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # as it writes it
    random = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=random)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    optimizer, library = Muon([ours]), torch.optim.Muon([theirs], lr=1.0, weight_decay=0.0)
    for rate in (0.1, 0.1, 0.02, 0.05, 0.1):
        ours.grad = theirs.grad = torch.randn(shape, generator=random)
        library.param_groups[0]["lr"] = rate
        before = ours.detach().clone(), theirs.detach().clone()
        optimizer.step(rate)
        library.step()
        (moved, wanted) = (after.detach() - earlier for after, earlier in zip((ours, theirs), before, strict=True))
        assert (moved - wanted).norm() < 1e-4 * wanted.norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_keeps_the_singular_vectors_and_evens_the_values(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    between = u.T @ orthogonal(matrix) @ v.T
    assert values.max() / values.min() > 3
    assert between.diagonal().min() > 0.6 and between.diagonal().max() < 1.3
    assert (between - between.diagonal().diag()).abs().max() < 0.05


def test_a_gradient_of_zeros_moves_nothing() -> None:
    weight = torch.nn.Parameter(torch.ones(3, 5))
    weight.grad = torch.zeros(3, 5)
    Muon([weight]).step(0.1)
    assert torch.equal(weight, torch.ones(3, 5))
