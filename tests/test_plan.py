"""The planner against transformers' own models (weights, saved tensors, counted FLOPs), this repository's own objects and
hand arithmetic; the times of an idealised machine; that more work costs more; what is said when a run does not fit.

    python -m pytest tests/test_plan.py
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_config, make_rows, tiny_llama, tiny_qwen, update
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from nanolapo import plan as planner
from nanolapo.calibrate import calibrate
from nanolapo.checkpoint import save_checkpoint
from nanolapo.config import Config, UserError
from nanolapo.config_file import load_config
from nanolapo.footprint import Expected, changed, expect, fit, memory
from nanolapo.lora import add_lora
from nanolapo.machines import PUBLISHED, Machine, Shape, cpu_machine, load_shape, parse_machine
from nanolapo.plan import Plan, disk, plan, sampling_seconds, training_flops
from nanolapo.policy import Policy, token_logprobs

ROOT = Path(__file__).parents[1]
BASE = "agentica-org/DeepScaleR-1.5B-Preview"
SHAPES = [  # hidden, layers, heads, key/value heads, intermediate
    (64, 2, 4, 2, 96),
    (64, 3, 4, 4, 160),
    (96, 2, 6, 1, 128),
]


def model_of(shape: tuple[int, ...], kind: str = "llama", tied: bool = False, **options: Any) -> PreTrainedModel:
    hidden, layers, heads, kv_heads, intermediate = shape
    torch.manual_seed(0)
    config_class, model_class = (LlamaConfig, LlamaForCausalLM) if kind == "llama" else (Qwen2Config, Qwen2ForCausalLM)
    return model_class(config_class(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=16,
        intermediate_size=intermediate, vocab_size=80, tie_word_embeddings=tied, **options,
    ))  # fmt: skip


def shape_of(model: PreTrainedModel, folder: Path) -> Shape:
    """As the planner sees it: config.json alone."""
    model.config.save_pretrained(folder)
    assert [file.name for file in folder.iterdir()] == ["config.json"]
    return load_shape(str(folder))


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("sizes", SHAPES)
def test_weights_are_those_of_the_real_model(tmp_path: Path, kind: str, tied: bool, sizes: tuple[int, ...]) -> None:
    model = model_of(sizes, kind, tied)
    shape = shape_of(model, tmp_path)
    assert shape.num_params == sum(p.numel() for p in model.parameters())
    layer = model.model.layers[0]
    assert shape.layer_weights == sum(p.numel() for p in layer.parameters() if p.ndim == 2)
    add_lora(model, rank=3, alpha=8)
    assert shape.lora_params(3) == sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)


@pytest.mark.parametrize("sizes", SHAPES)
def test_flops_are_those_that_torch_counts(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    """Forward, and forward plus backward, of layers and head. Eager attention computes all of the square, not half."""
    model = model_of(sizes, attn_implementation="eager")
    shape, rows, width, answer = shape_of(model, tmp_path), 2, 12, 5
    ids = torch.randint(80, (rows, width))
    with FlopCounterMode(display=False) as counted:
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    layers = rows * shape.layer_flops(width, causal=False)
    assert counted.get_total_flops() == layers
    head = rows * answer * 2 * shape.head
    with FlopCounterMode(display=False) as counted:
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        picked = hidden[:, -answer:].reshape(-1, shape.hidden)
        logprobs, _ = token_logprobs(picked, torch.zeros(len(picked), dtype=torch.long), model.lm_head, 1.0)
        logprobs.sum().backward()
    assert counted.get_total_flops() == 3 * (layers + head)


def test_causal_attention_is_counted_half() -> None:
    shape = Shape(64, 2, 4, 2, 16, 96, 80, tied=False)
    attention = shape.layer_flops(10, causal=False) - 2 * 2 * shape.layer_weights * 10
    assert shape.layer_flops(10, causal=False) - shape.layer_flops(10) == attention / 2 == 4 * 2 * 64 * 100 / 2


def saved_bytes(model: PreTrainedModel, ids: torch.Tensor, dtype: torch.dtype) -> int:
    """Bytes of all storages that autograd keeps for the backward pass of the layers, weights and their copies apart."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {tuple(s) for p in model.parameters() if p.ndim == 2 for s in (p.shape, p.shape[::-1])}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        is_copy = tensor.dtype == torch.bfloat16 and tuple(tensor.shape) in shapes
        if storage.data_ptr() not in weights and not is_copy:
            kept[storage.data_ptr()] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        model.model(input_ids=ids, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
@pytest.mark.parametrize("sizes", SHAPES)
def test_activations_are_what_autograd_keeps(
    tmp_path: Path, kind: str, dtype: torch.dtype, size: int, sizes: tuple[int, ...]
) -> None:
    ids = torch.randint(80, (3, 50))
    short, long = (model_of((sizes[0], layers, *sizes[2:]), kind) for layers in (2, 5))
    per_layer = (saved_bytes(long, ids, dtype) - saved_bytes(short, ids, dtype)) / 3
    assert shape_of(short, tmp_path).activation_bytes(size) * ids.numel() == per_layer


def test_checkpointing_keeps_one_float32_row_of_hidden_per_layer() -> None:
    ids = torch.randint(80, (3, 50))
    kept = []
    for layers in (2, 5):
        model = model_of((64, layers, 4, 2, 96)).train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        kept.append(saved_bytes(model, ids, torch.bfloat16))
    assert (kept[1] - kept[0]) / 3 == 4 * 64 * ids.numel()


def config_on(folder: Path, **sections: dict[str, Any]) -> Config:
    return make_config(folder, **({"run": {"dir": str(folder / "runs")}} | sections))


def parts(config: Config, machine: Machine, phase: str = "update") -> dict[str, float]:
    return memory(config, load_shape(config.model.path), machine, expect(config))[phase]


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_training_state_is_that_of_a_real_policy(tied_model: Path, lora_rank: int) -> None:
    """Weights, gradients and Adam's moments after a real update, to the byte; step counts are Adam's, too."""
    config = config_on(tied_model, model={"lora_rank": lora_rank}, loss={"kl_coef": 0.1})
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


def test_a_checkpoint_is_as_large_as_planned(tied_model: Path, tmp_path: Path) -> None:
    config = config_on(tied_model, run={"keep_checkpoints": 1})
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
    config = config_on(tied_model, rollout={"max_rows": 2, "engine": "vllm", "tensor_parallel": 2})
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
    config, shape, e = config_on(tied_model, **sections), load_shape(str(tied_model)), expected(10, 6)
    flops = 8 * (layers * shape.layer_flops(16) + head * 10 * 2 * shape.head)
    assert training_flops(config, shape, GPU, e) == pytest.approx(flops)


def test_a_real_update_takes_the_planned_flops(tied_model: Path) -> None:
    """update_policy under torch's counter: several optimizer steps, reference, checkpointing, logits in chunks."""
    sections: dict[str, dict[str, Any]] = {
        "model": {"gradient_checkpointing": True}, "train": {"batch_size": 2, "inner_epochs": 2}, "loss": {"kl_coef": 0.1},
    }  # fmt: skip
    config, rows = config_on(tied_model, **sections), make_rows([7, 7, 7, 7])
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


def recipe(*overrides: str) -> Config:
    return load_config(ROOT / "configs/deepscaler-1.5b/stage1.yaml", [f"run.dir={ROOT / 'nowhere'}", *overrides])


def on(machine: str, *overrides: str, mean: float | None = 2500) -> Plan:
    config = recipe(*overrides)
    return plan(config, parse_machine(machine, config), mean)


def test_the_paper_recipe_fits_eight_h100() -> None:
    """Its state by hand, from the published 1,777,088,000 weights: 4 weights, 4 gradients, 8 Adam, 4 reference; 28,672
    bytes of cache a token (2 x 28 layers x 2 heads x 128 x 2 bytes)."""
    planned = on("8xH100-80GB")
    update, sampling = planned.memory_gb["update"], planned.memory_gb["sampling"]
    state = [update[name] for name in ("weights", "gradients", "Adam", "reference")]
    assert state == pytest.approx([7.108352, 7.108352, 14.216704, 7.108352])
    assert sampling["sampler"] + sampling["cache"] == pytest.approx(0.45 * 80)
    assert planned.cache_rows == pytest.approx(sampling["cache"] * 1e9 / 28_672 / 2700)
    assert planned.fits and planned.notes == ()
    assert planned.tokens_per_step == 1024 * 2500 and planned.steps == 234
    assert planned.gpu_hours == 8 * planned.hours
    assert "ESTIMATE" in "\n".join(planned.lines())


def test_slices_lora_and_offload_take_what_they_say() -> None:
    whole, cut = (on("8xH100-80GB", f"model.sharding={x}").memory_gb["update"] for x in ("ddp", "fsdp2"))
    for name in ("weights", "gradients", "Adam", "reference"):
        assert cut[name] == pytest.approx(whole[name] / 8)
    assert on("8xH100-80GB", "model.offload_reference=true").memory_gb["update"]["reference"] == 0
    adapters = on("8xH100-80GB", "model.lora_rank=16")
    lora = PUBLISHED["DeepScaleR-1.5B-Preview"].lora_params(16)
    assert adapters.memory_gb["update"]["Adam"] == pytest.approx(8e-9 * lora)
    assert adapters.memory_gb["update"]["reference"] == 0
    assert adapters.disk_gb["checkpoints (2 and one being written)"] == pytest.approx(3 * 12e-9 * lora)


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


TOO_LARGE = [  # overrides that make it too large, the remedy
    (["model.gradient_checkpointing=false"], "set train.microbatch_tokens=8192"),
    (["model.gradient_checkpointing=false", "rollout.max_new_tokens=12000"], "set model.gradient_checkpointing=true"),
    (["rollout.gpu_memory_utilization=0.7"], "set rollout.gpu_memory_utilization=0.6"),
    (["rollout.gpu_memory_utilization=0.05"], "set rollout.gpu_memory_utilization=0.08"),
    (["rollout.gpu_memory_utilization=0.7", "model.gradient_checkpointing=false"],
     "set rollout.gpu_memory_utilization=0.6 train.microbatch_tokens=8192"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "remedy"), TOO_LARGE)
def test_what_does_not_fit_comes_with_a_remedy_that_works(overrides: list[str], remedy: str) -> None:
    planned = on("8xA100-80GB", *overrides)
    assert not planned.fits and planned.notes == (remedy,)
    assert any(line.strip().startswith("DOES NOT FIT") for line in planned.lines())
    assert on("8xA100-80GB", *overrides, *remedy.split()[1:]).fits


def test_what_cannot_fit_is_said(tmp_path: Path) -> None:
    giant = LlamaConfig(hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
                        intermediate_size=28672, vocab_size=128256)  # fmt: skip
    giant.save_pretrained(tmp_path)
    planned = on("1xH100-80GB", f"model.path={tmp_path}", "rollout.prompts_per_step=16")
    assert not planned.fits and planned.notes[0].startswith("no setting makes it fit")


def write_metrics(folder: Path, lengths: list[float], trained: float) -> None:
    folder.mkdir(parents=True)
    rows = [
        {"length": n, "trained_tokens": trained, "sampled_tokens": 1000 * i} for i, n in enumerate(lengths, start=1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_lengths_are_given_or_measured_or_the_limit(tmp_path: Path) -> None:
    config = config_on(tmp_path, rollout={"max_new_tokens": 100, "prompts_per_step": 4, "group_size": 2})
    assert (expect(config).answer, expect(config).trained) == (100, 8) and "limit" in expect(config).source
    assert expect(config, 30).answer == 30 and expect(config, 300).answer == 100
    write_metrics(config.run_dir, [40.0, 60.0], trained=200.0)
    found = expect(config, prompt_tokens=7, extra_rows=2)
    assert (found.answer, found.trained, found.rows, found.prompt) == (50, 4, 10, 7)
    assert found.source == "mean of 2 earlier steps" and expect(config, 30).source == "given"
    twice = changed(config, "train.inner_epochs", 2)
    assert expect(twice).trained == 2  # trained_tokens counts each epoch


def test_a_token_limit_ends_the_run(tmp_path: Path, tied_model: Path) -> None:
    """8 rows of 64 tokens a step; the runs to be matched sampled 2,000 together."""
    runs = [str(tmp_path / name) for name in "ab"]
    config = config_on(tied_model, train={"match_runs": runs}, run={"dir": str(tmp_path / "runs")})
    missing = plan(config, cpu_machine(config), 64)
    assert missing.steps == 100 and "upper bound" in missing.notes[0]
    for run in runs:
        write_metrics(Path(run), [64.0], trained=1.0)
    assert plan(config, cpu_machine(config), 64).steps == math.ceil(2000 / (8 * 64))


@pytest.mark.parametrize("text", ["8xH300", "0xA100-80GB", "H100", "x", "", "8 x H100-80GB", "CPU8"])
def test_an_unknown_machine_is_one_line(text: str) -> None:
    with pytest.raises(
        UserError, match=r"^--machine .*: write cpu, or COUNTx and one of A100-80GB.*as in 8xH100-80GB$"
    ):
        parse_machine(text, recipe())


def test_a_machine_that_the_prompts_do_not_divide_over_is_refused() -> None:
    with pytest.raises(UserError, match="rollout.prompts_per_step=128 does not divide over 3 samplers"):
        on("3xH100-80GB")


def test_a_model_that_is_not_there_or_not_known_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model.path='/no/such/model': .*run that writes it comes first"):
        load_shape("/no/such/model")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 8}))
    with pytest.raises(UserError, match="formulas are for llama and qwen2, not gpt2"):
        load_shape(str(tmp_path))
    tiny_llama().config.save_pretrained(tmp_path / "DeepScaleR-1.5B-Preview")
    assert load_shape(str(tmp_path / "DeepScaleR-1.5B-Preview")).hidden == 32  # a folder wins over the table
    assert load_shape(BASE).num_params == 1_777_088_000


def test_the_command_prints_the_plan(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    config = str(ROOT / "configs/deepscaler-1.5b/stage2.yaml")
    arguments = [config, "--machine", "8xH200-141GB", f"model.path={BASE}", "--mean-tokens", "2500"]
    monkeypatch.setattr(sys, "argv", ["plan", *arguments])
    planner.main()
    printed = capsys.readouterr().out.splitlines()
    assert printed == on("8xH200-141GB").lines()
    assert len(printed) < 10


@pytest.mark.slow
def test_calibration_measures_this_machine(tied_model: Path) -> None:
    """Its speed must give back the time of a real micro-batch, and both must be of this machine's order."""
    config = config_on(tied_model, train={"microbatch_tokens": 512}, rollout={"group_size": 8, "max_new_tokens": 24})
    e = expect(config, 20, 10)
    machine = calibrate(config, cpu_machine(config), e)
    assert 1e6 < machine.flops < 1e13 and 1e-5 < machine.step_s + 32 * machine.row_s < 1
    assert "measured on this machine" in machine.source and machine.count == 1
    assert fit(config, load_shape(str(tied_model)), machine, e)
