"""A base for tests: the demo's, pre-trained for seconds on what is learned first, so that many of its answers are right."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from nanolapo.config import DemoConfig
from nanolapo.data.demo_task import random_sums
from nanolapo.data.prompts import NO_GUIDANCE, exact_guidance
from nanolapo.demo import pretrain as demo


def draw_small_example(rng: random.Random, *_: object) -> tuple[str, str]:
    """A sum of level 0, Quick (42 tokens) or Careful (78). Three prompts of ten say which, in the paper's sentence."""
    sums, (manner, length) = random_sums(rng, 0), rng.choice((("Quick", 40), ("Careful", 80)))
    guidance = exact_guidance(length) if rng.random() < 0.3 else NO_GUIDANCE
    prompt = demo.TEMPLATE.replace("{question}", sums.question()) + guidance.inside
    return prompt, demo.write_solution(sums, manner)


def make_small_base(folder: Path, hidden_size: int = 64) -> None:
    """At 600 steps most of its answers are right, at 500 a third: it learns suddenly which digits belong together."""
    settings = DemoConfig(steps=600, hidden_size=hidden_size, layers=2, batch_tokens=1000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "draw_example", draw_small_example)
        demo.pretrain(str(folder), settings, seed=0)
