"""Tighter limits as the only pressure: plain truncation, and ThinkPrune.

ThinkPrune: Hou et al., arXiv 2504.01296; code UCSB-NLP-Chang/ThinkPrune (code read, paper text not). The reward is 1 for a
right answer within the limit and 0 otherwise, so an unfinished answer is wrong; the prompt also states the limit.
ThinkPrune4k keeps one limit, 4000; ThinkPruneIterative goes 4000 -> 3000 -> 2000. Plain truncation is ThinkPrune4k without
the sentence.

These limits scale with our base's mean as on DeepScaleR-1.5B-Preview, whose mean answer has 6229 tokens: 0.64, 0.48 and
0.32 of it, never above rollout.max_new_tokens. ThinkPrune's are rounded as prompts print lengths (prompt.length_multiple),
so that the printed limit is the limit. LAPO's table has ThinkPrune-4k on that base. The released scripts have R1-Distill
(8086 tokens), where 4000 is 0.49: method.options.limits.

Deviations: the stages follow each other within one run, so the optimizer and the reference model go on; theirs restart.
They pick the model of a stage by validation (step 180 of the first); here stages take equal parts of the run (ours; option
`first_steps`). Our sentence ends the question, theirs the system prompt.

Edge: if all answers of a group exceed the limit, all rewards are 0 and teach nothing, a known weakness early in a stage.
No state: the run's progress decides the stage.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

from nanolapo.config import Config, NotNegative, Positive, UserError
from nanolapo.data.problems import Problem
from nanolapo.data.prompts import Guidance, thinkprune_guidance
from nanolapo.lengths import to_multiple
from nanolapo.methods.base import Method, SamplingPlan
from nanolapo.methods.tools import DEEPSCALER, scale


@dataclass(frozen=True)
class Options:
    # Generation limit of each stage, tokens; None: the published ones, scaled
    limits: tuple[Positive[int], ...] | None = None
    # Step at which each stage begins; None: equal parts of the run
    first_steps: tuple[NotNegative[int], ...] | None = None


def limit_of_step(step: int, limits: Sequence[int], first_steps: Sequence[int]) -> int:
    """The limit of the stage that `step` is in.

    >>> [limit_of_step(step, [4000, 3000, 2000], [0, 10, 20]) for step in (0, 9, 10, 19, 20, 99)]
    [4000, 4000, 3000, 3000, 2000, 2000]
    """
    return limits[bisect_right(first_steps, step) - 1]


class Truncation(Method):
    """Accuracy only, under a tighter limit."""

    Options = Options
    published: tuple[int, ...] = (4000,)  # tokens
    is_printed = False

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        most, multiple = config.rollout.max_new_tokens, config.prompt.length_multiple if self.is_printed else 1
        scaled = (min(n * scale(config, DEEPSCALER, "method.options.limits"), most) for n in self.published)
        limits = self.options.limits or tuple(scaled)
        if max(*limits, multiple) > most:
            raise UserError(
                f"method.options.limits={list(limits)}, prompt.length_multiple={multiple}: need both to be at most "
                f"rollout.max_new_tokens={most}"
            )
        # A printed limit is a multiple, so the largest multiple within the run's limit bounds it.
        self.limits = tuple(min(to_multiple(n, multiple), most // multiple * multiple) for n in limits)
        stages, first_steps = len(self.limits), self.options.first_steps
        if first_steps and (len(first_steps) != stages or first_steps[0] or list(first_steps) != sorted(first_steps)):
            raise UserError(
                f"method.options.first_steps={list(first_steps)}: give one step for each of the {stages} limits, "
                "ascending, the first 0"
            )

    def limit(self, step: int) -> int:
        if self.options.first_steps:
            return limit_of_step(step, self.limits, self.options.first_steps)
        return self.limits[int(self.progress * len(self.limits) + 1e-9)]

    def sampling(self, step: int) -> SamplingPlan:
        return replace(super().sampling(step), max_new_tokens=self.limit(step))


class ThinkPrune4k(Truncation):
    """One limit throughout, stated in the prompt."""

    is_printed = True

    def guidance(self, problem: Problem, rollout_index: int, step: int) -> Guidance:
        return thinkprune_guidance(self.limit(step))


class ThinkPruneIterative(ThinkPrune4k):
    """The limit shrinks from stage to stage (I2k)."""

    published = (4000, 3000, 2000)
