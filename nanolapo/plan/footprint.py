"""Estimates the memory of a step: expected lengths, bytes per rank by part, whether they fit, and what to change if not.

Training state (policy.py), all float32: 4 bytes for a weight; for a trained weight 4 more for its gradient and 8 for Adam's
moments; 4 for a weight of the reference. Under model.sharding=fsdp2 a rank has a slice of each.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from nanolapo.config import Config, UserError
from nanolapo.model.logprobs import CPU_LOGITS, GPU_LOGITS
from nanolapo.plan.machines import Machine, Shape
from nanolapo.report.files import read_metrics
from nanolapo.samplers.choose import pick_engine
from nanolapo.samplers.vllm_sampler import cpu_cache

LOGIT_COPIES = 4  # live float32 copies of a block of logits: raw, tempered, softmax or gradient, its cast
GPU_RUNTIME, VLLM_RUNTIME = 3e9, 2e9  # ESTIMATES, bytes: CUDA, NCCL, fragmentation; vLLM's activations and graphs
CPU_RUNTIME, CPU_VLLM = 0.5e9, 1e9  # measured, bytes: a process before it has a model, and what vLLM adds
LONGEST = 2.5  # the longest answer of a step over the mean: 1.3 to 3.2 on average in 14 runs of the demo and of SmolLM2
PROMPT_TOKENS = 200  # ESTIMATE, for unknown prompts
# Table 1 of LAPO's paper (paper.yaml), MATH-500: midway between the base, where training starts, and LAPO-D, where it ends
PAPER_TOKENS = {"DeepSeek-R1-Distill-Qwen-1.5B": (4031 + 2566) / 2, "DeepScaleR-1.5B-Preview": (3280 + 2365) / 2}


@dataclass(frozen=True)
class Expected:
    """What a step samples and trains: tokens, means over rows."""

    answer: float
    prompt: float
    longest: float  # answer of a step
    rows: float  # sampled in a step, on all ranks
    trained: float  # the rows of config.rollouts_per_step whose group gives a signal
    source: str  # of `answer` and `trained`
    prompt_source: str = "given"

    @property
    def width(self) -> float:
        return self.prompt + self.answer


def expect(
    config: Config, mean_tokens: float | None = None, prompt_tokens: float | None = None, extra_rows: float = 0
) -> Expected:
    """Return the expected lengths: those given, else of earlier steps of this run, else the paper's, else the limit.

    Raises UserError for numbers that are not positive.
    """
    for name, value in (("--mean-tokens", mean_tokens), ("--prompt-tokens", prompt_tokens)):
        if value is not None and value <= 0:
            raise UserError(f"{name} {value:g}: give a number of tokens above 0")
    limit, rows = config.rollout.max_new_tokens, config.rollouts_per_step
    mean, trained, source = float(limit), float(rows), "the limit: an upper bound"
    steps = read_metrics(config.run_dir)
    if mean_tokens:
        mean, source = min(mean_tokens, limit), "given"
    elif steps:
        mean = max(1.0, sum(step["length"] for step in steps) / len(steps))
        tokens = sum(step["trained_tokens"] for step in steps) / len(steps) / config.train.inner_epochs
        trained, source = min(rows, tokens / mean), f"mean of {len(steps)} earlier steps"
    elif (name := config.model.path.rsplit("/", 1)[-1]) in PAPER_TOKENS:
        mean, source = min(limit, PAPER_TOKENS[name]), "ESTIMATE from the paper's Table 1"
    prompt, prompt_source = float(min(config.rollout.max_prompt_tokens, PROMPT_TOKENS)), "ESTIMATE"
    if prompt_tokens:
        prompt, prompt_source = prompt_tokens, "given"
    return Expected(mean, prompt, min(limit, LONGEST * mean), rows + extra_rows, trained, source, prompt_source)


def uses_vllm(config: Config, machine: Machine) -> bool:
    """True if vLLM samples. `auto` on a GPU counts as vllm, whether it is installed here or not."""
    return (pick_engine(config) if machine.is_cpu else config.rollout.engine) != "torch"


def bytes_of(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else 4


def prompt_share(config: Config, ranks: int) -> float:
    """Return computed prompts per row. A rank computes a prompt once for all its rows of the group (microbatches.py). If G
    rows are dealt to N ranks, a rank gets at least one with probability 1 - (1 - 1/N)^G.

    >>> prompt_share(Config(), 1), round(prompt_share(Config(), 8), 2)
    (0.125, 0.66)
    """
    size = config.rollout.group_size
    return ranks * (1 - (1 - 1 / ranks) ** size) / size


def memory(config: Config, shape: Shape, machine: Machine, e: Expected) -> dict[str, dict[str, float]]:
    """Bytes per rank, phase -> part -> bytes. On a GPU the sampler sleeps during the update; on a CPU it stays.

    copies: under ddp the bf16 copy (model/precision.py); under fsdp2 embedding, head, two layers, whole.
    activations: those of all layers (only the inputs of layers that compute theirs again), and the gradients of one layer.
    The backward pass frees the last layer's before it computes the first ones' again. Compiled layers keep less, which is
    not counted. head: a block of logits, under fsdp2 also its gradient as summed and as handed over.
    """
    m, size = config.model, bytes_of(config.model.dtype)
    cut = machine.count if m.sharding == "fsdp2" else 1
    lora = shape.lora_params(m.lora_rank)
    n, trained = shape.num_params + lora, lora or shape.num_params
    reference = shape.num_params * (4 / cut if cut > 1 else size)
    at_hand = config.loss.kl_coef and not lora and (machine.is_cpu or not m.offload_reference)
    state = {"weights": 4 * n / cut, "Adam": 8 * trained / cut, "reference": reference if at_hand else 0.0}
    together = shape.head * (2 - shape.tied) + 2 * shape.layer_weights
    state["copies"] = size * together if cut > 1 else n * size * (size == 2)
    share, tokens = prompt_share(config, machine.count), microbatch_tokens(config, machine, e)
    rows = tokens / (e.answer + share * e.prompt)
    layer = shape.activation_bytes(size, machine.is_cpu, rows, e.answer, e.prompt, share)
    again = m.num_checkpointed(shape.layers)
    whole = shape.layers - again + 1  # layers, with the gradients of the one that the backward pass is in
    logits = CPU_LOGITS if machine.is_cpu else GPU_LOGITS
    update = {
        "gradients": 4 * trained / cut,
        "activations": again * tokens * size * shape.hidden + max(whole, 2 if again else 1) * layer,
        "head": 4 * LOGIT_COPIES * min(logits, tokens * shape.vocab) + (size + 4) * shape.head * (cut > 1 and not lora),
    }
    sampler = sampler_memory(config, shape, machine, e)
    if machine.is_cpu:  # torch's cache lives only while it samples
        update |= sampler if uses_vllm(config, machine) else {"sampler": sampler["sampler"]}
    runtime = {"runtime": CPU_RUNTIME if machine.is_cpu else GPU_RUNTIME}
    return {"update": state | update | runtime, "sampling": state | sampler | runtime}


def host_memory(config: Config, shape: Shape, machine: Machine) -> dict[str, float]:
    """Bytes of host memory on all nodes together beside a GPU: phase -> bytes. Phases do not add up, but `reference`, which
    stays there, belongs to each.

    loading: one float32 model on the main rank under fsdp2 (model/spread.py), one on every rank under ddp. saving: Adam's
    moments on the main rank (checkpoint.py). vLLM's engines keep nothing there while they sleep.
    """
    m, split = config.model, config.model.sharding == "fsdp2" and machine.count > 1
    size, lora = bytes_of(m.dtype), shape.lora_params(m.lora_rank)
    kept = config.loss.kl_coef and m.offload_reference and not lora
    return {
        "loading": 4.0 * shape.num_params * (1 if split else machine.count),
        "saving": 8.0 * (lora or shape.num_params),
        "reference": shape.num_params * (4.0 if split else float(size * machine.count)) if kept else 0.0,
    }


def sampler_weights(config: Config, shape: Shape) -> float:
    """Bytes of the sampler's weights on each rank."""
    return bytes_of(config.rollout.dtype or config.model.dtype) * shape.num_params / config.rollout.tensor_parallel


