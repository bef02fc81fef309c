r"""LASER: a bonus for right answers within one target length. LASER-D and -DE, in laser_adaptive.py, move the target.

Source: Liu et al., "Learn to Reason Efficiently with Adaptive Length-based Reward Shaping", arXiv 2505.15612; code
hkust-nlp/Laser. Paper text and code were both read. R = base + bonus:

    base      1 right, -0.5 wrong, -1 badly formed (no box, or no end of the thought), right or not
    bonus     + alpha if right and L <= L_T                      alpha 0.5, L_T 8192 of 16,384 tokens

Lengths scale with the limit. The published entropy bonus (0.001) is not built here.

Edge cases: no right answer -> no length signal, only the form counts. A cut answer mostly has no box and is badly formed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from nanolapo.config import Config
from nanolapo.methods.base import Method
from nanolapo.methods.tools import scale, speaks_of_thought, well_formed
from nanolapo.rollouts import Rollouts

PAPER_LIMIT = 16384


@dataclass(frozen=True)
class Options:
    alpha: float = 0.5  # the bonus
    target: int | None = None  # L_T in tokens; None: 8192 (D, DE: 4096) at a limit of 16,384
    think_tags: bool | None = None  # True: an answer must end its thought; None: if the config's prompt names <think>


class Laser(Method):
    """One target for all problems."""

    Options: Any = Options
    paper_target = 8192

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        o, self.scale = self.options, scale(config, PAPER_LIMIT)
        self.target = max(1, round(self.paper_target * self.scale)) if o.target is None else o.target
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
