"""Reads the files of a run: the lines of its JSONL files, and config.yaml with the commit in its head.

A run may still be writing, so its last line may be incomplete. Any other line that cannot be read is left out, and a note
names it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml

Json = dict[str, Any]
Kinds = dict[str, tuple[type, ...]]
NONE = type(None)
NUMBER = (int, float, NONE)
ROLLOUT: Kinds = {
    "step": (int,), "problem": (str,), "level": (int, NONE), "question": (str,), "reference_answer": (str,), "text": (str,),
    "correct": (bool,), "finished": (bool,), "length": (int,), "budget": NUMBER, "reward": (dict,),
}  # fmt: skip
SAMPLE: Kinds = {
    "problem": (str,), "source": (str,), "level": (int, NONE), "index": (int,), "length": (int,), "correct": (bool,),
    "finished": (bool,), "text": (str,), "budget": NUMBER,
}  # fmt: skip
PROBLEM: Kinds = {"id": (str,), "question": (str,), "answer": (str,), "level": (int, NONE)}
RESULT: Kinds = {
    "model": (str,), "set": (str,), "temperature": (int, float), "guidance": (str,), "accuracy": (int, float),
    "tokens": (int, float), "truncated": (int, float), "problems": (int, NONE), "samples": (int, NONE),
    "answers": (str, NONE),
}  # fmt: skip


def printable(text: str) -> str:
    """The text without characters that UTF-8 cannot hold: a file name may contain any bytes."""
    return text.encode("utf-8", "replace").decode()


def read_text(path: Path) -> str:
    """Return the text of a file, or '' if the file is missing. Bytes that are not UTF-8 become U+FFFD."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def read_lines(path: Path, check: Callable[[Any], str], notes: list[str]) -> list[Json]:
    """The usable lines of a JSONL file. A half-written last line is left out silently; other bad lines are noted."""
    good, faults = [], []
    lines = read_text(path).split("\n")  # not splitlines: a text may hold U+2028
    for number, line in enumerate(lines, start=1):
        try:
            row = decode(line) if line else None
            wrong = check(row) if line else ""
        except (ValueError, RecursionError):
            wrong = "" if number == len(lines) else "not JSON"
            row = None
        if wrong:
            faults.append(f"line {number}, {wrong}")
        elif row is not None:
            good.append(row)
    if faults:
        notes.append(f"{path}: {len(faults)} of {len(good) + len(faults)} lines left out (first: {faults[0]})")
    return good


def read_metrics(run_dir: Path) -> list[Json]:
    """The whole lines of a run's metrics.jsonl. The run may still be writing, or was killed in mid-line."""
    return read_lines(run_dir / "metrics.jsonl", metrics_fault, [])


def decode(text: str) -> Any:
    """JSON to values. NaN and Infinity, which Python also reads and writes, become None: a page must not hold them.

    >>> decode('[NaN, 1e999, 0.5]')
    [None, None, 0.5]
    """
    return json.loads(text, parse_constant=finite, parse_float=finite)


def finite(text: str) -> float | None:
    return float(text) if math.isfinite(float(text)) else None


def fault(row: Any, kinds: Kinds) -> str:
    """What is wrong with a line, '' when nothing is.

    >>> fault({}, {"step": (int,)}), fault({"step": "1"}, {"step": (int,)}), fault({"step": 1}, {"step": (int,)})
    ("no 'step'", "'step' is '1'", '')
    """
    if not isinstance(row, dict):
        return "not an object"
    for key, allowed in kinds.items():
        if key not in row and NONE not in allowed:
            return f"no {key!r}"
        if type(row.get(key)) not in allowed:
            return f"{key!r} is {str(repr(row.get(key)))[:40]}"
    return ""


def metrics_fault(row: Any) -> str:
    return fault(row, {"step": (int,)}) or fault(row, dict.fromkeys(row, NUMBER))


sample_fault, problem_fault = partial(fault, kinds=SAMPLE), partial(fault, kinds=PROBLEM)


def rollout_fault(row: Any) -> str:
    return fault(row, ROLLOUT) or fault(row["reward"], dict.fromkeys(row["reward"], NUMBER))


def read_config(folder: Path, notes: list[str]) -> tuple[Json, str, str]:
    """Return (config.yaml as values, its text, the git commit at its head), empty if the file is missing."""
    text = read_text(folder / "config.yaml")
    commit = re.match(r"(?:#.*\n)*?# git: (.*)\n", text)
    try:
        values = yaml.safe_load(text) or {}
        if not isinstance(values, dict) or not all(isinstance(section, dict) for section in values.values()):
            raise ValueError("not sections of keys")
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        notes.append(f"{folder / 'config.yaml'}: cannot be read ({' '.join(str(error).split())[:120]})")
        values = {}
    return values, text, commit[1] if commit else ""
