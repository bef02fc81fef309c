"""`lapo.fidelity`: every difference between paper and released code has the effect it names.

Run: python -m pytest tests/methods/test_lapo_fidelity.py        Also the guidance forms of the paper's Table 2.
"""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
from tiny import fill, make_config, make_problems, make_rows

from nanolapo.config import UserError
from nanolapo.data.prompts import Guidance
from nanolapo.grader import Grader
from nanolapo.lengths import LengthMap
from nanolapo.methods.lapo import READINGS, Discovery, Internalization, Lapo, Readings
from nanolapo.sampling import mark

PROBLEM = make_problems(1)[0]
WORKED = [1000, 1200, 1300, 1500, 2000]  # P30 1220, P70 1460, median 1300, mean 1400


def method(
    kind: type[Lapo], fidelity: str, target: float | None = None, limit: int = 4096, multiple: int = 1, **lapo: object
) -> Lapo:
    config = make_config(
        rollout={"max_new_tokens": limit, "base_tokens": 6229, "group_size": 2, "prompts_per_step": 1},
        prompt={"length_multiple": multiple},
        lapo={"fidelity": fidelity, **lapo},
    )
    made = kind(config)
    made.length_map.entries = {PROBLEM.id: target}
    return made


def pair(lengths: list[int], budget: float = math.nan):
    return make_rows(lengths, correct=[True] * len(lengths), budgets=[budget] * len(lengths))


def test_the_table_of_readings():
    """The readings in one table; every field differs somewhere, else it would not be a switch."""
    assert {name: dataclasses.astuple(reading) for name, reading in READINGS.items()} == {
        "recommended": (0.8, False, "group_median", True, True, False, False, "math"),
        "paper": (0.7, False, "limit", True, True, False, True, "math"),
        "code": (0.8, True, "group_median", False, False, True, True, "exact_first_boxed"),
    }
    for field in dataclasses.fields(Readings):
        assert len({getattr(reading, field.name) for reading in READINGS.values()}) > 1, field.name


@pytest.mark.parametrize(("fidelity", "beta"), [("recommended", 0.8), ("paper", 0.7), ("code", 0.8)])
def test_beta(fidelity, beta):
    rollouts = pair([1000, 1000], budget=1000)
    assert method(Internalization, fidelity, 1000.0).reward(rollouts)["length"] == pytest.approx([beta, beta])
    set_by_hand = method(Internalization, fidelity, 1000.0, beta=0.25)
    assert set_by_hand.reward(rollouts)["length"] == pytest.approx([0.25, 0.25])


@pytest.mark.parametrize(("fidelity", "length_term"), [("recommended", 0.7), ("paper", 0.7), ("code", 0.0)])
def test_strict_range(fidelity, length_term):
    """All right answers equally long: Eq. 5 rewards them, the code wants P30 < P70 strictly."""
    discovery = method(Discovery, fidelity)
    assert discovery.reward(pair([900, 900]))["length"] == pytest.approx([length_term] * 2)
    lone = make_rows([900, 50], correct=[True, False])
    assert discovery.reward(lone)["length"] == pytest.approx([length_term, 0.0])
    assert discovery.reward(pair([900, 930]))["length"].min() > 0.6  # a real range is rewarded by all three


@pytest.mark.parametrize("fidelity", ["recommended", "paper", "code"])
@pytest.mark.parametrize("statistic", ["median", "minimum"])
def test_unsolved_center(fidelity, statistic):
    """Unsolved problem, 4096 printed in the prompt: the paper centres on 4096, the code on the group's median, whatever
    statistic M(q) records."""
    unsolved = method(Internalization, fidelity, None, statistic=statistic)
    reward = unsolved.reward(pair([1000, 1240], budget=4096))["length"]
    one_sigma = READINGS[fidelity].beta * math.exp(-0.5)
    assert reward == pytest.approx([0.0, 0.0] if fidelity == "paper" else [one_sigma, one_sigma], abs=1e-9)
    mixed = make_rows([1000, 3000], correct=[True, False], budgets=[4096.0] * 2)  # a wrong answer moves no centre
    lone = method(Internalization, fidelity, None).reward(mixed)["length"]
    assert lone == pytest.approx([0.0 if fidelity == "paper" else READINGS[fidelity].beta, 0.0], abs=1e-9)
    solved = method(Internalization, fidelity, 1000.0).reward(pair([1000, 1240], budget=1000))["length"]
    assert solved[0] > 6 * solved[1] > 0  # solved problems centre on the printed number in all three


@pytest.mark.parametrize(("fidelity", "printed"), [("recommended", 700), ("paper", 700), ("code", 1000)])
def test_live_map(fidelity, printed):
    """Eq. 8 reaches the next prompt, or (code) targets stay as stage 1 left them."""
    stage2 = method(Internalization, fidelity, 1000.0)
    stage2.after_step(pair([700, 700], budget=1000))
    assert stage2.guidance(PROBLEM, 0, 1).budget == printed


