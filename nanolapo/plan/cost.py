"""Forecasts what a run needs: memory per GPU, seconds per step, hours and disk from a config and a machine.

    python -m nanolapo.plan CONFIG.yaml ...   (__main__.py)

Memory is footprint.py. Training is counted in FLOPs: 2 per weight and token forward, twice that backward (the "6 N D" of
Kaplan et al., arXiv 2001.08361, section 2.1), and attention. Sampling: every decode step reads all weights, and the cached
keys and values of its rows, once (Pope et al., arXiv 2211.05102, section 2).

GPU rates (machines.py) are data-sheet figures times the shares that were measured on one H100 with one shape: for any
other machine they are ESTIMATES, and printed as such. CPU rates are measured: on our machine, or with --calibrate on
this one (calibrate.py). Left out, each a few percent: grading, weight sync, all-reduce, optimizer step, checkpoints,
skewed lengths. Of dynamic sampling only the first round is counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nanolapo.config import Config
from nanolapo.config_file import validate
from nanolapo.methods import load_method
from nanolapo.methods.base import Method
from nanolapo.plan.footprint import (
    Expected,
    bytes_of,
    cache_rows,
    changed,
    expect,
    fit,
    host_memory,
    least_checkpointing,
    memory,
    prompt_share,
    remedy,
    uses_vllm,
)
from nanolapo.plan.machines import Machine, Shape, load_shape
from nanolapo.samplers.torch_sampler import REPACK

LOG_PER_STEP, LOG_PER_ROW, LOG_PER_TOKEN = 1200, 350, 4  # bytes of metrics.jsonl; of rollouts.jsonl


@dataclass(frozen=True)
class Forecast:
    """What a run will need on a machine. `lines` prints it."""

    machine: Machine
    expected: Expected
    memory_gb: dict[str, dict[str, float]]  # phase (update, sampling) -> part -> GB per rank
    fits: bool
    cache_rows: float  # answers of mean length with their prompts that fit into an engine's cache
    tokens_per_step: float  # sampled
    trained_tokens: float  # per step; a prompt that a group shares counts once
    sample_seconds: float  # per step
    train_seconds: float  # per step
    steps: int
    disk_gb: dict[str, float]
    host_gb: dict[str, float]  # phase -> GB of all nodes together, see host_memory; empty on a CPU
    note: str  # what to change if it does not fit, or what there is room for; mostly ""

    @property
    def hours(self) -> float:
        return self.steps * (self.sample_seconds + self.train_seconds) / 3600

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.machine.count

    def lines(self) -> list[str]:
        """Return the forecast for people, one line a fact."""
        m, e = self.machine, self.expected
        prompts = f"prompts of {e.prompt:,.0f} ({e.prompt_source})"
        lines = [f"forecast for {m.name}: answers of {e.answer:,.0f} tokens ({e.source}), {prompts}"]
        for phase, parts in self.memory_gb.items():
            total = f"{sum(parts.values()):.1f} of {m.memory / 1e9:.0f} GB a rank"
            lines.append(f"  {phase + ' memory':<17} {total}: {listed(parts)}")
        if phases := {phase: gb for phase, gb in self.host_gb.items() if phase != "reference"}:
            most = max(phases.values()) + self.host_gb["reference"]
            lines.append(f"  {'host memory':<17} {most:.1f} GB on all nodes together: {listed(self.host_gb)}")
        unit = "CPU" if m.is_cpu else "GPU"
        trained = f"{self.trained_tokens:,.0f} trained in {self.train_seconds:,.1f} s"
        return [
            *lines,
            f"  {'fits' if self.fits else 'DOES NOT FIT':<17} the sampler's cache holds {self.cache_rows:,.0f} answers",
            f"  {'a step':<17} {self.tokens_per_step:,.0f} tokens sampled in {self.sample_seconds:,.1f} s, {trained}",
            f"  {f'{self.steps} steps':<17} {self.hours:,.2f} hours, {self.gpu_hours:,.2f} {unit}-hours; {m.source}",
            f"  {'disk':<17} {sum(self.disk_gb.values()):,.2f} GB: {listed(self.disk_gb)}",
            *([f"  {self.note}"] if self.note else []),
        ]


def listed(parts: dict[str, float]) -> str:
    return ", ".join(f"{name} {gb:.1f}" if gb >= 1 else f"{name} {gb:.2f}" for name, gb in parts.items() if gb >= 0.005)


def forecast(
    config: Config,
    machine: Machine,
    mean_tokens: float | None = None,
    prompt_tokens: float | None = None,
    extra_rows: float = 0.0,
) -> Forecast:
    """Forecast a run. extra_rows: sampled in a mean step by a method's monitor pass. Raises UserError."""
    validate(config, machine.count)
    shape, e = load_shape(config.model.path), expect(config, mean_tokens, prompt_tokens, extra_rows)
    steps, tokens = config.train.steps, e.rows * e.answer
    fits, share = fit(config, shape, machine, e), prompt_share(config, machine.count)
    if limit := config.train.sampled_tokens:
        steps = min(steps, math.ceil(limit / tokens))
    phases = memory(config, shape, machine, e)
    return Forecast(
        machine=machine,
        expected=e,
        memory_gb={phase: {name: size / 1e9 for name, size in parts.items()} for phase, parts in phases.items()},
        fits=fits,
        cache_rows=cache_rows(config, shape, machine, e),
        tokens_per_step=tokens,
        trained_tokens=e.trained * (e.answer + share * e.prompt),
        sample_seconds=sampling_seconds(config, shape, machine, e),
        train_seconds=training_seconds(config, shape, machine, e, share),
        steps=steps,
        disk_gb=disk(config, shape, e, steps),
        host_gb={} if machine.is_cpu else {k: x / 1e9 for k, x in host_memory(config, shape, machine).items()},
        note=roomier(config, shape, machine, e, share) if fits else remedy(config, shape, machine, e),
    )


