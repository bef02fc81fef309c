"""Planned seconds, FLOPs and disk against an ideal machine by hand, a real update that torch counts, a real
checkpoint; that more work costs more; the command.
    python -m pytest tests/test_plan.py
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from plan_helpers import BASE, ROOT, on, planning_config
from tiny import make_rows, tiny_qwen, update
from torch.utils.flop_counter import FlopCounterMode

from nanolapo import plan as planner
from nanolapo.checkpoint import save_checkpoint
from nanolapo.config import UserError
from nanolapo.footprint import Expected, expect
from nanolapo.machines import Machine, load_shape
from nanolapo.plan import Plan, disk, sampling_seconds, training_flops
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


PASSES = [  # sections, forward passes of the layers, of the head
    ({}, 3, 3),
    ({"train": {"batch_size": 2}}, 4, 4),  # old log-probs
    ({"train": {"batch_size": 2}, "loss": {"old_logprobs": "sampler"}}, 3, 3),
    ({"loss": {"kl_coef": 0.1}}, 4, 4),
    ({"train": {"inner_epochs": 3}, "loss": {"kl_coef": 0.1}}, 13, 13),
    ({"model": {"lora_rank": 2}}, 2, 2),
]


@pytest.mark.parametrize(("sections", "layers", "head"), PASSES)
def test_forward_passes_of_an_update(tied_model: Path, sections: dict[str, Any], layers: int, head: int) -> None:
    config, shape, e = planning_config(tied_model, **sections), load_shape(str(tied_model)), expected(10, 6)
    flops = 8 * (layers * shape.layer_flops(16) + head * 10 * 2 * shape.head)
    assert training_flops(config, shape, GPU, e) == pytest.approx(flops)


def test_a_real_update_takes_the_planned_flops(tied_model: Path) -> None:
    """update_policy under torch's counter: several optimizer steps, reference, checkpointing, logits in chunks."""
    sections: dict[str, dict[str, Any]] = {
        "model": {"gradient_checkpointing": True}, "train": {"batch_size": 2, "inner_epochs": 2}, "loss": {"kl_coef": 0.1},
    }  # fmt: skip
    config, rows = planning_config(tied_model, **sections), make_rows([7, 7, 7, 7])
    rows.prompt_ids = [rows.prompt_ids[0]] * 4
    policy = Policy(config, torch.device("cpu"))
    policy.model.set_attn_implementation("eager")
    policy.reference.model.set_attn_implementation("eager")  # type: ignore[union-attr]
    with FlopCounterMode(display=False) as counted:
        update(policy, rows, [1.0, -1.0, 1.0, -1.0])
    shape, width = load_shape(str(tied_model)), 7 + len(rows.prompt_ids[0])
    e = replace(expected(7, width - 7), trained=4)
    planned = training_flops(config, shape, GPU, e)
    planned += 4 * (2 * 5 + 1) * (shape.layer_flops(width, causal=False) - shape.layer_flops(width))  # eager attention
    assert counted.get_total_flops() == planned


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
    def value(planned: Plan) -> float:
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
    assert on("4xA100-80GB").train_seconds == pytest.approx(2 * on("8xA100-80GB").train_seconds)


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
