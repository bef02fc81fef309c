"""Runs one of the product's scripts and breaks it at one chosen moment. The product knows nothing of it.

    python tests/faults/killer.py --folder DIR --phase checkpoint --nth 7 -- train_stage1.py CONFIG.yaml ...

The functions of the product are wrapped from outside, as windows with a name (sampling, grading, update, sync, log,
checkpoint, final model; all of evaluate.py is one window, `evaluation`). Inside a window every moment is counted: its
beginning, each weight the sampler takes, and each file operation in DIR (open for writing, write, fsync, rename, unlink,
rmdir, mkdir). At the nth moment of the chosen phase this process, the other rank or the launcher is shot with SIGKILL, or
an exception is raised, or the disk is full from there on (RLIMIT_FSIZE). Without --phase nothing is broken, and the moments
are written to DIR/moments-rankR.json: that is how plan.py knows what it can choose from.

A kill inside a write: the write is done, the file cut back to a part of what was written, and only then the shot is fired.
"""

from __future__ import annotations

import argparse
import atexit
import builtins
import io
import json
import os
import resource
import runpy
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

RANK = int(os.environ.get("RANK", "0"))
FULL_DISK = 200_000  # bytes: more than any log of these small runs, less than any file of tensors
FILE_CALLS = ("rename", "replace", "unlink", "rmdir", "mkdir", "fsync")


class Shooter:
    """A child that waits for the order to shoot, so that neither the GIL nor a long C call can hold a shot up."""

    def __init__(self) -> None:
        reader, self.orders = os.pipe()
        if os.fork() == 0:
            os.close(self.orders)
            order = os.read(reader, 4096)  # empty when the parent has ended without a shot
            if order:
                delay, pids = json.loads(order)
                time.sleep(delay)
                shoot(pids)
            os._exit(0)
        os.close(reader)


