"""AEPO: keep the entropy near a target (arXiv 2510.08141; read-me and code of 597358816/AEPO).

Read-me: grad = grad_GRPO + alpha * E_{o ~ pi at T}[grad logp * R]. We follow the code, which has no alpha: every step a
quarter of the prompts is also sampled at T, 1.2 while the entropy is at most the target of 0.5 nats (the read-me's result:
0.75), else 0.8; of these, answers with a group advantage above 0.05 are kept, their advantage is set to 1, and they replace
at most K answers of the batch, K = 60 of 2560; half as many while the entropy is above the target.

Deviations: theirs overwrites the first rows of the batch, here an extra answer replaces one of the same prompt (first come,
first served). Last step's mean entropy is estimated by -mean(logp) of its samples, unbiased and free. At step 0 there is no
last entropy and no extra pass. Their dual clip at 3 is not set.

A replaced row keeps the reward of the answer it replaced, by which its group was measured. Its own verdict is "right", so
the logged accuracy is up to K/B too high. The trainer scores it anew. Without one: plain GRPO. State: last entropy.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanolapo.advantages import group_advantages
from nanolapo.config import Config, NotNegative, Positive, Share, UserError
from nanolapo.data.order import batch_indices
from nanolapo.data.problems import Problem
from nanolapo.methods.base import Method, MonitorPlan
from nanolapo.rollouts import Measured, Rollout, Rollouts


@dataclass(frozen=True)
class Options:
    target: NotNegative[float] = 0.5  # nats per token
    high: Positive[float] = 1.2  # temperature of the extra samples while the entropy is at most the target ...
    low: Positive[float] = 0.8  # ... and above it
    prompts: Share = 0.25  # share of the step's prompts that is sampled again
    threshold: NotNegative[float] = 0.05  # group advantage above which an extra answer is kept
    replace: NotNegative[int] | None = None  # K, answers; None: 60 of 2560


def pair_rows(group_of_extra: list[int], group_size: int) -> list[tuple[int, int]]:
    """(row of the batch, number of the extra answer), each in its own group, while there are rows left in it.

    >>> pair_rows([0, 0, 2], group_size=4)
    [(0, 0), (1, 1), (8, 2)]
    """
    used, pairs = Counter[int](), list[tuple[int, int]]()
    for extra, group in enumerate(group_of_extra):
        if used[group] < group_size:
            pairs.append((group * group_size + used[group], extra))
            used[group] += 1
    return pairs


class Aepo(Method):
    Options = Options

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.loss.old_logprobs != "trainer" or config.loss.tis_cap or config.loss.sequence_mask:
            raise UserError("aepo: two temperatures need loss.old_logprobs=trainer, no tis_cap and no sequence_mask")
        self.entropy: float | None = None  # of the last step
        self.extra: Rollouts | None = None
        self.replaced: list[int] = []

    def start(self, problems: list[Problem]) -> None:
        self.num_problems = len(problems)

    def monitor(self, step: int) -> MonitorPlan | None:
        self.extra = None
        if self.entropy is None:
            return None
        return self.extra_pass(step, self.options.high if self.entropy <= self.options.target else self.options.low)

    def possible_monitor(self, step: int) -> MonitorPlan | None:
        return self.extra_pass(step, self.options.high) if step else None

    def extra_pass(self, step: int, temperature: float) -> MonitorPlan:
        plan = self.sampling(step)
        chosen = batch_indices(self.num_problems, step, plan.num_prompts, self.config.run.seed)
        part = tuple(chosen[: max(1, round(self.options.prompts * len(chosen)))])
        return MonitorPlan(part, plan.group_size, temperature, plan.max_new_tokens, whole_rows=True)

    def on_monitor(self, found: Measured | Rollouts) -> dict[str, float]:
        assert isinstance(found, Rollouts), "the plan asks for whole rows"
        self.extra = found
        return {"aepo/extra_accuracy": float(found.correct_B.mean())}

    def num_replaced(self, num_pairs: int, num_rows: int) -> int:
        """At most K, and half of that while the entropy is above the target."""
        o = self.options
        most = max(1, round(60 / 2560 * num_rows)) if o.replace is None else o.replace
        return min(most, num_pairs) // (1 if self.entropy is not None and self.entropy <= o.target else 2)

    def edit_rollouts(self, rollouts: Rollouts) -> list[Rollout]:
        self.verdict_B, self.next_entropy, self.replaced = rollouts.correct_B, rollouts.mean_entropy, []
        if self.extra is None:
            return []
        extra, groups = self.extra, {p.id: g for g, p in enumerate(rollouts.problems)}
        verdicts_PG = torch.from_numpy(extra.by_group(extra.correct_B.astype(np.float64)))
        good_B = group_advantages(verdicts_PG).flatten().numpy() > self.options.threshold
        group_B = np.repeat([groups.get(p.id, -1) for p in extra.problems], extra.group_size)
        rows = np.nonzero(good_B & (group_B >= 0))[0]
        pairs = pair_rows(group_B[rows].tolist(), rollouts.group_size)
        for row, number in pairs[: self.num_replaced(len(pairs), len(rollouts))]:
            rollouts.put(row, extra.rows[rows[number]])
            self.replaced.append(row)
        return []

    def reward(self, rollouts: Rollouts) -> dict[str, np.ndarray]:
        return {"correct": self.verdict_B.astype(np.float64)}

    def advantage(self, rollouts: Rollouts, rewards_PG: Tensor) -> Tensor:
        advantages_B = super().advantage(rollouts, rewards_PG)
        advantages_B[self.replaced] = 1.0
        return advantages_B

    def after_step(self, rollouts: Rollouts) -> dict[str, float]:
        used = float("nan") if self.entropy is None else self.entropy
        self.entropy = None if np.isnan(self.next_entropy) else self.next_entropy
        return {"aepo/last_entropy": used, "aepo/replaced": float(len(self.replaced))}

    def state_dict(self) -> dict[str, Any]:
        return {"entropy": self.entropy}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.entropy = state["entropy"]
