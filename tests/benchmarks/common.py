"""What the benchmark scripts share: the workload, medians, peak memory, tables. Needs nothing but the standard library, so
that a script may run in another package's environment."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Word problems of about 50 tokens; the texts are sent as they are, without a chat template.
PROMPTS = (
    "Tom has 12 marbles. He buys 3 bags with 7 marbles in each bag and then gives 9 marbles to his sister. How many "
    "marbles does Tom have now? Think step by step and write the final number in a box.",
    "A baker makes 48 rolls in the morning and half as many in the afternoon. She sells 5 boxes of 6 rolls and eats two "
    "rolls herself. How many rolls are left in the evening? Think step by step and write the final number in a box.",
    "A train leaves at 9:15 and arrives at 11:40 after two stops of 10 minutes each. How many minutes does it move? Think "
    "step by step and write the final number in a box.",
    "Anna reads 14 pages on Monday, twice as many on Tuesday and 5 pages fewer than on Tuesday on Wednesday. How many "
    "pages did she read on these three days? Think step by step and write the final number in a box.",
)


def parser(description: str) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=description)
    p.add_argument("--model", required=True, help="a Hugging Face folder")
    p.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    p.add_argument("--prompts", type=int, default=4)
    p.add_argument("--group", type=int, default=8)
    p.add_argument("--tokens", type=int, default=96, help="every completion has exactly this many")
    p.add_argument("--steps", type=int, default=5, help="measured steps, after one that is not")
    p.add_argument("--threads", type=int, default=0, help="0: as torch chooses")
    p.add_argument("--cpu-clock", action="store_true", help="count CPU seconds; see use_cpu_clock")
    p.add_argument("--out", default="", help="write the numbers to this JSON file, too")
    return p


def use_cpu_clock() -> None:
    """Every time.perf_counter counts CPU seconds of this process (all its threads). With one thread these are the seconds a
    quiet machine would take, whatever else runs on this one; with more, waiting threads count too."""
    time.perf_counter = time.process_time


def texts(count: int) -> list[str]:
    """That many prompts, no two the same."""
    return [PROMPTS[i % len(PROMPTS)] + (f" (No. {i})" if i >= len(PROMPTS) else "") for i in range(count)]


def memory_gb(field: str = "VmHWM") -> float:
    """Resident memory of this process in GB: its peak (VmHWM) or now (VmRSS). Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e9


def forget_peak() -> None:
    """Let VmHWM start again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def spread(seconds: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}


def table(rows: Sequence[Sequence[Any]]) -> str:
    """Markdown; the first row is the head."""
    cells = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def save(result: dict[str, Any], out: str) -> None:
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps(result, indent=1) + "\n")
