"""The update alone, with each of its settings for speed: tokens/s, share of the peak, memory, kernels by kind.

Part `update` of gpu.py, which makes the model and calls `update_table`. Answers of 200 to 2,000 tokens, as in PERFORMANCE.
"""

from __future__ import annotations

import gc
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import memory_gb, table
from torch.profiler import ProfilerActivity, profile

SETTINGS: dict[str, dict[str, Any]] = {
    "as written, checkpointing": {"compile": False, "gradient_checkpointing": True},
    "compiled, checkpointing": {"compile": True, "gradient_checkpointing": True},
    "compiled, checkpointing in half of the layers": {"compile": True, "gradient_checkpointing": 0.5},
}
# Words in a kernel's name, on a CPU in an operator's. The first kind that has one of them counts, else it is elementwise.
KINDS = {
    "attention": ("flash", "fmha", "attention", "attn"),
    "products": ("gemm", "nvjet", "cutlass", "cublas", "::mm", "addmm", "bmm", "mkldnn_linear"),
    "copies": ("memcpy", "memset"),
}


def update_table(folder: Path, tiny: bool, peak_tflops: float) -> None:
    """Print a table and the profile by kind of each setting, as soon as it is measured."""
    head = ["update", "tokens/s", "share of the peak", "peak GB"]
    for name, model in SETTINGS.items():
        once, tokens, parameters = prepared(folder, tiny, model)
        once()  # compiles
        forget_peak()
        seconds = min(timed(once) for _ in range(1 if tiny else 2))
        share = f"{6 * parameters * tokens / seconds / peak_tflops / 1e12:.1%}"
        print(table([head, [name, tokens / seconds, share, peak_gb()]]), flush=True)  # a part may be cut before its end
        print(f"{name}: {by_kind(once)}", flush=True)
        del once
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def prepared(folder: Path, tiny: bool, model: dict[str, Any]) -> tuple[Callable[[], None], int, int]:
    """Return a whole update with optimizer step, its tokens (a group's prompt counts once), and the model's parameters."""
    from rows import make_config, make_rows

    from nanolapo.methods.base import Method
    from nanolapo.policy import Policy
    from nanolapo.ranks import Ranks
    from nanolapo.update import update_policy

    ranks, rows, longest = Ranks(), 8 if tiny else 128, 20 if tiny else 2000
    config = make_config(
        folder, model=model | {"dtype": "float32" if tiny else "bfloat16"}, rollout={"max_new_tokens": longest},
        train={"microbatch_tokens": 60 if tiny else 32_768, "learning_rate": 1e-6},
    )  # fmt: skip
    policy, method = Policy(config, ranks.device, ranks), Method(config)
    lengths = np.random.default_rng(0).integers(longest // 10, longest, rows, endpoint=True)
    rollouts = make_rows(lengths.tolist(), group_size=4 if tiny else 8)
    advantages = torch.tensor([1.0, -1.0] * (rows // 2))
    prompts = sum(len(prompt) for prompt in rollouts.prompt_ids[:: rollouts.group_size])

    def once() -> None:
        update_policy(policy, method, rollouts, advantages)

    return once, int(lengths.sum()) + prompts, sum(p.numel() for p in policy.model.parameters())


def timed(once: Callable[[], None]) -> float:
    started = time.perf_counter()
    once()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_gb() -> float:
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else memory_gb()


def kind_of(kernel: str) -> str:
    """The kind of a kernel's name.

    >>> [kind_of(x) for x in ("nvjet_sm90_tst_128x256", "flash_fwd_splitkv_kernel", "triton_poi_fused_mul_silu_4")]
    ['products', 'attention', 'elementwise']
    """
    lower = kernel.lower()
    return next((kind for kind, words in KINDS.items() if any(word in lower for word in words)), "elementwise")


def by_kind(once: Callable[[], None]) -> str:
    """Say each kind's share of the time of one update, and the share in which nothing ran. Profiling slows the host down:
    on a GPU the idle share is an upper bound. A CPU has no kernels, so its operators are counted instead."""
    on_gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as watched:
        total = timed(once)
    seconds: defaultdict[str, float] = defaultdict(float)
    for event in watched.key_averages():
        seconds[kind_of(event.key)] += (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
    shares = {kind: spent / total for kind, spent in seconds.items()} | {"idle": 1 - sum(seconds.values()) / total}
    return ", ".join(f"{kind} {share:.0%}" for kind, share in sorted(shares.items()))
