r"""AdaptThink: learn when not to think (Zhang et al., arXiv 2505.13417; code THU-KEG/AdaptThink read, paper not).

Half of a group is made to begin with `closing` (</think>: no thought), the other half with `opening`, a usual first word
of a thought (theirs: Alright). p_ref(q) is the accuracy of the first model, sampled freely before step 0.

    A = c - p_ref(q) + delta * [no thought]          delta = 0.05; no group mean, no standard deviation

The given token belongs to the answer: it counts in the length and in the limit, and it is trained, which is how the
model learns to choose. Its old log-prob is log 0.5, the probability with which it was given, and not that of any model. The
sampler's record says the same, so importance weights (TIS, sequence_mask) are 1 there. It is left out of the mismatch and
the entropy, because no model drew it.

The loss is theirs as well: GSPO with clips of 0.2 (configs/methods/adapt-think.yaml). With a ratio for each token, a first
token that the model never chooses would have a ratio near 0, and hence next to no gradient.

Deviation: theirs cuts answers without a thought at 4,096 of 16,384 tokens; here all have the same limit. While training,
the logged accuracy and length are those of answers whose beginning was given: evaluate the model for its own.

The demo's base has no answers without a thought, but its first word names its manner. `closing: " Quick"` and `opening:
" Careful"` let it learn when to be quick (configs/demo/compare.yaml); the defaults are refused there.
Edge: where the first model is never right, a wrong answer without a thought has A = delta, so it is reinforced.
State: the reference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from nanolapo.config import Config, NotNegative, Positive, UserError
from nanolapo.data.problems import Problem
from nanolapo.data.prompts import GivenTokens, Guidance, Prompter
from nanolapo.methods.reference import Reference
from nanolapo.model.folder import load_tokenizer
from nanolapo.rollouts import Rollouts


@dataclass(frozen=True)
class Options:
    delta: NotNegative[float] = 0.05
    closing: str = "</think>"  # first token of an answer without a thought
    opening: str = "Alright"  # first token of the others: a word with which the base's thoughts begin
    reference_samples: Positive[int] = 16  # per problem, before step 0


class AdaptThink(Reference):
    Options = Options
    compares_group = uses_normalize_std = False
    closing_id = opening_id = -1

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.rollout.group_size % 2:
            raise UserError(
                f"rollout.group_size={config.rollout.group_size}: adapt_think halves a group; it must be even"
            )
        if config.rollout.max_new_tokens < 2:
            raise UserError("rollout.max_new_tokens=1: adapt_think gives the first token; leave at least one to sample")

    def start(self, problems: list[Problem]) -> None:
        super().start(problems)
        tokenizer = load_tokenizer(self.config.model.path)
        for name in ("closing", "opening"):
            text = getattr(self.options, name)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(ids) != 1:
                raise UserError(
                    f"method.options.{name}={text!r} is {len(ids)} tokens of {self.config.model.path!r}; give one token, "
                    "with which its answers can begin"
                )
            setattr(self, f"{name}_id", ids[0])
        if self.closing_id == self.opening_id:
            raise UserError(
                f"method.options.opening={self.options.opening!r} is the same token as closing; give another one"
            )
        prompt = Prompter(tokenizer, self.config.prompt).render("")
        if "</think>" in self.options.closing and not prompt.rstrip().endswith("<think>"):
            raise UserError(
                "adapt_think: the prompt does not end in an open <think>, so there is no thought to close; set "
                "prompt.think_prefix=<think>, or method.options.closing"
            )

    def guidance(self, problem: Problem, rollout_index: int, step: int) -> Guidance:
        if not self.reference:  # the first model is measured freely
            return Guidance()
        no_thought = rollout_index < self.config.rollout.group_size // 2
        return Guidance(given=GivenTokens((self.closing_id if no_thought else self.opening_id,), math.log(0.5)))

    def closed(self, rollouts: Rollouts) -> np.ndarray:
        """Boolean [B]: the answers that were made to begin without a thought."""
        return np.array([row.num_given == 1 and row.response_ids[0] == self.closing_id for row in rollouts.rows])

    def reward(self, rollouts: Rollouts) -> dict[str, np.ndarray]:
        p_ref_P = np.array([self.reference[problem.id][1] for problem in rollouts.problems])
        return {
            "correct": rollouts.correct_B.astype(np.float64),
            "reference": -np.repeat(p_ref_P, rollouts.group_size),
            "closed": self.options.delta * self.closed(rollouts),
        }

    def advantage(self, rollouts: Rollouts, rewards_PG: Tensor) -> Tensor:
        return rewards_PG.flatten()

    def after_step(self, rollouts: Rollouts) -> dict[str, float]:
        closed_B, correct_B = self.closed(rollouts), rollouts.correct_B
        return {
            "adapt_think/closed_accuracy": float(correct_B[closed_B].mean()),
            "adapt_think/open_accuracy": float(correct_B[~closed_B].mean()),
        }
