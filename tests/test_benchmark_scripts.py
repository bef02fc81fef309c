"""The scripts of `make bench` run, on a tiny model, and their numbers are what they say.

Run: python -m pytest tests/test_benchmark_scripts.py        TRL's script needs TRL's own environment and is not run here.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from round_methods import make_base
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "tests" / "benchmarks"


def script(name: str, *arguments: str, launch: Sequence[str] = (sys.executable,)) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [*launch, str(SCRIPTS / name), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("bench")
    make_base(folder / "model")
    out = folder / "runs" / "step_torch_float32.json"
    out.parent.mkdir()
    sizes = ["--prompts", "2", "--group", "3", "--tokens", "5", "--steps", "3", "--dtype", "float32"]
    said = script("step.py", "--model", str(folder / "model"), "--engine", "torch", *sizes, "--out", str(out))
    return out, json.loads(out.read_text()), said


def test_the_step_is_the_sum_of_its_phases_and_the_tokens_are_those_asked_for(step):
    """Every completion has 5 tokens (the script stops otherwise), so tokens/s times the median step is 2 x 3 x 5."""
    _, result, said = step
    seconds = result["seconds"]
    assert result["tokens_per_second"] * seconds["step"]["median"] == pytest.approx(2 * 3 * 5)
    for kind in ("min", "max"):
        parts = sum(value[kind] for phase, value in seconds.items() if phase != "step")
        assert parts <= seconds["step"]["max"] * 1.001 if kind == "min" else parts >= seconds["step"]["min"] * 0.999
    assert seconds["update"]["min"] > 0 and seconds["sample"]["min"] > 0
    assert set(result["floors"]) == {"sync", "update"} and result["floors"]["update"]["min"] > 0
    assert result["mismatch"] < 1e-4, "float32: sampler and trainer agree"
    memory = list(result["memory_gb"].values())
    assert memory == sorted(memory) and said.count(", mismatch ") == 3


def test_products_are_those_of_the_model(step):
    """By hand: 4 products with each weight of the head and 3 with the others, for every token of the update; decoding and
    reading the prompts takes one."""
    out, result, said = step
    config = json.loads((out.parents[1] / "model" / "config.json").read_text())
    names = ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    hidden, heads, kv, inner = (config[name] for name in names)
    size = config.get("head_dim") or hidden // heads
    layers = config["num_hidden_layers"] * hidden * (2 * size * (heads + kv) + 3 * inner)
    head, answers = hidden * config["vocab_size"], 2 * 3 * 5
    flops = 2 * (3 * layers * result["update_tokens"] + 4 * head * answers)
    assert result["products"]["update"]["tflop"] * 1e12 == pytest.approx(flops)
    least = 2 * (layers + head) * 2 * 3 * 4  # six rows of five tokens; the first comes from reading the prompt
    assert result["products"]["sample"]["tflop"] * 1e12 > least
    assert all(found["seconds"] > 0 for found in result["products"].values())
    assert said.count(": its matrix products alone take ") == 2


def test_ratios_are_taken_against_trl_of_the_same_dtype(step):
    out, result, _ = step
    other = {"args": {"dtype": "float32"}, "seconds": {"step": {"median": 8.0}}, "tokens_per_second": 2.0}
    (out.parent / "trl_float32.json").write_text(json.dumps(other | {"memory_gb": {"peak": 10.0}}))
    (out.parent / "trl_bfloat16.json").write_text(
        json.dumps(other | {"tokens_per_second": 1.0, "memory_gb": {"peak": 1}})
    )
    (row,) = [line for line in script("compare.py", str(out.parent)).splitlines() if "step_torch_float32" in line]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert float(cells[4]) == pytest.approx(result["tokens_per_second"] / 2.0, rel=0.01)
    assert float(cells[5]) == pytest.approx(result["memory_gb"]["peak"] / 10.0, rel=0.01)


GROWTH = {
    "vocab": 500, "layers": 1, "hidden": 64, "prompt": 4, "group": 2, "length": 6, "prompts": 2, "micro": 64, "ranks": 1,
    "sharding": "ddp",
}  # fmt: skip


def test_growth_says_what_must_be_there():
    """With two float32 moments, weights and gradients, 16 bytes a parameter are `held`; the rest of the peak is not."""
    row = json.loads(script("growth.py", "--dtype", "float32", "--one", json.dumps(GROWTH)).splitlines()[-1])
    weights = 500 * 64 + 4 * 64 * 64 + 3 * 64 * 192 + 3 * 64  # embedding; attention; MLP; norms
    assert row["parameters, M"] == pytest.approx(weights / 1e6) and row["held GB"] == pytest.approx(weights * 16 / 1e9)
    assert row["tokens"] == 2 * 4 + 4 * 6 and 0 < row["beyond GB"] < row["peak GB"] and row["seconds"] > 0


def test_growth_on_two_ranks_holds_half_of_everything_on_each():
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    settings = json.dumps(GROWTH | {"ranks": 2, "sharding": "fsdp2"})
    said = script("growth.py", "--dtype", "bfloat16", "--one", settings, launch=launch)
    (row,) = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    weights = 500 * 64 + 4 * 64 * 64 + 3 * 64 * 192 + 3 * 64
    assert row["parameters, M"] == pytest.approx(weights / 1e6) and row["held GB"] == pytest.approx(weights * 8 / 1e9)


def test_only_the_main_rank_holds_a_whole_model_while_fsdp2_loads(tmp_path, monkeypatch):
    monkeypatch.setenv(
        "MALLOC_MMAP_THRESHOLD_", "65536"
    )  # freed tensors go back at once: the peak is that of live ones
    shape = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 8}
    LlamaForCausalLM(LlamaConfig(vocab_size=2_000, **shape)).save_pretrained(tmp_path)  # 65 M parameters
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {{path: {tmp_path}, sharding: fsdp2}}")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    said = script("loading.py", str(config), launch=launch)
    lines = sorted(line for line in said.splitlines() if line.startswith("rank"))
    main, other = (after - before for before, after in (map(int, re.findall(r"(\d+) MiB", line)) for line in lines))
    assert other < 0.6 * main, said  # 0.51; when every rank loaded the model it was 1


def test_the_gpu_script_runs_every_part_that_a_cpu_can_run(tmp_path: Path) -> None:
    said = script(
        "gpu.py", "--tiny", "--out", str(tmp_path), "--only", "attention,fsdp2,engine,resume,evaluation,update,step"
    )
    assert said.count("| ok |") == 7
    for what in (
        "gradient of v",
        "after sleep, wake and sync",
        "change of the weights, gloo",
        "third step after a restart",
        "compiled, checkpointing: attention ",
        "share of the peak",
    ):
        assert f"{what}" in said


def test_the_gpu_script_says_what_was_cut_and_what_failed() -> None:
    """A proof that is not done has failed. A measure that is not done was cut; it is not begun with too little time."""
    waits, fails = ["sleep", "60"], [sys.executable, "-c", "raise SystemExit('no')"]
    sys.path.insert(0, str(SCRIPTS))
    from gpu import WORTH, finish

    assert (
        finish(waits, 1.0, measures=False) == "not done after 1 s" and finish(waits, 0.5, False) == "no time was left"
    )
    assert finish(waits, WORTH - 1, measures=True) == "cut: not begun, no time was left"
    assert finish(fails, 30, False) == finish(fails, WORTH, True) == "exit code 1"
    assert finish(["true"], 30, measures=False) == "ok"
