"""The sentences in which prompts state a length: the paper's own, those of its ablations and of its rivals."""

from __future__ import annotations

import random

from nanolapo.data.prompts import (
    Guidance,
    curriculum_guidance,
    exact_guidance,
    hbpo_guidance,
    l1_max_guidance,
    outside_guidance,
    range_guidance,
    thinkprune_guidance,
)


def state_length(length: int, rng: random.Random, papers: bool) -> Guidance:
    """A sentence that is true of a solution of `length` tokens: the paper's, or one of the others."""
    near = max(1, round(length / 10)) * 10
    if papers:
        return exact_guidance(near)
    limit = -(-length // 10) * 10 + rng.choice((0, 10, 20, 40, 80))  # an upper limit need not be used up
    forms = (outside_guidance(near), curriculum_guidance(near), range_guidance(max(10, near - 10), near + 10, near),
             l1_max_guidance(limit), thinkprune_guidance(limit), hbpo_guidance(limit))  # fmt: skip
    return rng.choice(forms)