@pytest.mark.parametrize(("fidelity", "printed"), [("recommended", 1301), ("paper", 1301), ("code", 1300)])
def test_printed_number_is_rounded_or_cut(fidelity, printed):
    guidance = method(Internalization, fidelity, 1300.7).guidance(PROBLEM, 0, 0)
    assert guidance.inside == f" I will answer the question with {printed} tokens." and guidance.budget == printed
    assert method(Internalization, fidelity, None).guidance(PROBLEM, 0, 0).budget == 4096
    assert method(Internalization, fidelity, 0.2).guidance(PROBLEM, 0, 0).budget == 1  # never 0


@pytest.mark.parametrize(("fidelity", "limit"), [("recommended", 4096), ("paper", 4096), ("code", 2048)])
def test_half_limit(fidelity, limit):
    assert method(Internalization, fidelity).sampling(0).max_new_tokens == limit
    assert method(Discovery, fidelity).sampling(0).max_new_tokens == 4096  # stage 1 never


def test_grader_rule_and_cut_answers(monkeypatch):
    """Through the loop's own grading with the real grader: equivalent forms, first or last box, answers cut off."""
    texts = [r"so \boxed{0.5}", r"\boxed{7} no, \boxed{\frac{1}{2}}", r"\boxed{1/2}", r"\boxed{1/2}"]
    verdicts = {}
    for fidelity in READINGS:
        chosen = method(Discovery, fidelity)
        rollouts = make_rows([9] * 4, finished=[True, True, True, False])
        fill(rollouts, text=texts)
        fill(rollouts, problem=[dataclasses.replace(p, answer="1/2") for p in rollouts.problems])
        with Grader(rule=chosen.grader_rule) as grader:
            right = grader.grade_all(texts, ["1/2"] * 4)
            mark(SimpleNamespace(grader=grader, method=chosen), rollouts.rows, right)  # type: ignore[arg-type]
        verdicts[fidelity] = rollouts.correct_B.tolist()
    assert verdicts == {
        "recommended": [True, True, True, False],
        "paper": [True, True, True, True],
        "code": [False, False, True, True],
    }


@pytest.mark.parametrize(
    ("form", "outside", "inside"),
    [
        ("exact", "", " I will answer the question with 1300 tokens."),
        ("range", "", " I will answer the question with 1180 to 1420 tokens."),
        ("outside", " Think for 1300 tokens.", ""),
        ("implicit", "", ""),
    ],
)
def test_guidance_forms(form, outside, inside):
    """Table 2: the wording differs, the target of Eq. 7 is M(q) in all four."""
    guidance = method(Internalization, "recommended", 1300.2, guidance=form).guidance(PROBLEM, 0, 0)
    assert (guidance.outside, guidance.inside, guidance.budget) == (outside, inside, 1300)


def test_length_multiple_and_lower_end():
    rounded = method(Internalization, "recommended", 1330.0, multiple=100).guidance(PROBLEM, 0, 0)
    assert rounded.budget == 1300
    assert method(Internalization, "code", 1390.0, multiple=100).guidance(PROBLEM, 0, 0).budget == 1300
    low = method(Internalization, "recommended", 30.0, guidance="range").guidance(PROBLEM, 0, 0)
    assert low.inside == " I will answer the question with 1 to 150 tokens."


def test_stage1_has_no_guidance():
    assert method(Discovery, "recommended", 1300.0).guidance(PROBLEM, 0, 0).budget is None


def test_state_of_a_method_survives_a_checkpoint():
    first = method(Internalization, "recommended", 1000.0)
    first.after_step(pair([700, 800]))
    second = method(Internalization, "recommended")
    second.load_state_dict(first.state_dict())
    assert second.length_map.entries == first.length_map.entries == {PROBLEM.id: 750.0}


def test_range_is_the_one_that_stage_1_found():
    """Table 2, Range: P30 and P70 (Eq. 2) of the right lengths behind M(q); the reward aims at M(q) all the same."""
    stage1 = method(Discovery, "recommended")
    stage1.after_step(make_rows([*WORKED, 9], group_size=6, correct=[True] * 5 + [False]))
    stage2 = method(Internalization, "recommended", guidance="range")
    stage2.load_state_dict(stage1.state_dict())
    guidance = stage2.guidance(PROBLEM, 0, 0)
    assert guidance.inside == " I will answer the question with 1220 to 1460 tokens." and guidance.budget == 1300
    stage2.after_step(make_rows([2000, 3000], correct=[True] * 2))  # Eq. 8: not shorter, nothing moves
    assert stage2.guidance(PROBLEM, 0, 0) == guidance
    stage2.after_step(make_rows([700, 800], correct=[True] * 2))
    assert stage2.guidance(PROBLEM, 0, 0).inside == " I will answer the question with 730 to 770 tokens."
    wide = method(Internalization, "recommended", guidance="range", percentiles=[0, 100])
    wide.load_state_dict(stage1.state_dict())
    assert "with 1000 to 2000 tokens" in wide.guidance(PROBLEM, 0, 0).inside


