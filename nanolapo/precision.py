"""bf16 arithmetic on float32 weights: a working copy of the model that hands its gradients to the masters.

The masters keep weights, gradients and optimizer state in float32: at a learning rate of 1e-6 about 98 % of bf16 weights
would not move at all. Under autocast every forward pass casts every weight again, and everything between the matrix
products stays float32; the copy is cast once per optimizer step and halves the activations too. It computes what the
exported model and vLLM compute, so sampler and trainer also agree better. (fsdp2 does the same by itself, see sharding.py.)
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """In place. Parameters only: rotary frequencies are buffers and stay float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


class WorkingCopy:
    """`model` is the copy to compute with. Its gradients are added to the masters', in float32, as they are born."""

    def __init__(self, masters: PreTrainedModel, dtype: torch.dtype) -> None:
        self.model = copy.deepcopy(masters)
        self.pairs: list[tuple[nn.Parameter, nn.Parameter]] = []  # (master, its copy); a tied weight once
        cast_parameters(self.model, dtype)
        for master, mine in zip(masters.parameters(), self.model.parameters(), strict=True):
            if master.requires_grad:
                mine.register_post_accumulate_grad_hook(hand_over(master))
            self.pairs.append((master, mine))

    @torch.no_grad()
    def refresh(self) -> None:
        """Cast the masters again, after they were written to. (A fused optimizer does not raise their version counters, so
        nothing but the caller can know.)"""
        for master, mine in self.pairs:
            mine.copy_(master)


def hand_over(master: nn.Parameter) -> Callable[[Tensor], None]:
    def add(mine: Tensor) -> None:
        assert mine.grad is not None
        if master.grad is None:
            master.grad = mine.grad.float()
        else:
            master.grad.add_(mine.grad)
        mine.grad = None

    return add
