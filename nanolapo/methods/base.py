"""`Method`: accuracy-only GRPO, and the hooks in which every other method differs from it.

The loop calls the hooks in this order, once a step: sampling, monitor, on_monitor; guidance (per rollout), edit_rollouts,
reward, keep_groups (once per round of dynamic sampling, so mostly once); advantage, after_step. A subclass overrides only
what it changes. The policy loss is an object, `method.loss`; loss.kind chooses it, and a subclass may replace it. Every
rank sees the rollouts of all ranks and computes the same rewards, advantages and state, so a method need not know
about ranks.

advantage and the loss see the groups that keep_groups kept; after_step sees all that can be trained on (Rollouts.usable).
So row numbers must not be carried from one to the other. State is read before and written after the rewards of a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from nanolapo.advantages import group_advantages
from nanolapo.config import Config, NoOptions, UserError
from nanolapo.config_file import build
from nanolapo.data.problems import Problem
from nanolapo.data.prompts import Guidance
from nanolapo.losses import Loss, load_loss
from nanolapo.rollouts import Measured, Rollout, Rollouts


@dataclass(frozen=True)
class SamplingPlan:
    """What to sample this step."""

    num_prompts: int
    group_size: int
    temperature: float  # must be rollout.temperature, at which the trainer scores
    max_new_tokens: int  # at most rollout.max_new_tokens, also in MonitorPlan
    weights: np.ndarray | None = None  # [problems], >= 0: draw by these, each once a step at most; None: epochs
    max_rounds: int = 1  # more: dynamic sampling, rounds of num_prompts until keep_groups has kept num_prompts groups


@dataclass(frozen=True)
class MonitorPlan:
    """What to sample and grade before the step's own rollouts. They are not trained on unless the method puts them in."""

    problem_indices: tuple[int, ...]  # into the problems that `start` was given; any number, each once
    group_size: int
    temperature: float
    max_new_tokens: int
    whole_rows: bool = False  # True: on_monitor gets Rollouts, so that they can be trained on; else only Measured


class Method:
    """Accuracy-only GRPO: reward 1 for a right answer, 0 otherwise, group advantages, and the loss that loss.kind names."""

    Options: type = NoOptions  # a frozen dataclass; method.options in the YAML fills it, strictly
    grader_rule = "math"
    cut_answers_count = False  # True: an answer cut at the limit may be right (its box was already printed)
    compares_group = True  # False: its advantage is not 0 where a group is a single answer
    uses_normalize_std = True  # False: loss.normalize_std has no part in its advantage
    # Share of the run that is done, by steps or by sampled tokens, in [0, 1), at the start of the current step.
    progress = 0.0

    def __init__(self, config: Config) -> None:
        self.config = config
        if self.compares_group and config.rollout.group_size < 2:
            raise UserError("rollout.group_size=1: an advantage compares the answers of a group; use 2 or more")
        if not (config.loss.normalize_std or self.uses_normalize_std):
            raise UserError(
                f"loss.normalize_std=false: the advantage of {type(self).__name__} has a formula without this key; set "
                "loss.normalize_std=true"
            )
        self.options: Any = build(self.Options, dict(config.method.options), "method.options")
        self.loss: Loss = load_loss(config)  # what update_policy calls; its state is in every checkpoint, too

    def start(self, problems: list[Problem]) -> None:
        """Called once with the training problems, before the first step. Raise UserError for what cannot work."""

    def sampling(self, step: int) -> SamplingPlan:
        """What to sample. The first hook of every step."""
        r = self.config.rollout
        return SamplingPlan(r.prompts_per_step, r.group_size, r.temperature, r.max_new_tokens)

    def monitor(self, step: int) -> MonitorPlan | None:
        """An extra sampling before the step's own, with the same weights; None (mostly): no monitor pass in this step."""
        return None

    def possible_monitor(self, step: int) -> MonitorPlan | None:
        """The largest monitor pass of this step, for --dry-run. Override it where `monitor` depends on past steps."""
        return self.monitor(step)

    def on_monitor(self, found: Measured | Rollouts) -> dict[str, float]:
        """Receive lengths and verdicts of the monitor pass, and with whole_rows also the answers; returns numbers to log.
        Groups of the plan may be missing (Rollouts.usable), so go by found.problems.

        Ids, log-probs and texts of a pass over all problems are gigabytes, which every rank would have to hold. To train on
        rows, ask for them, keep them, and put them into the batch in edit_rollouts (rollouts.put).
        """
        return {}

    def guidance(self, problem: Problem, rollout_index: int, step: int) -> Guidance:
        """What is added to this rollout's prompt, and the budget it carries."""
        return Guidance()

    def edit_rollouts(self, rollouts: Rollouts) -> list[Rollout]:
        """Change responses after sampling; returns the rows that must be graded again."""
        return []

    def reward(self, rollouts: Rollouts) -> dict[str, np.ndarray]:
        """Named parts, each float64 [B]; the reward is their sum. The part "correct" is the plain verdict."""
        return {"correct": rollouts.correct_B.astype(np.float64)}

    def keep_groups(self, rollouts: Rollouts, rewards_PG: np.ndarray) -> np.ndarray:
        """Boolean [P]: which groups are trained on. If none is, the step is skipped. Denominators leave out the others."""
        return np.ones(len(rollouts.problems), dtype=bool)

    def advantage(self, rollouts: Rollouts, rewards_PG: Tensor) -> Tensor:
        """Advantages [B], or [B, T] to weigh single tokens (T = the longest response)."""
        return group_advantages(rewards_PG, self.config.loss.normalize_std).flatten()

    def after_step(self, rollouts: Rollouts) -> dict[str, float]:
        """Update state from this step's rollouts; returns numbers to log."""
        return {}

    def export(self, run_dir: Path) -> None:
        """Write what outlives the run, beside the final model."""

    def state_dict(self) -> dict[str, Any]:
        """Everything the method remembers, as JSON; goes into every checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state that state_dict wrote."""
