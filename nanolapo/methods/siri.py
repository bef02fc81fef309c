r"""SIRI: the generation limit swings between compression and expansion, cycle after cycle.

Source: Wen et al., arXiv 2509.25176. Paper text read.

    R = 1 if the first cap(t) tokens hold the right answer, else 0      (a cut answer counts if its box is already there)
    cap(t) = (Lmax + Lmin) / 2 + (Lmax - Lmin) / 2 * cos(2 pi t / T)    T 640 steps, three cycles

Lmax 16,384 and Lmin 8,192 were published on R1-Distill-1.5B (mean 8086 tokens). Lmax scales with our base's mean and is at
most rollout.max_new_tokens; Lmin is half of Lmax, as published. So the limit swings even where the run's own is tight.

`shape` has two variants. stair: Lmax for half a cycle, then Lmin; where it steps is our reading. stair-cosine: flat for an
eighth of the cycle on both sides of each end, half a cosine between.

The length follows the cap with a delay (100 to 200 of 640 steps). Published are the models at the last trough (SIRI-low)
and at the last peak (SIRI-high). The run's last model is that of the peak, with cycles 2.5 that of the trough. For all of
them give `period`, and half of it as run.export_every. Where sampled tokens end the run, cycles follow the share of them.

Edge: a cap below all answers of a group teaches nothing (all rewards 0). No state: the cap is a function of the progress.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from nanolapo.config import Config, Positive, UserError
from nanolapo.methods.base import Method, SamplingPlan
from nanolapo.methods.tools import R1_DISTILL, refuse_unused, scale
from nanolapo.rollouts import Rollouts


@dataclass(frozen=True)
class Options:
    shape: Literal["cosine", "stair", "stair-cosine"] = "cosine"
    max_tokens: Positive[int] | None = None  # Lmax; None: 16,384, scaled, at most rollout.max_new_tokens
    min_tokens: Positive[int] | None = None  # Lmin; None: half of Lmax
    cycles: Positive[float] = 3.0  # in the whole run; n and a half ends at a trough
    period: Positive[int] | None = None  # T, steps of a cycle; None: by `cycles`


def wave(phase: float, shape: str = "cosine") -> float:
    """1 at Lmax, -1 at Lmin; phase: cycles done.

    >>> [round(wave(phase), 2) for phase in (0.0, 0.25, 0.5, 0.75, 1.0)]
    [1.0, 0.0, -1.0, -0.0, 1.0]
    >>> [round(wave(x / 8, "stair-cosine"), 2) for x in range(9)]
    [1.0, 1.0, 0.0, -1.0, -1.0, -1.0, -0.0, 1.0, 1.0]
    """
    if shape == "cosine":
        return math.cos(2 * math.pi * phase)
    if shape == "stair-cosine":
        phase += 1 / 8  # a cycle begins in the middle of its flat part
    sign, half = (1.0 if phase % 1.0 < 0.5 else -1.0), phase % 0.5
    return sign if shape == "stair" else sign * math.cos(math.pi * min(max(4 * half - 1, 0.0), 1.0))


class Siri(Method):
    """Accuracy only, under a limit that swings."""

    Options = Options
    cut_answers_count = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        o, most = self.options, config.rollout.max_new_tokens
        if o.period:
            refuse_unused(o, ["cycles"], "beside period")
        published = o.max_tokens or 16384 * scale(config, R1_DISTILL, "method.options.max_tokens")
        self.high = self.now = o.max_tokens or max(1, min(round(published), most))
        self.low = o.min_tokens or max(1, round(min(published, most) / 2))
        if not 1 <= self.low <= self.high <= most:
            raise UserError(
                f"method.options.min_tokens={self.low}, max_tokens={self.high}: need 1 <= min_tokens <= max_tokens <= "
                f"rollout.max_new_tokens={most}"
            )

    def cap(self, step: int) -> int:
        o = self.options
        phase = step / o.period if o.period else self.progress * o.cycles
        return round((self.high + self.low) / 2 + (self.high - self.low) / 2 * wave(phase, o.shape))

    def sampling(self, step: int) -> SamplingPlan:
        self.now = self.cap(step)
        return replace(super().sampling(step), max_new_tokens=self.now)

    def after_step(self, rollouts: Rollouts) -> dict[str, float]:
        return {"siri/limit": float(self.now)}
