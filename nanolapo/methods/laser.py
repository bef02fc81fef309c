r"""LASER: a bonus for right answers within one target length. LASER-D and -DE, in laser_adaptive.py, move the target.

Source: Liu et al., "Learn to Reason Efficiently with Adaptive Length-based Reward Shaping", arXiv 2505.15612; code
hkust-nlp/Laser. Paper text and code were both read. R = base + bonus:

    base      1 right, -0.5 wrong, -1 badly formed (no box, or no end of the thought), right or not
    bonus     + alpha if right and L <= L_T                      alpha 0.5, L_T 8192 tokens

L_T scales with the base's mean length (published on R1-Distill-1.5B, mean 8086). But it is at most half of our limit, as
8192 of 16,384 is: near the limit no right answer would miss it, and the bonus would teach nothing. The published
entropy bonus (0.001) is not built here.

Edge cases: no right answer -> no length signal, only the form counts. A cut answer mostly has no box and is badly formed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from nanolapo.config import Config, NotNegative, Positive, UserError
from nanolapo.methods.base import Method
from nanolapo.methods.tools import R1_DISTILL, scale, speaks_of_thought, well_formed
from nanolapo.rollouts import Rollouts


@dataclass(frozen=True)
class Options:
    alpha: NotNegative[float] = 0.5  # the bonus
    target: Positive[int] | None = None  # L_T in tokens; None: 8192 (D, DE: 4096), scaled
    think_tags: bool | None = None  # True: an answer must end its thought; None: if the config's prompt names <think>


class Laser(Method):
    """One target for all problems."""

    Options: Any = Options
    published_target = 8192

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        o, self.target = self.options, self.options.target
        if self.target is None:
            tokens = round(self.published_target * scale(config, R1_DISTILL, "method.options.target"))
            self.target = max(1, min(tokens, config.rollout.max_new_tokens // 2))
        if self.target > config.rollout.max_new_tokens:
            raise UserError(
                f"method.options.target={self.target}: need 1 <= target <= rollout.max_new_tokens="
                f"{config.rollout.max_new_tokens}"
            )
        self.think_tags = speaks_of_thought(config) if o.think_tags is None else o.think_tags

    def targets(self, rollouts: Rollouts) -> np.ndarray:
        """Target length of each row, [B]."""
        return np.full(len(rollouts), self.target)

    def bonus(self, rollouts: Rollouts, formed: np.ndarray) -> np.ndarray:
        """Boolean [B]: the rows that get alpha."""
        return formed & rollouts.correct_B & (rollouts.lengths_B <= self.targets(rollouts))

    def reward(self, rollouts: Rollouts) -> dict[str, np.ndarray]:
        correct, formed = rollouts.correct_B, well_formed(rollouts, self.think_tags)
        base = np.where(~formed, -1.0, np.where(correct, 1.0, -0.5))
        verdict = correct.astype(np.float64)
        length = self.options.alpha * self.bonus(rollouts, formed)
        return {"correct": verdict, "format": base - verdict, "length": length}
