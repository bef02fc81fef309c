"""Measures the speeds that cost.py otherwise assumes, with the run's own model, trainer and sampler, on this machine.

It times a micro-batch forward and backward, and some decode steps, on random ids, and writes nothing. This takes about a
minute for a 135 M model on a CPU. Each time is the fastest of a few tries, because other work only adds time.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from nanolapo.config import Config
from nanolapo.data.problems import Problem
from nanolapo.microbatches import make_microbatch
from nanolapo.plan.cost import training_flops
from nanolapo.plan.footprint import Expected, changed, microbatch_tokens
from nanolapo.plan.machines import Machine, Shape, load_shape
from nanolapo.policy import Policy
from nanolapo.ranks import Ranks
from nanolapo.rollouts import make_rollouts
from nanolapo.samplers.choose import make_sampler
from nanolapo.samplers.sampler import Decoding, Request, Sample
from nanolapo.session import set_up_process

TRIES = 2
SHORT, LONG = 4, 24  # new tokens of two timed samplings; prompts and set-up cancel in the difference


def calibrate(config: Config, machine: Machine, e: Expected) -> Machine:
    """Return `machine` with the rates measured in this process. Raises UserError where model.path has no weights."""
    shape, ranks = load_shape(config.model.path), set_up_process(config)
    flops = training_rate(config, shape, machine, e, ranks)
    prompt = round(e.prompt + e.answer / 2)  # the mean context of a decode step
    sampler: Any = make_sampler(config, config.model.path, prompt + LONG, ranks)
    sampler.end_ids = sampler.end_ids[:0]  # random prompts must not end a row early
    many = min(config.rollout.max_rows, max(2, round(e.rows / machine.count)))
    few = max(1, many // 4)
    slow, fast = (decode_seconds(sampler, shape.vocab, prompt, rows) for rows in (many, few))
    sampler.close()
    row_s = max(0.0, slow - fast) / (many - few)
    return replace(
        machine, flops=flops, decode_flops=float("inf"), bandwidth=float("inf"), layer_s=0.0, row_s=row_s,
        step_s=slow - many * row_s, source="speed measured on this machine",
    )  # fmt: skip


def training_rate(config: Config, shape: Shape, machine: Machine, e: Expected, ranks: Ranks) -> float:
    """Measure FLOP/s of a forward and backward pass of one full micro-batch."""
    config = changed(changed(changed(config, "loss.kl_coef", 0.0), "train.batch_size", 0), "train.inner_epochs", 1)
    policy = Policy(config, ranks.device, ranks)
    prompt, answer = round(e.prompt), round(e.answer)
    rows = max(1, int(microbatch_tokens(config, machine, e) // (prompt + answer)))
    rng = np.random.default_rng(0)  # every row has another prompt: nothing is shared
    problem = Problem("0", "", "", None, "")
    requests = [Request(rng.integers(shape.vocab, size=prompt).tolist(), 0, answer, problem) for _ in range(rows)]
    samples = [Sample(rng.integers(shape.vocab, size=answer), np.zeros(answer, np.float32), True) for _ in range(rows)]
    rollouts = make_rollouts(requests, samples, 1)
    micro = make_microbatch(rollouts, range(rows), ranks.device)
    tries = []
    for _ in range(TRIES):
        start = clock()
        policy.logprobs(micro)[0].sum().backward()
        tries.append(clock() - start)
    return training_flops(config, shape, replace(e, trained=rows), share=1.0) / min(tries)


def decode_seconds(sampler: Any, vocab: int, prompt: int, rows: int) -> float:
    """Measure the seconds of a decode step of this many rows, each after `prompt` tokens."""
    seconds: dict[int, list[float]] = {SHORT: [], LONG: []}
    for number in range(TRIES):
        for new in seconds:
            ids = np.random.default_rng([number, new]).integers(vocab, size=prompt).tolist()
            requests = [Request(ids, row, new) for row in range(rows)]  # one prompt for all: read once
            start = clock()
            sampler.generate(requests, Decoding())
            seconds[new].append(clock() - start)
    return max(0.0, min(seconds[LONG]) - min(seconds[SHORT])) / (LONG - SHORT)


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
