"""The pipeline behind compare and reproduce: what runs, what is skipped, what an interruption and a failure leave.

Run: python -m pytest tests/reproduce/test_pipeline.py
The steps are real commands: small Python programs that leave a trace.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanolapo.config import Config, RunStopped, SourceConfig, UserError
from nanolapo.config_file import build
from nanolapo.reproduce.pipeline import Pipeline, Step
from nanolapo.reproduce.steps import identity

pytestmark = pytest.mark.slow

# Appends its name to `trace`, waits until a file exists (or not at all), writes its output; exit code by argument.
PROGRAM = """
import sys, time, pathlib
name, trace, output, code, wait_for = sys.argv[1:]
with open(trace, "a") as file:
    file.write(name + "\\n")
while wait_for and not pathlib.Path(wait_for).exists():
    time.sleep(0.02)
if code == "0" and output:
    pathlib.Path(output).parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(output).write_text(name)
print(f"{name} ends")
print("a last line, and blank ones after it\\n\\n")
sys.exit(int(code))
"""


class Lab:
    """Makes steps below a folder, and knows which of them have run, in order."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.trace = folder, folder / "trace"

    def step(self, name: str, *needs: str, config: str = "x", code: int = 0, wait_for: str = "") -> Step:
        out = self.folder / "out" / name / "result"
        command = (sys.executable, "-c", PROGRAM, name, str(self.trace), str(out), str(code), wait_for)
        return Step(name, command, config, needs, out, out.parent)

    def run(self, steps: list[Step], *wanted: str, jobs: int = 1) -> list[str]:
        """The names of the steps that ran this time. What the pipeline said is in `said`."""
        before, self.said = self.ran(), list[str]()
        Pipeline(steps, self.folder / "pipe", self.said.append).run(wanted, jobs)
        return self.ran()[len(before) :]

    def ran(self) -> list[str]:
        return self.trace.read_text().split() if self.trace.exists() else []


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


def test_a_step_runs_once_and_again_when_something_it_depends_on_changes(lab: Lab) -> None:
    def steps(config_a: str = "1", config_b: str = "1") -> list[Step]:
        return [lab.step("a", config=config_a), lab.step("b", "a", config=config_b), lab.step("c")]

    assert lab.run(steps()) == ["a", "b", "c"]
    assert lab.run(steps()) == []
    assert lab.run(steps(config_b="2")) == ["b"]
    assert lab.run(steps(config_a="2", config_b="2")) == ["a", "b"]  # b needs a; c does not
    (lab.folder / "out" / "b" / "result").unlink()
    assert lab.run(steps(config_a="2", config_b="2")) == ["b"]
    (lab.folder / "pipe" / "steps" / "c.json").write_text('{"digest": "cut off by a ki')
    with pytest.raises(UserError, match="step c: .*out/c is there, and not from here"):  # whose it is, nobody knows
        lab.run(steps(config_a="2", config_b="2"))


def test_a_changed_config_clears_its_folder_and_an_interruption_does_not(lab: Lab) -> None:
    """What a killed run left is for it to resume; what another config left is not."""
    half = lab.folder / "out" / "a" / "half"
    with pytest.raises(RunStopped):
        lab.run([lab.step("a", code=1)])
    half.parent.mkdir(parents=True)
    half.write_text("checkpoint")
    assert lab.run([lab.step("a")]) == ["a"] and half.exists()
    assert lab.run([lab.step("a", config="other")]) == ["a"] and not half.exists()
    assert lab.run([dataclasses.replace(lab.step("a", config="third"), clear=None)]) == ["a"]
    assert (lab.folder / "out" / "a" / "result").exists()


