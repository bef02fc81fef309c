"""Loads a model that fsdp2 splits: the main rank reads it from its files, and the other ranks receive it part by part.

The model on every other rank starts without storage (torch's meta device). So no rank but the main one ever holds more than
its slices and the one layer that is being cut, and the node holds one whole model instead of one for each rank.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from nanolapo.config import UserError
from nanolapo.model.folder import disable_dropout, load_model
from nanolapo.ranks import Ranks


def load_on_main(
    path: str, adapt: Callable[[PreTrainedModel], None], ranks: Ranks
) -> tuple[PreTrainedModel, Callable[[nn.Module], None]]:
    """Return a model without storage, the same on all ranks, and the function that gives a part of it its weights.

    adapt: changes the model after loading, for example by adding LoRA matrices. All ranks must call this together. Raises
    the errors of load_model on every rank.
    """
    full: PreTrainedModel | None = None
    with ranks.together():
        if ranks.is_main:
            full = load_model(path, torch.device("cpu"))
            adapt(full)
    config = ranks.from_main(lambda: full.config if full else None)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        adapt(empty)
    disable_dropout(empty)
    there, here = ranks.from_main(lambda: described(full)), described(empty)
    if there != here:
        raise UserError(
            f"model.path={path!r}: model.sharding=fsdp2 cannot split this model, because it differs from the model of its "
            f"config in {min(set(there.items()) ^ set(here.items()))[0]}; use model.sharding=ddp"
        )
    return empty, Giver(empty, full, ranks)


def all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name. A tied weight comes once; buffers that are not saved come as well."""
    return dict(chain(model.named_parameters(), model.named_buffers()))


def described(model: nn.Module | None) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> shape and dtype of every tensor."""
    return {name: (tuple(t.shape), str(t.dtype)) for name, t in all_tensors(model).items()} if model else {}


class Giver:
    """Replaces the tensors of an empty model by those of the main rank's full model, which it frees one after the other."""

    def __init__(self, empty: nn.Module, full: nn.Module | None, ranks: Ranks) -> None:
        self.device = ranks.device
        self.waiting = {tensor: name for name, tensor in all_tensors(empty).items()}
        self.full = all_tensors(full) if full else None

    def __call__(self, part: nn.Module) -> None:
        """Fill a part of the model on this rank's device. All ranks must call it together, for the same part."""
        given: dict[Tensor, Tensor] = {}  # a tied weight has two owners and stays one tensor
        for owner in part.modules():
            for tensors in (owner._parameters, owner._buffers):
                for name, tensor in tensors.items():
                    if tensor in self.waiting:
                        given[tensor] = self.receive(self.waiting.pop(tensor), tensor)
                    if tensor in given:
                        tensors[name] = given[tensor]  # type: ignore[assignment]

    def receive(self, name: str, like: Tensor) -> Tensor:
        if self.full is None:
            tensor = torch.empty(like.shape, dtype=like.dtype, device=self.device)
        else:
            tensor = self.full.pop(name).detach().to(self.device).contiguous()
        dist.broadcast(tensor, src=0)
        return nn.Parameter(tensor, like.requires_grad) if isinstance(like, nn.Parameter) else tensor
