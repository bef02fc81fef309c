"""Planned memory against a real policy's, by hand for the paper's recipe; what is said when a run does not fit; lengths.

python -m pytest tests/plan/test_footprint.py
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from plan_helpers import on, planning_config, recipe, write_metrics
from tiny import make_rows, update
from transformers import LlamaConfig

from nanolapo.config import Config, UserError
from nanolapo.plan.cost import forecast
from nanolapo.plan.footprint import PAPER_TOKENS, changed, expect, host_memory, memory
from nanolapo.plan.machines import PUBLISHED, Machine, Shape, cpu_machine, load_shape, parse_machine
from nanolapo.policy import Policy
from nanolapo.reproduce.paper import paper_tables


def parts(config: Config, machine: Machine, phase: str = "update") -> dict[str, float]:
    return memory(config, load_shape(config.model.path), machine, expect(config))[phase]


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_training_state_is_that_of_a_real_policy(tied_model: Path, lora_rank: int) -> None:
    """Weights, gradients and Adam's moments after a real update, to the byte; step counts are Adam's, too."""
    config = planning_config(tied_model, model={"lora_rank": lora_rank}, loss={"kl_coef": 0.1})
    policy = Policy(config, torch.device("cpu"))
    rows = make_rows([3, 4, 5, 6])
    predicted = parts(config, cpu_machine(config))
    kept: dict[str, int] = {}
    policy.optimizer.register_step_pre_hook(
        lambda *_: kept.update(gradients=sum(p.grad.nbytes for p in policy.model.parameters() if p.grad is not None))
    )
    update(policy, rows, [1.0, -1.0, 1.0, -1.0])
    moments = sum(t.nbytes for s in policy.optimizer.state.values() for name, t in s.items() if name != "step")
    assert predicted["weights"] == sum(p.nbytes for p in policy.model.parameters())
    assert predicted["Adam"] == moments and predicted["gradients"] == kept["gradients"]
    own_reference = 0 if lora_rank else sum(p.nbytes for p in policy.reference.parameters())  # type: ignore[union-attr]
    assert predicted["reference"] == own_reference


def test_the_paper_recipe_fits_eight_h100() -> None:
    """Its state by hand, from the published 1,777,088,000 weights: 4 weights, 4 gradients, 8 Adam, 2 reference; 28,672
    bytes of cache a token (2 x 28 layers x 2 heads x 128 x 2 bytes)."""
    planned = on("8xH100-80GB")
    update, sampling = planned.memory_gb["update"], planned.memory_gb["sampling"]
    state = [update[name] for name in ("weights", "gradients", "Adam", "reference")]
    assert state == pytest.approx([7.108352, 7.108352, 14.216704, 3.554176])
    assert sampling["sampler"] + sampling["cache"] == pytest.approx(0.45 * 80)
    assert planned.cache_rows == pytest.approx(sampling["cache"] * 1e9 / 28_672 / 2700)
    assert planned.fits and planned.note.startswith("there is room for model.gradient_checkpointing=")
    assert planned.tokens_per_step == 1024 * 2500 and planned.steps == 234
    assert planned.gpu_hours == 8 * planned.hours
    assert "ESTIMATE" in "\n".join(planned.lines())


def test_host_memory_of_a_7b_model_by_hand() -> None:
    """Qwen2.5-7B on 8 GPUs: ddp loads eight whole float32 models, fsdp2 one; a reference that waits there is extra."""
    shape = Shape(3584, 28, 28, 4, 128, 18944, 152064, tied=False, bias=True)
    billions, gpus = shape.num_params / 1e9, parse_machine("8xH100-80GB", Config())
    assert billions == pytest.approx(7.6, abs=0.05)
    for sharding, models, reference in (("ddp", 8, 16), ("fsdp2", 1, 4)):
        config = Config()
        for key, value in (("sharding", sharding), ("offload_reference", True)):
            config = changed(config, f"model.{key}", value)
        config = changed(config, "loss.kl_coef", 0.1)
        host = {phase: size / 1e9 for phase, size in host_memory(config, shape, gpus).items()}
        assert host["loading"] == pytest.approx(4 * billions * models)
        assert host["saving"] == pytest.approx(8 * billions)
        assert host["reference"] == pytest.approx(reference * billions)
        assert host.keys() == {"loading", "saving", "reference"}  # a sleeping engine keeps nothing
    lines = [line for line in on("8xH100-80GB", "model.sharding=fsdp2").lines() if "host memory" in line]
    assert lines == ["  host memory       14.2 GB on all nodes together: loading 7.1, saving 14.2"]
    assert not any("host memory" in line for line in on("cpu").lines())


def test_slices_lora_and_offload_take_what_they_say() -> None:
    whole, cut = (on("8xH100-80GB", f"model.sharding={x}").memory_gb["update"] for x in ("ddp", "fsdp2"))
    for name in ("weights", "gradients", "Adam"):
        assert cut[name] == pytest.approx(whole[name] / 8)
    assert cut["reference"] == pytest.approx(whole["weights"] / 8)  # slices are float32, a whole one is cast
    assert on("8xH100-80GB", "model.offload_reference=true").memory_gb["update"]["reference"] == 0
    adapters = on("8xH100-80GB", "model.lora_rank=16")
    lora = PUBLISHED["DeepScaleR-1.5B-Preview"].lora_params(16)
    assert adapters.memory_gb["update"]["Adam"] == pytest.approx(8e-9 * lora)
    assert adapters.memory_gb["update"]["reference"] == 0
    assert adapters.disk_gb["checkpoints (2 and one being written)"] == pytest.approx(3 * 12e-9 * lora)


TOO_LARGE = [  # overrides that make it too large, the remedy
    (["model.gradient_checkpointing=false"], "set train.microbatch_tokens=8192"),
    (["model.gradient_checkpointing=false", "rollout.max_new_tokens=16000"], "set model.gradient_checkpointing=0.67"),
    (["rollout.gpu_memory_utilization=0.7"], "set rollout.gpu_memory_utilization=0.6"),
    (["rollout.gpu_memory_utilization=0.05"], "set rollout.gpu_memory_utilization=0.08"),
    (["rollout.gpu_memory_utilization=0.7", "model.gradient_checkpointing=false"],
     "set rollout.gpu_memory_utilization=0.6 train.microbatch_tokens=8192"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "remedy"), TOO_LARGE)
def test_what_does_not_fit_comes_with_a_remedy_that_works(overrides: list[str], remedy: str) -> None:
    planned = on("8xA100-80GB", *overrides)
    assert not planned.fits and planned.note == remedy
    assert any(line.strip().startswith("DOES NOT FIT") for line in planned.lines())
    assert on("8xA100-80GB", *overrides, *remedy.split()[1:]).fits


@pytest.mark.parametrize("machine", ["8xA100-80GB", "8xH200-141GB"])
def test_the_least_checkpointing_that_fits_is_said(machine: str) -> None:
    """It fits, one layer less does not, and nothing is said where nothing lower fits."""
    note = on(machine).note
    found = re.fullmatch(
        r"there is room for (\S+)=(\S+) \((\d+) of 28 layers\): a step would train in ([\d.]+) s", note
    )
    assert found
    key, share, layers, seconds = found[1], float(found[2]), int(found[3]), float(found[4])
    lower = on(machine, f"{key}={share}")
    assert lower.fits and lower.note == "" and recipe(f"{key}={share}").model.num_checkpointed(28) == layers < 28
    assert lower.train_seconds == pytest.approx(seconds, abs=0.06) and seconds < on(machine).train_seconds
    assert layers == 0 or not on(machine, f"{key}={(layers - 1) / 28}").fits


def test_what_cannot_fit_is_said(tmp_path: Path) -> None:
    giant = LlamaConfig(hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
                        intermediate_size=28672, vocab_size=128256)  # fmt: skip
    giant.save_pretrained(tmp_path)
    planned = on("1xH100-80GB", f"model.path={tmp_path}", "rollout.prompts_per_step=16")
    assert not planned.fits and planned.note.startswith("no setting makes it fit")


def test_lengths_are_given_or_measured_or_the_limit(tmp_path: Path) -> None:
    config = planning_config(tmp_path, rollout={"max_new_tokens": 100, "prompts_per_step": 4, "group_size": 2})
    assert (expect(config).answer, expect(config).trained) == (100, 8) and "limit" in expect(config).source
    assert expect(config, 30).answer == 30 and expect(config, 300).answer == 100
    write_metrics(config.run_dir, [40.0, 60.0], trained=200.0)
    with (config.run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "len')  # a kill in mid-line
    found = expect(config, prompt_tokens=7, extra_rows=2)
    assert (found.answer, found.trained, found.rows, found.prompt) == (50, 4, 10, 7)
    assert found.source == "mean of 2 earlier steps" and expect(config, 30).source == "given"
    twice = changed(config, "train.inner_epochs", 2)
    assert expect(twice).trained == 2  # trained_tokens counts each epoch


def test_a_token_limit_ends_the_run(tmp_path: Path, tied_model: Path) -> None:
    """8 rows of 64 tokens a step, and a limit of 2,000."""
    config = planning_config(tied_model, train={"sampled_tokens": 2000}, run={"dir": str(tmp_path / "runs")})
    assert forecast(config, cpu_machine(config), 64).steps == math.ceil(2000 / (8 * 64))


def test_the_papers_lengths_are_those_that_it_prints() -> None:
    table = paper_tables()[1]
    for base, name in (("A", "DeepSeek-R1-Distill-Qwen-1.5B"), ("B", "DeepScaleR-1.5B-Preview")):
        ends = [table.row(base, row).scores["MATH-500"].tokens for row in ("Base", "+LAPO-D")]
        assert PAPER_TOKENS[name] == sum(ends) / 2
    planned = on("8xH100-80GB", mean=None)
    assert planned.expected.answer == 2822.5 and "ESTIMATE from the paper" in planned.lines()[0]
    assert on("8xH100-80GB", "rollout.max_new_tokens=2000", mean=None).expected.answer == 2000


@pytest.mark.parametrize(("arguments", "name"), [((0, None), "--mean-tokens 0"), ((5, -1), "--prompt-tokens -1")])
def test_a_length_that_is_not_positive_is_refused(arguments: tuple[float, float | None], name: str) -> None:
    with pytest.raises(UserError, match=f"^{name}: give a number of tokens above 0$"):
        expect(Config(), *arguments)
