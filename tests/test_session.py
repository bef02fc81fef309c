"""Set-up of a run: paths that can only be local, and problems that are read once for all models of an evaluation.

Run: python -m pytest tests/test_session.py
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import make_config

from nanolapo import session
from nanolapo.config import UserError
from nanolapo.data.load import load_data
from nanolapo.demo.pretrain import make_tokenizer
from nanolapo.evaluation.passes import Model, load_sets
from nanolapo.grader import Grader
from nanolapo.model.folder import load_tokenizer
from nanolapo.plan.machines import load_shape


@pytest.mark.parametrize("path", ["runs/base", "here/base", "./base", "../base", "/nowhere/base"])
def test_a_missing_local_folder_is_not_looked_for_on_the_hub(tmp_path, monkeypatch, path):
    """One slash makes it look like a hub name, for which one waits about a minute where there is no network."""
    (tmp_path / "cwd/here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "cwd")
    with pytest.raises(UserError, match="no such folder.*make demo"):
        load_tokenizer(path)
    with pytest.raises(UserError, match="no such folder.*make demo"):
        load_shape(path)


class CountingGrader(Grader):
    """A real grader that knows how many reference answers it was asked to check."""

    num_references = 0

    def references_that_fail(self, references: Sequence[str]) -> list[int]:
        self.num_references += len(references)
        return super().references_that_fail(references)


def write_problems(folder: Path) -> Path:
    """Three problems: a short one, one with a reference answer that cannot be graded, a long one."""
    rows = [("Start with 1.", "1"), ("Start with 2.", r"\frac{1}{2"), ("Start with 3." * 10, "3")]
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"problem": q, "answer": a}) for q, a in rows))
    return path


def test_reference_answers_are_checked_once_and_prompts_for_every_model(tmp_path):
    tokenizer, path = make_tokenizer(), write_problems(tmp_path)
    tokenizer.save_pretrained(tmp_path / "model")
    config = make_config(tmp_path / "model", data={"sources": [{"name": "d", "path": str(path)}]},
                         rollout={"max_prompt_tokens": 30})  # fmt: skip
    short = replace(config.prompt, template="{question}")
    long = replace(config.prompt, template="{question}" + " add 1" * 9)
    models = [
        Model(name, str(tmp_path / "model"), prompt) for name, prompt in (("a", short), ("b", long), ("c", short))
    ]
    with CountingGrader() as grader:
        found = load_sets(config, models, grader)
        assert grader.num_references == 3
        alone = load_data(replace(config, prompt=short), grader)
    assert [[p.question for p in data.problems] for data in found] == [["Start with 1."]] * 3
    assert found[0].problems == alone.problems and found[0].report == alone.report
    assert "dropped" in alone.report[1] and alone.report[2].startswith("skipped 1 prompts")
    assert found[1].prompter.ids("Start") == tokenizer("Start" + " add 1" * 9)["input_ids"]


def test_training_keeps_a_question_once_over_all_sources_and_evaluation_in_every_source(tmp_path):
    """A question in two sources would be trained twice as often, and with two answers where they contradict each other."""
    make_tokenizer().save_pretrained(tmp_path / "model")
    sources = []
    for name, rows in (
        ("one", {"Start 1": "1", "Start 2": "0.5", "Start 3": r"\frac{1"}),
        ("two", {"Start 2": r"\frac12", "Start 1": "7", "Start 4": "4"}),
        ("three", {"Start 3": "3", "Start 1": "1.0"}),
    ):
        lines = [json.dumps({"problem": question, "answer": answer}) for question, answer in rows.items()]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        sources.append({"name": name, "path": str(tmp_path / f"{name}.jsonl")})
    config = make_config(tmp_path / "model", data={"sources": sources})
    with Grader(workers=1) as grader:
        trained = load_data(config, grader)
        (evaluated,) = load_sets(config, [Model("a", str(tmp_path / "model"), config.prompt)], grader)
    # No answer reaches the first source's row of Start 3, so the third one's is the first that can be trained.
    assert [(p.source, p.question, p.answer) for p in trained.problems] == [
        ("one", "Start 1", "1"), ("one", "Start 2", "0.5"), ("two", "Start 4", "4"), ("three", "Start 3", "3"),
    ]  # fmt: skip
    assert trained.report[-1] == (
        "3 problems left out because an earlier one has their question, 1 of them with another answer"
    )
    assert [p.source for p in evaluated.problems] == ["one"] * 2 + ["two"] * 3 + ["three"] * 2
    assert evaluated.report == trained.report[:-1]


def test_a_test_problem_is_excluded_however_it_is_spelled_and_whatever_its_answer(tmp_path):
    """A problem of the test set is not trained: not with other blanks, and not where the set's own answer is unusable."""
    make_tokenizer().save_pretrained(tmp_path / "model")
    train = [r"Find $\dfrac12 + 1$.", "Add 1 2.", "Add 12.", "Prove 3.", "Add 4."]
    test = [{"problem": r"find  $\frac12+1$ .", "answer": "1.5"}, {"problem": "Add 12.", "answer": "12"},
            {"problem": "Prove 3.", "answer": ""}]  # fmt: skip
    rows = {"train": [{"problem": question, "answer": "7"} for question in [*train, "Add 4 .", "add 4."]], "test": test}
    for name, found in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, found)))
    source, excluded = ({"name": name, "path": str(tmp_path / f"{name}.jsonl")} for name in rows)
    config = make_config(tmp_path / "model", data={"sources": [source], "exclude": [excluded]})
    with Grader(workers=1) as grader:
        data = load_data(config, grader)
    assert [p.question for p in data.problems] == ["Add 1 2.", "Add 4."]
    assert "3 problems left out because they are in data.exclude" in data.report
    assert data.report[-1].startswith("2 problems left out because an earlier one has their question, 0 of them")


