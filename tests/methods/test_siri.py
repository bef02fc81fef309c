"""SIRI: the limit that swings, its three shapes, and what a cut answer is worth.

Run: python -m pytest tests/methods/test_siri.py
"""

from __future__ import annotations

import math

import pytest
from tiny import make_config, make_rows

from nanolapo.config import UserError
from nanolapo.methods.siri import Siri, wave


def make(limit: int = 16384, base: float = 8086, **options: object) -> Siri:
    rollout = {"max_new_tokens": limit, "base_tokens": base, "group_size": 4}
    return Siri(make_config(rollout=rollout, method={"options": options}))


def caps(method: Siri, steps: list[int], total: int) -> list[int]:
    """The limit of these steps of a run of `total`."""
    found = []
    for step in steps:
        method.progress = step / total
        found.append(method.sampling(step).max_new_tokens)
    return found


def test_the_published_schedule():
    """Lmax 16,384, Lmin 8,192, T 640: three cycles in 1920 steps, from peak to trough and back."""
    steps = list(range(0, 1920, 40))
    want = [round(12288 + 4096 * math.cos(2 * math.pi * t / 640)) for t in steps]
    assert caps(make(), steps, 1920) == want
    assert caps(make(period=640), steps, 5000) == want  # T in steps, whatever the length of the run
    assert [want[0], want[4], want[8], want[16]] == [16384, 12288, 8192, 16384]


def test_the_last_step_is_near_a_peak_and_with_a_half_cycle_more_near_a_trough():
    assert caps(make(), [0, 999], 1000)[1] > 16300
    assert caps(make(cycles=2.5), [0, 999], 1000)[1] < 8300


def test_stair():
    assert caps(make(shape="stair"), [0, 319, 320, 639, 640, 959, 960], 1920) == [
        16384, 16384, 8192, 8192, 16384, 16384, 8192,
    ]  # fmt: skip


def test_stair_cosine_is_flat_around_both_ends_with_half_a_cosine_between():
    """By the paper's angles, phi = 2 pi t / 640: Lmax below pi / 4 and from 7 pi / 4 on, Lmin from 3 pi / 4 to 5 pi / 4."""
    method = make(shape="stair-cosine")
    assert caps(method, list(range(0, 81, 20)) + list(range(560, 641, 20)), 1920) == [16384] * 10
    assert caps(method, list(range(240, 401, 20)), 1920) == [8192] * 9
    for t in range(0, 161, 16):
        down, up = caps(method, [80 + t, 400 + t], 1920)
        swing = 4096 * math.cos(math.pi * t / 160)
        assert down == pytest.approx(12288 + swing, abs=1) and up == pytest.approx(12288 - swing, abs=1)


@pytest.mark.parametrize("shape", ["cosine", "stair", "stair-cosine"])
def test_every_shape_stays_within_its_limits_and_repeats(shape):
    values = [wave(phase / 97, shape) for phase in range(97 * 4)]
    assert max(values) == 1 and min(values) >= -1 and min(values) < -0.99
    assert values[:97] == pytest.approx(values[97 * 2 : 97 * 3], abs=1e-9)
    method = make(max_tokens=9, min_tokens=7, shape=shape)
    assert set(caps(method, list(range(100)), 100)) <= {7, 8, 9}


def test_limits_scale_with_the_base_and_the_half_stays_under_a_tight_limit():
    assert (make(256, 100).high, make(256, 100).low) == (203, 101)
    assert (make(4096, 6229).high, make(4096, 6229).low) == (4096, 2048)
    assert (make(1, 100).high, make(1, 100).low) == (1, 1)
    given = make(64, 0, max_tokens=64)  # no mean length is needed
    assert (given.high, given.low) == (64, 32) and (make(64, 0, max_tokens=64, min_tokens=10).low) == 10


@pytest.mark.parametrize(
    "options", [{"max_tokens": 20000}, {"min_tokens": 16385}, {"max_tokens": 50, "min_tokens": 60}]
)
def test_impossible_limits_are_refused(options):
    with pytest.raises(UserError, match="max_tokens"):
        make(**options)


@pytest.mark.parametrize("options", [{"cycles": 0}, {"period": 0}, {"shape": "saw"}])
def test_impossible_settings_are_refused(options):
    with pytest.raises(UserError, match=next(iter(options))):
        make(**options)


def test_a_cut_answer_counts_if_it_is_right_and_the_rest_is_the_recipes():
    """The loop asks cut_answers_count; the reward is the verdict."""
    method = make()
    assert method.cut_answers_count
    parts = method.reward(make_rows([9, 128, 128, 3], 4, correct=[1, 1, 0, 0], finished=[1, 0, 0, 1]))
    assert list(parts) == ["correct"] and parts["correct"].tolist() == [1, 1, 0, 0]
    plan = method.sampling(0)
    assert (plan.num_prompts, plan.group_size, plan.temperature, plan.max_rounds) == (4, 4, 1.0, 1)


def test_the_limit_is_logged_and_nothing_is_remembered():
    method = make()
    method.progress = 1 / 6
    plan = method.sampling(5)
    assert method.after_step(make_rows([1, 1])) == {"siri/limit": 8192.0} == {"siri/limit": float(plan.max_new_tokens)}
    assert method.state_dict() == {}
