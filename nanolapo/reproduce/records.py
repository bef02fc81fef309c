"""What a comparison keeps of a method: one JSON line a seed, with the scores of every problem and the cost of training.

These files are small enough to be committed as they come. The table and the picture are made from them alone. So runs can
be deleted, methods can be added on another day, and a method that fails takes nothing away from the others.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nanolapo.config import UserError
from nanolapo.evaluation.scores import Answer, correctness, length, per_problem, read_answers
from nanolapo.fingerprint import digest
from nanolapo.locks import locked
from nanolapo.provenance import model_identity
from nanolapo.report.files import problem_fault, read_config, read_lines, read_metrics
from nanolapo.reproduce.pipeline import Pipeline
from nanolapo.reproduce.recipe import Recipe


@dataclass(frozen=True)
class Record:
    """One seed of one method. A place of `scores` is a set at a temperature: `row` of results.json, `accuracy` and `tokens`
    of each problem, their `levels`, and `problems`, which says that two records had the same ones in the same order."""

    method: str
    seed: int
    digest: str  # of all configs that the result depends on (Recipe.digest)
    base: str  # the base model's identity: another machine may make another base from the same config
    setting: str  # its name in the recipe's settings; empty: the run as the recipe has it
    costs: dict[str, float]
    scores: list[dict[str, Any]]
    commit: str = ""  # of the code. A line stays valid when that changes: delete those of a method that was mended


def file_of(folder: Path, method: str) -> Path:
    return folder / f"{method}.jsonl"


def read(folder: Path, method: str) -> list[Record]:
    """All seeds of a method, [] without a file. Raises UserError for a line that is no record."""
    path, found = file_of(folder, method), list[Record]()
    for number, line in enumerate(path.read_bytes().split(b"\n") if path.exists() else (), start=1):
        try:
            found += [Record(**json.loads(line))] if line else []
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}, line {number}: no result of a comparison ({error}); delete the line") from None
    known = [(one.seed, one.base if method == "base" else "") for one in found]
    if twice := {place[0] for place in known if known.count(place) > 1}:
        raise UserError(f"{path}: two lines are of seed {min(twice)}, as after a merge; delete one of them")
    return found


def write(folder: Path, record: Record) -> None:
    """Put a record in the place of the one of the same seed. Of a base, those of other machines stay."""

    def replaced(old: Record) -> bool:
        return old.seed == record.seed and (record.method != "base" or old.base == record.base)

    with locked(folder / ".lock", f"{folder}: another command is writing here; waiting for it", wait=True):
        kept = [*(old for old in read(folder, record.method) if not replaced(old)), record]
        lines = [json.dumps(asdict(one), separators=(",", ":")) for one in sorted(kept, key=lambda one: one.seed)]
        temporary = file_of(folder, record.method).with_suffix(".tmp")
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        temporary.replace(file_of(folder, record.method))


def record_of(recipe: Recipe, pipeline: Pipeline, seed: int, method: str) -> Record:
    """The record of a finished evaluation, from its results.json, its sample files and the runs' metrics.jsonl."""
    folder = recipe.run_dir(seed, f"scores/{method}")
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    levels = {one["id"]: one["level"] for one in read_lines(folder / "problems.jsonl", problem_fault, [])}
    runs = [recipe.run_dir(seed, phase) for phase in recipe.phases(method)] if method != "base" else []
    return Record(
        method, seed, recipe.digest(pipeline, f"seed{seed}/scores/{method}"), model_identity(recipe.base_model(seed)),
        recipe.setting_of(method), costs(runs),
        [place(recipe.run_dir(seed, "samples"), row, levels) for row in results["rows"]
         if row["model"] == method and row["answers"] and not row["guidance"]],
        commits_of(runs or [folder]),
    )  # fmt: skip


def commits_of(runs: Sequence[Path]) -> str:
    """The commits with which these runs were last started, from their config.yaml. They may be older than today's code."""
    return ", ".join(dict.fromkeys(read_config(run, [])[2] for run in runs))


def place(samples: Path, row: dict[str, Any], levels: Mapping[str, int | None]) -> dict[str, Any]:
    """A row with the scores of its problems. `levels`: of the evaluation's problems; those in the files may be older."""
    found: dict[tuple[str, int], Answer] = {}  # a kill may have left an answer twice
    for path in sorted(samples.glob(f"{row['answers']}*.jsonl")):
        found |= {(a.problem, a.index): a for a in read_answers(path)}
    each = row["samples"] // row["problems"]  # the files also keep those of an evaluation with more
    answers = [found[key] for key in sorted(found) if key[1] < each]
    accuracy, tokens = per_problem(answers, correctness), per_problem(answers, length)
    return {"row": row, "problems": digest(list(tokens)), "levels": [levels.get(problem) for problem in tokens],
            "accuracy": shorter(accuracy.values()), "tokens": shorter(tokens.values())}  # fmt: skip


