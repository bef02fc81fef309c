"""Muon: gradient descent with momentum whose steps are made orthogonal (Jordan, kellerjordan.github.io/posts/muon, 2024).

torch.optim.Muon makes them orthogonal in bfloat16. On the many CPUs that have no instructions for it, the demo's
pre-training takes four times as long with that. So we multiply in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of x, x^3, x^5: five turns bring singular values near 1


class Muon:
    """The optimizer of `matrices` (2-D parameters [rows, columns], not embeddings). It changes them in place.

    >>> weight = torch.nn.Parameter(torch.zeros(2, 2))
    >>> weight.grad = torch.tensor([[3.0, 0.0], [0.0, 3.0]])  # the gradient's size does not matter
    >>> Muon([weight]).step(0.1)
    >>> [round(value, 2) for value in weight.diagonal().tolist()]
    [-0.11, -0.11]
    """

    def __init__(self, matrices: Sequence[torch.nn.Parameter]) -> None:
        self.averages = [(matrix, torch.zeros_like(matrix)) for matrix in matrices]

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Take one step against the gradients of the last backward pass; every matrix must have one. A matrix with more
        rows than columns takes a step that is sqrt(rows / columns) times as long."""
        for matrix, average in self.averages:
            assert matrix.grad is not None
            average.lerp_(matrix.grad, 1 - MOMENTUM)
            ahead = matrix.grad.lerp(average, MOMENTUM)  # Nesterov
            rows, columns = matrix.shape
            matrix.sub_(orthogonal(ahead), alpha=learning_rate * max(1, rows / columns) ** 0.5)


def orthogonal(matrix: Tensor) -> Tensor:
    """Return U S V^T, of the shape of `matrix` and with its singular vectors. S is between 0.6 and 1.3 for each singular
    value above 0.2 % of the matrix's norm; smaller ones stay smaller."""
    a, b, c = NEWTON_SCHULZ
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    wide = wide / wide.norm().clamp(min=1e-7)  # so no singular value is above 1
    for _ in range(5):
        gram = wide @ wide.T
        update = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        wide = torch.addmm(wide, update, wide, beta=a)
    return wide.T if matrix.shape[0] > matrix.shape[1] else wide