def test_what_was_made_from_an_earlier_outcome_is_made_anew(lab: Lab) -> None:
    """A folder that was deleted by hand is made again, perhaps by other code: what came from the old one is void."""
    steps = [lab.step("a"), lab.step("b", "a"), lab.step("c", "b"), lab.step("d")]
    assert lab.run(steps) == ["a", "b", "c", "d"]
    half = lab.folder / "out" / "b" / "checkpoint"
    half.write_text("of the old a")
    shutil.rmtree(lab.folder / "out" / "a")
    assert lab.run(steps, "a") == ["a"]  # b and c were not asked for
    assert lab.run(steps) == ["b", "c"] and not half.exists()
    assert lab.said[1] == f"b: what it was made from has changed: {half.parent} is made anew"
    assert lab.run(steps) == []

    shutil.rmtree(lab.folder / "out" / "a")
    other_recipe = [lab.step("a"), lab.step("e", "a")]
    assert lab.run(other_recipe) == ["a", "e"]
    assert lab.run(steps) == ["b", "c"] and lab.run(other_recipe) == []


def test_which_key_has_changed_is_told(lab: Lab) -> None:
    lab.run([lab.step("a", config=identity("train.py", build(Config, {"train": {"steps": 40}}, "")))])
    lab.run([lab.step("a", config=identity("train.py", build(Config, {"train": {"steps": 45}}, "")))])
    folder = lab.folder / "out" / "a"
    old, new = (f'...["train.py", {{"train": {{"steps": {steps}}}}}]...' for steps in (40, 45))
    assert lab.said[0] == f"a: its config was {old} and is {new}: {folder} is made anew"


def test_what_an_earlier_version_left_is_not_deleted(lab: Lab) -> None:
    """Its stamps had a digest instead of the config."""
    steps = [lab.step("a")]
    lab.run(steps)
    stamp = lab.folder / "pipe" / "steps" / "a.json"
    stamp.write_text('{"digest": "0123", "done": true, "seconds": 1.0, "folder": "%s"}' % (lab.folder / "out" / "a"))
    with pytest.raises(UserError, match="step a: .*out/a is of an earlier version of nanolapo, which did"):
        lab.run(steps)


