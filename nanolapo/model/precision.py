"""Master weights in float32, a bf16 copy to compute with, and the one place where gradients reach the masters.

The masters keep weights, gradients and optimizer state in float32: at a learning rate of 1e-6 about 98 % of bf16 weights
would not move at all. Autocast would cast every weight in every forward pass and keep float32 between the matrix products.
The copy is cast once per optimizer step and halves the activations too. It computes what the exported model and vLLM
compute, so sampler and trainer also agree better. (fsdp2 does the same by itself, see sharding.py.)
"""

from __future__ import annotations

import copy
import timeit
from collections.abc import Iterable
from functools import partial
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from nanolapo.model.sharding import gather_full


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters in place. Buffers stay as they are: rotary frequencies must be float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def seconds_of_product(dtype: torch.dtype) -> float:
    """Return the seconds of the fastest of four products [64, 512] @ [512, 512] on the CPU, as in a small model."""
    one, other = torch.ones(64, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
    return min(timeit.repeat(lambda: one @ other, number=1, repeat=4))


def make_copy(masters: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Copy the model in `dtype`; tied weights stay tied."""
    copied = copy.deepcopy(masters)
    cast_parameters(copied, dtype)
    return copied


@torch.no_grad()
def refresh_copy(masters: PreTrainedModel, copied: PreTrainedModel) -> None:
    """Cast the masters into the copy again. Whoever writes to the masters must call it: a fused optimizer does not raise
    their version counters, so nothing else can tell that they changed."""
    for master, mine in zip(masters.parameters(), copied.parameters(), strict=True):
        mine.copy_(master)


def without_gradient_of(word: int, embedding: nn.Module, ids: tuple[Tensor], hidden: Tensor) -> Tensor:
    """Give the padding's row of an embedding no gradient. With padding_idx torch would pick the other rows out of a sparse
    gradient, and the host would wait for a GPU to tell it how many these are."""
    return torch.where((ids[0] == word)[..., None], hidden.detach(), hidden)


def add_rows(total_VD: Tensor, gradient: Tensor) -> None:
    """Add an embedding's sparse gradient in float32. Rows that were read twice are summed in a fixed order."""
    if total_VD.is_cpu:
        total_VD.add_(gradient.float().coalesce())
    else:  # to coalesce, the host would have to wait: a GPU tells it how many rows are left
        total_VD.index_put_((gradient._indices()[0],), gradient._values().float(), accumulate=True)


class MasterGradients:
    """Owns `.grad` of the trained masters: dense, float32, summed over micro-batches and, before the step, over ranks.

    With fsdp2, torch adds to this rank's slices by itself. Otherwise `collect` arranges who adds during a backward pass:

    - A parameter of the bf16 copy hands its gradient over as soon as it is complete: it is added in float32, then freed.
    - A float32 model computes with the masters themselves, so autograd adds.
    - The head adds block by block, in float32 (logprobs.py). So no second tensor of its size exists.
    - The embedding adds only the rows that were read. Its gradient is sparse, because nearly all rows are zero.
    """

    def __init__(self, trained: Iterable[nn.Parameter]) -> None:
        self.trained = list(trained)

    def collect(self, masters: PreTrainedModel, model: PreTrainedModel) -> None:
        """Make the backward pass of `model`, which is the masters or their copy, add to the masters' gradients."""
        for master, mine in zip(masters.parameters(), model.parameters(), strict=True):
            if master.requires_grad and mine is not master:
                mine.register_post_accumulate_grad_hook(partial(self.hand_over, master))
        model.get_output_embeddings().gradient_sum = partial(self.sum_of, masters.get_output_embeddings().weight)
        embedding = cast(nn.Embedding, model.get_input_embeddings())
        embedding.sparse = True
        if embedding.padding_idx is not None and embedding.weight.requires_grad:
            embedding.register_forward_hook(partial(without_gradient_of, embedding.padding_idx))
            embedding.padding_idx = None
        if model is masters and embedding.weight.requires_grad:
            embedding.weight.register_hook(partial(self.rows_read, embedding.weight))

    def sum_of(self, master: Tensor) -> Tensor:
        """Return the gradient so far, to be added to; zeros if there is none yet."""
        if master.grad is None:
            master.grad = torch.zeros_like(master)
        return master.grad

    def hand_over(self, master: nn.Parameter, mine: Tensor) -> None:
        """Move a gradient from the copy to its master."""
        if mine.grad is None:  # the head has added its gradient already
            return
        if mine.grad.is_sparse:
            add_rows(self.sum_of(master), mine.grad)
        elif master.grad is None:
            master.grad = mine.grad.float()
        else:
            master.grad.add_(mine.grad)
        mine.grad = None

    def rows_read(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """Prepare an embedding's sparse gradient for autograd, which adds it in place to a dense sum that exists."""
        self.sum_of(weight)
        return gradient.coalesce()  # sorted: rows that were read twice are summed in a fixed order on GPUs, too

    def sum_and_clip(self, max_norm: float) -> float:
        """Sum over ranks, clip, and return the global norm before clipping. A missing gradient counts as zero."""
        # vLLM needs a group even for one rank; to sum over it would send every gradient through the host.
        several = dist.is_initialized() and dist.get_world_size() > 1
        for master in self.trained:
            gradient = self.sum_of(master)
            if several and not isinstance(master, DTensor):  # slices were summed in the backward pass
                dist.all_reduce(gradient)
        return float(gather_full(nn.utils.clip_grad_norm_(self.trained, max_norm)))
