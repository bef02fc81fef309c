"""Starts runs of the product, waits until nothing of them is left, and compares what two runs have left behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
KILLER = Path(__file__).with_name("killer.py")
TIMING = ("seconds/", "tokens_per_second", "memory_gb")  # the only numbers that may differ between equal runs
END_LIMIT = 60.0  # seconds in which every process of a broken run must be gone
RUN_LIMIT = 900.0  # a busy machine

# The second source has answers that need algebra: it keeps grader workers alive, which must not outlive the run.
CONFIG = """
run: {{dir: {folder}, name: run, threads: 1, checkpoint_every: 2, print_every: 0}}
model: {{path: {base}, dtype: float32}}
data:
  sources:
    - {{name: demo, path: demo, count: 40, seed: 1, levels: [0]}}
    - {{name: algebra, path: {algebra}, question: question}}
prompt: {{template: "{{question}} <think>"}}
rollout: {{engine: torch, prompts_per_step: 8, group_size: 4, max_prompt_tokens: 64, max_new_tokens: 96, base_tokens: 73}}
train: {{steps: 6, batch_size: 16, learning_rate: 1e-3, microbatch_tokens: 512}}
loss: {{kl_coef: 0.001}}
evaluate: {{models: ["base={base}", "same={base}"], samples: 2, temperatures: [1.0], max_new_tokens: 48,
            guidance_factors: [1.0], bootstrap: 50}}
"""
ALGEBRA = [("Start at 002. A: add 001. Half its root?", r"\frac{\sqrt{3}}{2}"), ("Start at x. A: add 001.", "x+1")]


@dataclass(frozen=True)
class Setup:
    """What is broken: a script on one or two ranks, with a few overrides."""

    script: str
    ranks: int = 1
    overrides: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        sharding = ", fsdp2" if "model.sharding=fsdp2" in self.overrides else ""
        return f"{self.ranks} rank{'s' if self.ranks > 1 else ''}{sharding}"

    @property
    def name(self) -> str:
        return f"{self.script.removesuffix('.py')}-{self.kind.replace(', ', '-').replace(' ', '-')}"


CHUNKS = ("rollout.max_rows=8",)  # evaluation writes its samples in several pieces
TRAIN, TRAIN_2 = Setup("train_stage1.py"), Setup("train_stage1.py", 2)
TRAIN_FSDP2 = Setup("train_stage1.py", 2, ("model.sharding=fsdp2",))
EVALUATE, EVALUATE_2 = Setup("evaluate.py", 1, CHUNKS), Setup("evaluate.py", 2, CHUNKS)


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    output: str
    seconds: float  # from the strike, or the end of the launcher, until its last process was gone
    orphans: list[str]  # processes that had to be shot
    seen: set[str]  # command lines of all its processes

    @property
    def last_line(self) -> str:
        lines = [line for line in self.output.splitlines() if line.strip("= ")]
        return lines[-1].strip() if lines else ""


def prepare(folder: Path) -> None:
    """The base model, once: that of the tests, good enough that some answers are right."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"question": question, "answer": answer, "level": 1}) + "\n" for question, answer in ALGEBRA]
    (folder / "algebra.jsonl").write_text("".join(rows))
    if not (folder / "base/model.safetensors").exists():
        code = (
            "import sys; sys.path.append('tests/helpers'); from small_base import *; "
            f"make_small_base(Path({str(folder / 'base')!r}), hidden_size=128)"  # vLLM wants heads of 32
        )
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment("base"), check=True, capture_output=True)


def write_config(folder: Path) -> Path:
    """A folder for one fault, with the config whose run directory is folder/run."""
    folder.mkdir(parents=True, exist_ok=True)
    shared = folder.parent
    text = CONFIG.format(folder=folder, base=shared / "base", algebra=shared / "algebra.jsonl")
    (folder / "config.yaml").write_text(text)
    return folder / "config.yaml"


def environment(mark: str) -> dict[str, str]:
    """PATH ends in a mark: it is the one variable that every process of a run inherits, grader workers too."""
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": f"{os.environ['PATH']}:/{mark}"}


