"""LoRA, by peft: small trained matrices beside frozen ones, W x + scale * B (A x).

The trainer hands out the names and shapes of the plain model: it adds scale * B A to W before it sends weights to the
sampler or saves the final model. A KL term needs no second model as its reference: it is the same model with scale 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from nanolapo.model.sharding import gather_full

ADAPTER = "default"  # peft's name for the only adapter


def add_lora(model: PreTrainedModel, rank: int, alpha: int) -> None:
    """Freeze the model and put a LoRA of this rank beside every linear layer except the head, in place. B starts at 0."""
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
    inject_adapter_in_model(config, model, adapter_name=ADAPTER)


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def merged_delta(layer: LoraLayer) -> Tensor:
    """Return scale * B A, which the adapter adds to the layer's weight. All ranks must call it together."""
    low, up = layer.lora_A.get_parameter(f"{ADAPTER}.weight"), layer.lora_B.get_parameter(f"{ADAPTER}.weight")
    return layer.scaling[ADAPTER] * (gather_full(up.detach()) @ gather_full(low.detach()))  # [out, rank] @ [rank, in]


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside this context the model computes what it did before training (with scale 0, x + 0 is x to the bit)."""
    layers = lora_layers(model).values()
    scales = [layer.scaling[ADAPTER] for layer in layers]
    try:
        for layer in layers:
            layer.scaling[ADAPTER] = 0.0
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scaling[ADAPTER] = scale
