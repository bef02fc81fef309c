"""How the trained model is split over the ranks of a run, and how full tensors are gathered from it and put back.

`model.sharding: ddp` keeps a full copy on every rank. `fsdp2` (torch's fully_shard) keeps a slice of every weight,
gradient and moment on each rank, and gathers a layer just before it is used. Both *sum* gradients over ranks: every loss
term is already divided by a count taken over all ranks, so averaging would divide twice.

We call fully_shard ourselves: on a CPU, accelerate's FSDP plugin silently gives plain data parallelism.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(
    scorer: nn.Module, layers: Iterable[nn.Module], dtype: torch.dtype, give: Callable[[nn.Module], None],
    offload: bool,
) -> None:  # fmt: skip
    """Cut every parameter of `scorer` along its first dimension into one slice per rank. Each of `layers` is one unit.

    `give` puts the weights into a unit just before it is cut (spread.py).

    The model computes in `dtype`. Slices, gradients and their sums are float32. `offload` keeps the slices in host memory.
    Embedding, head and last norm form one more unit, so a tied head stays tied. This unit is cut up again after every
    forward pass, so no pass can see weights from before an optimizer step.
    """
    policy = MixedPrecisionPolicy(param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32)
    where = CPUOffloadPolicy() if offload else OffloadPolicy()
    units = []
    for module in [*layers, scorer]:
        give(module)
        again = True if module is scorer else None  # None: torch's default
        units.append(fully_shard(module, mp_policy=policy, offload_policy=where, reshard_after_forward=again))
    for unit in units:
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # a plain sum, which every backend knows


def gather_full(tensor: Tensor) -> Tensor:
    """Return the full tensor, gathered from its slices if it is cut up. All ranks must gather the same tensors in the same
    order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(parameter: Tensor, full: Tensor) -> Tensor:
    """Return this rank's slice of a full tensor if `parameter` is cut up, else all of it. Nothing is sent."""
    if isinstance(parameter, DTensor) and full.ndim:  # AdamW's step count is a plain number on every rank
        full = full.to(parameter.device_mesh.device_type)
        return distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return full.to(parameter.device)


def to_host(named: Iterable[tuple[str, Tensor]], keep: bool) -> dict[str, Tensor]:
    """Gather tensors one by one into host memory. Ranks that do not `keep` them hold one tensor at a time."""

    def gathered() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in named:
            full = gather_full(tensor.detach())
            if keep:
                yield name, full.cpu().contiguous()

    return dict(gathered())
