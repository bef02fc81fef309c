r"""HAPO, history-aware: be shorter than the shortest right answer to this problem so far.

Source: Huang, Zhang, Cardie, arXiv 2505.11225; code HCY123902/HAPO. We read the code, and of the paper the abstract.
(Another method of the same name, token-aware, is arXiv 2509.16591.)

h is the least length of a right answer to the problem in earlier steps; none at first. f(L) = cos(pi/2 * min(L / h,
2)): 1 for no length, 0 at L = h, -1 from 2h on.

    R = c + w * R_len, w = 1         R_len = 0 without h; right: max(-0.7, f); wrong: min(0, f)

So a right answer gets at least 0.3 and a wrong one at most 0, and a short wrong one loses nothing. h is updated after
the rewards. mode "mean": h is the mean of all right lengths so far. shape "linear": the code's other form, see
linear_shape. Their optional repetition penalty (weight 0 by default) is left out.

Edge cases: no right answer -> h stays. h only falls in mode "min". Cut answers never enter h.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from nanolapo.config import Config, NotNegative, UserError
from nanolapo.methods.base import Method
from nanolapo.methods.tools import as_parts
from nanolapo.rollouts import Rollouts


def cosine_shape(lengths: np.ndarray, correct: np.ndarray, history: float) -> np.ndarray:
    """R_len of one group.

    >>> cosine_shape(np.array([50, 100, 150, 300, 50, 150]), np.array([1, 1, 1, 1, 0, 0]), history=100.0).round(4)
    array([ 0.7071,  0.    , -0.7   , -0.7   ,  0.    , -0.7071])
    """
    f = np.cos(np.pi / 2 * np.minimum(lengths / history, 2.0))
    return np.where(correct, np.maximum(-0.7, f), np.minimum(0.0, f)) + 0.0


def linear_shape(lengths: np.ndarray, correct: np.ndarray, history: float) -> np.ndarray:
    """R_len of one group, linear, with a tolerance of a tenth.

    >>> linear_shape(np.array([50, 105, 150, 300, 50, 150]), np.array([1, 1, 1, 1, 0, 0]), history=100.0).round(4)
    array([ 0.5,  0. , -0.4, -0.7,  0. , -0.4])
    """
    shorter = np.maximum(0.0, 1.0 - lengths / history)
    longer = np.maximum(0.0, (lengths - 1.1 * history) / history)
    return np.where(correct, shorter - np.minimum(0.7, longer), -np.minimum(1.0, longer)) + 0.0


SHAPES = {"cosine": cosine_shape, "linear": linear_shape}


@dataclass(frozen=True)
class Options:
    weight: NotNegative[float] = 1.0  # w
    shape: str = "cosine"  # cosine | linear
    mode: str = "min"  # min | mean: h is this of the right lengths so far


class Hapo(Method):
    """A length reward against the problem's own history."""

    Options = Options

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if self.options.shape not in SHAPES or self.options.mode not in ("min", "mean"):
            raise UserError("method.options: shape is cosine or linear, mode is min or mean")
        self.history: dict[str, tuple[float, int]] = {}  # problem id -> (h, number of right answers in it)

    def reward(self, rollouts: Rollouts) -> dict[str, np.ndarray]:
        lengths, correct = rollouts.by_group(rollouts.lengths_B), rollouts.by_group(rollouts.correct_B)
        total = correct.astype(np.float64)
        for g, problem in enumerate(rollouts.problems):
            if problem.id in self.history:
                shape = SHAPES[self.options.shape]
                total[g] += self.options.weight * shape(lengths[g], correct[g], self.history[problem.id][0])
        return as_parts(rollouts, total.flatten())

    def after_step(self, rollouts: Rollouts) -> dict[str, float]:
        usable = rollouts.by_group(rollouts.correct_B & rollouts.finished_B)
        for g, problem in enumerate(rollouts.problems):
            self.update(problem.id, rollouts.by_group(rollouts.lengths_B)[g][usable[g]])
        known = [h for h, _ in self.history.values()]
        return {"history/known": float(len(known)), "history/mean": float(np.mean(known)) if known else 0.0}

    def update(self, problem_id: str, right_lengths: np.ndarray) -> None:
        if not len(right_lengths):
            return
        old, count = self.history.get(problem_id, (np.inf, 0))
        total = count + len(right_lengths)
        if self.options.mode == "min":
            new = min(old, float(right_lengths.min()))
        else:
            new = ((old * count if count else 0.0) + float(right_lengths.sum())) / total
        self.history[problem_id] = (max(1.0, new), total)

    def state_dict(self) -> dict[str, Any]:
        return {"history": {problem_id: list(entry) for problem_id, entry in self.history.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history = {problem_id: (float(h), int(count)) for problem_id, (h, count) in state["history"].items()}
