"""How the trained model lies on the ranks of a run, and how whole tensors come out of it and go back in.

`model.sharding: ddp` keeps a whole copy on every rank. `fsdp2` (torch's fully_shard) keeps a slice of every weight,
gradient and moment; a layer is brought together just before it is used. Both *sum* gradients over ranks, because every
loss term is already divided by a count taken over all ranks: averaging would divide twice.

fully_shard is called here and not by accelerate, whose FSDP plugin gives plain data parallelism on a CPU without a word.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from nanolapo.model.precision import gradient_of


def shard(scorer: nn.Module, layers: Iterable[nn.Module], dtype: torch.dtype, offload: bool = False) -> None:
    """Cut every parameter of `scorer` into one slice a rank (along its first dimension), each of `layers` as a unit.

    Arithmetic is in `dtype`, slices, gradients and their sums are float32. `offload` keeps the slices in host memory.
    The rest (embedding, head, norm) is one unit too, which keeps a tied head tied. It is cut up again after a forward pass,
    so that no pass can ever see weights from before an optimizer step.
    """
    policy = MixedPrecisionPolicy(param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32)
    where = CPUOffloadPolicy() if offload else OffloadPolicy()
    units = [fully_shard(module, mp_policy=policy, offload_policy=where) for module in layers]
    units.append(fully_shard(scorer, mp_policy=policy, offload_policy=where, reshard_after_forward=True))
    for unit in units:
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # a plain sum, which every backend knows


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum gradients over ranks. Slices were summed in the backward pass; a missing gradient counts as zero."""
    for p in parameters:
        gradient = gradient_of(p)
        if dist.is_initialized() and not isinstance(p, DTensor):
            dist.all_reduce(gradient)


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or its slices brought together. All ranks must call this for the same tensors in one order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(parameter: Tensor, full: Tensor) -> Tensor:
    """A whole tensor in the form of `parameter`: as it is, or this rank's slice of it (nothing is sent)."""
    if isinstance(parameter, DTensor) and full.ndim:  # AdamW's step count is a plain number on every rank
        full = full.to(parameter.device_mesh.device_type)
        return distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return full.to(parameter.device)


def to_host(named: Iterable[tuple[str, Tensor]], keep: bool) -> dict[str, Tensor]:
    """Gather tensors one by one into host memory; only ranks that `keep` them hold more than one at a time."""

    def gathered() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in named:
            full = whole(tensor.detach())
            if keep:
                yield name, full.cpu().contiguous()

    return dict(gathered())
