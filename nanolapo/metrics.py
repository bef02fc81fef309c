"""Writes the logs of a run: metrics.jsonl (one line a step), rollouts.jsonl (samples with text), console lines, wandb.

Every logged name is explained in docs/METRICS.md. Files are only ever appended to; after a crash they are cut back to the
step that the run resumes from, so a step never appears twice and none is missing.
"""

from __future__ import annotations

import fcntl
import json
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanolapo.config import Config
from nanolapo.config_file import to_yaml
from nanolapo.provenance import provenance, save_code
from nanolapo.rollouts import Rollout, Rollouts


class Stopwatch:
    """Seconds per phase of a step: `with watch("sample"): ...`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def total(self) -> float:
        return sum(self.seconds.values())


def rollout_metrics(rollouts: Rollouts) -> dict[str, float]:
    """Compute statistics of the step's samples. Accuracy is the grader's verdict, never the shaped reward."""
    lengths, correct, rewards_PG = rollouts.lengths_B, rollouts.correct_B, rollouts.rewards_PG
    group_range = rewards_PG.max(axis=1) - rewards_PG.min(axis=1)
    unique = [len(set(map(bytes, group))) for group in batched(rollouts.response_ids, rollouts.group_size)]
    metrics = {
        "reward": float(rewards_PG.mean()),
        "accuracy": float(correct.mean()),
        "length": float(lengths.mean()),
        "length_p90": float(np.percentile(lengths, 90)),
        "length_correct": float(lengths[correct].mean()) if correct.any() else float("nan"),
        "truncated": float((~rollouts.finished_B).mean()),
        "no_signal": float((group_range < 1e-6).mean()),
        "reward_spread": float(rewards_PG.max() - rewards_PG.min()),
        "empty": float((lengths <= 1).mean()),
        "repetition": float(np.mean([repetition(ids) for ids in rollouts.response_ids])),
        "unique_per_group": float(np.mean(unique)) if rollouts.group_size > 1 else float("nan"),
        "entropy": rollouts.mean_entropy,
    }
    return metrics | {f"reward/{name}": float(values.mean()) for name, values in rollouts.reward_parts.items()}


def batched(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def repetition(ids: np.ndarray) -> float:
    """Return the share of 4-grams that occurred before in the same answer; near 1 means the model is stuck in a loop.

    >>> repetition(np.array([1, 2, 1, 2, 1, 2, 1, 2])), repetition(np.array([1, 2, 3, 4, 5]))
    (0.6, 0.0)
    """
    n = 4
    if len(ids) < n:
        return 0.0
    windows = np.lib.stride_tricks.sliding_window_view(ids.astype(np.int32), n)  # four times as fast as tuples of ids
    grams = np.ascontiguousarray(windows).view(f"V{4 * n}")[:, 0].tolist()  # the bytes of each n-gram
    return round(1 - len(set(grams)) / len(grams), 6)


def memory_gb() -> float:
    """Return the peak memory of this process in GB: GPU memory if there is a GPU, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def write_config(config: Config) -> None:
    """Write config.yaml in the run directory: commit and package versions as comments, then every key with its value."""
    head = "".join(f"# {key}: {value}\n" for key, value in provenance().items())
    (config.run_dir / "config.yaml").write_text(head + to_yaml(config), encoding="utf-8")


