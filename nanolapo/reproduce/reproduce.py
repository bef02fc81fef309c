"""Runs a recipe: makes the base model, trains, evaluates, and writes the tables and figures.

    python -m nanolapo.reproduce.reproduce configs/demo/reproduce.yaml [--step table2] [--seeds 0,1] [--jobs 2] [--dry-run]
    python -m nanolapo.reproduce.reproduce configs/demo/compare.yaml [--methods lapo-d,laser-de] [--seeds 0,1] [--jobs 2]

A reproduce.yaml makes every table and figure of the paper, in runs/reproduce/RECIPE (`make reproduce`). A compare.yaml
trains every method from the same base, in runs/compare/RECIPE, and leaves results.md, results.json and figures (`make
compare`). Every method samples the same number of tokens in all its runs together, a monitor pass and dropped groups
included. Steps, and tokens trained on, differ and are in the table.

A step whose config and needs are unchanged is skipped, so the same command goes on where it was stopped. A comparison
writes a record of each method and seed as soon as it is evaluated (records.py), and its table is that of all records, also
of methods that were not named this time. Tables and figures are made from the files alone, for whatever is there.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nanolapo import cli
from nanolapo.config import UserError
from nanolapo.reproduce import records
from nanolapo.reproduce.beside_paper import compare, write_tables
from nanolapo.reproduce.comparison import compare_methods, write_comparison
from nanolapo.reproduce.forecast import print_forecast
from nanolapo.reproduce.over_seeds import mean_rows
from nanolapo.reproduce.pipeline import Pipeline
from nanolapo.reproduce.recipe import METHODS, Recipe, words

PAPER_TEMPERATURE = 0.6  # of the paper's evaluations


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, metavar="reproduce.yaml|compare.yaml")
    parser.add_argument("--step", default="", help="a table, run or evaluation with all it needs; default: everything")
    parser.add_argument("--methods", default="", help="of a comparison, separated by commas or blanks; default: all")
    parser.add_argument(
        "--tokens", type=int, help="of a comparison, sampled by every method; default: that of the file"
    )
    parser.add_argument("--seeds", default="", help="numbers separated by commas or blanks; default: those of the file")
    parser.add_argument("--jobs", type=int, default=1, help="steps at a time")
    parser.add_argument("--launcher", default=shlex.quote(sys.executable), help='e.g. "torchrun --nproc_per_node=8"')
    parser.add_argument("--out", type=Path, help="default: runs/reproduce/RECIPE, or runs/compare/RECIPE")
    parser.add_argument("--records", type=Path, help="folder of a comparison's records; default: records in --out")
    parser.add_argument("--machine", default="", help="dry run: what to forecast for, e.g. 8xH100-80GB")
    parser.add_argument("--dry-run", action="store_true", help="check all configs; list what is left, with its cost")
    return parser.parse_args()


def main() -> None:
    given = parse_arguments()
    name = given.config.parent.name
    folder = given.out or Path("runs") / given.config.stem / name
    recipe = Recipe(given.config, folder, shlex.split(given.launcher), given.tokens, words(given.methods))
    try:
        seeds = [int(word) for word in words(given.seeds)] or list(recipe.file.seeds)
    except ValueError:
        raise UserError(f"--seeds {given.seeds!r}: give whole numbers") from None
    kept = given.records or folder / "records"
    if given.dry_run:
        pipeline, wanted = recipe.pipeline(seeds), recipe.wanted(given.step, seeds)
        if recipe.known and not given.step:
            everything, wanted = len(wanted), records.without_record(recipe, pipeline, kept, seeds)
            print(f"{everything - len(wanted)} of {everything} results, the bases' too, have a record in {kept}\n")
        if left := [name for name in pipeline.closure(wanted) if not pipeline.is_done(name)]:
            print_forecast(recipe, pipeline, left, seeds[0], given.machine)
        else:
            print("nothing is left to run")
        return None
    if recipe.file.hardware and not torch.cuda.is_available():
        raise UserError(f"RECIPE={name} needs {recipe.file.hardware}, and this machine has no GPU: `make reproduce "
                        "RECIPE=demo` and `make demo` run on a CPU, DRY_RUN=1 shows the cost")  # fmt: skip
    if recipe.known and not given.step:
        return run_comparison(recipe, kept, seeds, given.jobs)
    try:
        recipe.pipeline(seeds).run(recipe.wanted(given.step, seeds), given.jobs)
    finally:
        if recipe.tables:
            for path in write_outputs(recipe, seeds):
                print(f"wrote {path}")


def run_comparison(recipe: Recipe, folder: Path, seeds: Sequence[int], jobs: int) -> None:
    """Train and evaluate what has no record in `folder`, then write the table of all that has one."""
    recipe.scored = [name for name in recipe.known if name in recipe.methods or records.file_of(folder, name).exists()]
    recorded = (one.seed for name in recipe.scored for one in records.read(folder, name))
    every_seed = sorted({*seeds, *recorded})
    pipeline = recipe.pipeline(every_seed)
    try:
        train_missing(recipe, pipeline, folder, seeds, jobs)
        together = [f"seed{seed}/{name}" for seed in seeds for name in recipe.evaluations]
        if together := [name for name in together if all(map(pipeline.is_done, pipeline.steps[name].needs))]:
            pipeline.run(together, jobs)  # the samples are there: this only puts them in one folder, for report.html
    finally:
        for path in write_methods(recipe, pipeline, folder, seeds, every_seed):
            print(f"wrote {path}")


def train_missing(recipe: Recipe, pipeline: Pipeline, folder: Path, seeds: Sequence[int], jobs: int) -> None:
    """Train and evaluate what has no record, and write each record as soon as it is there. Raises RunStopped."""
    pipeline.finished = partial(records.record_finished, recipe, pipeline, folder)
    if wanted := records.record_what_is_done(recipe, pipeline, folder, seeds):
        pipeline.run(wanted, jobs)
    else:
        print("every method has its records already")


def write_outputs(recipe: Recipe, seeds: Sequence[int]) -> list[Path]:
    """Tables and figures of everything that has been evaluated, from the evaluations' files alone.

    A results.json of another config, or of models that have to be trained again, is left out, for it may contradict the
    others.
    """
    pipeline = recipe.pipeline(seeds)
    done = {name: [seed for seed in seeds if pipeline.is_done(f"seed{seed}/{name}")] for name in recipe.evaluations}
    done = {name: found for name, found in done.items() if found}
    return write_paper(recipe, done, recipe.folder / f"seed{seeds[0]}")


def results(recipe: Recipe, evaluation: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The results.json of each of these seeds, which must have been evaluated."""
    paths = [recipe.run_dir(seed, evaluation) / "results.json" for seed in seeds]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def write_methods(
    recipe: Recipe, pipeline: Pipeline, folder: Path, seeds: Sequence[int], every_seed: Sequence[int]
) -> list[Path]:
    """The table and the pictures of all records; prints the table. It says which wanted results are missing, and why."""
    from nanolapo.report.plots import write_comparison_figures

    bases = records.valid_bases(recipe, pipeline, folder)
    identities, valid, found = {(one.seed, one.base) for one in bases}, {}, {}
    for name in ("base", *recipe.scored):
        valid[name] = records.valid(recipe, pipeline, folder, name, every_seed)
        named = [replace(one, setting=recipe.setting_of(name)) for one in valid[name].values()]  # as it is called today
        found[name] = {one.seed: one for one in named if (one.seed, one.base) in identities}
    missing = {}
    for name in recipe.scored:
        recorded = {one.seed for one in records.read(folder, name)} if valid[name] else set()
        expected = recorded | {*(seeds if name in recipe.methods else ())}
        for seed in sorted(expected - set(found[name])):
            missing[f"{name}, seed {seed}"] = records.why_missing(recipe, pipeline, folder, name, seed)
    if of_other_config := [name for name in recipe.scored if name not in recipe.methods and not valid[name]]:
        missing[", ".join(of_other_config)] = "all results are of another config"
    there = {name: list(by_seed.values()) for name, by_seed in found.items() if by_seed}
    if "base" not in there:
        return []
    made = compare_methods(there, bases, unverified(recipe.scored)) | {"tokens": recipe.tokens, "missing": missing}
    made["bases"] = records.of_other_bases(there)
    paths = write_comparison(recipe.folder, made)
    print(paths[0].read_text(encoding="utf-8"))
    return [*paths, *write_comparison_figures(recipe.folder, made["rows"], made["fronts"], made["bases"])]