def shoot(pids: Iterable[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


class Moments:
    """Counts the moments of each phase and breaks the process at the chosen one."""

    def __init__(self, order: argparse.Namespace) -> None:
        self.order, self.folder = order, Path(order.folder).resolve()
        self.phases: list[str] = ["evaluation"] if Path(order.command[0]).name == "evaluate.py" else []
        self.seen: list[tuple[str, str]] = []
        self.counts: Counter[str] = Counter()
        self.shooter = Shooter()
        (self.folder / f"pid-rank{RANK}").write_text(str(os.getpid()))
        if not order.phase:
            atexit.register(lambda: (self.folder / f"moments-rank{RANK}.json").write_text(json.dumps(self.seen)))

    def reached(self, label: str) -> bool:
        """Count a moment; True when it is the chosen one. The outermost window gives the phase its name."""
        if not self.phases:
            return False
        phase = self.phases[0]
        self.seen.append((phase, label))
        self.counts[phase] += 1
        return phase == self.order.phase and self.counts[phase] == self.order.nth and self.order.rank == RANK

    def victims(self) -> list[int]:
        """Pids in the order of the shots, this process last."""
        pids = {"launcher": os.getppid(), **{f.name[4:]: int(f.read_text()) for f in self.folder.glob("pid-rank*")}}
        return sorted((pids[name] for name in self.order.victims.split(",")), key=lambda pid: pid == os.getpid())

    def strike(self, label: str) -> None:
        # Written before the shot: a fault that did not happen must not count as survived.
        (self.folder / "struck").write_text(label)
        if self.order.action == "raise":
            raise RuntimeError(f"injected fault at {label}")
        if self.order.action == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_DISK, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        elif self.order.delay:
            os.write(self.shooter.orders, json.dumps([self.order.delay, self.victims()]).encode())
        else:
            shoot(self.victims())

    def pass_by(self, label: str) -> None:
        if self.reached(label):
            self.strike(label)

    def window(self, owner: Any, name: str, phase: str) -> None:
        """Everything that happens inside owner.name belongs to `phase`; its beginning is a moment, too."""
        original = getattr(owner, name)

        @wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.phases.append(phase)
            try:
                self.pass_by(f"during {phase}")
                return original(*args, **kwargs)
            finally:
                self.phases.pop()

        setattr(owner, name, wrapped)

    def writes(self, owner: Any, name: str, path_of: Callable[..., Path]) -> None:
        """owner.name writes a file: the moment lies inside that write."""
        original = getattr(owner, name)

        @wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            path = path_of(*args, **kwargs)
            inside = self.folder in path.resolve().parents
            label = f"write {path.name}"
            hit = inside and self.reached(label)
            if hit and self.order.action != "kill":
                self.strike(label)
            old = path.stat().st_size if name == "append" and path.exists() else 0
            result = original(*args, **kwargs)
            if hit and self.order.action == "kill":
                if os.getpid() in self.victims():  # a process that lives on has no half-written file
                    os.truncate(path, old + int(self.order.cut * (path.stat().st_size - old)))
                self.strike(label)
            return result

        setattr(owner, name, wrapped)

    def file_calls(self) -> None:
        """Before each rename, unlink, ... of a path in the folder, and before each opening for writing."""

        def wrap(name: str) -> None:
            original = getattr(os, name)

            @wraps(original)
            def wrapped(target: Any, *args: Any, **kwargs: Any) -> Any:
                path = absolute(target, kwargs.get("dir_fd"))
                if self.folder in path.parents:
                    self.pass_by(f"{name} {path.parent.name}/{path.name}")
                return original(target, *args, **kwargs)

            setattr(os, name, wrapped)

        for name in FILE_CALLS:
            wrap(name)
        original_open = io.open

        @wraps(original_open)
        def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if set(mode) & set("wax+") and not isinstance(file, int) and self.folder in absolute(file).parents:
                self.pass_by(f"open {absolute(file).name}")
            return original_open(file, mode, *args, **kwargs)

        builtins.open = io.open = opened  # type: ignore[assignment]

    def sync(self, sampler: type) -> None:
        """Each weight that the sampler takes is a moment."""
        original = sampler.load_weights  # type: ignore[attr-defined]

        @wraps(original)
        def load_weights(this: Any, named_tensors: Iterable[tuple[str, Any]]) -> Any:
            def taken() -> Iterator[tuple[str, Any]]:
                for name, tensor in named_tensors:
                    self.pass_by(f"take {name}")
                    yield name, tensor

            return original(this, taken())

        sampler.load_weights = load_weights  # type: ignore[attr-defined]
        self.window(sampler, "load_weights", "sync")


def absolute(target: Any, dir_fd: int | None = None) -> Path:
    """The path behind a path, a file descriptor, or a name relative to an open folder."""
    if isinstance(target, int):
        return Path(os.readlink(f"/proc/self/fd/{target}"))
    folder = os.readlink(f"/proc/self/fd/{dir_fd}") if dir_fd is not None else os.getcwd()
    return Path(os.path.abspath(os.path.join(folder, os.fsdecode(target))))


def install(moments: Moments) -> None:
    """Wrap the product. Names that no longer exist raise here: a fault that cannot strike must not go unnoticed."""
    import transformers.modeling_utils as modeling

    from nanolapo import checkpoint, lengths, loop, metrics, sampling
    from nanolapo.evaluation import evaluate as benchmarking
    from nanolapo.samplers import torch_sampler as sampler_torch
    from nanolapo.samplers import vllm_sampler as sampler_vllm

    moments.writes(checkpoint, "save_file", lambda tensors, path, *_, **__: Path(path))
    moments.writes(modeling, "safe_save_file", lambda tensors, path, *_, **__: Path(path))
    moments.writes(Path, "write_text", lambda path, *_, **__: path)
    moments.writes(metrics, "append", lambda path, rows: path)
    moments.writes(benchmarking, "append", lambda path, rows: path)
    moments.file_calls()
    moments.sync(sampler_torch.TorchSampler)
    moments.sync(sampler_vllm.VLLMSampler)
    for owner, name, phase in (
        (sampler_torch.TorchSampler, "generate", "sampling"),
        (sampler_vllm.VLLMSampler, "generate", "sampling"),
        (sampling, "mark", "grading"),
        (loop, "update_policy", "update"),
        (loop, "checkpoint", "checkpoint"),
        (loop, "save_model", "final model"),
        (lengths.LengthMap, "save", "final model"),  # inside a checkpoint it belongs to the checkpoint
        (metrics.RunLog, "__init__", "start"),
        (metrics.RunLog, "step", "log"),
        (metrics.RunLog, "rollouts", "log"),
    ):
        moments.window(owner, name, phase)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="where the run directory lies; only files in it count")
    parser.add_argument("--phase", default="", help="empty: break nothing, write down the moments")
    parser.add_argument("--nth", type=int, default=1, help="which moment of the phase")
    parser.add_argument("--rank", type=int, default=0, help="the rank whose moments are counted")
    parser.add_argument("--action", choices=("kill", "raise", "full"), default="kill")
    parser.add_argument("--victims", default="rank0", help="who is shot: launcher, rank0, rank1, with commas between")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds from the moment to the shot")
    parser.add_argument("--cut", type=float, default=0.5, help="how much of a half-written file is there")
    parser.add_argument("command", nargs="+", help="script and its arguments, after --")
    order = parser.parse_args()
    script = Path(order.command[0]).resolve()
    moments = Moments(order)
    sys.path[0] = str(script.parent)  # as if the script had been started itself
    install(moments)
    sys.argv = order.command
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