def test_a_folder_that_was_half_removed_still_has_to_go(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 in the middle of it, and then the old config again, whose stamp says that all is well."""
    lab.run([lab.step("a")])
    half = lab.folder / "out" / "a" / "half"
    half.write_text("left of it")

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nanolapo.reproduce.pipeline.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        lab.run([lab.step("a", config="other")])
    monkeypatch.undo()
    assert half.exists() and lab.run([lab.step("a")]) == ["a"] and not half.exists()


def test_a_failure_is_one_of_what_the_step_has_now(lab: Lab) -> None:
    """A step that ended well and has to be done again has a log, too: its last line is no reason for anything."""
    with pytest.raises(RunStopped):
        lab.run([lab.step("a"), lab.step("b", code=1), lab.step("c", "b")])

    def failed(*steps: Step) -> list[str]:
        pipeline = Pipeline(steps, lab.folder / "pipe")
        return [name for name in pipeline.steps if pipeline.failed(name)]

    assert failed(lab.step("a"), lab.step("b"), lab.step("c", "b")) == ["b"]
    assert failed(lab.step("a", config="other"), lab.step("b", config="other")) == []
    (lab.folder / "out" / "a" / "result").unlink()
    assert failed(lab.step("a")) == []


def test_a_stop_before_a_step_begins_removes_nothing(lab: Lab) -> None:
    lab.run([lab.step("a")])
    pipeline = Pipeline([lab.step("a", config="other")], lab.folder / "pipe")
    pipeline.stop.set()
    with pipeline.locked() as lock:
        assert pipeline.run_step("a", lock) == -signal.SIGTERM
    assert lab.ran() == ["a"] and lab.run([lab.step("a")]) == []


def test_only_what_is_wanted_and_what_it_needs(lab: Lab) -> None:
    steps = [lab.step("a"), lab.step("b"), lab.step("c", "b"), lab.step("d", "c")]
    assert lab.run(steps, "c") == ["b", "c"]
    with pytest.raises(UserError, match="step 'e' does not exist; there are a, b, c, d"):
        lab.run(steps, "e")
    with pytest.raises(UserError, match="step c needs b, which is not a step before it"):
        lab.run([lab.step("c", "b"), lab.step("b")])


def test_a_failure_stops_only_what_needs_it_and_is_told(lab: Lab) -> None:
    steps = [lab.step("a", code=7), lab.step("b", "a"), lab.step("c"), lab.step("d", "c")]
    with pytest.raises(RunStopped) as error:
        lab.run(steps, jobs=2)
    assert sorted(lab.ran()) == ["a", "c", "d"]
    message = str(error.value)
    assert "1 steps failed (a), 1 were not begun" in message and "a last line, and blank ones after it" in message
    assert message.endswith("pipe/logs/a.log")
    assert lab.run([lab.step("a"), *steps[1:]]) == ["a", "b"]  # mended, the rest is done


def test_who_wants_to_know_is_told_which_steps_ended_well(lab: Lab) -> None:
    """A comparison keeps the result of each at once. A step that failed has none."""
    ended: list[str] = []
    steps = [lab.step("a"), lab.step("b", code=1), lab.step("c", "a")]
    with pytest.raises(RunStopped):
        Pipeline(steps, lab.folder / "pipe", lambda line: None, ended.append).run()
    assert ended == ["a", "c"]


def test_jobs_run_beside_each_other_and_needs_one_after_the_other(lab: Lab) -> None:
    """a waits for what b writes: with one job at a time this would never end."""
    steps = [lab.step("a", wait_for=str(lab.folder / "out" / "b" / "result")), lab.step("b"), lab.step("c", "a", "b")]
    assert sorted(lab.run(steps, jobs=2)) == ["a", "b", "c"] and lab.ran()[-1] == "c"


def test_a_command_that_ends_well_without_its_output_has_not_done_it(lab: Lab) -> None:
    """A training that was told to stop saves a checkpoint and exits with 0; its model is not there."""
    step = lab.step("a")
    silent = dataclasses.replace(step, command=(sys.executable, "-c", "print('stopped')"))
    with pytest.raises(RunStopped, match="stopped"):
        lab.run([silent])
    assert lab.run([step]) == ["a"]


def test_killed_in_the_middle_and_started_again(lab: Lab) -> None:
    """kill -9 of the pipeline while its second step runs: the first is not done again, the second is."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\nfrom test_pipeline import Lab\n"
        "lab = Lab(Path(sys.argv[2]))\n"
        "lab.run([lab.step('a'), lab.step('b', 'a', wait_for=str(lab.folder / 'go'))])"
    )
    command = [sys.executable, "-c", program, str(Path(__file__).parent), str(lab.folder)]
    process = subprocess.Popen(command, start_new_session=True)
    deadline = time.time() + 60
    while lab.ran() != ["a", "b"] and time.time() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert lab.ran() == ["a", "b"]
    assert lab.run([lab.step("a"), lab.step("b", "a")]) == ["b"]


def test_identity_holds_what_differs_from_the_defaults() -> None:
    """So that a new key at its default makes nothing anew, and any other change does."""
    assert identity("s.py", Config()) == '["s.py", {}]'
    source = {"name": "d", "path": "demo", "levels": [1, 2]}
    config = build(Config, {"train": {"steps": 7}, "data": {"sources": [source]}}, "")
    assert identity("s.py", config) == (
        '["s.py", {"data": {"sources": [{"levels": [1, 2], "name": "d", "path": "demo"}]}, "train": {"steps": 7}}]'
    )
    assert SourceConfig("d", "demo", levels=(1, 2)) in config.data.sources
    others = [{"lapo": {"beta": 0.7}}, {"method": {"options": {"a": 1}}}, {"evaluate": {"models": ["a=b"]}}]
    assert len({identity("s.py", build(Config, values, "")) for values in ({}, *others)}) == 4


# ----------------------------------------------------------------------------------------- what may be deleted, and by whom


