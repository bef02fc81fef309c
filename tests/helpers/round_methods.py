"""Small methods for test_sampling.py and its two-rank runs: dynamic sampling, weighted drawing, a monitor.

    torchrun --standalone --nproc_per_node 2 tests/helpers/round_methods.py MODEL_FOLDER RUN_DIR [--vllm]

Rewards depend on the first sampled token alone, so a model with random weights has groups with and without signal.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nanolapo.config import Config
from nanolapo.config_file import build
from nanolapo.demo.pretrain import DemoConfig, make_model, make_tokenizer
from nanolapo.loop import train
from nanolapo.methods.base import Method, MonitorPlan, SamplingPlan
from nanolapo.rollouts import Rollout, Rollouts

NUM_PROBLEMS = 30


def make_base(folder: Path, hidden_size: int = 32) -> Path:
    """A model with random weights and the demo's tokenizer. vLLM wants heads of 32: hidden_size 128."""
    import torch

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    make_model(tokenizer, DemoConfig(hidden_size=hidden_size, layers=2)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_run(base: Path, folder: Path, **sections: dict[str, Any]) -> Config:
    values: dict[str, dict[str, Any]] = {
        "run": {"dir": str(folder), "name": "run", "threads": 1, "checkpoint_every": 1, "print_every": 0},
        "model": {"path": str(base), "dtype": "float32"},
        "data": {"sources": [{"name": "demo", "path": "demo", "count": NUM_PROBLEMS, "seed": 1}]},
        "prompt": {"template": "{question} <think>"},
        "rollout": {
            "engine": "torch", "prompts_per_step": 4, "group_size": 4, "max_prompt_tokens": 128, "max_new_tokens": 6,
        },
        "train": {
            "steps": 2, "batch_size": 8, "learning_rate": 1e-2, "warmup_fraction": 0.0, "final_lr_fraction": 1.0,
        },
        "loss": {"kl_coef": 0.0},
    }  # fmt: skip
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return build(Config, values, "")


class Dynamic(Method):
    """Reward 1 where the first token is a multiple of `every`; groups without spread are dropped and made up for."""

    max_rounds, every = 6, 6

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.seen: list[tuple[str, Any]] = []  # what each hook was given, in order
        self.told: list[float] = []  # the progress of each step

    def sampling(self, step: int) -> SamplingPlan:
        r = self.config.rollout
        self.seen.append(("sampling", step))
        self.told.append(self.progress)
        return SamplingPlan(r.prompts_per_step, r.group_size, r.temperature, r.max_new_tokens, None, self.max_rounds)

    def reward(self, rollouts: Rollouts) -> dict[str, np.ndarray]:
        self.seen.append(("reward", rollouts))
        first = np.array([ids[0] for ids in rollouts.response_ids])
        return {"correct": rollouts.correct_B.astype(np.float64), "first": (first % self.every == 0).astype(float)}

    def keep_groups(self, rollouts: Rollouts, rewards_PG: np.ndarray) -> np.ndarray:
        return rewards_PG.max(axis=1) > rewards_PG.min(axis=1)

    def advantage(self, rollouts: Rollouts, rewards_PG):
        self.seen.append(("advantage", rollouts))
        return super().advantage(rollouts, rewards_PG)

    def after_step(self, rollouts: Rollouts) -> dict[str, float]:
        self.seen.append(("after_step", rollouts))
        return {}

    def of(self, hook: str) -> list[Any]:
        return [value for name, value in self.seen if name == hook]


class Watched(Dynamic):
    """Remembers what it was asked to reward; all groups are kept."""

    max_rounds = 1

    def keep_groups(self, rollouts: Rollouts, rewards_PG: np.ndarray) -> np.ndarray:
        return np.ones(len(rewards_PG), dtype=bool)

    @property
    def rewarded(self) -> list[Rollouts]:
        return self.of("reward")


class Everything(Dynamic):
    """Also a monitor pass over an uneven number of problems at another temperature, whose first group is trained on, and
    problems drawn by weights that remember the rewards seen."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.weights = [1.0] * NUM_PROBLEMS
        self.monitored: Rollouts | None = None

    def start(self, problems) -> None:
        self.index = {problem.id: i for i, problem in enumerate(problems)}

    def sampling(self, step: int) -> SamplingPlan:
        plan = super().sampling(step)
        return SamplingPlan(
            plan.num_prompts, plan.group_size, plan.temperature, plan.max_new_tokens, np.array(self.weights), 3
        )

    def monitor(self, step: int) -> MonitorPlan | None:
        self.seen.append(("monitor", step))
        return None if step == 2 else MonitorPlan((3, 0, 7)[: 1 + 2 * (step % 2)], 4, 1.5, 5, whole_rows=True)

    def on_monitor(self, rollouts: Rollouts) -> dict[str, float]:
        self.seen.append(("on_monitor", rollouts))
        self.monitored = rollouts
        return {"monitor/length": float(rollouts.lengths_B.mean())}

    def edit_rollouts(self, rollouts: Rollouts) -> list[Rollout]:
        if self.monitored is None:
            return []
        for i in range(4):  # a whole group of the first round
            rollouts.put(i, self.monitored.rows[i])
        self.monitored = None
        return rollouts.rows[:4]

    def after_step(self, rollouts: Rollouts) -> dict[str, float]:
        for problem, rewards in zip(rollouts.problems, rollouts.by_group(self.reward(rollouts)["first"]), strict=True):
            self.weights[self.index[problem.id]] = 0.1 + float(rewards.mean())
        return super().after_step(rollouts)

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights = state["weights"]


R2VPO = {"kind": "r2vpo", "options": {"rate": 5.0}}


if __name__ == "__main__":
    config = make_run(Path(sys.argv[1]), Path(sys.argv[2]), train={"steps": 3}, loss=R2VPO)
    if "--vllm" in sys.argv:
        config = replace(config, rollout=replace(config.rollout, engine="vllm"))
    train(config, (Watched if "--vllm" in sys.argv else Everything)(config))