def microbatch_tokens(config: Config, machine: Machine, e: Expected) -> float:
    """Tokens of the largest micro-batch. It holds at least one row, and at most this rank's part of an optimizer batch."""
    rows = math.ceil((config.train.batch_size or config.rollouts_per_step) / machine.count)
    all_rows = rows * (e.answer + prompt_share(config, machine.count) * e.prompt)
    one_row = e.prompt + config.rollout.max_new_tokens
    return max(one_row, min(config.train.microbatch_tokens, all_rows))


def sampler_memory(config: Config, shape: Shape, machine: Machine, e: Expected) -> dict[str, float]:
    """Bytes of the sampler while it is awake. On a GPU vLLM fills its part of the memory with cache."""
    r = config.rollout
    weights = sampler_weights(config, shape)
    if not uses_vllm(config, machine):
        rows = min(r.max_rows, math.ceil(e.rows / machine.count))
        logits = 20 * shape.vocab  # float32 logits, log-probs and probabilities, float64 sums
        return {
            "sampler": weights,
            "cache": rows * ((e.prompt + r.max_new_tokens) * cache_bytes(config, shape) + logits),
        }
    if machine.is_cpu:
        return {
            "sampler": weights + CPU_VLLM,
            "cache": cpu_cache(cache_bytes(config, shape), r.max_rows, r.longest_row),
        }
    share = r.gpu_memory_utilization * machine.memory
    return {"sampler": weights + VLLM_RUNTIME, "cache": share - weights - VLLM_RUNTIME}


