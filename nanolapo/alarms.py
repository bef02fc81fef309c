"""Alarms for runs that go on but cannot be trusted, or cannot learn.

Two failures of RL trainers are easily missed: sampler and trainer no longer hold the same policy, or the reward no longer
tells answers apart. Both are watched at every step. The first stops the run; the second prints a warning.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from nanolapo.config import Config, RunStopped

NEARLY_ALL = 0.9  # of the answers, or of the groups: the rest does not make a run that learns
FIRST_LIMIT = 0.2  # at step 0 in bf16: 0.01 to 0.05 is normal, a stale tied head gives 0.4 to 1.5


class MismatchError(RunStopped):
    """Sampler and trainer disagree about the log-probs of the sampled tokens far more than at step 0."""


class Alarms:
    """Remembers the mismatch of the engine's first step and how long each symptom has lasted; part of every checkpoint."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.base_mismatch: float | None = None
        self.lasted: dict[str, int] = {}

    def check_mismatch(self, step: int, mean_mismatch: float) -> None:
        """Rule zero: d = mean |logp_trainer - logp_sampler| must stay near its first value. Raises MismatchError."""
        if math.isnan(mean_mismatch):
            raise MismatchError(
                f"step {step}: the trainer's log-probs are not finite: resume with a lower learning rate"
            )
        r, first = self.config.rollout, self.base_mismatch
        if self.base_mismatch is None:
            self.base_mismatch = mean_mismatch
            # A sampler that is wrong from the start must not become its own measure. In float32 even 0.1 is wrong: a mask
            # without the end token gave 0.19 with the demo's confident model.
            in_float32 = self.config.model.dtype == "float32" and r.dtype in ("", "float32")
            limit = min(FIRST_LIMIT, r.mismatch_floor) if in_float32 else FIRST_LIMIT
        else:
            limit = max(self.base_mismatch * r.mismatch_factor, r.mismatch_floor)
        if not mean_mismatch <= limit:
            raise MismatchError(
                f"step {step}: sampler and trainer disagree, mean |dlogp| = {mean_mismatch:.4g}"
                f"{'' if first is None else f' against {first:.4g} at first'} (limit {limit:.4g}): the sampler does not "
                "hold the trained weights, or samples another distribution"
            )

    def check_learning(self, step: int, metrics: dict[str, float], examples: Sequence[str]) -> list[str]:
        """Return a warning in words for each symptom that lasts; `examples` are completions to show with them."""
        limit, in_groups = self.config.rollout.max_new_tokens, self.config.rollout.group_size > 1
        symptoms = [  # name, steps in a row before a warning, is it there?, words
            ("truncated", 3, metrics["truncated"] >= NEARLY_ALL,
             f"{100 * metrics['truncated']:.0f} % of the answers were cut at rollout.max_new_tokens={limit}: a cut answer "
             "is wrong, so next to nothing can be learned; raise the limit or choose easier problems"),
            ("flat", 5, metrics["no_signal"] == 1.0 and not metrics.get("updates"),  # SPO compares over time, not in groups
             "the rewards of every group were all equal, so there is no signal: problems too hard or too easy, or the "
             "grader does not understand the prompt's answer format; three completions: " + " | ".join(examples[:3])),
            ("empty", 3, metrics["empty"] > 0.5,
             "more than half of the answers had at most one token: the policy has collapsed; lower train.learning_rate, or "
             "weaken the length reward"),
            ("looping", 3, metrics["repetition"] > 0.8,
             "answers mostly repeated themselves (4-grams): the policy is stuck in loops; one completion: "
             + "".join(examples[:1])),
            ("copies", 5, metrics["unique_per_group"] <= 2 - NEARLY_ALL and in_groups,
             "in nearly all groups all answers were the same: the policy is deterministic, or the sampler ignores its "
             "seeds; no group can teach anything"),
            ("dropped", 1, metrics.get("kept_groups") == 0,
             "the method has kept no group to train on (dynamic sampling: in none of its rounds), so nothing was learned: "
             "problems too hard or too easy, or too few rounds"),
        ]  # fmt: skip
        warnings = []
        for name, patience, present, words in symptoms:
            lasted = self.lasted[name] = self.lasted.get(name, 0) + 1 if present else 0
            if lasted and lasted % patience == 0:
                warnings.append(f"WARNING step {step}: for {lasted} step{'s' * (lasted > 1)} {words}")
        return warnings

    def state_dict(self) -> dict[str, Any]:
        return {"base_mismatch": self.base_mismatch, "lasted": dict(self.lasted)}

    def load_state_dict(self, state: dict[str, Any], same_engine: bool = True) -> None:
        """same_engine: False if another engine samples from here on. It rounds in another way, so its first step counts."""
        self.base_mismatch = state["base_mismatch"] if same_engine else None
        self.lasted |= state["lasted"]
