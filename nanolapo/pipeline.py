"""Named steps, each a command, run in the order of their needs and only when something changed: for compare and reproduce.

A step is done again when what its outcome depends on, or a step that it needs, has changed. What an interrupted step
left is kept: the scripts resume by themselves. Every step has a log and a stamp below the pipeline's folder.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from threading import Event
from typing import Any

from nanolapo.config import Config, RunStopped, SourceConfig, UserError


@dataclass(frozen=True)
class Step:
    """One command of a pipeline."""

    name: str
    command: tuple[str, ...]
    config: str  # what the outcome depends on beside its needs: the script and the keys that differ from their defaults
    needs: tuple[str, ...] = ()  # names of steps that must be done before
    output: Path | None = None  # must be there for the step to count as done
    clear: Path | None = None  # a folder made from one config only: it is removed when that config has changed


def identity(script: str, config: Config) -> str:
    """Step.config for a script that reads a Config. Keys at their defaults are left out, so that a key which a later
    version adds does not make everything anew."""
    return json.dumps([script, changed(config, Config())], sort_keys=True, default=str)


def changed(value: Any, default: Any) -> Any:
    """What differs from `default`, as plain values: of a dataclass the fields that differ, of anything else all of it."""
    if isinstance(value, tuple):
        return [changed(item, None) for item in value]
    if not dataclasses.is_dataclass(value):
        return value
    if isinstance(value, SourceConfig):
        default = SourceConfig("", "")
    pairs = {f.name: (getattr(value, f.name), getattr(default, f.name)) for f in dataclasses.fields(value)}
    return {name: changed(mine, other) for name, (mine, other) in pairs.items() if mine != other}


class Pipeline:
    """Steps with their stamps and logs in `folder`. Raises UserError for needs that do not exist."""

    def __init__(self, steps: Iterable[Step], folder: Path, say: Callable[[str], None] = print) -> None:
        self.steps = {step.name: step for step in steps}
        self.folder, self.say, self.stop = folder, say, Event()
        self.digests: dict[str, str] = {}
        for step in self.steps.values():  # in the order given: a step comes after what it needs
            for need in step.needs:
                if need not in self.digests:
                    raise UserError(f"step {step.name} needs {need}, which is not a step before it")
            parts = [step.config, *(self.digests[need] for need in step.needs)]
            self.digests[step.name] = sha256("\0".join(parts).encode()).hexdigest()

    def file(self, kind: str, name: str, ending: str) -> Path:
        return self.folder / kind / (name.replace("/", "-") + ending)

    def stamp(self, name: str) -> dict[str, object]:
        """What is known of an earlier run of the step: its digest, whether it ended well, seconds. {} if nothing is."""
        try:
            found = json.loads(self.file("steps", name, ".json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def write_stamp(self, name: str, done: bool, seconds: float) -> None:
        path = self.file("steps", name, ".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"digest": self.digests[name], "done": done, "seconds": round(seconds, 1)})
        temporary = path.with_suffix(".tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)

    def is_done(self, name: str) -> bool:
        """Done with this very config, with its needs done as well, and its output still there."""
        step, stamp = self.steps[name], self.stamp(name)
        fresh = stamp.get("done") is True and stamp.get("digest") == self.digests[name]
        return fresh and (step.output is None or step.output.exists()) and all(map(self.is_done, step.needs))

    def closure(self, wanted: Sequence[str]) -> list[str]:
        """The wanted steps and all that they need, in order. Raises UserError for a name that is no step."""
        for name in wanted:
            if name not in self.steps:
                raise UserError(f"step {name!r} does not exist; there are {', '.join(self.steps)}")
        chosen = set(wanted)
        for name in reversed(self.steps):
            if name in chosen:
                chosen.update(self.steps[name].needs)
        return [name for name in self.steps if name in chosen]

    def run(self, wanted: Sequence[str] = (), jobs: int = 1) -> None:
        """Run what is not done, `jobs` at a time. A failed step stops only those that need it.

        Raises RunStopped at the end when steps failed, with the last line of the first one's log.
        """
        names = self.closure(wanted or list(self.steps))
        left = [name for name in names if not self.is_done(name)]
        done, failed, number = set(names) - set(left), list[str](), len(names) - len(left)
        if number:
            self.say(f"{number} of {len(names)} steps are done already")
        running: dict[Future[int], str] = {}
        with ThreadPoolExecutor(jobs) as pool:
            try:
                while left or running:
                    ready = [name for name in left if done.issuperset(self.steps[name].needs)]
                    for name in ready[: jobs - len(running)]:
                        left.remove(name)
                        running[pool.submit(self.run_step, name)] = name
                    if not running:
                        break  # everything left needs a step that failed
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        name, number = running.pop(future), number + 1
                        code = future.result()
                        seconds = self.stamp(name).get("seconds")
                        self.say(f"[{number}/{len(names)}] {name}: {f'exit code {code}' if code else f'{seconds} s'}")
                        (failed.append if code else done.add)(name)
            except KeyboardInterrupt:
                self.stop.set()  # the commands got the same Ctrl-C, or are told to end by run_step
                raise
        if failed:
            raise RunStopped(f"{len(failed)} steps failed ({', '.join(failed)}), {len(left)} were not begun; the first "
                             f"one's last line: {self.last_line(failed[0])}; log: {self.log(failed[0])}")  # fmt: skip

    def log(self, name: str) -> Path:
        return self.file("logs", name, ".log")

    def last_line(self, name: str) -> str:
        lines = self.log(name).read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def run_step(self, name: str) -> int:
        """Run one command to its end and return its exit code; a stop request ends it."""
        step, started = self.steps[name], time.time()
        if step.clear and step.clear.exists() and self.stamp(name).get("digest") != self.digests[name]:
            self.say(f"{name}: its config has changed, {step.clear} is made anew")
            shutil.rmtree(step.clear)
        self.write_stamp(name, False, 0.0)
        self.log(name).parent.mkdir(parents=True, exist_ok=True)
        with self.log(name).open("ab") as log:
            process = subprocess.Popen(step.command, stdout=log, stderr=subprocess.STDOUT)
            while (code := process.poll()) is None:
                if self.stop.wait(0.2):
                    process.terminate()
                    code = process.wait()
                    break
        if code == 0 and step.output is not None and not step.output.exists():
            code = 1  # it stopped early, on request
        if code == 0:
            self.write_stamp(name, True, time.time() - started)
        return code
