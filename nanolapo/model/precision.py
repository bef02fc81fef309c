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


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """Its gradient so far, to be added to: zeros where there is none yet."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def only_rows_read(embedding: nn.Module) -> None:
    """Let the embedding's gradient be that of the rows that were read, and not a tensor of the vocabulary's size, of which
    nearly all is zero. The parameter's .grad stays what it is for any other: a dense sum."""

    def rows(gradient: Tensor) -> Tensor:
        gradient_of(weight)  # what sparse gradients are added to stays dense
        return gradient.coalesce()  # sorted: sums of rows that were read twice have an order on GPUs, too

    weight = embedding.get_parameter("weight")
    embedding.sparse = True  # type: ignore[assignment]
    if weight.dtype == torch.float32 and weight.requires_grad:  # a working copy's is added to its master's by hand_over
        weight.register_hook(rows)


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
        if mine.grad is None:
            return  # the head, which has added its own already (logprobs.py)
        if mine.grad.is_sparse:
            gradient_of(master).add_(mine.grad.float().coalesce())
        elif master.grad is None:
            master.grad = mine.grad.float()
        else:
            master.grad.add_(mine.grad)
        mine.grad = None

    return add
