"""Runs named steps, each of them a command, in the order of their needs, and skips those that are done.

A step is done again when its config has changed, or when a step that it needs was done again. What an interrupted step left
is kept, for the scripts resume by themselves. Every step has a log and a stamp below the pipeline's folder. Only a folder
that a stamp names is ever deleted, and only one command at a time works in a folder. The pipeline does not see a change of
the code: after one, use another folder or delete those of the steps (of an evaluation its stamp).
"""

from __future__ import annotations

import json
import os.path
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from uuid import uuid4

from nanolapo.config import RunStopped, UserError
from nanolapo.locks import locked


@dataclass(frozen=True)
class Step:
    """One command of a pipeline."""

    name: str
    command: tuple[str, ...]
    config: str  # what the outcome depends on beside its needs: the script and the keys that differ from their defaults
    needs: tuple[str, ...] = ()  # names of steps that must be done before
    output: Path | None = None  # must be there for the step to count as done
    clear: Path | None = None  # a folder made from one config only: it is removed when that config has changed


class Pipeline:
    """Steps with their stamps and logs in `folder`. `finished` is called with the name of each step that ended well.

    Raises UserError for needs that do not exist, and for two steps that share a name or a folder.
    """

    def __init__(self, steps: Iterable[Step], folder: Path, say: Callable[[str], None] = print,
                 finished: Callable[[str], None] = lambda name: None) -> None:  # fmt: skip
        self.steps: dict[str, Step] = {}
        self.folder, self.say, self.finished, self.stop = folder, say, finished, Event()
        for step in steps:  # in the order given: a step comes after what it needs
            if step.name in self.steps:
                raise UserError(f"two steps are called {step.name}: rename one of them")
            for other in self.steps.values():
                if self.file("steps", step.name, "") == self.file("steps", other.name, ""):
                    raise UserError(f"steps {other.name} and {step.name} would share a stamp: rename one of them")
                if step.clear is not None and step.clear == other.clear:
                    raise UserError(f"steps {other.name} and {step.name} both write to {step.clear}: give each its own "
                                    "run.name")  # fmt: skip
            for need in step.needs:
                if need not in self.steps:
                    raise UserError(f"step {step.name} needs {need}, which is not a step before it")
            self.steps[step.name] = step

    def file(self, kind: str, name: str, ending: str) -> Path:
        return self.folder / kind / (name.replace("/", "-") + ending)

    def stamp(self, name: str) -> dict[str, object]:
        """What an earlier run of the step left (see `new_stamp`), {} if there was none."""
        try:
            found = json.loads(self.file("steps", name, ".json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def new_stamp(self, name: str) -> dict[str, object]:
        """Of a run that begins. Its outcome has a name that no other has, so that what was made from another is told."""
        step = self.steps[name]
        return {"outcome": uuid4().hex, "config": step.config, "made_from": self.outcomes(step.needs), "done": False,
                "folder": str(step.clear)}  # fmt: skip

    def outcomes(self, names: Iterable[str]) -> dict[str, object]:
        return {name: self.stamp(name).get("outcome") for name in names}

    def write_stamp(self, name: str, stamp: dict[str, object]) -> None:
        path = self.file("steps", name, ".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(stamp), encoding="utf-8")
        temporary.replace(path)

    def change(self, name: str) -> str:
        """Why the outcome of the step's last run does not hold any more; empty if it does."""
        step, stamp = self.steps[name], self.stamp(name)
        old, new = str(stamp.get("config", "")), step.config
        if old != new:
            start = len(os.path.commonprefix([old, new]))
            was, now = (text[max(0, start - 40) : start + 40] for text in (old, new))
            return f"its config was ...{was}... and is ...{now}..."
        return "" if stamp.get("made_from") == self.outcomes(step.needs) else "what it was made from has changed"

    def is_done(self, name: str) -> bool:
        """True if the step's last run ended well and still holds, its output is still there, and its needs are done too."""
        step, stamp = self.steps[name], self.stamp(name)
        fresh = stamp.get("done") is True and not self.change(name)
        return fresh and (step.output is None or step.output.exists()) and all(map(self.is_done, step.needs))

    def failed(self, name: str) -> bool:
        """True if the step was begun with what it has now, and did not end well."""
        return not self.change(name) and self.stamp(name).get("done") is not True and self.log(name).exists()

    def leftover(self, name: str) -> Path | None:
        """The step's folder, if it does not hold any more and has to be deleted.

        Raises UserError for a folder of which no stamp tells that this step has made it.
        """
        folder, stamp = self.steps[name].clear, self.stamp(name)
        if folder is None or not folder.exists() or not self.change(name):
            return None
        if "digest" in stamp:
            raise UserError(f"step {name}: {folder} is of an earlier version of nanolapo, which did not keep its config: "
                            "move it away, or delete it")  # fmt: skip
        if stamp.get("folder") != str(folder):
            raise UserError(f"step {name}: {folder} is there, and not from here: move it away, or delete it")
        return folder

    def locked(self) -> AbstractContextManager[int]:
        """Hold the folder's lock. Steps inherit its descriptor: one that outlives a killed pipeline still holds it."""
        busy = f"{self.folder}: another command is at work here, or a step that it left behind; wait for it, or end it"
        return locked(self.folder / "lock", busy, say=self.say)

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
        if jobs < 1:
            raise UserError(f"--jobs {jobs}: at least 1")
        names = self.closure(wanted or list(self.steps))
        with self.locked() as lock:
            left = [name for name in names if not self.is_done(name)]
            for name in left:
                self.leftover(name)  # to know before anything runs
            if len(left) < len(names):
                self.say(f"{len(names) - len(left)} of {len(names)} steps are done already")
            before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the running steps, like Ctrl-C
            try:
                failed = self.work(names, left, jobs, lock)
            finally:
                signal.signal(signal.SIGTERM, before)
        if failed:
            raise RunStopped(f"{len(failed)} steps failed ({', '.join(failed)}), {len(left)} were not begun; the first "
                             f"one's last line: {self.last_line(failed[0])}; log: {self.log(failed[0])}")  # fmt: skip

    def work(self, names: Sequence[str], left: list[str], jobs: int, lock: int) -> list[str]:
        """Run the steps of `left` and take them from it. Those that need a failed step stay. Returns the failed ones."""
        done, failed, number = set(names) - set(left), list[str](), len(names) - len(left)
        running: dict[Future[int], str] = {}
        self.stop.clear()
        with ThreadPoolExecutor(jobs) as pool:
            try:
                while left or running:
                    ready = [name for name in left if done.issuperset(self.steps[name].needs)]
                    for name in ready[: jobs - len(running)]:
                        left.remove(name)
                        running[pool.submit(self.run_step, name, lock)] = name
                    if not running:
                        break  # everything left needs a step that failed
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        name, number = running.pop(future), number + 1
                        code = future.result()
                        seconds = self.stamp(name).get("seconds")
                        self.say(f"[{number}/{len(names)}] {name}: {f'exit code {code}' if code else f'{seconds} s'}")
                        (failed.append if code else done.add)(name)
                        if not code:
                            self.finished(name)
            finally:
                self.stop.set()  # after an interruption or an error: the running steps end, too
        return failed

    def log(self, name: str) -> Path:
        return self.file("logs", name, ".log")

    def last_line(self, name: str) -> str:
        lines = self.log(name).read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def run_step(self, name: str, lock: int) -> int:
        """Run one command to its end and return its exit code. A stop request ends it. lock: see `locked`."""
        step, started = self.steps[name], time.time()
        if self.stop.is_set():
            return -signal.SIGTERM
        if old := self.leftover(name):
            self.say(f"{name}: {self.change(name)}: {old} is made anew")
            self.write_stamp(name, self.stamp(name) | {"made_from": None})  # half removed, it still has to go
            shutil.rmtree(old)
        stamp = self.new_stamp(name)
        self.write_stamp(name, stamp)
        self.log(name).parent.mkdir(parents=True, exist_ok=True)
        with self.log(name).open("ab") as log:
            try:
                process = subprocess.Popen(step.command, stdout=log, stderr=subprocess.STDOUT, pass_fds=[lock])
            except FileNotFoundError:
                raise UserError(f"step {name}: there is no command {step.command[0]}; see --launcher") from None
            while (code := process.poll()) is None:
                if self.stop.wait(0.2):
                    process.terminate()  # after a Ctrl-C it got that as well, and knows them for one request
                    code = process.wait()
                    break
        if code == 0 and step.output is not None and not step.output.exists():
            code = 1  # it stopped early, on request
        if code == 0:
            self.write_stamp(name, stamp | {"done": True, "seconds": round(time.time() - started, 1)})
        return code
