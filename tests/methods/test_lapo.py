"""LAPO, equation by equation, and the traps of length-aware learning.

Run: python -m pytest tests/methods/test_lapo.py        The fidelity switches are in test_lapo_fidelity.py.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny import fill, make_config, make_problems, make_rows

from nanolapo.advantages import group_advantages
from nanolapo.config import UserError
from nanolapo.data.prompts import Guidance
from nanolapo.lengths import LengthMap
from nanolapo.methods.lapo import (
    Discovery,
    Internalization,
    discovery_reward,
    internalization_reward,
    stated_length,
)
from nanolapo.methods.tools import stated
from nanolapo.rollouts import Rollouts

PAPER = {"max_new_tokens": 4096, "base_tokens": 6229, "group_size": 5, "prompts_per_step": 1}
WORKED = [1000, 1200, 1300, 1500, 2000]  # worked by hand: P30 1220, P70 1460, median 1300


def group(lengths: list[int], correct: list[bool], **options: object) -> Rollouts:
    return make_rows(lengths, group_size=len(lengths), correct=correct, **options)  # type: ignore[arg-type]


def discovery(**lapo: object) -> Discovery:
    return Discovery(make_config(rollout=PAPER, lapo=lapo))


def internalization(entries: dict[str, float | None], **lapo: object) -> Internalization:
    method = Internalization(make_config(rollout=PAPER, lapo=lapo))
    method.length_map.entries = dict(entries)
    return method


# ------------------------------------------------------------------------------------------------------ equations


def test_eq1_only_correct_lengths_count():
    """L_q holds the right answers: wrong ones, however long, move neither the range nor M(q)."""
    method = discovery()
    rollouts = group([*WORKED, 5, 4000], [True] * 5 + [False] * 2)
    reward = method.reward(rollouts)["length"]
    np.testing.assert_allclose(reward, [0.0, 0.56, 0.7, 0.42, 0.0, 0.0, 0.0], atol=1e-12)
    method.after_step(rollouts)
    assert method.length_map.target("demo:0") == 1300


def test_eq2_range_is_p30_to_p70_interpolated_and_closed():
    """Linear interpolation between order statistics; both ends belong to the range; against a slow reference."""
    lengths = [1000, 1220, 1220, 1300, 1460, 1460, 2000]  # positions 1.8 and 4.2 of 0..6: P30 1220, P70 1460
    np.testing.assert_allclose(discovery_reward(lengths, [True] * 7), [1, 1.7, 1.7, 1.7, 1.7, 1.7, 1])
    np.testing.assert_allclose(discovery_reward(WORKED, [True] * 5, percentiles=(0.0, 100.0)), 1.7)

    def percentile(values: list[int], share: float) -> float:
        ordered, position = sorted(values), share * (len(values) - 1)
        below = int(position)
        above = min(below + 1, len(values) - 1)
        return ordered[below] + (position - below) * (ordered[above] - ordered[below])

    rng = np.random.default_rng(0)
    for _ in range(50):
        some = rng.integers(900, 1200, 8).tolist()
        low, high = percentile(some, 0.3), percentile(some, 0.7)
        outside = [max(low - x, x - high, 0) for x in some]
        r1 = np.array([max(0, 1 - d / 100) for d in outside])
        np.testing.assert_allclose(discovery_reward(some, [True] * 8), 1 + 0.7 * r1)


def test_eq3_map_is_the_median_overwritten_at_every_visit():
    method = discovery()
    method.after_step(group(WORKED, [True] * 5))
    assert method.length_map.target("demo:0") == 1300
    method.after_step(group([1800, 2000, 1, 1, 1], [True, True, False, False, False]))
    assert method.length_map.target("demo:0") == 1900  # grows: stage 1 overwrites, it does not take a minimum
    method.after_step(group(WORKED, [False] * 5))
    assert method.length_map.target("demo:0") is None and "demo:0" in method.length_map.entries  # visited, unsolved


def test_eq4_reward_is_correctness_plus_alpha_times_length_term():
    """Worked by hand: R1 = 0, 0.8, 1, 0.6, 0."""
    r1 = np.array([0, 0.8, 1, 0.6, 0])
    for alpha in (0.7, 0.3, 0.0):
        np.testing.assert_allclose(discovery_reward(WORKED, [True] * 5, alpha=alpha), 1 + alpha * r1)
    parts = discovery(alpha=0.3).reward(group(WORKED, [True] * 5))
    np.testing.assert_allclose(parts["correct"], 1.0)
    np.testing.assert_allclose(parts["length"], 0.3 * r1, atol=1e-12)


def test_eq5_length_term_decays_linearly_outside_and_is_zero_for_wrong_answers():
    """Right answers 1150, 1200, 1240, 1240, 1300: range [1208, 1240], so R1 = 1 - d/100 below and above it."""
    lengths, correct = [1150, 1200, 1240, 1240, 1300, 1220, 1400], [True] * 5 + [False] * 2
    np.testing.assert_allclose(discovery_reward(lengths, correct, alpha=1.0), [1.42, 1.92, 2, 2, 1.4, 0, 0])
    half = discovery_reward(lengths, correct, alpha=1.0, decay=50.0)  # 58 and 60 tokens outside: nothing left
    np.testing.assert_allclose(half, [1, 1.84, 2, 2, 1, 0, 0])


def test_eq6_reward_is_correctness_plus_beta_times_gaussian():
    lengths, correct = [1300, 1420, 1300], [True, True, False]
    np.testing.assert_allclose(
        internalization_reward(lengths, correct, 1300, beta=0.5), [1.5, 1 + 0.5 * math.exp(-0.5), 0.0]
    )
    method = internalization({"demo:0": 1300.0})
    parts = method.reward(group(lengths, correct, budgets=[1300.0] * 3))
    np.testing.assert_allclose(parts["correct"], [1, 1, 0])
    np.testing.assert_allclose(parts["length"], [0.8, 0.8 * math.exp(-0.5), 0.0])


def test_eq7_gaussian_of_the_deviation():
    """Worked by hand: one sigma 0.60653, two 0.13534, three 0.01111, the same on both sides."""
    for deviation, value in [(0, 1.0), (120, 0.60653), (240, 0.13534), (360, 0.01111)]:
        for sign in (1, -1):
            reward = internalization_reward([2000 + sign * deviation], [True], 2000, beta=1.0)
            assert reward[0] - 1 == pytest.approx(value, abs=5e-6)


def test_eq8_dual_update():
    """Unsolved: take the median. Solved: the smaller of M(q) and the median. Nothing right: unchanged."""
    method = internalization({"demo:0": None})
    history = []
    for lengths, right in [([9, 9], 0), ([1000, 1400], 2), ([2000, 3000], 2), ([800, 4000], 1), ([700, 700], 0)]:
        method.after_step(group(lengths, [True] * right + [False] * (2 - right)))
        history.append(method.length_map.target("demo:0"))
    assert history == [None, 1200, 1200, 800, 800]


def test_eq8_acts_after_the_reward():
    """The reward of a step measures against the number printed in the prompt, not against the updated map."""
    method = internalization({"demo:0": 1500.0})
    rollouts = group([900, 900], [True, True], budgets=[1500.0, 1500.0])
    before = method.reward(rollouts)["length"]
    method.after_step(rollouts)
    assert method.length_map.target("demo:0") == 900
    np.testing.assert_allclose(before, 0.8 * math.exp(-(600**2) / (2 * 120**2)))


# ------------------------------------------------------------------------------------------------------ edge cases


@pytest.mark.parametrize("reward", [discovery_reward, lambda length, c: internalization_reward(length, c, 1200)])
def test_no_right_answer_gives_zero_rewards_and_zero_advantage(reward):
    rewards = reward([10, 1200, 4096], [False] * 3)
    assert rewards.tolist() == [0, 0, 0]
    assert group_advantages(torch.from_numpy(rewards)[None]).tolist() == [[0, 0, 0]]


def test_E5_one_right_answer_or_equal_lengths():
    """A lone right answer is its own range: 1 + alpha. All right and equally long: equal rewards, no advantage."""
    np.testing.assert_allclose(discovery_reward([50, 3000, 7], [False, True, False]), [0, 1.7, 0])
    equal = discovery_reward([800] * 4, [True] * 4)
    np.testing.assert_allclose(equal, 1.7)
    assert group_advantages(torch.from_numpy(equal)[None]).abs().max() == 0
    assert np.isfinite(discovery_reward([], [])).all() and len(discovery_reward([], [])) == 0


@pytest.mark.parametrize("stage", ["discovery", "internalization"])
def test_E1_no_wrong_answer_beats_a_right_one(stage):
    """Over a grid of lengths, in any mix: min(right) > max(wrong), and wrong answers get no length term."""
    grid = [0, 1, 50, 600, 1300, 2500, 4096]
    for mix in range(1, 2 ** len(grid) - 1):
        correct = np.array([bool(mix >> i & 1) for i in range(len(grid))])
        if stage == "discovery":
            rewards = discovery_reward(grid, correct)
        else:
            rewards = internalization_reward(grid, correct, target=1300)
        assert rewards[correct].min() >= 1 > rewards[~correct].max() == 0


def test_E2_missing_budget_is_nan_never_zero():
    """A solved problem whose prompt carried no number: no length term, and it is counted."""
    method = internalization({"demo:0": 1000.0})
    rollouts = group([1, 1000], [True, True], budgets=[np.nan, np.nan])
    assert method.reward(rollouts)["length"].tolist() == [0, 0]
    assert method.after_step(rollouts)["budget/missing"] == 2
    assert LengthMap().target("never seen") is None
    with pytest.raises(ValueError, match="at least 1 token"):
        Guidance(budget=0.0)


def test_E3_ratchet_never_falls_below_the_smallest_length_seen():
    """Eq. 8 as published is a ratchet: for a solved problem M(q) only goes down. TRAPS E3 would like it to need several
    right rollouts and to be able to grow; the paper does neither, and nanolapo follows the paper. What does hold: after
    100 noisy updates M(q) is exactly the smallest median seen, so it is bounded below by a length that did suffice.
    """
    rng, length_map = np.random.default_rng(0), LengthMap()
    medians: list[float] = []
    for _ in range(100):
        lengths = rng.normal(1000, 300, rng.integers(1, 9)).clip(50).astype(int)
        medians.append(float(np.median(lengths)))
        length_map.update_internalization("q", lengths)
        assert length_map.target("q") == min(medians)
    one, many = LengthMap(), LengthMap()
    one.update_internalization("q", [40])  # one right rollout is enough to update, as published
    many.update_internalization("q", [40, 900, 1000])
    assert (one.target("q"), many.target("q")) == (40, 900)


def test_E4_two_prompts_in_one_call_have_two_ranges():
    method = Discovery(make_config(rollout=PAPER | {"group_size": 2, "prompts_per_step": 2}))
    rollouts = make_rows([100, 300, 3000, 3100], correct=[True] * 4)
    r1 = np.array([0.4, 0.4, 0.7, 0.7])  # 60 tokens outside [160, 240], 30 outside [3030, 3070]
    np.testing.assert_allclose(method.reward(rollouts)["length"], 0.7 * r1)
    method.after_step(rollouts)
    assert [method.length_map.target(f"demo:{i}") for i in range(2)] == [200, 3050]
    stage2 = internalization({"demo:0": 100.0, "demo:1": 3000.0})
    fill(rollouts, budget=np.array([100.0, 100.0, 3000.0, 3000.0]))
    one = 0.8 * np.exp(-(np.array([0, 200, 0, 100]) ** 2) / (2 * 120**2))
    np.testing.assert_allclose(stage2.reward(rollouts)["length"], one)


@pytest.mark.parametrize("make", [discovery, lambda: internalization({"demo:0": None})])
def test_E6_cut_answers_never_enter_the_map(make):
    """An answer that was cut is no evidence of a length that suffices, even if right."""
    method = make()
    rollouts = group([500, 4096, 700, 900], [True] * 4, finished=[True, False, True, True])
    method.after_step(rollouts)
    assert method.length_map.target("demo:0") == 700


def test_E7_one_reward_per_completion_and_raw_correctness_apart():
    for method in (discovery(), internalization({"demo:0": 1200.0})):
        rollouts = group(WORKED, [True, False, True, True, False], budgets=[1200.0] * 5)
        parts = method.reward(rollouts)
        assert set(parts) == {"correct", "length"} and all(values.shape == (5,) for values in parts.values())
        assert parts["correct"].tolist() == [1, 0, 1, 1, 0]
        assert (parts["length"][~rollouts.correct_B] == 0).all() and parts["length"].sum() > 0


def test_E8_length_is_the_number_of_sampled_ids():
    """Prompt, guidance and text do not enter it: other prompts and texts, same lengths and rewards."""
    rollouts = group(WORKED, [True] * 5, budgets=[1300.0] * 5)
    assert rollouts.lengths_B.tolist() == WORKED
    method, stage2 = discovery(), internalization({"demo:0": 1300.0})
    before = method.reward(rollouts)["length"], stage2.reward(rollouts)["length"]
    fill(rollouts, prompt_ids=[np.arange(1, 500) for _ in WORKED])
    fill(rollouts, text=["a very long text " * 50 for _ in WORKED])
    after = method.reward(rollouts)["length"], stage2.reward(rollouts)["length"]
    np.testing.assert_array_equal(before, after)


def test_stage2_needs_a_map_that_covers_its_problems(tmp_path):
    problems = make_problems(3)
    with pytest.raises(UserError, match="lapo.length_map is empty"):
        Internalization(make_config()).start(problems)
    length_map = LengthMap()
    length_map.update_discovery("demo:0", [10])
    length_map.save(tmp_path / "map.json")
    config = make_config(lapo={"length_map": str(tmp_path / "map.json")})
    with pytest.raises(UserError, match="lacks 2 of the 3 problems"):
        Internalization(config).start(problems)
    method = Internalization(config)
    method.start(problems[:1])
    assert method.length_map.target("demo:0") == 10


@pytest.mark.parametrize("multiple", [1, 10, 100])
@pytest.mark.parametrize("rounded", [True, False])
def test_the_reward_aims_at_the_number_that_the_prompt_prints(multiple, rounded):
    """Also where M(q) is below half of a multiple: the least that a prompt prints is one multiple."""
    config = make_config(prompt={"length_multiple": multiple})
    for target in (0.4, 3.0, 41.0, 149.0, 1330.0):
        n = stated_length(target, 4096, multiple, rounded)
        assert n == stated(config, n) and n >= multiple and (n == stated(config, target) or not rounded)
