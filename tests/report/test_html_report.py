"""report.html: its numbers are those of the files, nothing in it can run, and damaged or unfinished runs still make a page.

Run: python -m pytest tests/report/test_html_report.py
"""

from __future__ import annotations

import base64
import fnmatch
import json
import math
import os
import subprocess
import sys
import tomllib
from dataclasses import asdict, replace
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from statistics import median

import pytest
from report_dirs import NASTY, answers, html, read_rows, rollout, two_stages, write_evaluation, write_run
from tiny import make_config, make_rows

from nanolapo.config import UserError
from nanolapo.config_file import load_config
from nanolapo.data.problems import Problem
from nanolapo.evaluation.evaluate import write_setup
from nanolapo.evaluation.scores import sample_file, score_sets
from nanolapo.metrics import RunLog, append
from nanolapo.report import plots as report_plots
from nanolapo.report.content import content
from nanolapo.report.html import embed, main
from nanolapo.report.runs import names, read_all, trace, visits
from nanolapo.report.tables import markdown, table

ROOT = Path(__file__).parents[2]


# ---- reading the page back ----


class Page(HTMLParser):
    """What a browser would make of the page: its elements, the scripts' contents, and the text of everything else."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text = ""
        self.open = ""
        self.feed(text)
        self.close()
        self.data = json.loads(next(content for attributes, content in self.scripts if attributes.get("id") == "data"))
        blocks = [json.loads(content) for attributes, content in self.scripts if attributes.get("class") == "texts"]
        assert all(len(block) == self.data["texts_per_block"] for block in blocks[:-1])
        self.texts = [text for block in blocks for text in block]

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.open = tag
        if tag == "script":
            self.scripts.append((dict(attributes), ""))

    def handle_endtag(self, tag):
        self.open = ""

    def handle_data(self, data):
        if self.open == "script":
            attributes, before = self.scripts[-1]
            self.scripts[-1] = (attributes, before + data)
        else:
            self.text += data

    def rollouts(self) -> list[dict]:
        """The rollouts as rows like those of rollouts.jsonl, with the name of their run."""
        columns, parts = self.data["rollouts"]["columns"], self.data["rollouts"]["parts"]
        rows = []
        for i, run in enumerate(columns.get("run", [])):
            problem, question, reference_answer, level = self.data["problems"][columns["problem"][i]]
            row = {
                "run": self.data["rollouts"]["runs"][run],
                "step": columns["step"][i],
                "problem": problem,
                "level": level,
            }
            row |= {"question": question, "reference_answer": reference_answer, "text": self.texts[columns["text"][i]]}
            row |= {key: bool(columns[key][i]) for key in ("correct", "finished")}
            row |= {key: columns[key][i] for key in ("length", "budget")}
            rows.append(row | {"reward": dict(zip(parts[run], columns["reward"][i], strict=True))})
        return rows

    def samples(self, number: int) -> list[tuple]:
        c, problems = self.data["samples"][number]["columns"], self.data["problems"]
        return [(problems[c["problem"][i]][0], c["index"][i], c["length"][i], bool(c["correct"][i]), bool(c["finished"][i]),
                 self.texts[c["text"][i]], c["budget"][i]) for i in range(len(c["text"]))]  # fmt: skip


def report(*folders: Path, max_rows: int = 20_000) -> Page:
    return Page(html(*folders, max_rows=max_rows))


def data(*folders: Path) -> dict:
    """Only the data, without the plots."""
    return content(read_all(folders), 20_000)[0]


# ---- numbers ----


def test_every_rollout_is_there_as_it_was_written(tmp_path):
    folders = two_stages(tmp_path)
    found = report(*folders)
    assert found.rollouts() == [{"run": f.name, **row} for f in folders for row in read_rows(f / "rollouts.jsonl")]
    assert found.data["notes"] == []
    places = {tuple(p): i for i, p in enumerate(found.data["problems"])}
    assert found.data["targets"]["stage1"] == {
        str(places["q00", "question q00", "7", 0]): 12.0,
        str(places["q01", "question q01", "7", 1]): None,
        str(places["q10", "question q10", "7", 0]): 9.5,
    }


def test_what_was_run_and_how_it_began_and_ended(tmp_path):
    folders = two_stages(tmp_path)
    found = report(*folders)
    head, [first, _] = found.data["runs"]
    facts = dict(zip(head, first, strict=True))
    assert facts | {"run": "stage1", "steps": "2 of 2", "seed": "3", "commit": "abc1234", "state": "finished"} == facts
    assert found.data["configs"][0] == ["stage1", (folders[0] / "config.yaml").read_text()]
    metrics = read_rows(folders[1] / "metrics.jsonl")
    head, [_, second] = found.data["first_last"]
    cells = dict(zip(head, second, strict=True))
    assert cells["reward"] == f"{metrics[0]['reward']:.3f} \u2192 {metrics[1]['reward']:.3f}"
    assert cells["accuracy"] == f"{metrics[0]['accuracy']:.1%} \u2192 {metrics[1]['accuracy']:.1%}"
    assert cells["map/target_mean"] == "20.0 \u2192 19.0" and "entropy" not in cells
    head, body = found.data["maps"]
    assert head == ["run", "solved", "level 0", "level 1", "never logged"]
    assert body[0] == ["stage1", "5 of 6", "11 (10 to 12)", "-", "41 (40 to 90)"]  # 9.5 rounds to even


def test_logs_of_the_product_itself_are_read_whole(tmp_path):
    """RunLog writes, report/runs.py reads: every key of a rollout line, nan as null, a budget of nan as none."""
    config = make_config(run={"dir": str(tmp_path), "name": "r", "log_rollouts": 3})
    rollouts = make_rows([3, 9, 5, 7], correct=[True, False, False, False], budgets=[math.nan, 5, 5, 5])
    log = RunLog(config, 0, None)
    for row, length in zip(rollouts.rows, (0.5, 0.0, 0.0, math.nan), strict=True):
        row.reward = {"correct": float(row.correct), "length": length}
    log.rollouts(0, rollouts)
    found = report(tmp_path / "r")
    assert [(r["length"], r["budget"], r["correct"], r["text"]) for r in found.rollouts()] == [
        (3, None, True, "text 0"), (9, 5.0, False, "text 1"), (5, 5.0, False, "text 2"),
    ]  # fmt: skip
    assert found.data["notes"] == [f"{tmp_path / 'r'}: no metrics.jsonl (yet)"]
    assert found.data["runs"][1][0][-1] not in ("", "-")  # the commit


def test_the_evaluation_has_the_tables_of_results_md_and_the_samples_behind_each_row(tmp_path):
    made = write_evaluation(tmp_path / "evaluate")
    found = report(tmp_path / "evaluate")
    results = json.loads((tmp_path / "evaluate/results.json").read_text())
    [evaluation] = found.data["evaluations"]
    [[title, parts]] = evaluation["tables"]
    assert title == "s, temperature 0.6, 2 samples a problem"
    assert evaluation["facts"] == "AES is measured against base (weights of O1-Pruner); commit not recorded"
    text = markdown(results)
    assert len(parts) == 4 and all(table(*cells) in text for _, cells in parts)
    right, tokens = [a.correct for a in made["org/new"]], [a.length for a in made["org/new"]]
    row = next(line for line in parts[0][1][1] if line[0] == "org/new")
    assert row[1] == f"{sum(right) / 6:.1%}" and row[3] == f"{sum(tokens) / 6:.1f}" and row[6] == f"{1 / 6:.1%}"
    assert [s["model"] for s in found.data["samples"]] == list(made)
    for number, answers_ in enumerate(made.values()):
        want = [(a.problem, a.index, a.length, a.correct, a.finished, a.text, a.budget) for a in answers_]
        assert sorted(found.samples(number)) == sorted(want)
    assert ["s:1", "how much is 1?", "1", 1] in found.data["problems"] and found.data["notes"] == []


def test_evaluate_keeps_its_config_and_the_problems_behind_the_ids(tmp_path):
    config = make_config(run={"dir": str(tmp_path), "name": "e"})
    problems = [Problem("s:1", NASTY[6], "1", 2, "s"), Problem("s:2", "q 2", "2", None, "s")]
    write_setup(config, problems)
    assert load_config(str(tmp_path / "e/config.yaml"), []) == config
    assert [asdict(p) for p in problems] == read_rows(tmp_path / "e/problems.jsonl")
    write_evaluation(tmp_path / "e")
    write_setup(config, problems)
    found = data(tmp_path / "e")
    assert ["s:1", NASTY[6], "1", 2] in found["problems"] and ["s:0", None, None, 0] in found["problems"]
    assert "; data -; at most 32768 tokens, top-p 0.95; seed 0; commit " in found["evaluations"][0]["facts"]


def test_stale_and_surplus_samples_are_told_from_those_of_the_table(tmp_path):
    folder = tmp_path / "evaluate"
    made = write_evaluation(folder)
    stale = sample_file(folder / "samples", "base", "s", 0.6, {"model": "of yesterday"})
    append(stale.with_stem(f"{stale.stem}-rank0"), [asdict(a) for a in answers(3, "111111")])
    current = sample_file(folder / "samples", "base", "s", 0.6, {"told": ""})
    surplus = [asdict(replace(a, index=2 + a.index)) for a in answers(5, "000000")]  # of a run with samples=4
    append(current.with_stem(f"{current.stem}-rank0"), surplus)
    found = report(folder)
    assert [s["model"] for s in found.data["samples"]] == list(made) and len(found.samples(0)) == 6
    [note] = [note for note in found.data["notes"] if "samples" in note]
    assert "1 sets of samples belong to no row" in note and stale.stem in note


def test_passes_of_equal_numbers_show_their_own_answers(tmp_path):
    """As many tokens and right answers whatever length was stated, and the names of the files in another order."""
    told = {"": None, "0.5x own length": 30, "2x own length": 120, "500 tokens, outside": 500}
    groups = {
        f"m--s--T0.6--{10 * key}": answers(0, "110111", budget)
        for key, budget in zip("cbad", told.values(), strict=True)
    }
    rows = [score_sets("m", 0.6, name, found, make_config())[0] | {"answers": stem}
            for name, (stem, found) in zip(told, groups.items(), strict=True)]  # fmt: skip
    notes: list[str] = []
    traced = trace(rows, dict(sorted(groups.items())), tmp_path, notes)
    assert [s.model for s in traced] == ["m", "m, told 0.5x own length", "m, told 2x own length",
                                         "m, told 500 tokens, outside"]  # fmt: skip
    assert [{a.budget for a in s.answers} for s in traced] == [{None}, {30}, {120}, {500}] and notes == []


@pytest.mark.parametrize("change", [{"accuracy": 0.5}, {"answers": "m--s--T0.6--of_before"}, {"answers": None}])
def test_a_row_whose_samples_are_not_there_is_named(tmp_path, change):
    """The samples were changed or deleted since, or an early version wrote the row without their name."""
    [row] = score_sets("m", 0.6, "", answers(0, "110111"), make_config())
    notes: list[str] = []
    row |= {"answers": "m--s--T0.6--x"} | change
    assert trace([row], {"m--s--T0.6--x": answers(0, "110111")}, tmp_path, notes) == []
    assert (
        notes[0] == f"{tmp_path}: 1 rows of results.json name no samples with their numbers (m on s at temperature 0.6)"
    )


def test_an_evaluation_under_way_lists_samples_by_file_name(tmp_path):
    write_evaluation(tmp_path / "evaluate")
    (tmp_path / "evaluate/results.json").unlink()
    (tmp_path / "evaluate/problems.jsonl").unlink()
    found = report(tmp_path / "evaluate")
    assert sorted(s["model"] for s in found.data["samples"])[:2] == ["base", "org_new"]
    assert {s["title"] for s in found.data["samples"]} == {"evaluate: s, temperature 0.6"}
    assert ["s:0", None, None, 0] in found.data["problems"] and found.data["evaluations"][0]["tables"] == []
    assert any("no results.json (yet)" in note for note in found.data["notes"])


# ---- plots ----


@pytest.fixture
def drawn(monkeypatch):
    """The figures of the plots, kept before they become SVG."""
    figures: list = []
    to_svg = report_plots.svg
    monkeypatch.setattr(report_plots, "svg", lambda figure: figures.append(figure) or to_svg(figure))
    return figures


def lines(axis) -> list[tuple[list, list]]:
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axis.get_lines()]


def test_curves_are_the_metrics(tmp_path, drawn):
    folders = two_stages(tmp_path)
    found = report(*folders)
    training, over_steps, first, second = drawn
    panels = {axis.get_title("left"): lines(axis) for axis in training.axes}
    assert list(panels) == ["reward", "accuracy", "length, tokens (dashed: P90)", "mismatch",
                            "share cut at the limit"]  # fmt: skip
    metrics = [read_rows(folder / "metrics.jsonl") for folder in folders]
    assert panels["reward"] == [([0, 1], [line["reward"] for line in run]) for run in metrics]
    assert panels["length, tokens (dashed: P90)"] == [([0, 1], [2.0, 2.0]), ([0, 1], [1.0, 1.0])] * 2
    assert lines(over_steps.axes[0]) == [([0, 1], [20.0, 19.0])] * 2
    assert "stage1" in found.text and "stage2" in found.text and len(drawn) == 4
    assert first.axes[0].get_title("left") == "stage1: M(q) measured, by level"
    assert second.axes[0].get_title("left") == "stage2: M(q) in the prompt (dotted: measured), by level"


def test_M_by_level_from_the_groups_that_were_logged_whole(tmp_path, drawn):
    folders = two_stages(tmp_path)
    report(*folders)
    for figure, folder in zip(drawn[2:], folders, strict=True):
        rows = read_rows(folder / "rollouts.jsonl")
        measured = {}
        for step, group in ((0, 0), (0, 1), (1, 0)):  # (1, 1) lacks a row
            usable = [r["length"] for r in rows if r["problem"] == f"q{step}{group}" and r["correct"] and r["finished"]]
            measured[step, group] = median(usable) if usable else None
        want = []
        for group in range(2):
            curve = [(s, measured[s, group]) for s in range(2) if measured.get((s, group)) is not None]
            told = [(s, 10.0 * (group + 1)) for s in range(2) if (s, group) in measured]
            want += [curve, told] if folder.name == "stage2" else [curve]
        assert [list(zip(*line, strict=True)) for line in lines(figure.axes[0])] == want
        assert [t.get_text() for t in figure.axes[1].get_xticklabels()] == ["0", "never logged"]  # level 1: unsolved
        medians = [
            line.get_ydata()[0] for line in figure.axes[1].get_lines()[5::7]
        ]  # box, whiskers, caps, median, fliers
        assert medians == [10.75, 41.0]


@pytest.mark.parametrize(
    ("group_size", "logged", "whole"),
    [(4, [4, 4, 2], [4, 4]), (4, [2], []), (4, [8, 4, 3], [8, 4]), (4, [1, 1, 1], [1, 1, 1]), (None, [4, 4, 2], [4, 4])],
)  # fmt: skip
def test_which_groups_were_logged_whole(tmp_path, group_size, logged, whole):
    """Each of two steps logged so many answers to each problem. A problem may come twice in a step; SPO asks each once."""
    rows = [
        rollout(step, f"q{q}", length=10 * (i + 1)) for step in (0, 1) for q, n in enumerate(logged) for i in range(n)
    ]
    folder = write_run(tmp_path / "r", rows)
    if group_size:
        (folder / "config.yaml").write_text(f"rollout: {{group_size: {group_size}}}\n")
    found = visits(read_all([folder]).runs[0])
    of_step = [(f"q{q}", 5.0 * (n + 1)) for q, n in enumerate(whole)]  # the median of 10, 20, ..., 10 n
    assert [(v.step, v.problem, v.measured) for v in found] == [(step, *one) for step in (0, 1) for one in of_step]


def test_accuracy_against_tokens(tmp_path, drawn):
    write_evaluation(tmp_path / "evaluate")
    report(tmp_path / "evaluate")
    rows = json.loads((tmp_path / "evaluate/results.json").read_text())["rows"]
    [figure] = drawn
    points = [(x[0], y[0]) for x, y in lines(figure.axes[0]) if len(x) == 1]
    assert points == [(row["tokens"], 100 * row["accuracy"]) for row in rows]
    assert lines(figure.axes[1]) == [(["0", "1", "2"], [v["tokens"] for v in r["by_level"].values()]) for r in rows[:2]]


# ---- nothing in it can run ----


def is_ours(page_: Page) -> bool:
    """One program, the data, the blocks of texts: no other script element, nothing that loads or handles an event."""
    kinds = [(a.get("type"), a.get("id"), a.get("class")) for a, _ in page_.scripts]
    blocks = [("application/json", None, "texts")] * (len(kinds) - 2)
    attributes = {(key, value) for _, found in page_.elements for key, value in found.items()}
    loads = [value for key, value in attributes if key in ("href", "xlink:href") and not (value or "").startswith("#")]
    risky = [key for key, _ in attributes if key.startswith("on") or key in ("src", "srcdoc", "action")]
    return kinds == [("application/json", "data", None), *blocks, (None, None, None)] and not loads and not risky


def test_nasty_strings_come_out_as_they_went_in(tmp_path):
    rows = [rollout(i, text, question=f"q {text}", reference_answer=f"g {text}", text=text, reward={text: 1.0})
            for i, text in enumerate(NASTY)]  # fmt: skip
    folder = write_run(tmp_path / "<img src=x onerror=alert(0)> & $x$", rows)
    (folder / "config.yaml").write_text(f"# git: </script>{NASTY[0]}\nrun:\n  name: '{NASTY[1]}'\n")
    text = html(folder)
    found = Page(text)
    assert text.isascii() and is_ours(found)
    got = found.rollouts()
    for row, want in zip(got, rows, strict=True):
        assert {key: row[key] for key in ("problem", "question", "reference_answer", "text")} == {
            key: want[key] for key in ("problem", "question", "reference_answer", "text")
        }
        assert {name: value for name, value in row["reward"].items() if value is not None} == want["reward"]
    for _, inside in found.scripts[:-1]:
        assert not set("<>&") & set(inside)  # a browser ends a script at </script, and nests at <!--
    assert found.text.count("<img src=x onerror=alert(0)> & $x$") == 1  # the legend of the curves
    assert found.data["runs"][1][0][-1] == "</script><script>alert(1)</script>"


def test_nasty_names_in_an_evaluation(tmp_path):
    folder = tmp_path / "evaluate"
    write_evaluation(folder)
    results = json.loads((folder / "results.json").read_text())
    for row, name in zip(results["rows"], (NASTY[0], NASTY[11], NASTY[4]), strict=True):
        row["model"] = row["set"] = name
    (folder / "results.json").write_text(json.dumps(results | {"base": NASTY[1]}))
    text = html(folder)
    found = Page(text)
    assert text.isascii() and is_ours(found) and NASTY[0] in found.text
    assert [parts[0][1][1][0][0] for _, parts in found.data["evaluations"][0]["tables"]] == [
        NASTY[0], NASTY[11], f"{NASTY[4]}, told 2x own length",
    ]  # fmt: skip


def test_the_policy_allows_this_script_only(tmp_path):
    text = html(write_run(tmp_path / "r", [rollout()]))
    found = Page(text)
    [policy] = [a["content"] for tag, a in found.elements if tag == "meta" and "http-equiv" in a]
    digest = base64.b64encode(sha256(found.scripts[-1][1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy and "unsafe-eval" not in policy
    for danger in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "DOMParser"):
        assert danger not in found.scripts[-1][1]
    assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org/", "")  # SVG's name spaces


def test_embedded_json_is_plain():
    for text in NASTY:
        made = embed([text])
        assert made.isascii() and not set("<>&\n") & set(made) and json.loads(made) == [text]
    with pytest.raises(ValueError, match="not JSON compliant"):
        embed([math.nan])


# ---- unfinished and damaged runs ----


def test_a_run_in_progress_makes_a_page_without_complaint(tmp_path):
    """The last lines are half written, in the middle of a character even; length_map.json is not there yet."""
    folder = write_run(tmp_path / "r", [rollout(0, text="ä"), rollout(1, text="ö")])
    (folder / "config.yaml").write_text("train:\n  steps: 9\n")
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        whole = (folder / name).read_bytes()
        half = json.dumps(rollout(1, text="ü"), ensure_ascii=False).encode()
        (folder / name).write_bytes(whole + half[: half.index("ü".encode()) + 1])
    found = report(folder)
    assert [row["text"] for row in found.rollouts()] == ["ä", "ö"] and found.data["notes"] == []
    facts = dict(zip(found.data["runs"][0], found.data["runs"][1][0], strict=True))
    assert facts["steps"] == "2 of 9" and facts["state"] == "in progress or stopped"


@pytest.mark.parametrize(
    ("train", "step", "tokens", "has_model", "finished"),
    [
        ("{steps: 40}", 24, 900, True, False),  # it was finished, and goes on
        ("{steps: 40}", 39, 900, False, True),
        ("{steps: 40, sampled_tokens: 900}", 24, 899, True, False),
        ("{steps: 40, sampled_tokens: 900}", 24, 900, False, True),
        ("{steps: 40, sampled_tokens: 0}", 24, 900, False, False),
        ("{}", 24, 900, True, True),
        ("{}", 24, 900, False, False),
        ("{steps: 40}", None, 0, True, True),
    ],
)
def test_a_run_is_finished_when_its_steps_or_its_tokens_are_done(tmp_path, train, step, tokens, has_model, finished):
    folder = write_run(tmp_path / "r", [], [{"step": step, "sampled_tokens": tokens}])
    (folder / "config.yaml").write_text(f"train: {train}\n")
    if step is None:
        (folder / "metrics.jsonl").unlink()
    if has_model:
        (folder / "model").mkdir()
    head, [line] = data(folder)["runs"]
    assert line[head.index("state")] == ("finished" if finished else "in progress or stopped")


@pytest.mark.parametrize("kept", ["config.yaml", "metrics.jsonl", "rollouts.jsonl"])
def test_missing_files_are_named(tmp_path, kept):
    folder = write_run(tmp_path / "r", [rollout()])
    (folder / "model").mkdir()
    for path in folder.glob("*.*"):
        if path.name != kept:
            path.unlink()
    found = report(folder)  # and the page is made
    missing = {"config.yaml", "metrics.jsonl", "rollouts.jsonl"} - {kept}
    assert sorted(found.data["notes"]) == sorted(f"{folder}: no {name} (yet)" for name in missing)
    assert len(found.rollouts()) == (kept == "rollouts.jsonl") and found.data["runs"][1][0][0] == "r"


@pytest.mark.parametrize(
    ("file", "broken", "words"),
    [
        ("rollouts.jsonl", '{"step": 0, "pro\n' + json.dumps(rollout()), "1 of 2 lines left out (first: line 1, not JSON)"),
        ("rollouts.jsonl", "[]\n" + json.dumps(rollout()), "1 of 2 lines left out (first: line 1, not an object)"),
        ("rollouts.jsonl", '{"step": 0}\n' * 3, "3 of 3 lines left out (first: line 1, no 'problem')"),
        ("rollouts.jsonl", json.dumps(rollout(length="9")) + "\n", "'length' is '9'"),
        ("rollouts.jsonl", json.dumps(rollout(correct=1)) + "\n", "'correct' is 1"),
        ("rollouts.jsonl", json.dumps(rollout(length=True)) + "\n", "'length' is True"),
        ("rollouts.jsonl", json.dumps(rollout(reward={"correct": "x"})) + "\n", "'correct' is 'x'"),
        ("rollouts.jsonl", "[" * 100_000 + "\n", "not JSON"),
        ("metrics.jsonl", '{"reward": 1}\n', "no 'step'"),
        ("metrics.jsonl", '{"step": 0, "reward": "high"}\n', "'reward' is 'high'"),
        ("metrics.jsonl", b"\xff\xfe\n", "not JSON"),
        ("config.yaml", "a: [", "config.yaml: cannot be read"),
        ("config.yaml", "just words", "not sections of keys"),
        ("length_map.json", '{"entries": {}}', "not a length map"),
        ("length_map.json", '{"statistic": "median", "entries": {"q": -1}}', "not a length map"),
    ],
)  # fmt: skip
def test_damage_is_one_line_that_names_the_file(tmp_path, file, broken, words):
    folder = write_run(tmp_path / "r", [rollout()])
    (folder / file).write_bytes(broken if isinstance(broken, bytes) else broken.encode())
    [note] = data(folder)["notes"]
    assert str(folder / file) in note and words in note and "\n" not in note


@pytest.mark.parametrize(
    "broken",
    ["", "{", "[]", '{"rows": 3}', '{"rows": [{}]}', '{"rows": [{"model": "m"}]}', '{"base": "b", "rows": [3]}',
     '{"rows": [{"model": "m", "set": "s", "temperature": 1, "guidance": "", "accuracy": 1, "tokens": 1, '
     '"truncated": 0}]}', {"answers": ["x"]}],
)  # fmt: skip
def test_damaged_results_are_one_line(tmp_path, broken):
    write_evaluation(tmp_path / "evaluate")
    path = tmp_path / "evaluate/results.json"
    if isinstance(broken, dict):  # one value is wrong
        good = json.loads(path.read_text())
        broken = json.dumps(good | {"rows": [row | broken for row in good["rows"]]})
    path.write_text(broken)
    found = data(tmp_path / "evaluate")
    [note] = [note for note in found["notes"] if "results.json" in note]
    assert note.startswith(f"{tmp_path / 'evaluate/results.json'}: not what evaluate.py writes")
    assert len(found["samples"]) == 3  # the answers can be read all the same


def test_numbers_that_json_does_not_have(tmp_path):
    folder = write_run(tmp_path / "r", [])
    line = json.dumps(rollout(reward={"a": math.nan, "b": math.inf, "c": 0.5}))
    (folder / "rollouts.jsonl").write_text(
        line.replace("0.5", "1e999") + "\n" + json.dumps(rollout(budget=math.nan)) + "\n"
    )
    found = report(folder)
    assert [row["reward"].get("a") for row in found.rollouts()] == [None, None] and found.rollouts()[1][
        "budget"
    ] is None
    assert found.rollouts()[0]["reward"] == {"a": None, "b": None, "c": None, "correct": None}


def test_user_errors(tmp_path, monkeypatch):
    run = write_run(tmp_path / "r", [rollout()])
    (tmp_path / "empty").mkdir()
    for arguments, words in (
        ([tmp_path / "no"], "no such directory"),
        ([run, tmp_path / "no*"], "no such directory"),
        ([tmp_path / "empty"], "no run directory"),
        ([run, "--out", tmp_path], "a directory"),
        ([run, "--max-rows", "0"], "give 1 or more"),
    ):
        monkeypatch.setattr(sys, "argv", ["html_report", *map(str, arguments)])
        with pytest.raises(UserError, match=words.replace("*", r"\*")) as error:
            main()
        assert "\n" not in str(error.value)


def test_other_directories_are_named_and_models_samples_and_scores_passed_over(tmp_path):
    run = write_run(tmp_path / "r", [rollout()])
    (tmp_path / "empty").mkdir()
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text("{}")
    (tmp_path / "note.txt").write_text("x")
    write_evaluation(tmp_path / "scores/m")
    (tmp_path / "scores/m/samples").rename(tmp_path / "samples_of_all")  # as in a comparison
    (tmp_path / "scores/.m.lock").write_text("")
    write_run(tmp_path / "seed0/stage1", [rollout()])
    write_evaluation(tmp_path / "seed0/evaluate")  # somebody may have meant these two
    noted, silent = ("empty", "note.txt", "seed0"), ("base", "scores", "samples_of_all")
    found = report(run, *(tmp_path / name for name in (*noted, *silent)), run)
    assert [note.split(":")[0] for note in found.data["notes"]] == [str(tmp_path / name) for name in noted]
    assert found.data["rollouts"]["runs"] == ["r"]  # given twice, shown once


def test_what_explain_has_left_is_no_run(tmp_path):
    """It has the files of a run, with a single step in them, and the default RUNS of make report names it."""
    folders = two_stages(tmp_path)
    explained = write_run(tmp_path / "explain-stage1", [rollout()])
    (explained / "explain.html").write_text("<!DOCTYPE html>")
    material = read_all([*folders, explained])
    assert [run.name for run in material.runs] == ["stage1", "stage2"] and material.notes == []
    assert html(*folders, explained) == html(*folders)


def test_names_tell_seeds_apart(tmp_path):
    assert names([tmp_path / "seed0/a", tmp_path / "seed1/a", tmp_path / "b"]) == ["seed0/a", "seed1/a", "b"]


# ---- size and sameness ----


@pytest.mark.slow
def test_the_same_files_make_the_same_bytes(tmp_path):
    folders = two_stages(tmp_path)
    write_evaluation(tmp_path / "evaluate")
    here = html(*folders, tmp_path / "evaluate")
    command = [sys.executable, "-m", "nanolapo.report.html", *map(str, folders), str(tmp_path / "evaluate"), "--out",
               str(tmp_path / "new/report.html")]  # fmt: skip
    ran = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": "1"}, capture_output=True, text=True)
    assert ran.returncode == 0 and "2 runs and 1 evaluation" in ran.stdout, ran.stderr
    assert (tmp_path / "new/report.html").read_bytes() == here.encode()


def test_20_000_rollouts_take_little_more_than_their_texts(tmp_path):
    """Every answer differs, the questions repeat: the page is smaller than the log it was made from."""
    rows = [rollout(i // 64, f"q{i % 350}", question="word " * 40, text=f"{i} " + "x" * 1000, budget=50.0,
                    reward={"correct": 1.0, "length": 0.123456789}) for i in range(20_000)]  # fmt: skip
    folder = write_run(tmp_path / "r", rows)
    text = html(folder)
    texts = sum(len(row["text"]) for row in rows)
    assert texts < len(text) < texts + 100 * len(rows) < 0.85 * (folder / "rollouts.jsonl").stat().st_size
    assert [row["text"] for row in Page(text).rollouts()] == [row["text"] for row in rows]


def test_beyond_max_rows_whole_steps_are_left_out_and_the_page_says_so(tmp_path):
    rows = [rollout(step, f"q{i}") for step in range(10) for i in range(4)]
    found = report(write_run(tmp_path / "r", rows), max_rows=15)
    assert [row["step"] for row in found.rollouts()] == [1] * 4 + [5] * 4 + [9] * 4  # every third would make 16
    assert found.data["notes"] == ["rollouts: one of 4 logged steps is shown (--max-rows 15)"]
    write_evaluation(tmp_path / "evaluate")
    found = report(tmp_path / "evaluate", max_rows=17)  # of 3 rows with 3 problems x 2 samples
    assert [len(found.samples(i)) for i in range(3)] == [3, 3, 3] and {one[1] for one in found.samples(0)} == {0}
    assert found.data["notes"] == ["samples: 1 of 2 of a problem are shown side by side (--max-rows 17)"]


# ---- packaging ----


def test_every_file_that_is_no_module_is_packaged():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    files = [path for path in (ROOT / "nanolapo").rglob("*.*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert {path.name for path in files} >= {"page.html", "paper.yaml"}
    for path in files:
        package = ".".join(path.parent.relative_to(ROOT).parts)
        assert any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns.get(package, [])), path