def command(folder: Path, setup: Setup, killer: tuple[str, ...] = ()) -> list[str]:
    """The command line of a run; with `killer` the same run under the killer's eyes."""
    launch = [sys.executable]
    if setup.ranks > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={setup.ranks}"]
    if killer:
        launch += [str(KILLER), "--folder", str(folder), *killer, "--"]
    return [*launch, str(ROOT / setup.script), str(folder / "config.yaml"), *setup.overrides]


def execute(folder: Path, arguments: list[str], limit: float = RUN_LIMIT) -> Ended:
    """Run to the end, and wait for the end of every process that came from it; what stays is shot and reported."""
    mark = f"nanolapo-fault-{os.getpid()}-{folder.name}"
    (folder / "struck").unlink(missing_ok=True)
    seen: set[str] = set()
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(
            arguments, stdout=output, stderr=subprocess.STDOUT, env=environment(mark), start_new_session=True
        )
    begun, over = time.time(), False  # begun: when the end began
    alive: dict[int, str] = {}
    deadline = begun + limit
    try:
        while time.time() < deadline:
            alive = processes(mark)
            seen |= set(alive.values())
            if not over and (process.poll() is not None or (folder / "struck").exists()):
                over, begun = True, time.time()
                deadline = begun + END_LIMIT
            if process.poll() is not None and not alive:
                break
            time.sleep(0.1)
    finally:  # also when the harness itself is interrupted
        alive = processes(mark)
        for pid in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
    text = (folder / "output.txt").read_text(errors="replace")
    return Ended(process.returncode, text, time.time() - begun, [f"{pid} {line}" for pid, line in alive.items()], seen)


def processes(mark: str) -> dict[int, str]:
    """Pid and command line of every living process whose PATH carries the mark."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:160]
        except OSError:
            continue  # it has just ended, or belongs to another user
    return found


def reference(folder: Path, setup: Setup) -> Path:
    """Where the unbroken run of this setup lies."""
    return folder / f"reference-{setup.name}"


def differences(expected: Path, found: Path) -> list[str]:
    """What differs between two folders of finished runs; empty when they are equal."""
    if (expected / "run/results.json").exists():
        return [
            name for name, read in (("results.json", results), ("samples", samples)) if read(expected) != read(found)
        ]
    wanted, given = contents(expected / "run"), contents(found / "run")
    assert any(name.startswith("model/") for name in wanted), f"{expected} is no finished run"
    return sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name))


def contents(run: Path) -> dict[str, Any]:
    """Every file of a training run, leftovers included: bytes, or JSON without timings where those are written.

    config.yaml is left out: it names the folder.
    """
    found: dict[str, Any] = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if path.is_dir() or name == "config.yaml":
            continue
        if name == "metrics.jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{k: v for k, v in row.items() if not k.startswith(TIMING)} for row in rows]
        elif path.name == "state.json":
            found[name] = json.loads(path.read_text())
        else:
            found[name] = path.read_bytes()
    return found


def results(folder: Path) -> Any:
    return json.loads((folder / "run/results.json").read_text())


def samples(folder: Path) -> list[tuple[str, str]]:
    """Every whole sample of an evaluation, sorted, whichever rank wrote it: none may be missing or there twice."""
    rows = []
    for path in (folder / "run/samples").glob("*.jsonl"):
        for line in path.read_text(errors="replace").split("\n"):
            try:
                rows.append((re.sub(r"-rank\d+$", "", path.stem), json.dumps(json.loads(line))))
            except ValueError:
                continue  # a half-written line stays in the file, closed
    return sorted(rows)


def learned(folder: Path) -> bool:
    return any(json.loads(line)["updates"] for line in (folder / "run/metrics.jsonl").read_text().splitlines())


def steps_logged(folder: Path) -> int:
    path = folder / "run/metrics.jsonl"
    return path.read_text(errors="replace").count("\n") if path.exists() else 0
