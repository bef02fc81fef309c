"""`Method`: accuracy-only GRPO, and the hooks in which every other method differs from it.

The loop calls the hooks in this order, once a step: sampling, guidance (per rollout), edit_rollouts, reward, keep_groups,
advantage, loss (once per micro-batch), after_step. A subclass overrides only what it changes. Every rank sees the rollouts
of all ranks and computes the same rewards, advantages and state, so a method needs no word about ranks.
State is read before and written after the rewards of a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanolapo.advantages import group_advantages
from nanolapo.config import Config
from nanolapo.config_file import build
from nanolapo.losses import kl_penalty, policy_loss, tis_weights
from nanolapo.problems import Problem
from nanolapo.prompts import Guidance
from nanolapo.rollouts import Rollouts


@dataclass(frozen=True)
class SamplingPlan:
    """What to sample this step."""

    num_prompts: int
    group_size: int
    temperature: float
    max_new_tokens: int


@dataclass(frozen=True)
class MonitorPlan:
    """A second, graded sampling before the step's own."""

    problem_indices: tuple[int, ...]
    group_size: int
    temperature: float
    max_new_tokens: int


@dataclass(frozen=True)
class LossInputs:
    """One micro-batch on its way to the loss; rows are padded to the right with zeros where mask_BT is 0."""

    logprobs_BT: Tensor  # of the policy being trained, with gradient
    old_logprobs_BT: Tensor  # of the policy at the start of this step
    sampler_logprobs_BT: Tensor  # as recorded while sampling
    ref_logprobs_BT: Tensor | None  # of the stage's first model; None when loss.kl_coef is 0
    entropy_BT: Tensor | None  # only when the method sets needs_entropy
    advantages_BT: Tensor
    mask_BT: Tensor  # 1 for sampled tokens, by position (the end token included)
    rows: list[int]  # row numbers in `rollouts`
    rollouts: Rollouts


@dataclass(frozen=True)
class NoOptions:
    """A method without settings of its own."""


class Method:
    """Accuracy-only GRPO: reward 1 for a right answer, 0 otherwise, group advantages, clipped token loss."""

    Options: type = NoOptions  # a frozen dataclass; method.options in the YAML fills it, strictly
    grader_rule = "math"
    cut_answers_count = False  # may an answer that hit the length limit be right (its box already printed)?
    needs_entropy = False

    def __init__(self, config: Config) -> None:
        self.config = config
        self.options: Any = build(self.Options, dict(config.method.options), "method.options")

    def start(self, problems: list[Problem]) -> None:
        """Called once with the training problems, before the first step. Raise UserError for what cannot work."""

    def sampling(self, step: int) -> SamplingPlan:
        r = self.config.rollout
        return SamplingPlan(r.prompts_per_step, r.group_size, r.temperature, r.max_new_tokens)

    def monitor(self, step: int) -> MonitorPlan | None:
        """What to sample and grade before this step's own sampling, if anything."""
        return None

    def on_monitor(self, rollouts: Rollouts) -> dict[str, float]:
        """Look at what monitor asked for; returns numbers to log."""
        return {}

    def guidance(self, problem: Problem, rollout_index: int, step: int) -> Guidance:
        """What is added to this rollout's prompt, and the budget it carries."""
        return Guidance()

    def edit_rollouts(self, rollouts: Rollouts) -> None:
        """Change responses after sampling (and grade them again with rollouts.regrade)."""

    def reward(self, rollouts: Rollouts) -> dict[str, np.ndarray]:
        """Named parts, each float64 [B]; the reward is their sum. The part "correct" is the plain verdict."""
        return {"correct": rollouts.correct_B.astype(np.float64)}

    def keep_groups(self, rollouts: Rollouts, rewards_PG: np.ndarray) -> np.ndarray:
        """Boolean [P]: which groups are trained on. Dropped ones leave every denominator as well."""
        return np.ones(len(rollouts.problems), dtype=bool)

    def advantage(self, rollouts: Rollouts, rewards_PG: Tensor) -> Tensor:
        """Advantages [B], or [B, T] to weigh single tokens (T = the longest response)."""
        return group_advantages(rewards_PG, self.config.loss.normalize_std).flatten()

    def loss(self, x: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Per-token loss [B, T] and per-token quantities to log (each averaged over the trained tokens)."""
        c = self.config.loss
        loss_BT, clipped_BT = policy_loss(x.logprobs_BT, x.old_logprobs_BT, x.advantages_BT, c.clip_low, c.clip_high)
        logged = {
            "clip_fraction": clipped_BT.float(),
            "ratio": torch.exp(x.logprobs_BT - x.old_logprobs_BT).detach(),
        }
        if c.tis_cap:
            weights_BT = tis_weights(x.old_logprobs_BT, x.sampler_logprobs_BT, c.tis_cap)
            loss_BT = loss_BT * weights_BT
            logged["tis_weight"] = weights_BT
        if x.ref_logprobs_BT is not None:
            kl_BT = kl_penalty(x.logprobs_BT, x.ref_logprobs_BT, c.kl_kind)
            loss_BT = loss_BT + c.kl_coef * kl_BT
            logged["kl"] = kl_BT.detach()
        return loss_BT, logged

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
