"""Exports can be read by transformers 4 as well: it needs other keys, and without them computes other positions.

Run: python -m pytest tests/model/test_version4.py
What is expected here was checked with transformers 4.57.6: the logits of all these families agree. Without the keys they
are off by 0.7 to 11.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_llama
from tokenizers import AddedToken
from transformers import AutoConfig, AutoTokenizer

from nanolapo.demo.pretrain import make_tokenizer
from nanolapo.model.folder import save_model
from nanolapo.model.version4 import add_version4_keys

DEFAULT = {"rope_type": "default", "rope_theta": 5000.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 30000.0, "factor": 4.0, "original_max_position_embeddings": 128}
LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}
PARTIAL = DEFAULT | {"partial_rotary_factor": 0.5}


def scaling(rope: dict[str, Any]) -> dict[str, Any]:
    """Version 4 keeps the base beside the scaling, and warns about a key that it does not know in there."""
    return {key: value for key, value in rope.items() if key != "rope_theta"}


# model type: (rope parameters of version 5, keys that version 4 reads)
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": (LLAMA3, {"rope_theta": 500000.0, "rope_scaling": scaling(LLAMA3)}),
    "qwen2": (YARN, {"rope_theta": 30000.0, "rope_scaling": scaling(YARN)}),
    "qwen3": (DEFAULT, {"rope_theta": 5000.0}),
    "mistral": (LINEAR, {"rope_theta": 5000.0, "rope_scaling": scaling(LINEAR)}),
    "phi3": (PARTIAL, {"rope_theta": 5000.0, "partial_rotary_factor": 0.5}),
    "smollm3": (DEFAULT, {"rope_theta": 5000.0}),
    "olmo2": (DEFAULT, {"rope_theta": 5000.0}),
    "glm4": (PARTIAL, {"rope_theta": 5000.0, "partial_rotary_factor": 0.5}),
    "stablelm": (PARTIAL, {"rope_theta": 5000.0, "partial_rotary_factor": 0.5}),
    "starcoder2": (DEFAULT, {"rope_theta": 5000.0}),
    "gpt_neox": (PARTIAL, {"rotary_emb_base": 5000.0, "rotary_pct": 0.5}),
    "gemma3_text": (
        {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 777.0}},
        {"rope_theta": 5000.0, "rope_scaling": scaling(LINEAR), "rope_local_base_freq": 777.0},
    ),
}


def config_of(folder: Path, name: str = "config.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text())


@pytest.mark.parametrize("family", FAMILIES)
def test_both_versions_find_their_keys(family, tmp_path):
    rope, expected = FAMILIES[family]
    config = AutoConfig.for_model(family, num_hidden_layers=2, rope_parameters=json.loads(json.dumps(rope)))
    config.dtype = torch.bfloat16
    config.save_pretrained(tmp_path)
    plain = config_of(tmp_path)
    add_version4_keys(tmp_path)
    found = config_of(tmp_path)
    assert found == plain | expected | {"torch_dtype": "bfloat16"}
    assert "rope_scaling" in expected or not found.get("rope_scaling")
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.rope_parameters == config.rope_parameters and again.dtype == torch.bfloat16
    again.save_pretrained(tmp_path / "again")  # a model that is trained on
    add_version4_keys(tmp_path / "again")
    assert config_of(tmp_path / "again") == found


def test_a_mixture_of_experts_keeps_their_number(tmp_path):
    AutoConfig.for_model("qwen3_moe", num_experts=4).save_pretrained(tmp_path)
    add_version4_keys(tmp_path)
    assert config_of(tmp_path)["num_experts"] == 4 == AutoConfig.from_pretrained(tmp_path).num_experts


def test_a_config_without_rope_is_left_alone(tmp_path):
    AutoConfig.for_model("gpt2").save_pretrained(tmp_path)
    plain = config_of(tmp_path)
    add_version4_keys(tmp_path)
    assert config_of(tmp_path) == plain


def test_keys_that_version_5_would_read_otherwise_are_not_written(tmp_path):
    """Version 5 prefers rope_scaling. A family that reads it in its own way must not lose what it had."""
    nested = {"full_attention": dict(LINEAR), "sliding_attention": dict(DEFAULT)}
    layers = ["full_attention", "sliding_attention"]
    config = AutoConfig.for_model("qwen3", num_hidden_layers=2, layer_types=layers, rope_parameters=nested)
    config.save_pretrained(tmp_path)
    plain = config_of(tmp_path)
    add_version4_keys(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == nested and config_of(tmp_path) == plain


def test_the_tokenizer_of_an_export_names_a_class_of_both_versions(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<extra>", special=True)]})
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    model = tiny_llama(vocab=128, rope_parameters=dict(LLAMA3))
    save_model(model, torch.float32, tokenizer, tmp_path / "model")
    found = config_of(tmp_path / "model", "tokenizer_config.json")
    assert found["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert found["additional_special_tokens"] == ["<extra>"] and "extra_special_tokens" not in found
    again = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert type(again) is type(tokenizer) and again.get_vocab() == tokenizer.get_vocab()
    assert set(again.all_special_tokens) == set(tokenizer.all_special_tokens) and "<extra>" in again.all_special_tokens
    text = " A: 3+2=6 </think><extra>"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"] and again.chat_template == tokenizer.chat_template
    assert config_of(tmp_path / "model")["rope_scaling"] == scaling(LLAMA3)
