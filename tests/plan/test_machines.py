"""Shapes against transformers' own models: weights, FLOPs that torch counts, tensors that autograd keeps; machines.

python -m pytest tests/plan/test_machines.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from plan_helpers import planning_config
from tiny import fill, make_config, make_rows, tiny_llama
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from nanolapo.config import UserError
from nanolapo.microbatches import make_microbatch
from nanolapo.model import attention
from nanolapo.model.lora import add_lora
from nanolapo.plan.calibrate import calibrate
from nanolapo.plan.footprint import expect, fit
from nanolapo.plan.machines import Shape, cpu_machine, load_shape, parse_machine
from nanolapo.policy import Policy

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
def test_flops_of_the_layers_are_those_that_torch_counts(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    """transformers' own model; its eager attention computes all of the square, a causal kernel half of it."""
    model = model_of(sizes, attn_implementation="eager")
    shape, rows, width = shape_of(model, tmp_path), 2, 12
    with FlopCounterMode(display=False) as counted:
        model.model(input_ids=torch.randint(80, (rows, width)), use_cache=False)
    assert counted.get_total_flops() == rows * shape.layer_flops(width, causal=False)
    attention = (
        4 * sizes[1] * sizes[2] * 16 * width**2
    )  # query by query, key by key: two products of [width, width, 16]
    assert shape.layer_flops(width, causal=False) - shape.layer_flops(width) == attention / 2


def test_a_shared_prompt_saves_its_own_tokens_only(tmp_path: Path) -> None:
    """Prompt 5 and answer 7 are a sequence of 12; without the prompt's own part, 12 less a sequence of 5."""
    shape = shape_of(model_of(SHAPES[0]), tmp_path)
    whole = shape.layer_flops(12)
    assert shape.layer_flops(7, 5) == pytest.approx(whole)
    assert shape.layer_flops(7, 5, share=0) == pytest.approx(whole - shape.layer_flops(5))


def saved_bytes(folder: Path, dtype: str, group: int, checkpointing: float = False) -> int:
    """Bytes of all storages that autograd keeps in the real forward pass of three groups, weights apart."""
    model = {"dtype": dtype, "gradient_checkpointing": checkpointing}
    policy = Policy(planning_config(folder, model=model), torch.device("cpu"))
    rollouts = make_rows([ANSWER] * 3 * group, group)
    prompts = [np.full(PROMPT, g + 1) for g in range(3)]
    fill(rollouts, prompt_ids=[prompts[row // group] for row in range(3 * group)])
    weights = {p.untyped_storage().data_ptr() for m in (policy.model, policy.scorer) for p in m.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        policy.logprobs(make_microbatch(rollouts, range(3 * group), policy.device))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


PROMPT, ANSWER = 6, 17


def bytes_per_layer(folder: Path, sizes: tuple[int, ...], kind: str, *arguments: Any) -> tuple[Shape, float]:
    """What three layers more keep, a third of it."""
    saved = []
    for layers in (2, 5):
        model = model_of((sizes[0], layers, *sizes[2:]), kind)
        model.save_pretrained(folder / f"{layers}")
        saved.append(saved_bytes(folder / f"{layers}", *arguments))
    return load_shape(str(folder / "2")), (saved[1] - saved[0]) / 3


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("sizes", SHAPES)
def test_activations_are_what_autograd_keeps(
    tmp_path: Path, kind: str, dtype: str, size: int, group: int, sizes: tuple[int, ...]
) -> None:
    shape, measured = bytes_per_layer(tmp_path, sizes, kind, dtype, group)
    assert shape.activation_bytes(size, True, 3 * group, ANSWER, PROMPT, 1 / group) == pytest.approx(measured, abs=1e-6)


def test_on_a_gpu_attention_keeps_its_own_type_and_no_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's branch of attention.attend on a CPU: the mask that torch's CPU kernel is given is still there."""
    monkeypatch.setattr(attention, "attend", gpu_attend)
    shape, measured = bytes_per_layer(tmp_path, SHAPES[0], "llama", "bfloat16", 4)
    mask = 12 * ANSWER * (PROMPT + ANSWER) * 2  # bfloat16 here
    assert shape.activation_bytes(2, False, 12, ANSWER, PROMPT, 1 / 4) == pytest.approx(measured - mask, abs=1e-6)


def gpu_attend(query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
    mask: Tensor = causal_lower_right(query.shape[2], key.shape[2])
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True)


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_checkpointing_keeps_one_row_of_hidden_per_layer(tmp_path: Path, dtype: str, size: int) -> None:
    _, measured = bytes_per_layer(tmp_path, SHAPES[0], "llama", dtype, 4, True)
    assert measured == size * 64 * (12 * ANSWER + 3 * PROMPT)


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_a_share_of_the_layers_keeps_only_its_input(tmp_path: Path, dtype: str, size: int) -> None:
    """One, two, three and all of four layers: counted where autograd keeps them. The last one also frees what all layers
    share, the rotary cosines and sines."""
    hidden, _, *rest = SHAPES[0]
    model_of((hidden, 4, *rest)).save_pretrained(tmp_path)
    whole = load_shape(str(tmp_path)).activation_bytes(size, True, 12, ANSWER, PROMPT, 1 / 4)
    tokens = 12 * ANSWER + 3 * PROMPT
    every = saved_bytes(tmp_path, dtype, 4, False)
    for share, layers in ((0.25, 1), (0.5, 2), (0.51, 3), (1, 4), (True, 4)):
        less = layers * (whole - size * hidden * tokens) + (layers == 4) * 2 * size * 16 * tokens
        assert every - saved_bytes(tmp_path, dtype, 4, share) == pytest.approx(less, abs=1e-6), share


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