def test_a_folder_that_the_pipeline_has_not_made_is_never_deleted(lab: Lab) -> None:
    """--out runs/demo would have removed what `make demo` left there; run.dir=... in an override any folder at all."""
    precious = lab.folder / "out" / "a" / "thesis"
    precious.parent.mkdir(parents=True)
    precious.write_text("years of work")
    with pytest.raises(UserError, match=r"step a: .*out/a is there, and not from here: move it away, or delete it"):
        lab.run([lab.step("b"), lab.step("a")])
    assert precious.exists() and lab.ran() == []  # told before anything runs
    precious.unlink()
    precious.parent.rmdir()
    assert lab.run([lab.step("a")]) == ["a"]

    other = lab.folder / "elsewhere"  # a stamp of this step, but of another folder
    other.mkdir()
    with pytest.raises(UserError, match="elsewhere is there, and not from here"):
        lab.run([dataclasses.replace(lab.step("a", config="2"), clear=other)])
    assert other.exists()


def test_two_steps_of_one_name_or_one_folder_are_refused(lab: Lab) -> None:
    """Two phases without a run.name of their own: the second would delete the first one's model and start anew."""
    with pytest.raises(UserError, match="two steps are called a"):
        lab.run([lab.step("a"), lab.step("a", config="2")])
    with pytest.raises(UserError, match=r"steps a and b both write to .*out/a: give each its own run\.name"):
        lab.run([lab.step("a"), dataclasses.replace(lab.step("b"), clear=lab.step("a").clear)])
    with pytest.raises(UserError, match="steps x/a and x-a would share a stamp"):
        lab.run([lab.step("x/a"), lab.step("x-a")])


# ------------------------------------------------------------------------------------------- signals, and two at once

PIPELINE = """
import signal, sys; sys.path.insert(0, sys.argv[1])
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs the tests in the background ignores it
from pathlib import Path
from nanolapo import cli
from test_pipeline import Lab
lab = Lab(Path(sys.argv[2]))
cli.run(lambda: lab.run([lab.step("a"), lab.step("b", "a", wait_for=str(lab.folder / "go"))]))
"""


def pipeline_at_b(lab: Lab) -> subprocess.Popen[str]:
    """A pipeline in a process of its own, whose step b waits until lab.folder / "go" exists."""
    command = [sys.executable, "-c", PIPELINE, str(Path(__file__).parent), str(lab.folder)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 60
    while lab.ran() != ["a", "b"] and time.time() < deadline:
        time.sleep(0.05)
    assert lab.ran() == ["a", "b"]
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_running_step_too(lab: Lab, number: int) -> None:
    process = pipeline_at_b(lab)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and err == "interrupted; the same command goes on from what was saved\n"
    assert lab.run([lab.step("a"), lab.step("b", "a")]) == ["b"]  # it could not, if the step still held the lock


def test_a_second_pipeline_is_refused_while_one_is_at_work_or_its_orphan_is(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two trainings in one folder would spoil each other. After kill -9 of the pipeline its training goes on alone."""
    monkeypatch.setattr("nanolapo.locks.PATIENCE_S", 0.2)
    process = pipeline_at_b(lab)
    steps = [lab.step("a"), lab.step("b", "a")]
    refused = "pipe: another command is at work here, or a step that it left behind; wait for it, or end it"
    with pytest.raises(UserError, match=refused):
        lab.run(steps)
    process.kill()
    process.communicate()
    with pytest.raises(UserError, match=refused):
        lab.run(steps)
    (lab.folder / "go").touch()  # the orphan ends
    deadline = time.time() + 30
    while time.time() < deadline:
        try:
            assert lab.run(steps) == ["b"]  # it wrote its output, but nobody wrote down that it ended well
            break
        except UserError:
            time.sleep(0.1)
    assert lab.ran() == ["a", "b", "b"]


def test_a_command_that_is_not_there_is_one_line_and_stops_at_once(lab: Lab) -> None:
    step = dataclasses.replace(lab.step("a"), command=("torchrum", "x.py"))
    with pytest.raises(UserError, match="step a: there is no command torchrum"):
        lab.run([step])
    with pytest.raises(UserError, match="--jobs 0: at least 1"):
        lab.run([lab.step("a")], jobs=0)
