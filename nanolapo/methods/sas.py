"""SAS: Step-level Advantage Selection (arXiv 2604.24003; code HanNight/SAS). The reward is 1 or 0, under a tight limit.

The thought (up to </think>, else the whole answer) is cut into steps after every token whose text contains a blank line. A
step's confidence is the mean old log-prob of its tokens; n steps, r = 0.3. Advantage 0 goes to

    right answers   the ceil(r n) least confident steps, so they are not reinforced
    wrong answers   the most confident steps; the ceil((1 - r) n) least confident ones keep their advantage

Tokens from </think> on keep their advantage. This is the paper's description. The released code computes ceil(n_splits +
1 * r), a slip of operator precedence, which is n: every right answer loses its whole thought and no wrong one is protected.

Old log-probs are those recorded while sampling: the same policy, up to the rounding of the engine, and only their order
counts. Of equally confident steps the earlier counts as less confident. A step without a token (a blank line at the very
end) does not count. Edge: without a blank line there is one step, so a right answer loses its whole thought and a wrong one
nothing; for models that write no blank lines (the demo's) set `separator`. No state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanolapo.config import Share
from nanolapo.data.problems import Problem
from nanolapo.grader.boxes import THOUGHT_TAG
from nanolapo.methods.base import Method
from nanolapo.model.folder import load_tokenizer
from nanolapo.rollouts import Rollouts


@dataclass(frozen=True)
class Options:
    share: Share = 0.3  # r
    separator: str = "\n\n"  # a token that contains this ends a step


def split_steps(pieces: Sequence[str], separator: str = "\n\n") -> list[slice]:
    """Token ranges of the steps of the thought; pieces: the text of every token.

    >>> split_steps(["a", " b.\\n\\n", "c", "</", "think>", "7"])
    [slice(0, 2, None), slice(2, 3, None)]
    """
    starts = np.cumsum([0, *map(len, pieces)])
    tag = next((tag.start() for tag in THOUGHT_TAG.finditer("".join(pieces)) if tag["end"]), -1)
    begins_tag = int(np.searchsorted(starts, tag, side="right")) - 1  # the token
    end = len(pieces) if tag < 0 else begins_tag
    cuts = [t + 1 for t in range(end) if separator in pieces[t]]
    edges = [0, *cuts, *([] if cuts and cuts[-1] == end else [end])]
    return [slice(a, b) for a, b in zip(edges, edges[1:], strict=False) if a < b]


def kept_steps(confidences: np.ndarray, correct: bool, share: float = 0.3) -> np.ndarray:
    """Boolean [n]: the steps that keep their advantage.

    >>> kept_steps(np.array([-1.0, -3.0, -2.0, -0.5]), correct=True)     # ceil(0.3 * 4) = 2 least confident ones go
    array([ True, False, False,  True])
    >>> kept_steps(np.array([-1.0, -3.0, -2.0, -0.5]), correct=False)    # ceil(0.7 * 4) = 3 least confident ones stay
    array([ True,  True,  True, False])
    """
    n = len(confidences)
    part = share if correct else 1.0 - share
    least_confident = np.zeros(n, dtype=bool)
    # 0.1 * 30 is 3.0000000000000004; without the small number ceil would give 4.
    least_confident[np.argsort(confidences, kind="stable")[: math.ceil(n * part - 1e-9)]] = True
    return ~least_confident if correct else least_confident


class Sas(Method):
    Options = Options

    def start(self, problems: list[Problem]) -> None:
        self.tokenizer = load_tokenizer(self.config.model.path)
        self.texts: dict[int, str] = {}  # of the tokens met so far

    def piece(self, token: int) -> str:
        if token not in self.texts:
            self.texts[token] = str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False))
        return self.texts[token]

    def advantage(self, rollouts: Rollouts, rewards_PG: Tensor) -> Tensor:
        o, advantages_B = self.options, super().advantage(rollouts, rewards_PG)
        advantages_BT = advantages_B[:, None].repeat(1, max(1, int(rollouts.lengths_B.max())))
        for b in torch.nonzero(advantages_B).flatten().tolist():
            row = rollouts.rows[b]
            advantages_BT[b, len(row.response_ids) :] = 0.0  # or a row without any signal would seem to have some
            steps = split_steps([self.piece(token) for token in row.response_ids.tolist()], o.separator)
            confidences = np.array([row.sampler_logprobs[step].mean() for step in steps])
            kept = kept_steps(confidences, row.correct, o.share)
            for step, keep in zip(steps, kept, strict=True):
                if not keep:
                    advantages_BT[b, step] = 0.0
        return advantages_BT