def test_when_no_problem_is_left_the_message_says_why(tmp_path):
    path = write_problems(tmp_path)
    make_tokenizer().save_pretrained(tmp_path / "model")
    config = make_config(tmp_path / "model", data={"sources": [{"name": "d", "path": str(path)}]},
                         rollout={"max_prompt_tokens": 2})  # fmt: skip
    with (
        pytest.raises(UserError, match="no problem is left.*cannot be graded; skipped 2 prompts longer than"),
        Grader() as grader,
    ):
        load_data(config, grader)


def test_a_run_is_checked_for_the_number_of_its_ranks(monkeypatch):
    monkeypatch.setattr(session, "Ranks", lambda: SimpleNamespace(count=3))
    with pytest.raises(UserError, match="does not divide over 3 samplers"):
        session.set_up_process(make_config())


@pytest.mark.slow
def test_only_a_second_ctrl_c_stops_at_once() -> None:
    """A launcher or pipeline that gets a Ctrl-C passes it on as SIGTERM, beside the SIGINT that the terminal sent: the two
    are one request, and the step must still end with its checkpoint."""
    program = (
        "import os, signal\nfrom nanolapo.session import StopRequest\nstop = StopRequest()\n"
        "for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):\n    os.kill(os.getpid(), number)\n"
        "print('wanted', stop.wanted, flush=True)\nos.kill(os.getpid(), signal.SIGINT)\nprint('not reached')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert "wanted True" in done.stdout and done.stdout.count("stopping after this step") == 1
    assert "not reached" not in done.stdout and "KeyboardInterrupt" in done.stderr


@pytest.mark.slow
def test_a_ctrl_c_may_come_while_a_line_is_being_printed() -> None:
    """The step's line is written when the signal comes: what the handler says must not be written by the same print."""
    program = (
        "import io, os, signal, sys\nfrom nanolapo.session import StopRequest\nstop = StopRequest()\n"
        "class Interrupted(io.RawIOBase):\n"
        "    def writable(self):\n        return True\n"
        "    def write(self, data):\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n        return os.write(1, data)\n"
        "sys.stdout = io.TextIOWrapper(io.BufferedWriter(Interrupted()))\n"
        "print('step 1/5', flush=True)\nos.write(1, b'went on: %d' % stop.wanted)\nos._exit(0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.split("\n")[1:] == [
        "stopping after this step, with a checkpoint; press Ctrl-C again to stop at once", "step 1/5", "went on: 1",
    ], done.stderr  # fmt: skip
