"""Exercise 6: the cosine reward as a method of its own. Run: make exercise N=6"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from rows import make_rows

from nanolapo.config import UserError
from nanolapo.config_file import load_config
from nanolapo.methods import load_method
from nanolapo.methods.base import Method

ROOT = Path(__file__).parents[2]
LENGTHS = [1, 64, 128, 200, 256, 256, 30, 90]
CORRECT = [True, False, True, False, False, True, True, False]
FINISHED = [True, True, True, True, False, False, True, True]
PUBLISHED = {"right_short": 2.0, "right_long": 1.0, "wrong_short": -10.0, "wrong_long": 0.0, "cut": -10.0}


def make(*overrides: str) -> Method:
    files = ROOT / "nanolapo/methods/cosine.py", ROOT / "configs/methods/cosine.yaml"
    missing = [str(path.relative_to(ROOT)) for path in files if not path.exists()]
    assert not missing, f"a method is two files; missing: {', '.join(missing)}"
    method = f"method={ROOT}/configs/methods/cosine.yaml"
    try:
        return load_method(load_config(ROOT / "configs/demo/stage1.yaml", [method, *overrides]))
    except UserError as error:
        raise AssertionError(f"configs/methods/cosine.yaml does not load: {error}") from None


def by_hand(length: int, correct: bool, finished: bool, limit: int, o: dict[str, float]) -> float:
    """The formula at one answer: the cosine goes from the value at length 0 to the value at the limit."""
    if not finished:
        return o["cut"]
    short, long = (o["right_short"], o["right_long"]) if correct else (o["wrong_short"], o["wrong_long"])
    return (short + long) / 2 + (short - long) / 2 * math.cos(math.pi * length / limit)


def compare(method: Method, limit: int, options: dict[str, float]) -> None:
    rollouts = make_rows(LENGTHS, group_size=4, correct=CORRECT, finished=FINISHED)
    parts = method.reward(rollouts)
    got = sum(parts.values(), np.zeros(len(LENGTHS)))
    for n, c, f, reward in zip(LENGTHS, CORRECT, FINISHED, got, strict=True):
        want = by_hand(n, c, f, limit, options)
        what = ("right" if c else "wrong") + ("" if f else ", cut")
        assert reward == pytest.approx(want), (
            f"{n} tokens of {limit}, {what}: the formula gives {want:.6g}, the reward is {reward:.6g}"
        )
    assert "correct" in parts and parts["correct"].tolist() == [float(c) for c in CORRECT], (
        'the part "correct" must be the plain verdict, 1 or 0; what length adds or takes is another part '
        "(nanolapo/methods/tools.py, as_parts)"
    )


def test_the_published_numbers():
    compare(make(), 256, PUBLISHED)


def test_the_limit_is_the_runs():
    compare(make("rollout.max_new_tokens=512"), 512, PUBLISHED)


def test_the_five_numbers_are_options():
    other = {"right_short": 1.0, "right_long": 0.5, "wrong_short": -1.0, "wrong_long": -0.25, "cut": -2.0}
    compare(make(*(f"method.options.{name}={value}" for name, value in other.items())), 256, other)


def test_it_is_a_reward_and_nothing_else():
    """The rest of the step stays GRPO's, and nothing is remembered."""
    method = make()
    changed = [name for name in vars(Method) if not name.startswith("_") and name in vars(type(method))]
    extra = set(changed) - {"reward", "Options"}
    assert not extra, f"the formula is a reward: {', '.join(sorted(extra))} should be left to Method"
