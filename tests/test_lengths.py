"""The length-statistics tracker on its own: statistics, both update rules, JSON on disk, messages for bad files.

Run: python -m pytest tests/test_lengths.py
"""

from __future__ import annotations

import os
import signal
import time

import pytest

from nanolapo.config import UserError
from nanolapo.lengths import LengthMap


@pytest.mark.parametrize(
    ("statistic", "value"), [("median", 250.0), ("mean", 400.0), ("minimum", 100.0)]
)  # the paper's Table 3
def test_statistics(statistic, value):
    for update in ("update_discovery", "update_internalization"):
        length_map = LengthMap(statistic)
        getattr(length_map, update)("q", [1000, 100, 200, 300])
        assert length_map.target("q") == value


def test_unsolved_and_unknown_have_no_target():
    length_map = LengthMap()
    length_map.update_discovery("seen", [])
    length_map.update_internalization("also seen", [])
    assert length_map.target("seen") is None and length_map.target("unknown") is None
    assert length_map.entries == {"seen": None, "also seen": None} and len(length_map) == 2


def test_the_lengths_behind_an_entry_are_those_it_was_measured_on():
    """The last visit's in stage 1, the shortest group's in stage 2, none where nothing is solved."""
    length_map = LengthMap()
    length_map.update_discovery("q", [5, 9, 7])
    length_map.update_discovery("q", [50, 90])
    assert length_map.lengths == {"q": [50, 90]} and length_map.typical_range("q", (0, 50)) == (50, 70)
    length_map.update_internalization("q", [80, 80])
    length_map.update_internalization("q", [])
    assert length_map.lengths == {"q": [50, 90]}
    length_map.update_internalization("q", [60, 40])
    assert length_map.lengths == {"q": [60, 40]} and length_map.target("q") == 50
    length_map.update_discovery("q", [])
    assert length_map.lengths == {} and length_map.typical_range("q", (30, 70)) is None


@pytest.mark.parametrize(("statistic", "value"), [("median", 250.0), ("mean", 400.0), ("minimum", 100.0)])
def test_a_map_measured_by_another_statistic(statistic, value):
    recorded = LengthMap("mean")
    recorded.update_discovery("q", [1000, 100, 200, 300])
    recorded.update_discovery("unsolved", [])
    other = recorded.measured_by(statistic, "map.json")
    assert other.statistic == statistic and other.entries == {"q": value, "unsolved": None}
    assert recorded.entries["q"] == 400.0


def test_maps_of_older_versions_have_no_lengths(tmp_path):
    path = tmp_path / "length_map.json"
    path.write_text('{"statistic": "median", "entries": {"q": 13.0, "u": null}}')
    loaded = LengthMap.load(path)
    assert loaded.target("q") == 13 and loaded.typical_range("q", (30, 70)) is None
    with pytest.raises(UserError, match="map.json records 'median' without the lengths.*run stage 1 again"):
        loaded.measured_by("mean", str(path))


def test_a_target_equal_to_the_limit_is_still_solved():
    """The code's sentinel 4096 confuses the two: a solved problem at 4096 must not move up."""
    length_map = LengthMap()
    length_map.update_internalization("q", [4096])
    length_map.update_internalization("q", [5000])
    assert length_map.target("q") == 4096


def test_saved_and_loaded_map_is_the_same(tmp_path):
    length_map = LengthMap("mean")
    length_map.update_discovery("demo:1", [3, 4])
    length_map.update_discovery("ü:2", [])
    length_map.save(tmp_path / "length_map.json")
    loaded = LengthMap.load(tmp_path / "length_map.json")
    assert loaded.state_dict() == length_map.state_dict() and loaded.entries == {"demo:1": 3.5, "ü:2": None}
    assert [path.name for path in tmp_path.iterdir()] == ["length_map.json"]  # no leftovers


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"statistic": "median", "entries": {"q": 13',
        "[]",
        "3",
        "{}",
        '{"statistic": "mode", "entries": {}}',
        '{"statistic": "median", "entries": {"q": 0}}',
        '{"statistic": "median", "entries": {"q": -1}}',
        '{"statistic": "median", "entries": {"q": "1300"}}',
        '{"statistic": "median", "entries": {"q": true}}',
        '{"statistic": "median", "entries": {"q": NaN}}',
        '{"statistic": "median", "entries": {"q": Infinity}}',
        '{"statistic": ["median"], "entries": {}}',
        '{"statistic": "median", "entries": ["q"]}',
        '{"statistic": "median", "entries": {"q": 13}, "lengths": {"q": []}}',
        '{"statistic": "median", "entries": {"q": 13}, "lengths": {"q": [13, 0]}}',
        '{"statistic": "median", "entries": {"q": 13}, "lengths": {"q": [12.5]}}',
        '{"statistic": "median", "entries": {"q": 13}, "lengths": {"q": 13}}',
    ],
)
def test_damaged_file_is_one_line_naming_it(tmp_path, text):
    path = tmp_path / "length_map.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"length_map\.json: not a length map") as error:
        LengthMap.load(path)
    assert "\n" not in str(error.value)


def test_binary_missing_and_folder(tmp_path):
    (tmp_path / "binary").write_bytes(b"\x80\x04\xff")
    with pytest.raises(UserError, match="binary: not a length map"):
        LengthMap.load(tmp_path / "binary")
    for path in (tmp_path / "missing.json", tmp_path):
        with pytest.raises(UserError, match="no such file; stage 1 writes it as length_map.json"):
            LengthMap.load(path)


def test_coverage_error_counts_and_explains():
    length_map = LengthMap()
    length_map.update_discovery("a", [])
    length_map.check_covers(["a"], "m.json")  # unsolved is covered: stage 1 visited it
    with pytest.raises(UserError, match="m.json: lacks 1 of the 2 problems .first: b.*did not visit them"):
        length_map.check_covers(["a", "b"], "m.json")
    with pytest.raises(UserError, match="lacks 2 of the 2 problems.*comes from other data"):
        length_map.check_covers(["x", "y"], "m.json")


def test_D4_file_is_whole_after_a_kill(tmp_path):
    """A process that saves all the time is killed at 10 moments: the file on disk always is one of its maps."""
    path = tmp_path / "length_map.json"
    LengthMap().save(path)
    for attempt in range(10):
        child = os.fork()
        if child == 0:
            try:
                for size in range(50, 100_000, 50):
                    length_map = LengthMap()
                    length_map.entries = {f"demo:{i}": float(size) for i in range(size)}
                    length_map.save(path)
            finally:
                os._exit(1)
        time.sleep(0.02 + 0.02 * attempt)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        entries = LengthMap.load(path).entries
        assert set(entries.values()) <= {float(len(entries))}
    assert len(entries) > 50  # the children did save
