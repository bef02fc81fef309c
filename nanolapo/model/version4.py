"""Adds to a model folder the keys that transformers 4 reads, beside those that transformers 5 writes.

Without them version 4 takes its defaults for the rotary embedding and says nothing, and it does not know the tokenizer's
class. Nothing changes for version 5, which is asked before a key stays.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig


def add_version4_keys(folder: Path) -> None:
    """Add keys to config.json and tokenizer_config.json (if it is there)."""
    path = folder / "config.json"
    text = path.read_text(encoding="utf-8")
    config = json.loads(text)
    if config.get("rope_parameters"):
        before = AutoConfig.from_pretrained(folder).rope_parameters
        write(path, config | version4_keys(config) | {"torch_dtype": config.get("dtype")})
        if AutoConfig.from_pretrained(folder).rope_parameters != before:
            path.write_text(text, encoding="utf-8")
    path = folder / "tokenizer_config.json"
    if path.exists():
        tokenizer = json.loads(path.read_text(encoding="utf-8"))
        if tokenizer.get("tokenizer_class") == "TokenizersBackend":  # the same class: tokenizer.json as it is
            tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
        if isinstance(tokenizer.get("extra_special_tokens"), list):
            tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens")
        write(path, tokenizer)


def version4_keys(config: dict[str, Any]) -> dict[str, Any]:
    """Return version 4's names for the rotary embedding and the number of experts.

    >>> version4_keys({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}})["rope_theta"]
    5000.0
    """
    by_layer = config["rope_parameters"]
    rope = by_layer.get("full_attention") or by_layer
    theta, share = rope.get("rope_theta"), rope.get("partial_rotary_factor")
    if config.get("model_type") == "gpt_neox":
        keys = {"rotary_emb_base": theta, "rotary_pct": share}
    else:
        keys = {"rope_theta": theta, "partial_rotary_factor": share}
    if rope.get("rope_type", "default") != "default":
        keys["rope_scaling"] = {key: value for key, value in rope.items() if key not in keys}
    if by_layer.get("sliding_attention"):  # Gemma 3
        keys["rope_local_base_freq"] = by_layer["sliding_attention"].get("rope_theta")
    keys["num_experts"] = config.get("num_local_experts")
    return {key: value for key, value in keys.items() if value is not None}


def write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
