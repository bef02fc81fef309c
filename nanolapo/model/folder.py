"""A model as a Hugging Face folder: load it, name its weights, write it. It never runs pickle or code."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import cached_file

from nanolapo.config import UserError
from nanolapo.model.lora import lora_layers, merged_delta
from nanolapo.model.sharding import gather_full, to_host
from nanolapo.model.version4 import add_version4_keys

NO_FOLDER = "no such folder; the run that writes it comes first (the demo's models: make demo)"


def must_be_local(path: str) -> bool:
    """Return True if `path` cannot be a hub name (organisation/name): it has more slashes, or an existing first folder.

    >>> [must_be_local(path) for path in ("runs/base", "./base", "../base", "/base", "a/b/c", "someone/base", "base")]
    [True, True, True, True, True, False, False]
    """
    first, slash, _ = path.partition("/")
    return path.count("/") > 1 or (bool(slash) and (first == "runs" or Path(first).is_dir()))


def load_tokenizer(path: str, key: str = "model.path") -> PreTrainedTokenizerBase:
    """Load a tokenizer, tokenizer.json as it is if there is one. Raises UserError naming the config's key if there is none.

    AutoTokenizer would take only the vocabulary from tokenizer.json and rebuild the rest as the class in config.json or
    tokenizer_config.json does it. Where that is another kind, blanks or the whole text vanish.
    """
    if must_be_local(path) and not Path(path).exists():  # the hub would be asked for a minute without a network
        raise UserError(f"{key}={path!r}: {NO_FOLDER}")
    try:
        kind = PreTrainedTokenizerFast if file_of(path, "tokenizer.json") else AutoTokenizer
        return kind.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # a damaged file raises anything: KeyError, TypeError, tokenizers' bare Exception
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{key}={path!r}: no tokenizer to be had there ({first}); without a network give a local folder"
        ) from None


def file_of(path: str, name: str) -> Path | None:
    """Return the path of a model's file on this machine, fetched from the hub if need be; None if the model has none."""
    found = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def read_settings(path: str, key: str) -> tuple[PreTrainedConfig, GenerationConfig | None]:
    """Read config.json and generation_config.json. Raises UserError if there is no config, or an end token is no
    id of the model."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        has_generation = file_of(path, "generation_config.json") is not None
        generation = GenerationConfig.from_pretrained(path) if has_generation else None
    except Exception as error:  # a damaged file raises anything, see load_tokenizer
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{key}={path!r}: no config.json or a damaged generation_config.json there ({first}); give a Hugging Face "
            "model folder or a hub name"
        ) from None
    size = getattr(config.get_text_config(), "vocab_size", math.inf)
    sources = (config, "config.json"), (config.get_text_config(), "config.json"), (generation, "generation_config.json")
    for source, file in sources:
        ends = getattr(source, "eos_token_id", None)
        listed = ends if isinstance(ends, list) else [ends] if ends else []
        if not all(type(end) is int and 0 <= end < size for end in listed):
            raise UserError(
                f"{key}={path!r}: eos_token_id={ends!r} in {file} is no token id below the model's vocab_size={size} and "
                "no list of them; mend that key"
            )
    drop_default_ends(config, generation, path)
    return config, generation


def drop_default_ends(config: PreTrainedConfig, generation: GenerationConfig | None, path: str) -> None:
    """Forget, in place, an end token that config.json does not name, if generation_config.json names one.

    It is the default of the config's class (LlamaConfig: 2) and may be a word of this model. An export would write it down.
    """
    if getattr(generation, "eos_token_id", None) in (None, []):
        return
    raw, _ = PreTrainedConfig.get_config_dict(path)
    for part, given in ((config, raw), (config.get_text_config(), raw.get("text_config") or raw)):
        if "eos_token_id" not in given and hasattr(part, "eos_token_id"):
            part.eos_token_id = None


def load_model(path: str, device: torch.device, key: str = "model.path") -> PreTrainedModel:
    """Load a causal LM in float32 from a local folder or by hub name. Raises UserError naming the config's key.

    On the device "meta" its tensors have names and shapes, but no values are read.
    """
    local = Path(path)
    if not path or (local.exists() and not (local / "config.json").exists()):
        raise UserError(f"{key}={path!r}: no config.json there; give a Hugging Face model folder or a hub name")
    try:
        on = "meta" if device.type == "meta" else None
        model: Any = read_model(path, f"{key}={path!r}", dtype=torch.float32, device_map=on)
    except UserError:
        raise
    except Exception as error:  # these libraries raise anything: ImportError for a quantised folder, KeyError, ...
        first = f"{type(error).__name__}: {error}".splitlines()[0]
        missing = "no such local folder, and not to be had from the hub; without a network give a local folder"
        source = "cannot be loaded" if local.exists() else missing
        raise UserError(f"{key}={path!r}: {source} ({first})") from None
    disable_dropout(model)
    drop_default_ends(model.config, model.generation_config, path)
    return model.to(device)


def read_model(path: str, name: str, **options: Any) -> PreTrainedModel:
    """Read a causal LM as its files have it. Raises UserError, with `name` in front, if they lack a weight, which would be
    random, or if they have a head of its own for a model that ties it, which vLLM would not read."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(  # safetensors only: a pickle file could run code
        path, trust_remote_code=False, use_safetensors=True, output_loading_info=True, **options
    )
    model, missing = loaded[0], loaded[1]["missing_keys"]
    if missing:
        raise UserError(f"{name}: the files lack {len(missing)} weights of the model, such as {min(missing)}; "
                        "fetch or save the model again")  # fmt: skip
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    if getattr(model.config, "tie_word_embeddings", False) and not head.is_meta and head is not embedding:
        raise UserError(f"{name}: config.json says that the output embedding is the input embedding, but the files have "
                        "two that differ; set tie_word_embeddings to false in config.json")  # fmt: skip
    return model


