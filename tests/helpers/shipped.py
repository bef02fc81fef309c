"""The configs that the project ships, each of one training or evaluation."""

from __future__ import annotations

from pathlib import Path

CONFIGS = Path(__file__).parents[2] / "configs"
PLANS = ("chosen", "compare", "demo.yaml", "reproduce", "tuning", "settings")  # of many runs: see tests/reproduce
SHIPPED = sorted(path for path in CONFIGS.glob("*/*.yaml") if not path.name.startswith(PLANS))
