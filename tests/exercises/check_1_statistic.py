"""Exercise 1: lapo.statistic: p25. Run: make exercise N=1"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from rows import make_rows

from nanolapo.config import UserError
from nanolapo.config_file import load_config
from nanolapo.lengths import STATISTICS, LengthMap
from nanolapo.methods.lapo import Discovery

DEMO = Path(__file__).parents[2] / "configs/demo/stage1.yaml"
# Lengths of right answers, and by hand the length a quarter of the way from the shortest to the longest.
BY_HAND = [([40], 40.0), ([10, 50], 20.0), ([80, 20, 60, 40, 100], 40.0), ([7, 1, 3, 5], 2.5), ([30, 10, 20], 15.0)]


def test_the_statistic_is_there():
    assert "p25" in STATISTICS, 'nanolapo/lengths.py: STATISTICS has no entry "p25" yet'


@pytest.mark.parametrize(("lengths", "want"), BY_HAND)
def test_its_value(lengths, want):
    got = LengthMap("p25").measure(lengths)
    assert got == pytest.approx(want), (
        f"the 25th percentile of the right lengths {lengths} is {want:g}, not {got:g} (between two lengths it lies on the "
        "straight line, as numpy.percentile has it)"
    )


def test_the_config_takes_it():
    try:
        config = load_config(DEMO, ["lapo.statistic=p25"])
    except UserError as error:
        config = None
        said = str(error)
    assert config is not None, f"lapo.statistic=p25 is refused ({said}); choices are in nanolapo/config.py"


def test_stage_1_records_it():
    """Two groups of four; the wrong answer of 5 tokens and the cut one of 90 must stay out, as before."""
    method = Discovery(load_config(DEMO, ["lapo.statistic=p25", "rollout.group_size=4"]))
    rollouts = make_rows(
        [10, 50, 5, 30, 60, 90, 80, 70], group_size=4, correct=[True, True, False, True, True, True, True, True],
        finished=[True] * 5 + [False, True, True],
    )  # fmt: skip
    method.after_step(rollouts)
    got = [method.length_map.target(problem.id) for problem in rollouts.problems]
    assert got == [20.0, 65.0], (
        f"right lengths 10, 30, 50 and 60, 70, 80: M(q) should be 20 and 65, Discovery wrote {got}"
    )


def test_a_map_with_it_is_read_back_and_measured_anew(tmp_path):
    path = tmp_path / "length_map.json"
    recorded = LengthMap("p25")
    recorded.update_discovery("q", [80, 20, 60, 40, 100])
    recorded.save(path)
    loaded = LengthMap.load(path)
    assert (loaded.statistic, loaded.target("q")) == ("p25", 40.0), "a saved p25 map does not come back as it was"
    median = LengthMap()
    median.update_discovery("q", [80, 20, 60, 40, 100])
    assert median.target("q") == 60.0, "the median has changed: add an entry, leave the others alone"
    assert median.measured_by("p25", str(path)).target("q") == 40.0, "stage 2 cannot measure a median map by p25"


def test_the_others_are_as_they_were():
    numbers = [float(STATISTICS[name](np.array([1.0, 2.0, 6.0]))) for name in ("median", "mean", "minimum")]
    assert numbers == [2.0, 3.0, 1.0], f"median, mean and minimum of 1, 2, 6 are now {numbers}"