def roomier(config: Config, shape: Shape, machine: Machine, e: Expected, share: float) -> str:
    """Say which lower model.gradient_checkpointing fits as well, and what it saves; "" if none does."""
    least = least_checkpointing(config, shape, machine, e)
    if least is None or least >= config.model.gradient_checkpointing:
        return ""
    lower = changed(config, "model.gradient_checkpointing", least)
    seconds = training_seconds(lower, shape, machine, e, share)
    layers = f"{lower.model.num_checkpointed(shape.layers)} of {shape.layers} layers"
    return (
        f"there is room for model.gradient_checkpointing={least:g} ({layers}): a step would train in {seconds:,.1f} s"
    )


def training_seconds(config: Config, shape: Shape, machine: Machine, e: Expected, share: float) -> float:
    return training_flops(config, shape, e, share) / machine.count / machine.flops


def training_flops(config: Config, shape: Shape, e: Expected, share: float) -> float:
    """Count the FLOPs of one step on all ranks, in forward passes; a backward pass is two (one under LoRA: frozen weights
    have no gradient). share: of the prompts that are computed, see prompt_share.

    Further forward passes: the reference model for a KL term; once per step the old log-probs, with several optimizer
    steps (with one epoch not of the first one's rows), or entropies, for a loss that needs them; the head, on answers only,
    again in every backward pass (model/logprobs.py); the layers again under gradient checkpointing, except their last
    product (the recomputation stops before it, because its result is not needed).
    """
    updates = config.optimizer_steps_per_step
    several = updates > 1 and config.loss.old_logprobs == "trainer"
    passes, epochs = (2 if config.model.lora_rank else 3) + bool(config.loss.kl_coef), config.train.inner_epochs
    layers, head = shape.layer_flops(e.answer, e.prompt, share), 2.0 * shape.head * e.answer
    last = 2.0 * shape.layers * shape.intermediate * shape.hidden * (e.answer + share * e.prompt)
    again = epochs * config.model.num_checkpointed(shape.layers) / shape.layers * (layers - last)
    needs_entropy = load_method(config, default=Method).loss.needs_entropy
    scored = 1.0 if needs_entropy else several * (1 - (epochs == 1) / updates)
    return e.trained * ((epochs * passes + scored) * layers + again + (epochs * (passes + 1) + scored) * head)


def sampling_seconds(config: Config, shape: Shape, machine: Machine, e: Expected) -> float:
    """Estimate the seconds of one step: all decode steps of an engine, and its prompts, each read once for its group.

    C rows are decoded at once; a waiting row takes the place of one that ends. So R rows of mean length n take R n / C
    decode steps, and while the last ones finish, as many more as the longest answer exceeds the mean.
    """
    r = config.rollout
    rows = math.ceil(e.rows * r.tensor_parallel / machine.count)
    at_once = min(rows, r.max_rows)
    if uses_vllm(config, machine):
        at_once = max(1, min(at_once, int(cache_rows(config, shape, machine, e))))
    steps = rows * e.answer / at_once + e.longest - e.answer
    active, context = rows * e.answer / steps, e.prompt + e.answer / 2
    if not uses_vllm(config, machine):
        active /= 1 - REPACK / 2  # rows that have ended stay until they are REPACK of all
    numbers = (shape.matrices + active * context * shape.cache_per_token) / r.tensor_parallel
    read = bytes_of(r.dtype or config.model.dtype) * numbers / machine.bandwidth
    computed = active * 2 * shape.matrices / r.tensor_parallel / machine.decode_flops
    step = machine.step_s + machine.layer_s * shape.layers + machine.row_s * active + max(read, computed)
    return steps * step + rows / r.group_size * shape.layer_flops(e.prompt) / machine.flops


def disk(config: Config, shape: Shape, e: Expected, steps: int) -> dict[str, float]:
    """Estimate GB by part: float32 weights and Adam's two moments in each kept checkpoint and the one being written."""
    trained = shape.lora_params(config.model.lora_rank) or shape.num_params
    rows = min(config.run.log_rollouts, config.rollouts_per_step)
    logs = steps * (LOG_PER_STEP + rows * (LOG_PER_ROW + LOG_PER_TOKEN * e.answer))
    kept = config.run.keep_checkpoints
    return {
        f"checkpoints ({kept} and one being written)": 12e-9 * trained * (kept + 1),
        "model": bytes_of(config.model.dtype) * shape.num_params / 1e9,
        "logs": logs / 1e9,
    }
