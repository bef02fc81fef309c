"""Configs, problems and rollouts for the tests, from seeds, without a model: transformers is not imported. See tiny.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nanolapo.config import Config
from nanolapo.config_file import build
from nanolapo.data.problems import Problem
from nanolapo.rollouts import Rollout, Rollouts

VOCAB = 64


def make_config(model_path: str | Path = "", **sections: dict[str, Any]) -> Config:
    """A float32 config without KL and warm-up, learning fast; sections override single keys."""
    values: dict[str, dict[str, Any]] = {
        "model": {"path": str(model_path), "dtype": "float32"},
        "rollout": {
            "prompts_per_step": 4,
            "group_size": 2,
            "max_new_tokens": 64,
            "base_tokens": 100,
            "engine": "torch",
        },
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
    problems = make_problems(count // group_size)
    rows = [
        Rollout(
            problem=problems[b // group_size],
            prompt_ids=prompts[b // group_size],
            response_ids=rng.integers(1, vocab, length),
            sampler_logprobs=np.zeros(length, dtype=np.float32),
            finished=True if finished is None else bool(finished[b]),
            budget=np.nan if budgets is None else float(budgets[b]),
            correct=False if correct is None else bool(correct[b]),
            place=b // group_size,
            text=f"text {b}",
        )
        for b, length in enumerate(lengths)
    ]
    return Rollouts(rows, group_size)


def fill(rollouts: Rollouts, **columns: Any) -> Rollouts:
    """Write these fields of all rows: a value for each, or one for all; a problem for each group."""
    for name, values in columns.items():
        if not isinstance(values, list | tuple | np.ndarray):
            values = [values] * len(rollouts)
        if name == "problem":
            values = [problem for problem in values for _ in range(rollouts.group_size)]
        for row, value in zip(rollouts.rows, values, strict=True):
            setattr(row, name, value.item() if isinstance(value, np.generic) else value)
    return rollouts


def copied(rollouts: Rollouts, **columns: Any) -> Rollouts:
    """The same rows again, other objects, with these fields."""
    return fill(Rollouts([replace(row) for row in rollouts.rows], rollouts.group_size), **columns)
