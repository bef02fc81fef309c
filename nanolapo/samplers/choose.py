"""Chooses the sampler of a run: vLLM if it is installed, else the torch sampler (`rollout.engine`)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from transformers import AutoConfig

from nanolapo.config import GUIDANCE_ROOM, Config, UserError
from nanolapo.ranks import Ranks
from nanolapo.samplers.sampler import Sampler
from nanolapo.samplers.torch_sampler import TorchSampler, torch_objection
from nanolapo.samplers.vllm_fit import vllm_objection


def pick_engine(config: Config) -> str:
    """Return rollout.engine with `auto` resolved: vllm if it is installed, else torch."""
    if config.rollout.engine != "auto":
        return config.rollout.engine
    return "vllm" if importlib.util.find_spec("vllm") else "torch"


def check_engine(config: Config) -> None:
    """Raise UserError if the sampler of this training run cannot hold the model and take over its weights.

    The other sampler is named as the remedy only if that one can. No weights are read."""
    path = config.model.path
    try:
        kind = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError):
        return  # load_model tells what is wrong with the folder
    if pick_engine(config) == "torch":
        reason, remedy = torch_objection(kind), "set rollout.engine=vllm (`make vllm` installs it)"
        also = vllm_objection(kind, path) if reason and Path(path).is_dir() else None  # no download just to give advice
    else:
        reason, remedy, also = vllm_objection(kind, path), "set rollout.engine=torch", torch_objection(kind)
    if reason and also:
        remedy = f"{also}; take a model of a kind that docs/MODELS.md lists, such as llama, qwen2, qwen3 or mistral"
    if reason:
        raise UserError(f"model.path={path!r}: {reason}; {remedy}")


def make_sampler(config: Config, model_path: str, max_new_tokens: int, ranks: Ranks, trains: bool = True) -> Sampler:
    """Make the engine of this rank, holding the weights of `model_path`.

    trains: False if no trainer shares the memory or reads log-probs. Then vLLM neither sleeps nor records them.
    """
    r = config.rollout
    dtype = getattr(torch, r.dtype or config.model.dtype)
    if pick_engine(config) == "torch":
        if r.engine == "auto" and ranks.is_main:
            print("rollouts: vLLM is not installed, using the torch sampler; `make vllm` installs vLLM")
        try:
            sampler = TorchSampler(model_path, dtype, ranks.device, max_rows=r.max_rows)
        except UserError:
            raise
        except Exception as error:  # in evaluation these weights are loaded here first; see load_model
            raise UserError(f"{model_path}: the model cannot be loaded ({str(error).strip()[:200]})") from None
        if config.model.compiled_on(ranks.device.type):
            for layer in sampler.model.model.layers:  # what treats every token alone, for any number of tokens
                for part in (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp):
                    part.compile(dynamic=True)
        return sampler
    from nanolapo.samplers.vllm_sampler import VLLMSampler

    return VLLMSampler(
        model_path, dtype, max_model_len=r.max_prompt_tokens + GUIDANCE_ROOM + max_new_tokens, max_rows=r.max_rows,
        gpu_memory_utilization=r.gpu_memory_utilization, tensor_parallel=r.tensor_parallel,
        seed=config.run.seed, trains=trains,
    )  # fmt: skip
