"""LoRA, by peft: small trained matrices beside frozen ones, W x + scale * B (A x).

The names and shapes that leave the trainer are those of the plain model: B A is added into W on the way out, for the
sampler at every sync and for the final model. The reference model of a KL term is the same model with scale 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from nanolapo.model.sharding import whole

ADAPTER = "default"  # peft's name for the only adapter


def add_lora(model: PreTrainedModel, rank: int, alpha: int) -> None:
    """Freeze the model and put a LoRA of this rank beside every linear layer but the head; B starts at 0. In place."""
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
    inject_adapter_in_model(config, model, adapter_name=ADAPTER)


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def merged_delta(layer: LoraLayer) -> Tensor:
    """scale * B A, what the adapter adds to the layer's weight. All ranks must call it together."""
    low, up = layer.lora_A.get_parameter(f"{ADAPTER}.weight"), layer.lora_B.get_parameter(f"{ADAPTER}.weight")
    return layer.scaling[ADAPTER] * (whole(up.detach()) @ whole(low.detach()))  # B [out, rank] @ A [rank, in]


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes what it computed before training (scale 0: x + 0 is x, to the bit)."""
    layers = lora_layers(model).values()
    scales = [layer.scaling[ADAPTER] for layer in layers]
    try:
        for layer in layers:
            layer.scaling[ADAPTER] = 0.0
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scaling[ADAPTER] = scale
