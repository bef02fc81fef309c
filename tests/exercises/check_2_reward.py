"""Exercise 2: lapo.one_sided. Run: make exercise N=2"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from rows import make_rows

from nanolapo.config import LapoConfig
from nanolapo.config_file import load_config
from nanolapo.methods.lapo import Discovery

DEMO = Path(__file__).parents[2] / "configs/demo/stage1.yaml"
LENGTHS = [20, 40, 60, 80, 100, 130, 10, 55, 90, 90, 5, 91, 92, 93, 300, 94]  # two groups of eight
CORRECT = [True] * 6 + [False, True] + [False, True, True, True, False, True, True, False]


def rewards(*overrides: str) -> np.ndarray:
    """Of the two groups, the sum of all parts."""
    method = Discovery(load_config(DEMO, list(overrides)))
    return sum(method.reward(make_rows(LENGTHS, group_size=8, correct=CORRECT)).values(), np.zeros(len(LENGTHS)))


def by_hand(alpha: float, decay: float, low: float, high: float, one_sided: bool) -> list[float]:
    """Eq. 2, 4 and 5, answer by answer."""
    out = []
    for g in (0, 8):
        right = sorted(n for n, c in zip(LENGTHS[g : g + 8], CORRECT[g : g + 8], strict=True) if c)
        bottom, top = (float(np.quantile(right, share / 100)) for share in (low, high))
        for n, c in zip(LENGTHS[g : g + 8], CORRECT[g : g + 8], strict=True):
            outside = n - top if n > top else 0.0 if one_sided or n >= bottom else bottom - n
            out.append(1 + alpha * max(0.0, 1 - outside / decay) if c else 0.0)
    return out


def say(got: np.ndarray, want: list[float], what: str) -> str:
    row = int(np.argmax(abs(got - np.array(want))))
    verdict = "right" if CORRECT[row] else "wrong"
    return f"{what}: a {verdict} answer of {LENGTHS[row]} tokens should get {want[row]:.4g}, it gets {got[row]:.4g}"


def test_the_key_is_there():
    fields = {field.name: field.default for field in dataclasses.fields(LapoConfig)}
    assert "one_sided" in fields, "nanolapo/config.py: LapoConfig has no key one_sided yet"
    assert fields["one_sided"] is False, f"lapo.one_sided must be off by default; it is {fields['one_sided']!r}"


@pytest.mark.parametrize("numbers", [(0.7, 20.0, 30.0, 70.0), (0.5, 7.0, 10.0, 50.0)])
def test_an_answer_below_the_range_loses_nothing(numbers):
    alpha, decay, low, high = numbers
    keys = [f"lapo.alpha={alpha}", f"lapo.decay={decay}", f"lapo.percentiles=[{low}, {high}]"]
    for one_sided in (False, True):
        got, want = rewards(*keys, f"lapo.one_sided={str(one_sided).lower()}"), by_hand(*numbers, one_sided)
        assert got == pytest.approx(want), say(got, want, f"with lapo.one_sided={str(one_sided).lower()}")


def test_without_the_key_nothing_has_changed():
    got, want = rewards(), by_hand(0.7, 20.0, 30.0, 70.0, False)
    assert got == pytest.approx(want), say(got, want, "without lapo.one_sided")


def test_the_released_codes_rule_for_a_single_length_still_holds():
    """Under lapo.fidelity=code a range that is a point pays nothing (nanolapo/methods/lapo.py, strict_range)."""
    method = Discovery(load_config(DEMO, ["lapo.fidelity=code", "lapo.one_sided=true", "rollout.group_size=4"]))
    got = method.reward(make_rows([50] * 4, group_size=4, correct=[True] * 4))["length"]
    assert not got.any(), f"fidelity=code: four right answers of 50 tokens get a length reward of {got[0]:g}, not 0"