def shorter(values: Any) -> list[float]:
    """The same numbers, whole ones without a decimal point: a file holds hundreds of thousands.

    >>> shorter([1.0, 0.5, 2 / 3])
    [1, 0.5, 0.66667]
    """
    return [int(value) if value == int(value) else round(value, 5) for value in values]


def costs(run_dirs: Sequence[Path]) -> dict[str, float]:
    """Sampled and trained tokens, steps and seconds of training, without start-up: the sum over a method's phases."""
    phases = [read_metrics(folder) for folder in run_dirs]
    if not phases or not all(phases):  # a lost metrics.jsonl: a part of the costs would look like all of them
        return {}
    lines = [line for phase in phases for line in phase]
    return {
        "sampled_tokens": sum(phase[-1]["sampled_tokens"] for phase in phases),
        "trained_tokens": sum(line.get("trained_tokens") or 0 for line in lines),
        "steps": len(lines),
        "seconds": sum(value for line in lines for key, value in line.items() if key.startswith("seconds/")),
    }


def valid(recipe: Recipe, pipeline: Pipeline, folder: Path, method: str, seeds: Sequence[int]) -> dict[int, Record]:
    """The records of these seeds that the recipe would make again just so."""
    return {one.seed: one for one in read(folder, method) if one.seed in seeds
            and one.digest == recipe.digest(pipeline, f"seed{one.seed}/scores/{method}")}  # fmt: skip


def valid_bases(recipe: Recipe, pipeline: Pipeline, folder: Path) -> list[Record]:
    """All base models that have a valid record; of one seed there are several where it ran on several machines."""
    digests = {name: recipe.digest(pipeline, name) for name in pipeline.steps if name.endswith("/scores/base")}
    return [one for one in read(folder, "base") if digests.get(f"seed{one.seed}/scores/base") == one.digest]


def record_finished(recipe: Recipe, pipeline: Pipeline, folder: Path, step: str) -> None:
    """Write the record of a step seedN/scores/METHOD that is done; other steps leave none."""
    seed, kind, *method = step.split("/")
    if kind == "scores":
        write(folder, record_of(recipe, pipeline, int(seed.removeprefix("seed")), method[0]))


def without_record(recipe: Recipe, pipeline: Pipeline, folder: Path, seeds: Sequence[int]) -> list[str]:
    """The steps of the wanted methods that have no valid record."""
    found = []
    for step in recipe.wanted("", seeds):
        seed, method = int(step.split("/")[0].removeprefix("seed")), step.split("/")[2]
        if seed not in valid(recipe, pipeline, folder, method, [seed]):
            found.append(step)
    return found


def record_what_is_done(recipe: Recipe, pipeline: Pipeline, folder: Path, seeds: Sequence[int]) -> list[str]:
    """Write the missing records of evaluations that are done: they are of a run that was killed, or that had another folder
    of records. Returns the steps that are left to run."""
    left = []
    for step in (f"seed{seed}/scores/base" for seed in seeds):  # there may be a record, of another machine's base
        if pipeline.is_done(step):
            record_finished(recipe, pipeline, folder, step)
    for step in without_record(recipe, pipeline, folder, seeds):
        if pipeline.is_done(step):
            record_finished(recipe, pipeline, folder, step)
        else:
            left.append(step)
    return left


def of_other_bases(found: Mapping[str, Sequence[Record]]) -> list[str]:
    """The methods with a seed that started from another base model than most methods of that seed: it was made on
    another machine or commit."""
    counts = Counter((one.seed, one.base) for method, mine in found.items() if method != "base" for one in mine)
    common: dict[int, str] = {}
    for (seed, base), _ in counts.most_common():
        common.setdefault(seed, base)
    return [method for method, mine in found.items() if any(common.get(one.seed, one.base) != one.base for one in mine)]


def why_missing(recipe: Recipe, pipeline: Pipeline, folder: Path, method: str, seed: int) -> str:
    """Why a method has no valid record of a seed: which of its steps failed, with the last line of the log."""
    for name in pipeline.closure([f"seed{seed}/scores/{method}"]):
        if pipeline.failed(name):
            return f"{name.partition('/')[2]} did not end well: {pipeline.last_line(name)[:200]}"
    digests = [one.digest for one in read(folder, method) if one.seed == seed]
    if recipe.digest(pipeline, f"seed{seed}/scores/{method}") in digests:
        return f"its base has no line in {file_of(folder, 'base')} any more; put it back"
    return "its result is of another config" if digests else "not run"
