"""`make faults`: breaks small runs in many ways, starts the same command again, and compares with the unbroken run.

    python tests/faults/run.py [--count 50] [--seed 0] [--only random|scripted] [--folder runs/faults]

First COUNT random SIGKILLs, drawn by plan.py; each run is shot once (topic `resume`: twice) and the same plain command is
given again. Equal means: model and checkpoint files byte for byte, length_map.json, rollouts.jsonl, metrics.jsonl without
timings, and no file left over; for evaluate.py results.json and the samples. Then the faults of scripted.py. Writes
report.json and report.md to the folder; exit code 1 if any fault was not survived. Linux only (it reads /proc).
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

import one_run
import plan
import scripted
from one_run import ROOT, TRAIN, Setup, command, differences, execute, reference, write_config


@dataclass(frozen=True)
class Line:
    """One line of the report."""

    topic: str
    fault: str
    ranks: str
    step: str  # steps logged when it struck
    seconds: float  # from the strike until the last process of the broken run was gone
    result: str
    passed: bool | None  # None: not tried

    def __str__(self) -> str:
        return (
            f"{self.topic:20} {self.ranks:15} step {self.step:6} {self.fault:72} {self.seconds:5.1f} s  {self.result}"
        )


@cache
def unbroken(folder: Path, setup: Setup) -> list[plan.Moments]:
    """Make the unbroken run of a setup, and list its moments, rank by rank, by the same run once more under killer.py's
    eyes. That these two are equal shows that equality can be asked for."""
    whole, watched = reference(folder, setup), folder / f"watched-{setup.name}"
    for place, killer in ((whole, ()), (watched, ("--phase", ""))):
        write_config(place)
        ended = execute(place, command(place, setup, killer))
        if ended.code or ended.orphans:
            sys.exit(f"an unbroken run failed ({place}): {ended.last_line} {ended.orphans}")
    if different := differences(whole, watched):
        sys.exit(f"two unbroken runs differ in {different}: nothing can be compared")
    if setup.script == TRAIN.script and not one_run.learned(whole):
        sys.exit("the unbroken run has learned nothing: equal weights would say nothing")
    return [read_moments(watched, rank) for rank in range(setup.ranks)]


@cache
def resumed(folder: Path) -> plan.Moments:
    """What rank 0 does when it takes up a run that was killed in its fifth update."""
    place = folder / "watched-resume"
    write_config(place)
    execute(place, command(place, TRAIN, plan.Kill("update", 5, "").arguments()))
    execute(place, command(place, TRAIN, ("--phase", "")))
    return read_moments(place, 0)


def read_moments(folder: Path, rank: int) -> plan.Moments:
    return [(phase, label) for phase, label in json.loads((folder / f"moments-rank{rank}.json").read_text())]


def survive(number: int, fault: plan.Fault, folder: Path) -> Line:
    """Shoot the run, give the same command again, compare."""
    place = folder / f"fault-{number:02d}"
    write_config(place)
    problems, seconds, steps = [], 0.0, []
    for kill in fault.kills:
        broken = execute(place, command(place, fault.setup, kill.arguments()))
        seconds = max(seconds, broken.seconds)
        steps.append("-" if fault.topic.startswith("evaluation") else str(one_run.steps_logged(place)))
        if not (place / "struck").exists() or broken.code == 0:
            problems.append(f"it did not strike ({kill.label}, exit code {broken.code})")
        problems += [f"did not end: {process}" for process in broken.orphans]
    again = execute(place, command(place, fault.setup))
    if again.code:
        problems.append(f"the same command fails: {again.last_line}")
    else:
        try:
            different = differences(reference(folder, fault.setup), place)
            problems += [f"differs: {name}" for name in different]
        except (OSError, ValueError) as error:  # a file is missing, or is no JSON
            problems.append(f"cannot be compared: {error!r}")
    problems += [f"did not end: {process}" for process in again.orphans]
    if not problems:
        shutil.rmtree(place)
    kills = ", then ".join(f"{k.label} -> {k.victims.replace(',', ' + ')}" for k in fault.kills)
    result = "; ".join(problems) or "equal"
    return Line(fault.topic, kills, fault.setup.kind, "+".join(steps), seconds, result, not problems)


def random_faults(faults: list[plan.Fault], folder: Path) -> list[Line]:
    lines = []
    for number, fault in enumerate(faults, 1):
        lines.append(survive(number, fault, folder))
        print(f"{number:3}/{len(faults)} {lines[-1]}", flush=True)
    return lines


def scripted_faults(folder: Path) -> list[Line]:
    lines = []
    for fault, setup in scripted.FAULTS.items():
        unbroken(folder, setup)
        place = folder / fault.__name__
        write_config(place)
        passed: bool | None = True
        try:
            seconds, result = fault(place)
            shutil.rmtree(place)
        except scripted.NotTried as reason:
            passed, seconds, result = None, 0.0, f"not tried: {reason}"
        except (AssertionError, OSError, ValueError) as error:
            passed, seconds, result = False, 0.0, f"{type(error).__name__}: {error}"
        lines.append(Line("scripted", fault.__name__.replace("_", " "), setup.kind, "-", seconds, result, passed))
        print(f"{len(lines):3}/{len(scripted.FAULTS)} {lines[-1]}", flush=True)
    return lines


def count(lines: list[Line]) -> str:
    """For example: 50 of 50 random kills survived, 18 of 18 scripted faults (1 not tried)."""
    parts = []
    for name, scripted_ones in (("random kills", False), ("scripted faults", True)):
        tried = [x for x in lines if (x.topic == "scripted") == scripted_ones and x.passed is not None]
        parts.append(f"{sum(x.passed is True for x in tried)} of {len(tried)} {name} survived")
    return f"{', '.join(parts)} ({sum(x.passed is None for x in lines)} not tried)"


def write_report(folder: Path, lines: list[Line], seed: int, minutes: float) -> None:
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, cwd=ROOT).stdout.strip()
    head = {"commit": commit, "seed": seed, "minutes": round(minutes, 1), "count": count(lines)}
    (folder / "report.json").write_text(json.dumps(head | {"lines": [asdict(line) for line in lines]}, indent=1))
    table = ["| topic | ranks | steps logged | fault | ended after | result |", "| :-- | --: | --: | :-- | --: | :-- |"]
    table += [f"| {x.topic} | {x.ranks} | {x.step} | {x.fault} | {x.seconds:.1f} s | {x.result} |" for x in lines]
    text = f"Commit {commit}, seed {seed}, {minutes:.0f} minutes: {count(lines)}.\n\n"
    (folder / "report.md").write_text(text + "\n".join(table) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("random", "scripted"))
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/faults")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    one_run.prepare(folder)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an interrupted harness leaves no run behind
    started, lines = time.monotonic(), []
    if arguments.only != "scripted":
        faults = plan.draw(arguments.count, arguments.seed, partial(unbroken, folder), partial(resumed, folder))
        lines += random_faults(faults, folder)
    if arguments.only != "random":
        lines += scripted_faults(folder)
    write_report(folder, lines, arguments.seed, (time.monotonic() - started) / 60)
    print(f"{count(lines)}; {folder / 'report.md'}")
    sys.exit(any(line.passed is False for line in lines))


if __name__ == "__main__":
    main()
