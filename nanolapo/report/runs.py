"""Reads the run and evaluation directories that report.html is made from.

A file may be missing, because the run is still at work, or be damaged. A note names each such file, and nothing is guessed.
"""

from __future__ import annotations

import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from nanolapo.config import UserError
from nanolapo.evaluation.scores import Answer, correctness, length, per_problem
from nanolapo.lengths import LengthMap
from nanolapo.report.files import (
    RESULT,
    Json,
    decode,
    fault,
    metrics_fault,
    printable,
    problem_fault,
    read_config,
    read_lines,
    read_text,
    rollout_fault,
    sample_fault,
)
from nanolapo.report.tables import Cells, label, tables

Place = tuple[int, int, str]  # sorts as levels should: (0, level, 'level n'), (1, 0, 'no level'), ...


@dataclass
class Run:
    """A training run's directory. `config` is empty and `commit` "" where config.yaml is missing."""

    name: str
    folder: Path
    config: Json
    config_text: str
    commit: str
    metrics: list[Json]
    rollouts: list[Json]
    length_map: LengthMap | None


@dataclass
class Samples:
    """The answers of one row of an evaluation's table: one model, set, temperature and stated length."""

    model: str
    source: str
    temperature: float
    answers: list[Answer]


@dataclass
class Evaluation:
    """A directory of evaluate.py."""

    name: str
    config: Json
    config_text: str
    commit: str
    results: Json | None
    tables: list[tuple[str, list[tuple[str, Cells]]]]  # see report.tables
    samples: list[Samples]
    problems: dict[str, Json]


@dataclass
class Material:
    """Everything that was found, and a note for each thing that could not be read."""

    runs: list[Run] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_all(folders: Sequence[Path]) -> Material:
    """Read run and evaluation directories. Raises UserError for one that does not exist, or when none has anything."""
    folders = list({folder.resolve(): folder for folder in folders}.values())
    material = Material()
    for folder, name in zip(folders, names(folders), strict=True):
        if not folder.exists():
            raise UserError(f"{folder}: no such directory; name run directories, such as runs/demo/seed0/stage1")
        inside = [entry for entry in folder.iterdir() if entry.name[0] != "."] if folder.is_dir() else []
        has = {entry.name for entry in inside}
        # a comparison's samples and scores, whose table is in its evaluate/
        is_part = all(entry.match("*--*.jsonl") or (entry / "results.json").exists() for entry in inside)
        if "explain.html" in has:
            continue  # --explain leaves one step, not a run, and RUNS="runs/demo/seed0/*" matches it
        if has & {"results.json", "samples"}:
            material.evaluations.append(read_evaluation(name, folder, material.notes))
        elif has & {"config.yaml", "metrics.jsonl", "rollouts.jsonl"}:
            material.runs.append(read_run(name, folder, material.notes))
        elif not (inside and is_part) and "config.json" not in has:  # silent of a model folder, such as the demo's base
            material.notes.append(f"{folder}: no run directory (no config.yaml or results.json), left out")
    if not material.runs and not material.evaluations:
        raise UserError(f"{', '.join(map(str, folders))}: no run directory; one holds config.yaml or results.json "
                        "(what --explain has left is one step and no run)")  # fmt: skip
    return material


def names(folders: Sequence[Path]) -> list[str]:
    """Short names that tell the directories apart: what lies below their common parent.

    >>> names([Path("runs/a/seed0/x"), Path("runs/a/seed1/x")]), names([Path("runs/x")])
    (['seed0/x', 'seed1/x'], ['x'])
    """
    whole = [folder.resolve() for folder in folders]
    common = os.path.commonpath([folder.parent for folder in whole])
    return [printable(folder.relative_to(common).as_posix()) for folder in whole]


# ---- a training run ----


