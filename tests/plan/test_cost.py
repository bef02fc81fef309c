"""Planned seconds, FLOPs and disk against an ideal machine by hand, a real update that torch counts, a real
checkpoint; that more work costs more; the command.
    python -m pytest tests/plan/test_cost.py
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plan_helpers import BASE, ROOT, on, planning_config
from tiny import fill, make_rows, tiny_qwen, update
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from nanolapo.checkpoint import save_checkpoint
from nanolapo.config import UserError
from nanolapo.microbatches import plan_microbatches
from nanolapo.model import attention
from nanolapo.plan import __main__ as planner
from nanolapo.plan.cost import Forecast, disk, sampling_seconds, training_flops
from nanolapo.plan.footprint import Expected, expect, prompt_share
from nanolapo.plan.machines import Machine, load_shape
from nanolapo.policy import Policy


def test_a_checkpoint_is_as_large_as_planned(tied_model: Path, tmp_path: Path) -> None:
    config = planning_config(tied_model, run={"keep_checkpoints": 1})
    policy = Policy(config, torch.device("cpu"))
    update(policy, make_rows([3, 4, 5, 6]), [1.0, -1.0, 1.0, -1.0])
    save_checkpoint(tmp_path, 1, policy, {"step": 1}, keep=1)
    written = sum(file.stat().st_size for file in (tmp_path / "step-000001").glob("*.safetensors"))
    planned = disk(config, load_shape(str(tied_model)), expect(config), steps=1)
    headers = 12_000  # names, shapes and step counts: much of so small a file
    assert planned["checkpoints (1 and one being written)"] / 2 * 1e9 == pytest.approx(written, abs=headers)
    assert planned["model"] * 1e9 == sum(p.nbytes for p in policy.model.parameters())


GPU = Machine("ideal", 4, 80e9, 1e12, 1e12, 1e9, 0.0, 0.0, 0.0, "ideal")


def expected(answer: float, prompt: float, rows: float = 8, longest: float | None = None) -> Expected:
    return Expected(answer, prompt, answer if longest is None else longest, rows, rows, "test")


def test_decode_seconds_of_an_ideal_machine(tied_model: Path) -> None:
    """By hand: 2 engines of 2 ranks; 4 rows each, 2 at a time: 2 x 10 / 1 = 20 steps, and 5 more for the longest answer."""
    config = planning_config(tied_model, rollout={"max_rows": 2, "engine": "vllm", "tensor_parallel": 2})
    shape = load_shape(str(tied_model))
    machine, e = replace(GPU, decode_flops=math.inf, flops=math.inf), expected(10, 6, longest=15)
    steps, active = 25, 4 * 10 / 25
    weights = sum(p.numel() for p in tiny_qwen().parameters() if p.ndim == 2)  # tied: the embedding is the head
    cache = 2 * 2 * 16  # keys and values, two layers, one key/value head of 16
    read = 4 * (weights + active * (6 + 5) * cache) / 2  # float32, half on each rank
    assert sampling_seconds(config, shape, machine, e) == pytest.approx(steps * read / 1e9)
    overheads = replace(machine, bandwidth=math.inf, step_s=0.5, layer_s=0.25, row_s=0.125)
    assert sampling_seconds(config, shape, overheads, e) == pytest.approx(steps * (0.5 + 2 * 0.25 + active * 0.125))
    computing = replace(machine, bandwidth=math.inf, decode_flops=1e6)
    assert sampling_seconds(config, shape, computing, e) == pytest.approx(steps * active * 2 * weights / 2 / 1e6)
    prompts = replace(machine, bandwidth=math.inf, flops=1e6)  # two groups an engine
    assert sampling_seconds(config, shape, prompts, e) == pytest.approx(2 * shape.layer_flops(6) / 1e6)


PASSES = [  # sections, forward passes of the layers, of the head (which is computed again in each backward pass)
    ({}, 3, 4),
    ({"train": {"batch_size": 2}}, 3.75, 4.75),  # old log-probs of the last three of four updates
    ({"train": {"batch_size": 2}, "loss": {"old_logprobs": "sampler"}}, 3, 4),
    ({"loss": {"kl_coef": 0.1}}, 4, 5),
    ({"train": {"inner_epochs": 3}, "loss": {"kl_coef": 0.1}}, 13, 16),
    ({"model": {"lora_rank": 2}}, 2, 3),
    ({"loss": {"mastered_mask": (0.2, 0.99), "old_logprobs": "sampler"}}, 4, 5),  # the entropies of all rows
    ({"method": {"name": "hapo_tokens:TokenHapo"}, "train": {"batch_size": 2}}, 4, 5),
]


@pytest.mark.parametrize(("sections", "layers", "head"), PASSES)
def test_forward_passes_of_an_update(tied_model: Path, sections: dict[str, Any], layers: float, head: float) -> None:
    config, shape, e = planning_config(tied_model, **sections), load_shape(str(tied_model)), expected(10, 6)
    flops = 8 * (layers * shape.layer_flops(10, 6, 0.5) + head * 10 * 2 * shape.head)
    assert training_flops(config, shape, e, share=0.5) == pytest.approx(flops)


class Counter(TorchDispatchMode):
    """FLOPs of every operation, as torch counts them. (FlopCounterMode itself cannot follow the head's own backward.)"""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        self.flops += count(*args, **(kwargs or {}), out_val=out) if count else 0
        return out


def written_out(query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
    heads = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(heads, dim=1), value.repeat_interleave(heads, dim=1)
    hidden = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).triu(key.shape[2] - query.shape[2] + 1)
    return (query @ key.mT * scaling).masked_fill(hidden, -torch.inf).softmax(dim=-1) @ value


@pytest.mark.parametrize("checkpointing", [False, 0.5, True])
@pytest.mark.parametrize(("batch_size", "epochs"), [(2, 2), (2, 1), (4, 2), (4, 1)])
@pytest.mark.parametrize("mask", [None, (0.2, 0.99)])
def test_a_real_update_takes_the_planned_flops(
    tied_model: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: float, batch_size: int, epochs: int, mask: Any
) -> None:
    """update_policy under torch's counter: several optimizer steps and epochs, reference, checkpointing, shared prompts,
    entropies. The counter cannot see into fused attention; written out, it is computed in full."""
    monkeypatch.setattr(attention, "attend", written_out)
    config = planning_config(
        tied_model,
        model={"gradient_checkpointing": checkpointing},
        rollout={"prompts_per_step": 2, "group_size": 2},
        train={"batch_size": batch_size, "inner_epochs": epochs},
        loss={"kl_coef": 0.1, "mastered_mask": mask},
    )
    answer, prompt, share = 7, 5, 0.5
    rows = make_rows([answer] * 4)
    prompts = [np.full(prompt, group + 1) for group in range(2)]
    fill(rows, prompt_ids=[prompts[row // 2] for row in range(4)])
    policy = Policy(config, torch.device("cpu"))
    with Counter() as counted:
        update(policy, rows, [1.0, -1.0, 1.0, -1.0])
    shape = load_shape(str(tied_model))
    half = shape.layer_flops(answer, prompt, share, causal=False) - shape.layer_flops(answer, prompt, share)
    passes = epochs * (4 + checkpointing) + (1 if mask or epochs == 2 else 1 - batch_size / 4)  # old log-probs
    planned = training_flops(config, shape, replace(expected(answer, prompt), trained=4), prompt_share(config, 1))
    assert counted.flops == planned + 4 * passes * half


def test_prompts_are_shared_as_the_rows_are_dealt(tied_model: Path) -> None:
    """Against plan_microbatches itself: 64 groups of 8 rows of random lengths, prompts of 5, on 1, 2, 4 and 8 ranks."""
    lengths = np.random.default_rng(0).integers(50, 150, 512)
    rows = make_rows(lengths.tolist(), group_size=8)
    prompts = [np.full(5, group) for group in range(64)]
    fill(rows, prompt_ids=[prompts[row // 8] for row in range(512)])
    config = planning_config(tied_model, rollout={"group_size": 8})
    for ranks in (1, 2, 4, 8):
        dealt = plan_microbatches(rows, range(512), ranks, token_budget=10**9)
        computed = sum(len({row // 8 for micro in share for row in micro}) for share in dealt)
        assert prompt_share(config, ranks) == pytest.approx(computed / 512, rel=0.05)


MORE = [  # overrides, then a larger value; what must grow
    ("train.microbatch_tokens=16384", "train.microbatch_tokens=32768", "activations"),
    ("rollout.max_new_tokens=2048", "rollout.max_new_tokens=4096", "sample_seconds"),
    ("rollout.prompts_per_step=64", "rollout.prompts_per_step=128", "train_seconds"),
    ("rollout.prompts_per_step=64", "rollout.prompts_per_step=128", "sample_seconds"),
    ("loss.kl_coef=0.0", "loss.kl_coef=1e-4", "train_seconds"),
    ("rollout.max_rows=256", "rollout.max_rows=16", "sample_seconds"),
    ("rollout.gpu_memory_utilization=0.3", "rollout.gpu_memory_utilization=0.5", "cache"),
    ("run.keep_checkpoints=2", "run.keep_checkpoints=3", "disk"),
]


@pytest.mark.parametrize(("less", "more", "what"), MORE)
def test_more_costs_more(less: str, more: str, what: str) -> None:
    def value(planned: Forecast) -> float:
        if what == "disk":
            return sum(planned.disk_gb.values())
        parts = planned.memory_gb["update"] | planned.memory_gb["sampling"]
        return parts[what] if what in parts else float(getattr(planned, what))

    assert value(on("8xH100-80GB", less, mean=2000)) < value(on("8xH100-80GB", more, mean=2000))


def test_longer_answers_and_slower_machines_take_longer() -> None:
    hours = [on("8xH100-80GB", mean=mean).hours for mean in (500, 1000, 2000, 4000)]
    assert hours == sorted(hours) and len(set(hours)) == 4
    kinds = ["8xH200-141GB", "8xH100-80GB", "8xA100-80GB", "4xA100-80GB"]
    assert [on(kind).hours for kind in kinds] == sorted(on(kind).hours for kind in kinds)
    assert on("4xA100-80GB").train_seconds == pytest.approx(2 * on("8xA100-80GB").train_seconds, rel=0.03)


def test_a_machine_that_the_prompts_do_not_divide_over_is_refused() -> None:
    with pytest.raises(UserError, match="rollout.prompts_per_step=128 does not divide over 3 samplers"):
        on("3xH100-80GB")


def test_the_command_prints_the_plan(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    config = str(ROOT / "configs/deepscaler-1.5b/stage2.yaml")
    arguments = [config, "--machine", "8xH200-141GB", f"model.path={BASE}", "--mean-tokens", "2500"]
    monkeypatch.setattr(sys, "argv", ["plan", *arguments])
    planner.main()
    printed = capsys.readouterr().out.splitlines()
    assert printed == on("8xH200-141GB").lines()
    assert len(printed) < 10
