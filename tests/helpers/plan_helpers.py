"""Forecasts for the paper's recipe and of tiny models, shared by the tests of planning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny import make_config

from nanolapo.config import Config
from nanolapo.config_file import load_config
from nanolapo.plan.cost import Forecast, forecast
from nanolapo.plan.machines import parse_machine

ROOT = Path(__file__).parents[2]
BASE = "agentica-org/DeepScaleR-1.5B-Preview"


def planning_config(folder: Path, **sections: dict[str, Any]) -> Config:
    return make_config(folder, **({"run": {"dir": str(folder / "runs")}} | sections))


def recipe(*overrides: str) -> Config:
    return load_config(ROOT / "configs/deepscaler-1.5b/stage1.yaml", [f"run.dir={ROOT / 'nowhere'}", *overrides])


def on(machine: str, *overrides: str, mean: float | None = 2500) -> Forecast:
    config = recipe(*overrides)
    return forecast(config, parse_machine(machine, config), mean)


def write_metrics(folder: Path, lengths: list[float], trained: float) -> None:
    folder.mkdir(parents=True)
    rows = [
        {"step": i - 1, "length": n, "trained_tokens": trained, "sampled_tokens": 1000 * i}
        for i, n in enumerate(lengths, start=1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