def read_run(name: str, folder: Path, notes: list[str]) -> Run:
    for missing in ("config.yaml", "metrics.jsonl", "rollouts.jsonl"):
        if not (folder / missing).is_file():
            notes.append(f"{folder}: no {missing} (yet)")
    config, text, commit = read_config(folder, notes)
    metrics = read_lines(folder / "metrics.jsonl", metrics_fault, notes)
    rollouts = read_lines(folder / "rollouts.jsonl", rollout_fault, notes)
    length_map = None
    if (folder / "length_map.json").exists():
        try:
            length_map = LengthMap.load(folder / "length_map.json")
        except UserError as error:
            notes.append(str(error).removeprefix("lapo.length_map="))
    return Run(name, folder, config, text, commit, metrics, rollouts, length_map)


def is_finished(run: Run) -> bool:
    """By steps or by tokens. A model may be of before: a finished run can be continued with a larger train.steps."""
    train = run.config.get("train", {})
    steps, tokens = (whole_number(train.get(key)) for key in ("steps", "sampled_tokens"))  # tokens 0: no limit
    if not steps or not run.metrics:
        return (run.folder / "model").is_dir()
    last = run.metrics[-1]
    return last["step"] + 1 >= steps or 0 < tokens <= (last.get("sampled_tokens") or 0)


def whole_number(value: Any) -> int:
    """A number of config.yaml; 0 where there is none."""
    return value if type(value) is int else 0


@dataclass(frozen=True)
class Visit:
    """A logged group: its problem, what M(q) its prompt carried (stage 2), what its right answers say (Eq. 3)."""

    step: int
    problem: str
    level: int | None
    budget: float | None
    measured: float | None


def visits(run: Run) -> list[Visit]:
    """The groups in rollouts.jsonl that were logged whole: run.log_rollouts may cut a step's last group."""
    groups: dict[tuple[int, str], list[Json]] = defaultdict(list)
    for row in run.rollouts:
        groups[row["step"], row["problem"]].append(row)
    largest = max(map(len, groups.values()), default=0)
    size = whole_number(run.config.get("rollout", {}).get("group_size")) or largest
    if len(groups) > len({step for step, _ in groups}):  # a step's first group is whole where a second one follows
        size = min(size, largest)  # SPO has groups of one
    measure = (run.length_map or LengthMap()).measure
    found = []
    for (step, problem), rows in groups.items():
        if len(rows) % size == 0:  # where problems are few, a step has one twice
            right = [row["length"] for row in rows if row["correct"] and row["finished"]]
            level, budget = rows[0].get("level"), rows[0].get("budget")
            found.append(Visit(step, problem, level, budget, measure(right) if right else None))
    return found


def known_levels(material: Material) -> dict[str, int | None]:
    """Problem id -> level, from every rollout and every evaluated problem: length_map.json itself has no levels."""
    levels = {row["problem"]: row.get("level") for run in material.runs for row in run.rollouts}
    return levels | {i: p.get("level") for e in material.evaluations for i, p in e.problems.items()}


def targets_by_level(length_map: LengthMap, levels: dict[str, int | None]) -> dict[Place, list[float | None]]:
    """M(q) of every problem, by level. Problems without a level come after the levels, those of unknown level last.

    >>> m = LengthMap(); m.entries = {"a": 9.0, "b": None, "c": 7.0, "d": 8.0}
    >>> targets_by_level(m, {"a": 10, "b": 2, "c": None})
    {(0, 2, 'level 2'): [None], (0, 10, 'level 10'): [9.0], (1, 0, 'no level'): [7.0], (2, 0, 'never logged'): [8.0]}
    """
    found: dict[Place, list[float | None]] = defaultdict(list)
    for problem, target in length_map.entries.items():
        level = levels.get(problem)
        unknown = (1, 0, "no level") if problem in levels else (2, 0, "never logged")
        found[unknown if level is None else (0, level, f"level {level}")].append(target)
    return dict(sorted(found.items()))


def mean_by_step(points: Iterable[tuple[int, float | None]]) -> tuple[list[int], list[float]]:
    """Steps that have a value, and the mean of each.

    >>> mean_by_step([(3, 10.0), (1, 8.0), (3, 20.0), (2, None)])
    ([1, 3], [8.0, 15.0])
    """
    found: dict[int, list[float]] = defaultdict(list)
    for step, value in points:
        if value is not None:
            found[step].append(value)
    return sorted(found), [float(np.mean(found[step])) for step in sorted(found)]


