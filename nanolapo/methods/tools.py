"""What several methods share: the scale of lengths, unused options, rewards by group, cut answers, form of an answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nanolapo.config import Config, UserError
from nanolapo.grader.boxes import boxed_answer
from nanolapo.lengths import to_multiple
from nanolapo.rollouts import Rollout, Rollouts

# Mean tokens per answer of the models that numbers were published on (LAPO, Table 1: the mean over its four sets)
DEEPSCALER = 6229  # DeepScaleR-1.5B-Preview
R1_DISTILL = 8086  # DeepSeek-R1-Distill-Qwen-1.5B


def scale(config: Config, published_base: float, option: str) -> float:
    """Return the factor for a published number of tokens: our base's mean length over that of the published base.

    It does not depend on the generation limit: a limit that cuts many answers of one base cuts none of another. `option` is
    the key that replaces the published number; the error names it.
    """
    if not config.rollout.base_tokens:
        raise UserError(
            "rollout.base_tokens is not set: give the mean length of the base's answers in tokens (evaluate.py prints it), "
            f"or set {option}"
        )
    return config.rollout.base_tokens / published_base


def stated(config: Config, length: float) -> int:
    """Round a budget as the prompt prints it (prompt.length_multiple): a reward for another number could not be learned."""
    return to_multiple(length, config.prompt.length_multiple)


def refuse_unused(options: Any, names: Sequence[str], because: str) -> None:
    """Raise UserError if one of these options was changed, because nothing reads it beside the others."""
    for name in names:
        value = getattr(options, name)
        if value != getattr(type(options)(), name):
            raise UserError(f"method.options.{name}={value} has no effect {because}: leave it out")


def each_group(rollouts: Rollouts, reward: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    """Call reward(lengths_G, correct_G) for every group; returns float64 [B]."""
    lengths_PG, correct_PG = rollouts.by_group(rollouts.lengths_B), rollouts.by_group(rollouts.correct_B)
    return np.concatenate([reward(n, c) for n, c in zip(lengths_PG.astype(np.float64), correct_PG, strict=True)])


def as_parts(rollouts: Rollouts, total_B: np.ndarray) -> dict[str, np.ndarray]:
    """Split a total reward into the plain verdict and what the length added to it."""
    verdict_B = rollouts.correct_B.astype(np.float64)
    return {"correct": verdict_B, "length": total_B - verdict_B}


def shorten(rollouts: Rollouts, limits_B: np.ndarray) -> list[Rollout]:
    """Cut every answer that is longer than its limit in tokens; returns the cut rows, which must be graded again."""
    cut = []
    for row, limit in zip(rollouts.rows, limits_B.tolist(), strict=True):
        if len(row.response_ids) > limit:
            row.response_ids, row.sampler_logprobs = row.response_ids[:limit], row.sampler_logprobs[:limit]
            row.finished = False
            cut.append(row)
    return cut


def speaks_of_thought(config: Config) -> bool:
    """True if the config's prompt names a <think> tag. (A tag that only a chat template writes is not seen.)"""
    p = config.prompt
    return "<think>" in (p.template if p.style == "raw" else p.system + p.instruction + p.think_prefix)


def well_formed(rollouts: Rollouts, think_tags: bool) -> np.ndarray:
    """Boolean [B]: the answer shows a box where the grader looks for it (not in the thought), and ended its thought where
    thoughts are tagged."""
    return np.array([boxed_answer(text, think_tags) is not None for text in rollouts.texts])
