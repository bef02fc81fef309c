"""Several seeds of one evaluation in one table: means and ranges by hand, scores that are missing, folders that are wrong.

Run: python -m pytest tests/reproduce/test_seeds.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from nanolapo.config import UserError
from nanolapo.evaluation.scores import bootstrap_interval
from nanolapo.reproduce import seeds
from nanolapo.reproduce.over_seeds import mean_row
from nanolapo.reproduce.seeds import read_results, seed_table


def results(aes: float | None, accuracy: float = 0.5, model: str = "m") -> dict:
    by_level = {str(k): {"accuracy": accuracy, "tokens": 10.0 * k} for k in (1, 2, 3)}
    row = {
        "model": model,
        "set": "s",
        "temperature": 0.6,
        "guidance": "",
        "accuracy": accuracy,
        "tokens": 100 * accuracy,
    }
    need = {"adaptivity": 40 * accuracy, "need_correlation": accuracy, "length_spread": 10 * accuracy}
    return {"base": model, "rows": [row | need | {"aes": aes, "by_level": by_level}]}


def write(folder: Path, content: object) -> Path:
    folder.mkdir()
    (folder / "results.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_means_and_ranges_by_hand():
    table = seed_table([results(0.1, 0.5), results(0.3, 0.75)], "s", 0.6)
    assert table.splitlines()[2] == (
        "| m | 62.5% (50.0% to 75.0%) | 62.5 (50.0 to 75.0) | +0.20 | +25.0 (+20.0 to +30.0) | 0.62 | 6.2 "
        "| 62% / 10 | 62% / 20 | 62% / 30 |"
    )
    without = [results(0.1), results(0.3)]
    without[1]["rows"][0]["adaptivity"] = None
    assert "| +0.20 | - | 0.50 |" in seed_table(without, "s", 0.6)


def test_a_seed_without_an_aes_gives_a_dash():
    """results.json writes null where the base solved nothing; the mean of the others would be of other seeds."""
    assert "| - |" in seed_table([results(0.1), results(None)], "s", 0.6)
    assert "| - |" in seed_table([results(None)], "s", 0.6)


def test_the_command_reads_folders(tmp_path, capsys, monkeypatch):
    folders = [write(tmp_path / name, results(aes)) for name, aes in (("a", 0.25), ("b", 0.75))]
    monkeypatch.setattr(sys, "argv", ["seeds", *map(str, folders)])
    seeds.main()
    out = capsys.readouterr().out
    assert "### s, temperature 0.6, 2 seeds" in out and "| +0.50 |" in out


def test_wrong_folders_are_one_clear_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty has no results.json: name finished run directories of evaluate.py"):
        read_results(tmp_path / "empty")
    with pytest.raises(UserError, match="nowhere is no folder: name finished run directories"):
        read_results(tmp_path / "nowhere")
    for i, content in enumerate(["{", "[]", '{"rows": [{"set": "s"}]}', '{"tables": []}']):
        with pytest.raises(UserError, match="results.json is not what evaluate.py writes .*: run evaluate.py again"):
            read_results(write(tmp_path / str(i), content))
    with pytest.raises(UserError, match="s, temperature 0.6: .*different models .*'m'.*'n'.*one config"):
        seed_table([results(0.1), results(0.1, model="n")], "s", 0.6)
    for arguments, code, said in ([], 2, "required: folders"), (["--help"], 0, "run directories of evaluate.py"):
        monkeypatch.setattr(sys, "argv", ["seeds", *arguments])
        with pytest.raises(SystemExit) as end:
            seeds.main()
        assert end.value.code == code and said in "".join(capsys.readouterr())


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"samples": 2}, {"4 samples, pass@1,2,4, levels 1,2,3", "2 samples, pass@1,2,4, levels 1,2,3"}),
        (
            {"pass_at_k": {"1": 0.5, "2": 0.5}},
            {"4 samples, pass@1,2,4, levels 1,2,3", "4 samples, pass@1,2, levels 1,2,3"},
        ),
        (
            {"by_level": {"1": {"accuracy": 1, "tokens": 9}}},
            {"4 samples, pass@1,2,4, levels 1,2,3", "4 samples, pass@1,2,4, levels 1"},
        ),
    ],
)
def test_seeds_of_other_samples_or_levels_are_refused(change, words, swapped):
    """In either order: from the first seed's side the others may only have more."""
    one, other = results(0.1), results(0.2)
    for each in (one, other):
        each["rows"][0] |= {"samples": 4, "problems": 1, "pass_at_k": {"1": 0.5, "2": 0.5, "4": 0.5}}
    assert "| +0.15 |" in seed_table([one, other], "s", 0.6)
    other["rows"][0] |= change
    with pytest.raises(UserError) as error:
        seed_table([other, one] if swapped else [one, other], "s", 0.6)
    start, _, rest = str(error.value).partition(": of m these results have ")
    assert start == "s, temperature 0.6" and rest.endswith("; compare evaluations of one config")
    assert set(rest.split("; ")[0].split(" against ")) == words


def test_the_interval_over_seeds_is_not_narrower_than_that_of_drawing_problems() -> None:
    """Three seeds answer the same 200 problems, and a problem's length is mostly its own: reference is a bootstrap that
    draws each problem with the answers of all seeds."""
    rng = np.random.default_rng(1)
    tokens_SQ = rng.gamma(2.0, 40.0, 200) + rng.normal(0, 5, (3, 200))
    rows = [
        {"set": "s", "temperature": 0.6, "model": "m", "guidance": "", "accuracy": 1.0, "aes": 0.0,
         "tokens": float(tokens_Q.mean()), "tokens_interval": bootstrap_interval(tokens_Q.tolist(), 2000)}
        for tokens_Q in tokens_SQ
    ]  # fmt: skip
    low, high = bootstrap_interval(tokens_SQ.mean(axis=0).tolist(), 2000)
    found = mean_row(rows)["tokens_interval"]
    assert 0.97 < (found[1] - found[0]) / (high - low) < 1.1