# ---- an evaluation ----


def read_evaluation(name: str, folder: Path, notes: list[str]) -> Evaluation:
    config, text, commit = read_config(folder, notes)
    problems = {row["id"]: row for row in read_lines(folder / "problems.jsonl", problem_fault, notes)}
    results, found = read_results(folder, notes)
    groups: dict[str, list[Answer]] = defaultdict(list)
    given = (config.get("evaluate") or {}).get("samples_dir") if config else ""
    for path in sorted((Path(given) if given else folder / "samples").glob("*.jsonl")):
        rows = read_lines(path, sample_fault, notes)
        keys = [f.name for f in fields(Answer)]
        groups[path.stem.rpartition("-rank")[0]] += [Answer(**{k: row[k] for k in keys if k in row}) for row in rows]
    samples = trace(results["rows"], groups, folder, notes) if results and groups else list(by_file_name(groups))
    return Evaluation(name, config, text, commit, results, found, samples, problems)


def read_results(folder: Path, notes: list[str]) -> tuple[Json | None, list[Any]]:
    """(results.json, its tables), or (None, []) and a note where it is missing or damaged."""
    path = folder / "results.json"
    if not path.is_file():
        notes.append(f"{folder}: no results.json (yet); samples are listed without a table")
        return None, []
    try:
        results = decode(read_text(path))
        for row in results["rows"]:
            if wrong := fault(row, RESULT):
                raise ValueError(f"a row has {wrong}")
        return results, tables(results)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        notes.append(f"{path}: not what evaluate.py writes ({type(error).__name__}: {str(error)[:80]}); run it again")
        return None, []


def trace(rows: list[Json], groups: dict[str, list[Answer]], folder: Path, notes: list[str]) -> list[Samples]:
    """The samples behind each row of results.json, which names their files: those of two passes may have equal numbers.

    The old samples of a retrained model stay, and those of another run may come later, so the numbers are compared too.
    """
    found, untraced = [], []
    for row in rows:
        if not row.get("samples") or not row.get("problems"):
            continue
        per, of_row = row["samples"] // row["problems"], groups.get(row.get("answers") or "", [])
        answers = list({(a.problem, a.index): a for a in of_row if a.index < per}.values())
        if has_numbers(answers, row):
            found.append(Samples(label(row), row["set"], row["temperature"], answers))
        elif row["set"] != "average":  # "average" has no samples
            untraced.append(f"{label(row)} on {row['set']} at temperature {row['temperature']:g}")
    if untraced:
        notes.append(
            f"{folder}: {len(untraced)} rows of results.json name no samples with their numbers ({untraced[0]})"
        )
    if left := groups.keys() - {row.get("answers") for row in rows}:
        notes.append(f"{folder}: {len(left)} sets of samples belong to no row of results.json ({min(left)}); left out")
    return found


def has_numbers(answers: list[Answer], row: Json) -> bool:
    """Were these answers the ones that a row of results.json was computed from?"""
    if len(answers) != row["samples"]:
        return False
    for key, value in (("accuracy", correctness), ("tokens", length), ("truncated", lambda a: float(not a.finished))):
        mean = np.mean(list(per_problem(answers, value).values()))
        if not math.isclose(row[key], mean, rel_tol=1e-9, abs_tol=1e-12):
            return False
    return True


def by_file_name(groups: dict[str, list[Answer]]) -> Iterator[Samples]:
    """Samples of an evaluation that has no table yet, named after their files."""
    for key, answers in groups.items():
        parts = re.fullmatch(r"(.+?)--(.+)--T([\d.e+-]+)--(\w+)", key)
        if parts and answers:
            told = f", told a length ({parts[4]})" if any(a.budget is not None for a in answers) else ""
            unique = list({(a.problem, a.index): a for a in answers}.values())
            yield Samples(parts[1] + told, parts[2], float(parts[3]), unique)
