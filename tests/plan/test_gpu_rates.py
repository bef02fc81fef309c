"""The planner's GPU rates against what was measured, and the line on a run's own steps.

python -m pytest tests/plan/test_gpu_rates.py        After another measurement, change MEASURED and machines.py together.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from plan_helpers import planning_config

from nanolapo.config import Config
from nanolapo.plan.beside_run import beside_run
from nanolapo.plan.cost import forecast, sampling_seconds, training_flops
from nanolapo.plan.footprint import Expected
from nanolapo.plan.machines import QWEN_1_5B, parse_machine, this_machine

TIED = replace(QWEN_1_5B, tied=True, bias=True)
# Commit 43bd68e, one H100-80GB: the update's tokens/s (prompts of 100 counted once for 8 rows; answers of 200 to 2,000),
# and the seconds of a whole step of 256 answers of exactly 1,024 tokens.
MEASURED = {"update tokens/s": (15_300 + 16_000) / 2, "step": 26.1}


def gpu_config(prompts: int, tokens: int) -> Config:
    return planning_config(
        Path("none"), model={"dtype": "bfloat16", "gradient_checkpointing": True},
        rollout={"engine": "vllm", "prompts_per_step": prompts, "group_size": 8, "max_new_tokens": tokens, "max_rows": 256,
                 "gpu_memory_utilization": 0.45},
    )  # fmt: skip


def update_seconds(config: Config, e: Expected) -> float:
    return training_flops(config, TIED, e, 1 / 8) / parse_machine("1xH100-80GB", config).flops


def test_the_update_takes_as_long_as_on_the_gpu() -> None:
    e, config = Expected(1100, 100, 2000, 128, 128, "measured"), gpu_config(16, 2000)
    tokens = 128 * (1100 + 100 / 8)
    assert tokens / update_seconds(config, e) == pytest.approx(MEASURED["update tokens/s"], rel=0.05)


def test_a_whole_step_takes_as_long_as_on_the_gpu() -> None:
    e, config = Expected(1024, 100, 1024, 256, 256, "measured"), gpu_config(32, 1024)
    sampling = sampling_seconds(config, TIED, parse_machine("1xH100-80GB", config), e)
    assert sampling + update_seconds(config, e) == pytest.approx(MEASURED["step"], rel=0.05)


def test_the_plan_says_what_its_rates_rest_on() -> None:
    source = parse_machine("8xH200-141GB", gpu_config(16, 2000)).source
    assert "ESTIMATE from one H100 at commit 43bd68e" in source and "kernels reach" in source and "waits 22%" in source


def write_steps(config: Config, seconds: list[tuple[float, float]]) -> None:
    config.run_dir.mkdir(parents=True)
    common = {"step": 0, "length": 5.0, "trained_tokens": 40.0}
    lines = [json.dumps(common | {"seconds/sample": s, "seconds/update": u}) + "\n" for s, u in seconds]
    (config.run_dir / "metrics.jsonl").write_text("".join(lines))


def test_the_line_compares_medians_without_the_first_step(tied_model: Path, tmp_path: Path) -> None:
    config = planning_config(tied_model, run={"dir": str(tmp_path / "runs")})
    planned = forecast(config, this_machine(config))
    assert beside_run(config, planned) == []
    write_steps(config, [(900.0, 900.0), (8.0, 3.0), (2.0, 1.0), (4.0, 2.0)])
    [line] = beside_run(config, planned)
    assert "steps 2 to 4 of " in line and "sampling took 4 s, " in line and "update took 2 s, " in line
    ratios = [float(part.split(" times")[0].split()[-1]) for part in line.split(", update ")]
    assert ratios == pytest.approx([4 / planned.sample_seconds, 2 / planned.train_seconds], rel=0.01)