class RunLog:
    """Writes the files of a run directory. Only rank 0 has a log."""

    def __init__(self, config: Config, start_step: int, wandb_id: str | None, start_share: float = 0.0) -> None:
        """start_share: the share of the run done before this process, see Session.progress."""
        self.config, self.started, self.start_share = config, time.time(), start_share
        self.dir = config.run_dir
        self.dir.mkdir(parents=True, exist_ok=True)
        write_config(config)
        save_code(self.dir)
        for name in ("metrics.jsonl", "rollouts.jsonl"):
            keep_steps_before(self.dir / name, start_step)
        self.wandb_id = wandb_id
        self.tracker: Any = None
        if config.wandb.mode != "disabled":
            import wandb

            try:
                self.tracker = wandb.init(
                    project=config.wandb.project, name=config.run.name, mode=config.wandb.mode,  # type: ignore[arg-type]
                    dir=str(self.dir), id=wandb_id, resume="allow",
                    config=json.loads(json.dumps(config, default=vars)),
                )  # fmt: skip
                self.wandb_id = self.tracker.id
            except wandb.Error as error:
                print(f"wandb could not start, the run goes on without it: {error}", flush=True)

    def step(self, step: int, metrics: dict[str, float], share: float) -> None:
        """Append one line to metrics.jsonl, send it to wandb, print the console line. `share` of the run is done now."""
        # JSON has no NaN: a mean over nothing is written as null.
        plain = {name: value if np.isfinite(value) else None for name, value in metrics.items()}
        append(self.dir / "metrics.jsonl", [{"step": step, **plain}])
        if self.tracker is not None:
            self.tracker.log(metrics, step=step)
        left = (time.time() - self.started) / (share - self.start_share) * max(0.0, 1 - share)
        m = metrics
        print(
            f"step {step + 1}/{self.config.train.steps} | reward {m['reward']:.3f} | acc {m['accuracy']:.1%} | "
            f"len {m['length']:.1f} p90 {m['length_p90']:.0f} | cut {m['truncated']:.1%} | "
            f"no signal {m['no_signal']:.0%} | mismatch {m['mismatch']:.1e} | grad {m['grad_norm']:.3f} | "
            f"{m['tokens_per_second']:,.0f} tok/s | {m['memory_gb']:.1f} GB | {left / 60:.1f} min left",
            flush=True,
        )

    def rollouts(self, step: int, rollouts: Rollouts) -> None:
        """Append the first run.log_rollouts rows, with text, verdict, length, budget and every reward part."""
        rows = rollouts.rows[: self.config.run.log_rollouts]
        append(self.dir / "rollouts.jsonl", [describe(step, row) for row in rows])

    def show_examples(self, step: int, rollouts: Rollouts) -> None:
        """Print the best and the worst rollout of the step with each reward part."""
        total = rollouts.rewards_PG.flatten()
        for label, b in (("best", int(total.argmax())), ("worst", int(total.argmin()))):
            row = describe(step, rollouts.rows[b])
            named = ", ".join(f"{k} {v:.2f}" for k, v in row["reward"].items())
            budget = "none" if row["budget"] is None else f"{row['budget']:.0f}"
            told = f"length {row['length']} | budget {budget} | reference answer {row['reference_answer']}"
            print(f"  {label} rollout: {named} | {told}")
            print(f"    Q: {shorten(row['question'])}\n    A: {shorten(row['text'])}", flush=True)

    def close(self) -> None:
        if self.tracker is not None:
            self.tracker.finish()


def describe(step: int, row: Rollout) -> dict[str, Any]:
    """Return a rollout as a line of rollouts.jsonl."""
    return {
        "step": step,
        "problem": row.problem.id,
        "level": row.problem.level,
        "question": row.problem.question,
        "reference_answer": row.problem.answer,
        "text": row.text,
        "correct": row.correct,
        "finished": row.finished,
        "length": len(row.response_ids),
        "budget": None if np.isnan(row.budget) else row.budget,
        "reward": row.reward,
    }


def shorten(text: str, limit: int = 400) -> str:
    """Put a text on one line and leave out the middle of a long one.

    >>> shorten("a\\n" * 300, limit=20)
    'a a a a a  ...  a a a a a'
    """
    flat = " ".join(text.split())
    half = limit // 2
    return flat if len(flat) <= limit else f"{flat[:half].strip()}  ...  {flat[-half:].strip()}"


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add JSON lines to a file. A half-written last line (after a kill) is ended first, so new lines stay whole.

    Two evaluations may share a sample file: the lock keeps their lines apart.
    """
    with path.open("ab+") as file:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            file.write(b"" if file.read(1) == b"\n" else b"\n")
        file.writelines((json.dumps(row, ensure_ascii=False, default=float) + "\n").encode() for row in rows)


def keep_steps_before(path: Path, step: int) -> None:
    """Cut a log back to the steps before `step`, which come first in it; a half-written last line goes too.

    rollouts.jsonl can be larger than the memory, so only a line at a time is read, and what stays is not written again.
    """
    if not path.exists():
        return
    end = 0  # bytes that stay
    with path.open("rb+") as file:
        for line in file:
            try:
                if json.loads(line.decode(errors="replace"))["step"] >= step:
                    break
            except ValueError:
                break  # the kill came in the middle of this line
            end += len(line)
        file.truncate(end)
