"""Shapes against transformers' own models: weights, FLOPs that torch counts, tensors that autograd keeps; machines.

python -m pytest tests/test_machines.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from plan_helpers import planning_config
from tiny import make_config, tiny_llama
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from nanolapo.calibrate import calibrate
from nanolapo.config import UserError
from nanolapo.footprint import expect, fit
from nanolapo.lora import add_lora
from nanolapo.machines import Shape, cpu_machine, load_shape, parse_machine
from nanolapo.policy import token_logprobs

SHAPES = [  # hidden, layers, heads, key/value heads, intermediate
    (64, 2, 4, 2, 96),
    (64, 3, 4, 4, 160),
    (96, 2, 6, 1, 128),
]


def model_of(shape: tuple[int, ...], kind: str = "llama", tied: bool = False, **options: Any) -> PreTrainedModel:
    hidden, layers, heads, kv_heads, intermediate = shape
    torch.manual_seed(0)
    config_class, model_class = (LlamaConfig, LlamaForCausalLM) if kind == "llama" else (Qwen2Config, Qwen2ForCausalLM)
    return model_class(config_class(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=16,
        intermediate_size=intermediate, vocab_size=80, tie_word_embeddings=tied, **options,
    ))  # fmt: skip


def shape_of(model: PreTrainedModel, folder: Path) -> Shape:
    """As the planner sees it: config.json alone."""
    model.config.save_pretrained(folder)
    assert [file.name for file in folder.iterdir()] == ["config.json"]
    return load_shape(str(folder))


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("sizes", SHAPES)
def test_weights_are_those_of_the_real_model(tmp_path: Path, kind: str, tied: bool, sizes: tuple[int, ...]) -> None:
    model = model_of(sizes, kind, tied)
    shape = shape_of(model, tmp_path)
    assert shape.num_params == sum(p.numel() for p in model.parameters())
    layer = model.model.layers[0]
    assert shape.layer_weights == sum(p.numel() for p in layer.parameters() if p.ndim == 2)
    add_lora(model, rank=3, alpha=8)
    assert shape.lora_params(3) == sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)


@pytest.mark.parametrize("sizes", SHAPES)
def test_flops_are_those_that_torch_counts(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    """Forward, and forward plus backward, of layers and head. Eager attention computes all of the square, not half."""
    model = model_of(sizes, attn_implementation="eager")
    shape, rows, width, answer = shape_of(model, tmp_path), 2, 12, 5
    ids = torch.randint(80, (rows, width))
    with FlopCounterMode(display=False) as counted:
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    layers = rows * shape.layer_flops(width, causal=False)
    assert counted.get_total_flops() == layers
    head = rows * answer * 2 * shape.head
    with FlopCounterMode(display=False) as counted:
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        picked = hidden[:, -answer:].reshape(-1, shape.hidden)
        logprobs, _ = token_logprobs(picked, torch.zeros(len(picked), dtype=torch.long), model.lm_head, 1.0)
        logprobs.sum().backward()
    assert counted.get_total_flops() == 3 * (layers + head)


def test_causal_attention_is_counted_half() -> None:
    shape = Shape(64, 2, 4, 2, 16, 96, 80, tied=False)
    attention = shape.layer_flops(10, causal=False) - 2 * 2 * shape.layer_weights * 10
    assert shape.layer_flops(10, causal=False) - shape.layer_flops(10) == attention / 2 == 4 * 2 * 64 * 100 / 2


def saved_bytes(model: PreTrainedModel, ids: torch.Tensor, dtype: torch.dtype) -> int:
    """Bytes of all storages that autograd keeps for the backward pass of the layers, weights and their copies apart."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {tuple(s) for p in model.parameters() if p.ndim == 2 for s in (p.shape, p.shape[::-1])}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        is_copy = tensor.dtype == torch.bfloat16 and tuple(tensor.shape) in shapes
        if storage.data_ptr() not in weights and not is_copy:
            kept[storage.data_ptr()] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        model.model(input_ids=ids, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
@pytest.mark.parametrize("sizes", SHAPES)
def test_activations_are_what_autograd_keeps(
    tmp_path: Path, kind: str, dtype: torch.dtype, size: int, sizes: tuple[int, ...]
) -> None:
    ids = torch.randint(80, (3, 50))
    short, long = (model_of((sizes[0], layers, *sizes[2:]), kind) for layers in (2, 5))
    per_layer = (saved_bytes(long, ids, dtype) - saved_bytes(short, ids, dtype)) / 3
    assert shape_of(short, tmp_path).activation_bytes(size) * ids.numel() == per_layer


def test_checkpointing_keeps_one_float32_row_of_hidden_per_layer() -> None:
    ids = torch.randint(80, (3, 50))
    kept = []
    for layers in (2, 5):
        model = model_of((64, layers, 4, 2, 96)).train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        kept.append(saved_bytes(model, ids, torch.bfloat16))
    assert (kept[1] - kept[0]) / 3 == 4 * 64 * ids.numel()


@pytest.mark.parametrize("text", ["8xH300", "0xA100-80GB", "H100", "x", "", "8 x H100-80GB", "CPU8"])
def test_an_unknown_machine_is_one_line(text: str) -> None:
    with pytest.raises(
        UserError, match=r"^--machine .*: write cpu, or COUNTx and one of A100-80GB.*as in 8xH100-80GB$"
    ):
        parse_machine(text, make_config())


def test_a_model_that_is_not_there_or_not_known_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model.path='/no/such/model': .*run that writes it comes first"):
        load_shape("/no/such/model")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 8}))
    with pytest.raises(UserError, match="formulas are for llama and qwen2, not gpt2"):
        load_shape(str(tmp_path))
    tiny_llama().config.save_pretrained(tmp_path / "DeepScaleR-1.5B-Preview")
    assert load_shape(str(tmp_path / "DeepScaleR-1.5B-Preview")).hidden == 32  # a folder wins over the table
    assert load_shape("agentica-org/DeepScaleR-1.5B-Preview").num_params == 1_777_088_000


@pytest.mark.slow
def test_calibration_measures_this_machine(tied_model: Path) -> None:
    """Its speed must give back the time of a real micro-batch, and both must be of this machine's order."""
    config = planning_config(
        tied_model, train={"microbatch_tokens": 512}, rollout={"group_size": 8, "max_new_tokens": 24}
    )
    e = expect(config, 20, 10)
    machine = calibrate(config, cpu_machine(config), e)
    assert 1e6 < machine.flops < 1e13 and 1e-5 < machine.step_s + 32 * machine.row_s < 1
    assert "measured on this machine" in machine.source and machine.count == 1
    assert fit(config, load_shape(str(tied_model)), machine, e)