def disable_dropout(model: nn.Module) -> None:
    """Switch dropout off, in place. It would make old and new log-probs differ by chance."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in [name for name, value in vars(module).items() if "dropout" in name and isinstance(value, float)]:
            setattr(module, name, 0.0)


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder's layers in their order, whatever a kind of model calls them."""
    return [module for module in model.get_decoder().modules() if isinstance(module, GradientCheckpointingLayer)]


def named_weights(model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, full tensor) of every parameter and saved buffer, with the names of a saved checkpoint.

    A tied head appears once, under the embedding's name; samplers that keep two copies must fill both. Slices are gathered
    one tensor at a time, and LoRA matrices are added in. All ranks must iterate in lockstep.

    dtype: of the tensors; None leaves them as they are. Slices are cast before they are gathered, so that ranks send and
    hold half of the bytes. Rounding goes number by number, so the order changes nothing. But a sum is rounded once, at
    its end: weights with a LoRA are gathered in float32.
    """
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    adapters = {f"{plain_name(name)}.base_layer.weight": layer for name, layer in lora_layers(model).items()}
    for name, tensor in model.state_dict().items():
        plain = plain_name(name)
        if plain in tied or ".lora_" in plain:
            continue
        adapter = adapters.get(plain)
        full = gather_full(tensor.detach() if dtype is None or adapter else tensor.detach().to(dtype))
        if adapter:
            full = full + merged_delta(adapter)
        yield plain.replace(".base_layer.", "."), full if dtype is None else full.to(dtype)


def plain_name(name: str) -> str:
    """Remove what torch.compile and activation-checkpoint wrappers add to a name."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def save_model(
    model: PreTrainedModel, dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase, folder: Path, is_main: bool = True
) -> None:
    """Write a plain Hugging Face folder, complete or not at all. The model's float32 weights are stored as `dtype`.

    transformers (4 and 5) and vLLM load the folder as it is. A tied head is stored once, as transformers expects. All ranks
    must call this; the main rank writes.
    """
    state = to_host(named_weights(model, dtype), keep=is_main)
    if not is_main:
        return
    write_whole(model, state, dtype, tokenizer, folder)


def write_whole(
    model: PreTrainedModel,
    state: dict[str, Tensor],
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
) -> None:
    """Write weights, config, generation config and tokenizer under a temporary name, and publish the folder. Without a
    `state` it has all but the weights. Raises UserError if the disk does not take it."""
    temporary, config = folder.with_name(folder.name + ".tmp"), copy.deepcopy(model.config)
    shutil.rmtree(temporary, ignore_errors=True)
    config.dtype = dtype  # model.save_pretrained writes float32, the masters' dtype
    try:
        model.save_pretrained(temporary, state_dict=state)
        config.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        add_version4_keys(temporary)
        publish(temporary, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"{folder}: could not be written ({error}); free some disk and run the same command") from None


def publish(temporary: Path, folder: Path) -> None:
    """Give a folder that is complete its final name, in place of an older one. A kill never leaves half of one there.

    Its files get the mode that the umask asks for. safetensors writes 0600, which nobody else could read.
    """
    probe = temporary / ".mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in [*temporary.rglob("*"), temporary]:
        if path.is_file():  # folders have their mode from the umask already, and need x
            path.chmod(mode)
        sync(path)
    older = folder.with_name(f"{folder.name}.old.tmp")
    if older.exists():  # of a killed process
        shutil.rmtree(older)
    if folder.exists():
        folder.rename(older)  # a kill must not leave half of it under its final name
    temporary.rename(folder)
    sync(folder.parent)
    shutil.rmtree(older, ignore_errors=True)  # what is still open over a network may stay until the next time


def position_limit(config: PreTrainedConfig) -> int | None:
    """Return the longest sequence, in tokens, that a model was made for; None if its config names no limit.

    >>> from transformers import LlamaConfig, MambaConfig
    >>> yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    >>> position_limit(LlamaConfig(max_position_embeddings=512, rope_scaling=yarn)), position_limit(MambaConfig())
    (2048, None)
    """
    text = config.get_text_config()
    limit, rope = getattr(text, "max_position_embeddings", None), getattr(text, "rope_parameters", None) or {}
    if not limit:
        return None
    kind = rope.get("rope_type")  # a dict by kind of layer has no kind itself, and its limit is already the long one
    if kind == "yarn":
        limit = max(limit, rope.get("original_max_position_embeddings", limit) * rope["factor"])
    elif kind in ("linear", "dynamic"):
        limit *= rope["factor"]
    return int(limit)


def settings_of(config: PreTrainedConfig) -> dict[str, str]:
    """A config's settings as text, without those that say how and by what it was written."""
    kept = {k: v for k, v in config.to_dict().items() if k not in ("dtype", "transformers_version", "architectures")}
    return {name: json.dumps(value, sort_keys=True, default=str) for name, value in kept.items() if name[0] != "_"}


def sync(path: Path) -> None:
    """Flush a file or folder to disk, so that a rename cannot become visible before the contents."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
