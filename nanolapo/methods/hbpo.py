r"""HBPO: a group explores several thinking budgets at once, each with its own reward curve.

Source: Hierarchical Budget Policy Optimization, arXiv 2507.15844 (LAPO's group); code ZJU-REAL/HBPO. Paper text and
code read.

The group is split evenly over the budgets b = 512, 1024, 2048, 2560 (published on DeepScaleR-1.5B-Preview; scaled with
the base's mean length), each stated in the thought: "I will answer the question within {b} tokens." (paper; the code says
"with": option `wording`). As in the code the sentence is given, but belongs to the answer: it counts in the length and is
trained, so the model learns which budget to prefer. (A_intra is never positive: what all sentences share is pushed down.)

    right, L <= b    f2(b) = beta * cos(pi * b / (2 L_max))                          beta = 4
    right, L > b     f1 = beta * cos(pi * L / (2 L_max)) - alpha * |L - b|           alpha = 1 / L_max
    wrong 0; no </think> or no box: -1, right or not
    A = A_inter + A_intra   A_inter: (R - mean) / std of the whole group; A_intra(b): mean of R in budget b - f2(b) <= 0

L_max is our own limit: the curve ends where answers are cut. The code adds A_intra twice (`intra_weight: 2`), and takes
min(f1, f2) for every right answer, which differs for very short ones only. A_intra is the same for all rollouts of a
budget: a budget in which nothing is right is pushed down as a whole, its sentence first of all. What counts as the old
log-prob of the sentence is the trainer's own, so loss.old_logprobs must be trainer.

Edge cases: near the limit f1 falls below 0, the reward of a wrong answer (its minimum is -(L_max - b) / L_max). A
prompt without a budget gets plain correctness and no A_intra.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from nanolapo.config import Config, NotNegative, Positive, UserError
from nanolapo.data.problems import Problem
from nanolapo.data.prompts import Guidance, exact_guidance, hbpo_guidance
from nanolapo.methods.base import Method
from nanolapo.methods.tools import DEEPSCALER, scale, speaks_of_thought, stated, well_formed
from nanolapo.rollouts import Rollouts

WORDINGS = {"within": hbpo_guidance, "with": exact_guidance}


def budget_reward(budgets: np.ndarray, limit: int, beta: float = 4.0) -> np.ndarray:
    """Return f2, the most that a right answer with this budget can get; small budgets pay better.

    >>> budget_reward(np.array([512, 1024, 2048, 2560]), limit=4096).round(4)
    array([3.9231, 3.6955, 2.8284, 2.2223])
    """
    return beta * np.cos(np.pi * budgets / (2 * limit))


def hierarchical_reward(
    lengths: np.ndarray, correct: np.ndarray, formed: np.ndarray, budgets: np.ndarray, limit: int, beta: float = 4.0
) -> np.ndarray:
    """R, element by element.

    >>> rows = np.array([300, 2048, 300, 300]), np.array([1, 1, 0, 1]), np.array([True, True, True, False])
    >>> hierarchical_reward(*rows, np.full(4, 1024), limit=4096).round(4)   # 4 cos(pi/4) - 1024/4096 = 2.5784
    array([ 3.6955,  2.5784,  0.    , -1.    ])
    """
    over = beta * np.cos(np.pi * lengths / (2 * limit)) - np.abs(lengths - budgets) / limit
    return np.where(~formed, -1.0, correct * np.where(lengths <= budgets, budget_reward(budgets, limit, beta), over))


def intra_advantages(rewards_PG: np.ndarray, budgets_PG: np.ndarray, limit: int, beta: float = 4.0) -> np.ndarray:
    """A_intra of every rollout, [P, G]: the mean reward of its budget in its group, minus the most that budget can pay."""
    intra = np.zeros(rewards_PG.shape)
    for g, budgets in enumerate(budgets_PG):
        for budget in np.unique(budgets[~np.isnan(budgets)]):
            mine = budgets == budget
            intra[g, mine] = rewards_PG[g, mine].mean() - budget_reward(budget, limit, beta)
    return intra


@dataclass(frozen=True)
class Options:
    budgets: tuple[Positive[int], ...] | None = None  # tokens; None: 512, 1024, 2048, 2560, scaled
    beta: NotNegative[float] = 4.0
    intra_weight: NotNegative[float] = 1.0  # of A_intra; the code has 2
    wording: str = "within"  # within (paper) | with (code)
    think_tags: bool | None = None  # True: an answer must end its thought; None: if the config's prompt names <think>


class Hbpo(Method):
    """Budgets within a group; reward by budget; advantage from group and budget."""

    Options = Options

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        o, self.limit = self.options, config.rollout.max_new_tokens
        scaled = (b * scale(config, DEEPSCALER, "method.options.budgets") for b in (512, 1024, 2048, 2560))
        self.budgets = tuple(stated(config, b) for b in o.budgets or scaled)
        if max(self.budgets) >= self.limit:
            raise UserError(
                f"method.options.budgets={list(self.budgets)}: at rollout.max_new_tokens={self.limit} a right answer earns "
                "nothing; give budgets below it"
            )
        self.think_tags = speaks_of_thought(config) if o.think_tags is None else o.think_tags
        if config.rollout.group_size % len(self.budgets):
            raise UserError(
                f"rollout.group_size={config.rollout.group_size}: HBPO splits a group evenly over its {len(self.budgets)} "
                f"budgets; use a multiple of {len(self.budgets)}"
            )
        if config.loss.old_logprobs != "trainer":
            raise UserError(
                "hbpo: nobody has drawn the budget's sentence, which is trained: set loss.old_logprobs=trainer"
            )
        if o.wording not in WORDINGS:
            raise UserError(f"method.options.wording={o.wording!r} is not 'within' or 'with'")

    def guidance(self, problem: Problem, rollout_index: int, step: int) -> Guidance:
        budget = self.budgets[rollout_index * len(self.budgets) // self.config.rollout.group_size]
        return replace(WORDINGS[self.options.wording](budget), inside_is_answer=True)

    def reward(self, rollouts: Rollouts) -> dict[str, np.ndarray]:
        verdict, formed = rollouts.correct_B.astype(np.float64), well_formed(rollouts, self.think_tags)
        budgets, none = rollouts.budgets_B, np.isnan(rollouts.budgets_B)
        total = hierarchical_reward(rollouts.lengths_B, verdict, formed, budgets, self.limit, self.options.beta)
        total = np.where(none, verdict, total)
        return {
            "correct": verdict,
            "length": np.where(formed, total - verdict, 0.0),
            "format": np.where(formed, 0.0, total - verdict),
        }

    def advantage(self, rollouts: Rollouts, rewards_PG: Tensor) -> Tensor:
        budgets = rollouts.by_group(rollouts.budgets_B)
        intra = intra_advantages(rewards_PG.double().numpy(), budgets, self.limit, self.options.beta)
        return super().advantage(rollouts, rewards_PG) + self.options.intra_weight * torch.from_numpy(intra.flatten())