def unverified(methods: Sequence[str]) -> set[str]:
    """Methods whose file says that something of them is unverified."""
    files = {name: METHODS / f"{name}.yaml" for name in methods}
    return {name for name, p in files.items() if p.exists() and "unverified" in p.read_text(encoding="utf-8").lower()}


def write_paper(recipe: Recipe, done: dict[str, list[int]], first_seed: Path) -> list[Path]:
    """The paper's tables and figures. done: the seeds of each evaluation; report.html shows the directory of the first."""
    from nanolapo.report.html import write_report
    from nanolapo.report.plots import write_figures

    of_paper = {name: mean_rows(results(recipe, name, seeds)) for name, seeds in done.items()}
    rows = {name: [r for r in found if r["temperature"] == PAPER_TEMPERATURE] for name, found in of_paper.items()}
    comparisons = []
    for table in recipe.tables.values():
        there = [name for name in table.evaluations if rows.get(name)]
        if there:
            ours = [row for name in there for row in rows[name]]
            made = compare(table.number, recipe.file.paper_base, ours, table.rows)
            over = [f"{name}, seeds {', '.join(map(str, done[name]))}" for name in there]
            comparisons.append(replace(made, notes=(*made.notes, f"Ours: {'; '.join(over)}.")))
    written = write_tables(comparisons, recipe.folder) if comparisons else []
    for name in filter(rows.get, rows):
        figures = recipe.folder / "figures" / name
        figures.mkdir(parents=True, exist_ok=True)
        written += write_figures({"rows": rows[name]}, recipe.runs_of(name, done[name][0]), figures)
    places = [first_seed / name for name in (*recipe.runs, *recipe.evaluations)]
    if any(place.exists() for place in places):
        write_report([place for place in places if place.exists()], recipe.folder / "report.html")
        written.append(recipe.folder / "report.html")
    return written


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    cli.run(main)
