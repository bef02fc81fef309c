"""A model as a Hugging Face folder: load it, name its weights, write it. It never runs pickle or code."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from nanolapo.config import UserError
from nanolapo.model.lora import lora_layers, merged_delta
from nanolapo.model.sharding import gather_full, to_host

NO_FOLDER = "no such folder; the run that writes it comes first (the demo's models: make demo)"


def must_be_local(path: str) -> bool:
    """Return True if `path` cannot be a hub name (organisation/name): it has more slashes, or an existing first folder.

    >>> [must_be_local(path) for path in ("runs/base", "./base", "../base", "/base", "a/b/c", "someone/base", "base")]
    [True, True, True, True, True, False, False]
    """
    first, slash, _ = path.partition("/")
    return path.count("/") > 1 or (bool(slash) and (first == "runs" or Path(first).is_dir()))


def load_tokenizer(path: str, key: str = "model.path") -> PreTrainedTokenizerBase:
    """Load a tokenizer. Raises UserError naming the config's key if there is none."""
    if must_be_local(path) and not Path(path).exists():  # the hub would be asked for a minute without a network
        raise UserError(f"{key}={path!r}: {NO_FOLDER}")
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # a damaged file raises anything: KeyError, TypeError, tokenizers' bare Exception
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{key}={path!r}: no tokenizer to be had there ({first}); without a network give a local folder"
        ) from None


def load_model(path: str, device: torch.device, key: str = "model.path") -> PreTrainedModel:
    """Load a causal LM in float32 from a local folder or by hub name. Raises UserError naming the config's key."""
    local = Path(path)
    if not path or (local.exists() and not (local / "config.json").exists()):
        raise UserError(f"{key}={path!r}: no config.json there; give a Hugging Face model folder or a hub name")
    try:  # safetensors only: a pickle file could run code
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        missing = "no such local folder, and not to be had from the hub; without a network give a local folder"
        source = "cannot be loaded" if local.exists() else missing
        raise UserError(f"{key}={path!r}: {source} ({first})") from None
    model, info = loaded
    if info["missing_keys"]:
        raise UserError(f"{key}={path!r}: the files lack {len(info['missing_keys'])} weights of the model, such as "
                        f"{min(info['missing_keys'])}; fetch or save the model again")  # fmt: skip
    disable_dropout(model)
    return model.to(device)


def disable_dropout(model: nn.Module) -> None:
    """Switch dropout off, in place. It would make old and new log-probs differ by chance."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]


def compile_token_wise(model: PreTrainedModel) -> None:
    """Compile, in place, the layers that treat every token alone: MLPs and norms, which serve any number of tokens.
    Attention depends on the rows of each micro-batch, and is already one fused kernel per row."""
    for name, module in model.get_decoder().named_modules():
        if name.rsplit(".", 1)[-1] in ("mlp", "input_layernorm", "post_attention_layernorm"):
            module.compile(dynamic=True)


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, full tensor) of every parameter and saved buffer, with the names of a saved checkpoint.

    A tied head appears once, under the embedding's name; samplers that keep two copies must fill both. Slices are gathered
    one tensor at a time, and LoRA matrices are added in. All ranks must iterate in lockstep.
    """
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    adapters = {f"{plain_name(name)}.base_layer.weight": layer for name, layer in lora_layers(model).items()}
    for name, tensor in model.state_dict().items():
        plain = plain_name(name)
        if plain in tied or ".lora_" in plain:
            continue
        full = gather_full(tensor.detach())
        if plain in adapters:
            full = full + merged_delta(adapters[plain])
        yield plain.replace(".base_layer.", "."), full


def plain_name(name: str) -> str:
    """Remove what torch.compile and activation-checkpoint wrappers add to a name."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def save_model(
    model: PreTrainedModel, dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase, folder: Path, is_main: bool = True
) -> None:
    """Write a plain Hugging Face folder, complete or not at all. The model's float32 weights are stored as `dtype`.

    transformers and vLLM load the folder as it is. A tied head is stored once, as transformers expects. All ranks must call
    this; the main rank writes.
    """
    state = to_host(((name, tensor.to(dtype)) for name, tensor in named_weights(model)), keep=is_main)
    if not is_main:
        return
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    config = copy.deepcopy(model.config)
    config.dtype = dtype  # model.save_pretrained writes float32, the masters' dtype
    try:
        model.save_pretrained(temporary, state_dict=state)
        config.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"{folder}: could not be written ({error}); free some disk and run the same command") from None
    for path in [*temporary.iterdir(), temporary]:
        sync(path)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def sync(path: Path) -> None:
    """Flush a file or folder to disk, so that a rename cannot become visible before the contents."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
