"""Configs, problems and rollouts for the tests, from seeds, without a model: transformers is not imported. See tiny.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanolapo.config import Config
from nanolapo.config_file import build
from nanolapo.data.problems import Problem
from nanolapo.rollouts import Rollouts

VOCAB = 64


def make_config(model_path: str | Path = "", **sections: dict[str, Any]) -> Config:
    """A float32 config without KL and warm-up, learning fast; sections override single keys."""
    values: dict[str, dict[str, Any]] = {
        "model": {"path": str(model_path), "dtype": "float32"},
        "rollout": {"prompts_per_step": 4, "group_size": 2, "max_new_tokens": 64, "engine": "torch"},
        "train": {"batch_size": 0, "learning_rate": 1e-2, "warmup_fraction": 0.0, "steps": 100},
        "loss": {"kl_coef": 0.0},
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return build(Config, values, "")


def make_problems(count: int) -> list[Problem]:
    return [Problem(f"demo:{i}", f"question {i}", str(i), None, "demo") for i in range(count)]


def make_rows(
    lengths: Sequence[int],
    group_size: int = 2,
    seed: int = 0,
    vocab: int = VOCAB,
    correct: Sequence[bool] | None = None,
    finished: Sequence[bool] | None = None,
    budgets: Sequence[float] | None = None,
) -> Rollouts:
    """Rollouts of random ids with these response lengths; sampler log-probs 0 until `score_rows` fills them in."""
    rng = np.random.default_rng(seed)
    count = len(lengths)
    prompts = [rng.integers(1, vocab, rng.integers(2, 7)) for _ in range(count // group_size)]
    return Rollouts(
        problems=make_problems(count // group_size),
        group_size=group_size,
        prompt_ids=[prompts[b // group_size] for b in range(count)],
        response_ids=[rng.integers(1, vocab, length) for length in lengths],
        sampler_logprobs=[np.zeros(length, dtype=np.float32) for length in lengths],
        finished_B=np.ones(count, dtype=bool) if finished is None else np.array(finished, dtype=bool),
        budgets_B=np.full(count, np.nan) if budgets is None else np.array(budgets, dtype=np.float64),
        correct_B=np.zeros(count, dtype=bool) if correct is None else np.array(correct, dtype=bool),
        broken_B=np.zeros(count, dtype=bool),
        texts=[f"text {b}" for b in range(count)],
    )