@pytest.mark.parametrize(("statistic", "n"), [("median", 1300), ("mean", 1400), ("minimum", 1000)])
def test_statistic_in_both_stages(statistic, n):
    """Table 3: the statistic is what M(q) records, what the prompt states, the centre of Eq. 7, what Eq. 8 compares."""
    stage1 = method(Discovery, "recommended", statistic=statistic)
    rollouts = make_rows(WORKED, group_size=5, correct=[True] * 5)
    medians = method(Discovery, "recommended").reward(rollouts)["length"]
    np.testing.assert_array_equal(stage1.reward(rollouts)["length"], medians)  # stage 1's reward has no n in it
    stage1.after_step(rollouts)
    stage2 = method(Internalization, "recommended", statistic=statistic)
    stage2.load_state_dict(stage1.state_dict())
    assert stage2.guidance(PROBLEM, 0, 0).inside == f" I will answer the question with {n} tokens."
    reward = stage2.reward(pair([n, n + 120], budget=n))["length"]
    assert reward == pytest.approx([0.8, 0.8 * math.exp(-0.5)])
    stage2.after_step(make_rows([600, 900, 1200], group_size=3, correct=[True] * 3))
    assert stage2.length_map.target(PROBLEM.id) == {"median": 900, "mean": 900, "minimum": 600}[statistic]
    unsolved = method(Internalization, "recommended", None, statistic=statistic)
    group = make_rows([1000, 1240, 1900], group_size=3, correct=[True] * 3, budgets=[4096.0] * 3)
    center = 1240  # of the group: there is no M(q) yet, and the code takes the median here
    by_hand = [0.8 * math.exp(-((length - center) ** 2) / (2 * 120**2)) for length in (1000, 1240, 1900)]
    assert unsolved.reward(group)["length"] == pytest.approx(by_hand)


@pytest.mark.parametrize("form", ["exact", "range", "outside", "implicit"])
def test_the_guidance_form_changes_nothing_but_words(form):
    """Table 2: stage 1 states nothing under any of them; in stage 2 rewards and Eq. 8 do not know the form."""
    assert method(Discovery, "recommended", 1300.0, guidance=form).guidance(PROBLEM, 0, 0) == Guidance()
    stage2 = method(Internalization, "recommended", 1300.0, guidance=form)
    rollouts = pair([1300, 1180], budget=stage2.guidance(PROBLEM, 0, 0).budget)
    assert stage2.reward(rollouts)["length"] == pytest.approx([0.8, 0.8 * math.exp(-0.5)])
    stage2.after_step(rollouts)
    assert stage2.length_map.target(PROBLEM.id) == 1240


def test_stage2_turns_a_map_into_another_statistic_or_refuses(tmp_path):
    """Table 3 needs no second stage 1; but a map of an older version, without the lengths, must not quietly be taken."""
    recorded = LengthMap("median")
    recorded.update_discovery(PROBLEM.id, WORKED)
    recorded.save(tmp_path / "map.json")
    config = make_config(lapo={"statistic": "minimum", "length_map": str(tmp_path / "map.json")})
    stage2 = Internalization(config)
    stage2.start([PROBLEM])
    assert stage2.length_map.target(PROBLEM.id) == 1000 and stage2.length_map.statistic == "minimum"
    stage2.after_step(make_rows([1100, 900], correct=[True] * 2))
    assert stage2.length_map.target(PROBLEM.id) == 900
    recorded.lengths = {}
    recorded.save(tmp_path / "map.json")
    with pytest.raises(UserError, match="lapo.statistic='minimum'.*'median' without"):
        Internalization(config).start([PROBLEM])


def test_metrics_of_the_map():
    stage2 = method(Internalization, "recommended", 1000.0)
    logged = stage2.after_step(pair([700, 900], budget=1000))
    assert logged["map/solved_fraction"] == 1 and logged["map/target_mean"] == 800
    assert logged["map/moved_mean"] == -200 and logged["budget/above_length"] == 200


def test_a_mean_over_no_problem_is_no_number():
    """0 would say that M(q) stands still, or that no token suffices."""
    stage1 = method(Discovery, "recommended")
    first = stage1.after_step(pair([5, 5]))
    assert first["map/target_mean"] == 5 and np.isnan(first["map/moved_mean"])
    assert stage1.after_step(pair([9, 9]))["map/moved_mean"] == 4
    unsolved = stage1.after_step(make_rows([7, 7], correct=[False, False]))
    assert unsolved["map/solved_fraction"] == 0 and np.isnan(unsolved["map/target_mean"])
    assert np.isnan(unsolved["map/moved_mean"])
