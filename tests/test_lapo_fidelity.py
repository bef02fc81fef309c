"""`lapo.fidelity`: every difference between paper and released code has the effect it names.

Run: python -m pytest tests/test_lapo_fidelity.py        Also the guidance forms of the paper's Table 2.
"""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
from tiny import make_config, make_problems, make_rows

from nanolapo.config import UserError
from nanolapo.grader import Grader
from nanolapo.lengths import LengthMap
from nanolapo.methods.lapo import READINGS, Discovery, Internalization, Lapo, Readings
from nanolapo.sampling import grade

PROBLEM = make_problems(1)[0]


def method(
    kind: type[Lapo], fidelity: str, target: float | None = None, limit: int = 4096, multiple: int = 1, **lapo: object
) -> Lapo:
    config = make_config(
        rollout={"max_new_tokens": limit, "group_size": 2, "prompts_per_step": 1},
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
    assert {
        "recommended": Readings(0.8, False, "group_median", True, True, False, False, "math"),
        "paper": Readings(0.7, False, "limit", True, True, False, True, "math"),
        "code": Readings(0.8, True, "group_median", False, False, True, True, "exact_first_boxed"),
    } == READINGS
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
def test_unsolved_center(fidelity):
    """Unsolved problem, 4096 printed in the prompt: the paper centres on 4096, the code on the group's median."""
    reward = method(Internalization, fidelity, None).reward(pair([1000, 1240], budget=4096))["length"]
    one_sigma = READINGS[fidelity].beta * math.exp(-0.5)
    assert reward == pytest.approx([0.0, 0.0] if fidelity == "paper" else [one_sigma, one_sigma], abs=1e-9)
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
        rollouts.texts = texts
        rollouts.problems = [dataclasses.replace(p, answer="1/2") for p in rollouts.problems]
        with Grader(rule=chosen.grader_rule) as grader:
            grade(SimpleNamespace(grader=grader, method=chosen), rollouts, range(4))  # type: ignore[arg-type]
        verdicts[fidelity] = rollouts.correct_B.tolist()
    assert verdicts == {
        "recommended": [True, True, True, False],
        "paper": [True, True, True, True],
        "code": [False, False, True, True],
    }


def test_scale_follows_the_generation_limit():
    """The paper's 100 and 120 tokens belong to a limit of 4096; a given value is taken as it is."""
    small = method(Discovery, "recommended", limit=512)
    assert (small.decay, small.sigma) == (12.5, 15.0)
    given = method(Discovery, "recommended", limit=512, decay=100.0, sigma=7.0)
    assert (given.decay, given.sigma) == (100.0, 7.0)


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


def test_stage2_refuses_a_map_of_another_statistic(tmp_path):
    """Table 3: a map of medians must not quietly become the start of a `minimum` run."""
    recorded = LengthMap("median")
    recorded.update_discovery(PROBLEM.id, [10])
    recorded.save(tmp_path / "map.json")
    config = make_config(lapo={"statistic": "minimum", "length_map": str(tmp_path / "map.json")})
    with pytest.raises(UserError, match="lapo.statistic='minimum'.*'median'"):
        Internalization(config).start([PROBLEM])


def test_metrics_of_the_map():
    stage2 = method(Internalization, "recommended", 1000.0)
    logged = stage2.after_step(pair([700, 900], budget=1000))
    assert logged["map/solved_fraction"] == 1 and logged["map/target_mean"] == 800
    assert logged["map/moved_mean"] == -200 and logged["budget/above_length"] == 200
    assert not any(np.isnan(list(method(Discovery, "recommended").after_step(pair([5, 5])).values())))
