"""Exercise 3: lapo.guidance: at_most. Run: make exercise N=3"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from rows import make_problems, make_rows

from nanolapo.config import UserError
from nanolapo.config_file import load_config
from nanolapo.data.prompts import Guidance
from nanolapo.lengths import LengthMap
from nanolapo.methods.lapo import Internalization

DEMO = Path(__file__).parents[2] / "configs/demo/stage2.yaml"
RIGHT = [1000, 1200, 1300, 1500, 2000]  # their median is 1300, their P70 1460
SOLVED, UNSOLVED = make_problems(2)


def stage_2(folder: Path, *overrides: str, form: str = "at_most") -> Internalization:
    """Stage 2 on a map with one solved and one unsolved problem; lengths are printed as they are unless overridden."""
    length_map = LengthMap()
    length_map.update_discovery(SOLVED.id, RIGHT)
    length_map.update_discovery(UNSOLVED.id, [])
    length_map.save(folder / "length_map.json")
    keys = ["prompt.length_multiple=1", "rollout.max_new_tokens=4096", f"lapo.guidance={form}"]
    method = Internalization(load_config(DEMO, [*keys, f"lapo.length_map={folder}/length_map.json", *overrides]))
    method.start([SOLVED, UNSOLVED])
    return method


def test_the_config_takes_it():
    said = ""
    try:
        load_config(DEMO, ["lapo.guidance=at_most"])
    except UserError as error:
        said = str(error)
    assert not said, f"lapo.guidance=at_most is refused ({said}); choices are in nanolapo/config.py"


def test_the_sentence_states_the_upper_end_and_the_reward_aims_at_the_map(tmp_path):
    got = stage_2(tmp_path).guidance(SOLVED, 0, 0)
    want = " I will answer the question with at most 1460 tokens."
    assert got.inside == want, f"right lengths {RIGHT}: the thought should open with {want!r}, not with {got.inside!r}"
    assert not got.outside, f"nothing belongs into the question, but it gets {got.outside!r}"
    assert got.budget == 1300, f"the reward aims at M(q) = 1300 whatever is printed, but the budget is {got.budget}"


def test_other_percentiles_and_a_coarser_number(tmp_path):
    """P90 of the five lengths is 1800; the budget is a multiple of what the prompt prints, as in the other forms."""
    got = stage_2(tmp_path, "lapo.percentiles=[30, 90]", "prompt.length_multiple=100").guidance(SOLVED, 0, 0)
    stated = [round(int(number) / 100) * 100 for number in re.findall(r"\d+", got.inside)]
    assert stated == [1800], f"lapo.percentiles=[30, 90]: P90 of {RIGHT} is 1800, the sentence is {got.inside!r}"
    assert got.budget == 1300, f"with prompt.length_multiple=100 the budget is 1300, not {got.budget}"


def test_an_unsolved_problem_is_given_the_limit(tmp_path):
    got = stage_2(tmp_path).guidance(UNSOLVED, 0, 0)
    want = Guidance(inside=" I will answer the question with at most 4096 tokens.", budget=4096)
    assert got == want, f"an unsolved problem has no range: state the generation limit, {want.inside!r}; got {got}"


def test_the_number_follows_the_map(tmp_path):
    """Two shorter right answers of 700 and 900 tokens: M(q) 800, P70 840."""
    method = stage_2(tmp_path)
    rollouts = make_rows([700, 900, 50, 60], correct=[True, True, False, False], budgets=[1300, 1300, 4096, 4096])
    method.after_step(rollouts)
    got = method.guidance(SOLVED, 0, 1)
    assert (got.inside, got.budget) == (" I will answer the question with at most 840 tokens.", 800), (
        f"after right answers of 700 and 900 tokens P70 is 840 and M(q) 800; the next prompt says {got}"
    )


@pytest.mark.parametrize(
    ("form", "want"),
    [
        ("exact", Guidance(inside=" I will answer the question with 1300 tokens.", budget=1300)),
        ("range", Guidance(inside=" I will answer the question with 1220 to 1460 tokens.", budget=1300)),
        ("outside", Guidance(outside=" Think for 1300 tokens.", budget=1300)),
        ("implicit", Guidance(budget=1300)),
    ],
)
def test_the_other_forms_are_as_they_were(tmp_path, form, want):
    got = stage_2(tmp_path, form=form).guidance(SOLVED, 0, 0)
    assert got == want, f"lapo.guidance={form} has changed: {got}"