def cache_bytes(config: Config, shape: Shape) -> float:
    """Bytes of cache for one token, on each rank of an engine."""
    size = bytes_of(config.rollout.dtype or config.model.dtype)
    return size * shape.cache_per_token / config.rollout.tensor_parallel


def cache_rows(config: Config, shape: Shape, machine: Machine, e: Expected) -> float:
    """Return how many answers of mean length, with their prompts, fit into an engine's cache."""
    cache = sampler_memory(config, shape, machine, e)["cache"]
    return max(0.0, cache) / (cache_bytes(config, shape) * e.width)


def fit(config: Config, shape: Shape, machine: Machine, e: Expected) -> bool:
    """True if both phases fit and vLLM's cache holds at least one answer."""
    phases = memory(config, shape, machine, e)
    room = not uses_vllm(config, machine) or phases["sampling"]["cache"] >= one_answer(config, shape)
    return room and all(sum(parts.values()) <= machine.memory for parts in phases.values())


def one_answer(config: Config, shape: Shape) -> float:
    """Bytes of cache for the longest prompt with the longest answer; vLLM refuses to start with less."""
    return config.rollout.longest_row * cache_bytes(config, shape)


def remedy(config: Config, shape: Shape, machine: Machine, e: Expected) -> str:
    """Name the one key that makes the run fit, or else the first few keys that do so together."""
    candidates = list(changes(config, shape, machine, e))
    for key, value in candidates:
        if fit(changed(config, key, value), shape, machine, e):
            return f"set {key}={json.dumps(value)}"
    together = config
    for number, (key, value) in enumerate(candidates, start=1):
        together = changed(together, key, value)
        if fit(together, shape, machine, e):
            return "set " + " ".join(f"{key}={json.dumps(value)}" for key, value in candidates[:number])
    return "no setting makes it fit: take a smaller model, GPUs with more memory, or more of them with model.sharding=fsdp2"


def least_checkpointing(config: Config, shape: Shape, machine: Machine, e: Expected) -> float | None:
    """Return the smallest share of layers for model.gradient_checkpointing that fits, in hundredths; None if all do not."""
    for layers in range(shape.layers + 1):
        share = math.floor(100 * layers / shape.layers) / 100  # num_checkpointed rounds up
        if fit(changed(config, "model.gradient_checkpointing", share), shape, machine, e):
            return share
    return None


def changes(config: Config, shape: Shape, machine: Machine, e: Expected) -> Iterator[tuple[str, Any]]:
    """Yield keys that may help, each with a value. Those that cost the least time come first."""
    r, m, t, vllm = config.rollout, config.model, config.train, uses_vllm(config, machine)
    if vllm and not machine.is_cpu:
        parts, share = memory(config, shape, machine, e)["sampling"], r.gpu_memory_utilization
        others = sum(bytes for name, bytes in parts.items() if name not in ("sampler", "cache"))
        least = math.ceil(100 * (parts["sampler"] + one_answer(config, shape)) / machine.memory) / 100
        most = math.floor(100 * (1 - others / machine.memory)) / 100
        if least <= most and not least <= share <= most:
            yield "rollout.gpu_memory_utilization", most if share > most else least
    one_row = math.ceil(e.prompt + r.max_new_tokens)
    if t.microbatch_tokens > 2 * one_row:
        yield "train.microbatch_tokens", max(one_row, t.microbatch_tokens // 4)
    if m.gradient_checkpointing < 1:
        enough = least_checkpointing(config, shape, machine, e)
        yield "model.gradient_checkpointing", True if enough is None else enough
    if machine.count > 1 and m.sharding != "fsdp2":
        yield "model.sharding", "fsdp2"
    if config.loss.kl_coef and not m.offload_reference and not machine.is_cpu:
        yield "model.offload_reference", True
    if not vllm and r.max_rows > 64:
        yield "rollout.max_rows", 64
    if not m.lora_rank:
        yield "model.lora_rank", 16


def changed(config: Config, key: str, value: Any) -> Config:
    section, name = key.split(".")
    return replace(config, **{section: replace(getattr(config, section), **{name: value})})
