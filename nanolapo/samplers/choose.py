"""Chooses the sampler of a run: vLLM if it is installed, else the torch sampler (`rollout.engine`)."""

from __future__ import annotations

import importlib.util

import torch
from safetensors import SafetensorError

from nanolapo.config import Config, UserError
from nanolapo.model.folder import compile_token_wise
from nanolapo.ranks import Ranks
from nanolapo.samplers.sampler import Sampler

GUIDANCE_ROOM = 64  # tokens kept free for a method's guidance beyond rollout.max_prompt_tokens


def pick_engine(config: Config) -> str:
    """Return rollout.engine with `auto` resolved: vllm if it is installed, else torch."""
    if config.rollout.engine != "auto":
        return config.rollout.engine
    return "vllm" if importlib.util.find_spec("vllm") else "torch"


def make_sampler(config: Config, model_path: str, max_new_tokens: int, ranks: Ranks, trains: bool = True) -> Sampler:
    """Make the engine of this rank, holding the weights of `model_path`.

    trains: False if no trainer shares the memory or reads log-probs. Then vLLM neither sleeps nor records them.
    """
    r = config.rollout
    dtype = getattr(torch, r.dtype or config.model.dtype)
    if pick_engine(config) == "torch":
        from nanolapo.samplers.torch_sampler import TorchSampler

        if r.engine == "auto" and ranks.is_main:
            print("rollouts: vLLM is not installed, using the torch sampler; `make vllm` installs vLLM")
        try:
            sampler = TorchSampler(model_path, dtype, ranks.device, max_rows=r.max_rows)
        except (OSError, ValueError, SafetensorError) as error:  # in evaluation these weights are loaded here first
            raise UserError(f"{model_path}: the model cannot be loaded ({str(error).strip()[:200]})") from None
        if config.model.compile:
            compile_token_wise(sampler.model)
        return sampler
    from nanolapo.samplers.vllm_sampler import VLLMSampler

    return VLLMSampler(
        model_path, dtype, max_model_len=r.max_prompt_tokens + GUIDANCE_ROOM + max_new_tokens, max_rows=r.max_rows,
        gpu_memory_utilization=r.gpu_memory_utilization, tensor_parallel=r.tensor_parallel,
        seed=config.run.seed, trains=trains,
    )  # fmt: skip
