"""Runs a recipe: makes the base model, trains, evaluates, and writes the tables and figures.

    python -m nanolapo.reproduce.reproduce configs/demo/reproduce.yaml [--step table2] [--seeds 0,1] [--jobs 2] [--dry-run]
    python -m nanolapo.reproduce.reproduce configs/demo/compare.yaml [--methods lapo,laser-de] [--seeds 0,1] [--jobs 2]

A reproduce.yaml makes every table and figure of the paper, in runs/reproduce/RECIPE (`make reproduce`). A compare.yaml
trains every method from the same base, and leaves results.md, results.json and figures in runs/compare/RECIPE (`make
compare`). Every method samples the same number of tokens in all its runs together, a monitor pass and dropped groups
included. Steps, and tokens trained on, differ and are in the table.

A step whose config and needs are unchanged is skipped, so the same command goes on where it was stopped. Tables and figures
are made from the evaluations' files alone, for whatever is there.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nanolapo import cli
from nanolapo.config import UserError
from nanolapo.reproduce.beside_paper import compare, write_tables
from nanolapo.reproduce.forecast import print_forecast
from nanolapo.reproduce.over_seeds import mean_rows, summarize_methods
from nanolapo.reproduce.recipe import METHODS, Recipe
from nanolapo.reproduce.seeds import write_comparison

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
    parser.add_argument("--machine", default="", help="dry run: what to forecast for, e.g. 8xH100-80GB")
    parser.add_argument("--dry-run", action="store_true", help="check all configs; list steps with their cost")
    return parser.parse_args()


def words(text: str) -> list[str]:
    """Names given on the command line, separated by commas or blanks."""
    return text.replace(",", " ").split()


def main() -> None:
    given = parse_arguments()
    name = given.config.parent.name
    folder = given.out or Path("runs") / given.config.stem / name
    recipe = Recipe(given.config, folder, shlex.split(given.launcher), given.tokens, words(given.methods))
    try:
        seeds = [int(word) for word in words(given.seeds)] or list(recipe.file.seeds)
    except ValueError:
        raise UserError(f"--seeds {given.seeds!r}: give whole numbers") from None
    pipeline, wanted = recipe.pipeline(seeds), recipe.wanted(given.step, seeds)
    if given.dry_run:
        return print_forecast(recipe, pipeline, pipeline.closure(wanted), seeds[0], given.machine)
    if recipe.file.hardware and not torch.cuda.is_available():
        raise UserError(f"RECIPE={name} needs {recipe.file.hardware}, and this machine has no GPU: `make reproduce "
                        "RECIPE=demo` and `make demo` run on a CPU, DRY_RUN=1 shows the cost")  # fmt: skip
    try:
        pipeline.run(wanted, given.jobs)
    finally:
        for path in write_outputs(recipe, seeds):
            print(f"wrote {path}")


def write_outputs(recipe: Recipe, seeds: Sequence[int]) -> list[Path]:
    """Tables and figures of everything that has been evaluated, from the evaluations' files alone.

    A results.json of another config, or of models that have to be trained again, is left out, for it may contradict the
    others.
    """
    pipeline = recipe.pipeline(seeds)
    done = {
        name: [seed for seed in seeds if pipeline.is_done(f"seed{seed}/{name}")] for name in recipe.evaluations
    }  # fmt: skip
    done = {name: found for name, found in done.items() if found}
    if recipe.methods:
        return [path for name, found in done.items() for path in write_methods(recipe, name, found)]
    return write_paper(recipe, done, recipe.folder / f"seed{seeds[0]}")


def results(recipe: Recipe, evaluation: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The results.json of each of these seeds, which must have been evaluated."""
    paths = [recipe.run_dir(seed, evaluation) / "results.json" for seed in seeds]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def write_methods(recipe: Recipe, evaluation: str, seeds: Sequence[int]) -> list[Path]:
    """The tables and the figures of a comparison; prints the tables."""
    from nanolapo.report.plots import write_comparison_figures

    run_dirs = {
        name: [[recipe.run_dir(seed, phase) for phase in recipe.phases(name)] for seed in seeds]
        for name in recipe.methods
    }
    rows = summarize_methods(results(recipe, evaluation, seeds), run_dirs, unverified(recipe.methods))
    paths = write_comparison(recipe.folder, rows, recipe.tokens, seeds)
    print(paths[0].read_text(encoding="utf-8"))
    return [*paths, *write_comparison_figures(recipe.folder, rows)]


def unverified(methods: Sequence[str]) -> set[str]:
    """Methods whose file says that something of them is unverified."""
    files = {name: METHODS / f"{name}.yaml" for name in methods}
    return {name for name, p in files.items() if p.exists() and "unverified" in p.read_text(encoding="utf-8").lower()}


def write_paper(recipe: Recipe, done: dict[str, list[int]], first_seed: Path) -> list[Path]:
    """The paper's tables and figures. done: the seeds of each evaluation; report.html shows the directory of the first."""
    from nanolapo.report.html import write_report
    from nanolapo.report.plots import write_figures

    rows = {
        name: [r for r in mean_rows(results(recipe, name, seeds)) if r["temperature"] == PAPER_TEMPERATURE]
        for name, seeds in done.items()
    }
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
