"""Every table and figure of the paper by one command: base, trainings, ablations, evaluations, tables, figures, report.

    python -m nanolapo.reproduce.reproduce configs/demo/reproduce.yaml [--step table2] [--seeds 0,1] [--jobs 2] [--dry-run]

A recipe's reproduce.yaml names its training runs, its evaluations, and which of our models is which row of the paper. All
configs are read first; a step whose config and needs are unchanged is skipped, so the same command goes on where it was
stopped. Tables, figures and report.html are made from the evaluations' files alone, in runs/reproduce/RECIPE, for whatever
is there. `make reproduce` calls it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from nanolapo import cli
from nanolapo.config import UserError
from nanolapo.config_file import build, load_config, read_yaml
from nanolapo.report.html import write_report
from nanolapo.report.tables import plots
from nanolapo.reproduce.beside_paper import compare, write_tables
from nanolapo.reproduce.forecast import show_plan
from nanolapo.reproduce.over_seeds import mean_rows
from nanolapo.reproduce.pipeline import Pipeline, Step
from nanolapo.reproduce.steps import base_step, evaluation_step, override, seed_overrides, training_step, words

PAPER_TEMPERATURE = 0.6  # of the paper's evaluations


@dataclass(frozen=True)
class Run:
    """One training. Its name is its run directory."""

    script: str = "train_stage1.py"
    config: str = "stage1.yaml"  # of the recipe
    after: tuple[str, ...] = ()  # runs that it starts from or is matched to
    overrides: tuple[str, ...] = ()  # section.key=value


@dataclass(frozen=True)
class Evaluation:
    """One call of evaluate.py."""

    config: str = "evaluate.yaml"
    models: dict[str, Any] = field(default_factory=dict)  # label -> run, run/folder, or base; the first is AES' base
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """A table of the paper, and where its numbers of ours come from."""

    number: int
    evaluations: tuple[str, ...]
    rows: dict[str, Any] = field(default_factory=dict)  # the paper's name of a row -> our label


@dataclass(frozen=True)
class Recipe:
    """A recipe's reproduce.yaml."""

    paper_base: str  # A or B: the paper's base model that this recipe is compared with
    runs: dict[str, Any]
    evaluations: dict[str, Any]
    tables: dict[str, Any]
    seeds: tuple[int, ...] = (0,)
    prepare: str = ""  # a module that makes the base model from base.yaml
    hardware: str = ""  # what it needs; empty: any machine


class Runner:
    """A recipe read and checked, and its steps."""

    def __init__(self, path: Path, folder: Path, launcher: Sequence[str]) -> None:
        self.configs, self.folder, self.launcher = path.parent, folder, launcher
        self.recipe = build(Recipe, read_yaml(path), "")
        self.runs = self.parts(Run, "runs")
        self.evaluations = self.parts(Evaluation, "evaluations")
        self.tables = self.parts(Table, "tables")
        for name, table in self.tables.items():
            if missing := [e for e in table.evaluations if e not in self.evaluations]:
                raise UserError(f"tables.{name} of {path}: no evaluation is called {', '.join(missing)}")

    def parts(self, kind: type, section: str) -> dict[str, Any]:
        return {
            name: build(kind, value or {}, f"{section}.{name}") for name, value in getattr(self.recipe, section).items()
        }

    def steps(self, seed: int) -> list[Step]:
        """Base, runs and evaluations of one seed."""
        common, needs = seed_overrides(self.folder, seed), list[str]()
        made = []
        if self.recipe.prepare:
            made.append(base_step(f"seed{seed}/base", self.recipe.prepare, self.configs / "base.yaml", common))
            needs = [made[0].name]
        for name, run in self.runs.items():
            before = [*needs, *(f"seed{seed}/{other}" for other in run.after)]
            overrides = [*common, override("run.name", name), *run.overrides]
            path = self.configs / run.config
            made.append(training_step(f"seed{seed}/{name}", run.script, path, overrides, before, self.launcher))
        base = load_config(self.configs / "base.yaml", common).model.path
        for name, evaluation in self.evaluations.items():
            models, before = [], list(needs)
            for label, place in evaluation.models.items():
                run_name, _, rest = str(place).partition("/")
                if run_name not in {"base", *self.runs}:
                    raise UserError(f"evaluations.{name}.models.{label}: no run is called {run_name}")
                folder = self.folder / f"seed{seed}" / run_name / (rest or "model")
                models.append(f"{label}={base if run_name == 'base' else folder}")
                before += [] if run_name == "base" else [f"seed{seed}/{run_name}"]
            overrides = [*common, override("run.name", name), override("evaluate.models", models)]
            overrides += [
                override("evaluate.samples_dir", str(self.folder / f"seed{seed}" / "samples")),
                *evaluation.overrides,
            ]
            before = list(dict.fromkeys(before))
            path = self.configs / evaluation.config
            made.append(evaluation_step(f"seed{seed}/{name}", path, overrides, before, self.launcher))
        return made

    def pipeline(self, seeds: Sequence[int]) -> Pipeline:
        return Pipeline([step for seed in seeds for step in self.steps(seed)], self.folder)

    def wanted(self, step: str, seeds: Sequence[int]) -> list[str]:
        """Names of the pipeline's steps that --step asks for: a table, a run, an evaluation; all when it is empty."""
        known = [*(["base"] if self.recipe.prepare else []), *self.runs, *self.evaluations]
        if step and step not in known and step not in self.tables:
            raise UserError(f"--step {step}: there are {', '.join([*self.tables, *known])}")
        parts = self.tables[step].evaluations if step in self.tables else [step] if step else known
        return [f"seed{seed}/{part}" for seed in seeds for part in parts]

    def runs_of(self, evaluation: str, seed: int) -> dict[str, Path]:
        """Run directories of one seed that an evaluation's models come from, for the training curves."""
        places = {label: str(place).partition("/")[0] for label, place in self.evaluations[evaluation].models.items()}
        return {label: self.folder / f"seed{seed}" / run for label, run in places.items() if run in self.runs}

    def rows(self, evaluation: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
        """Rows of an evaluation at the paper's temperature, means over these seeds, which must have been evaluated."""
        paths = [self.folder / f"seed{seed}" / evaluation / "results.json" for seed in seeds]
        results = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        return [row for row in mean_rows(results) if row["temperature"] == PAPER_TEMPERATURE] if results else []


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, metavar="reproduce.yaml")
    parser.add_argument("--step", default="", help="a table, run or evaluation with all it needs; default: everything")
    parser.add_argument("--seeds", default="", help="numbers separated by commas or blanks; default: those of the file")
    parser.add_argument("--jobs", type=int, default=1, help="steps at a time")
    parser.add_argument("--launcher", default=shlex.quote(sys.executable), help='e.g. "torchrun --nproc_per_node=8"')
    parser.add_argument("--out", type=Path, help="default: runs/reproduce/RECIPE")
    parser.add_argument("--machine", default="", help="dry run: what to plan for, e.g. 8xH100-80GB")
    parser.add_argument("--dry-run", action="store_true", help="check all configs; list steps with their cost")
    return parser.parse_args()


def main() -> None:
    given = parse_arguments()
    name = given.config.parent.name
    runner = Runner(given.config, given.out or Path("runs") / "reproduce" / name, shlex.split(given.launcher))
    try:
        seeds = [int(word) for word in words(given.seeds)] or list(runner.recipe.seeds)
    except ValueError:
        raise UserError(f"--seeds {given.seeds!r}: give whole numbers") from None
    pipeline = runner.pipeline(seeds)
    wanted = runner.wanted(given.step, seeds)
    if given.dry_run:
        base = load_config(given.config.parent / "base.yaml", seed_overrides(runner.folder, seeds[0])).model.path
        names, at = pipeline.closure(wanted), len(runner.launcher)
        return show_plan(pipeline, names, at, base, runner.recipe.paper_base, given.machine)
    if runner.recipe.hardware and not torch.cuda.is_available():
        raise UserError(f"RECIPE={name} needs {runner.recipe.hardware}, and this machine has no GPU: `make reproduce "
                        "RECIPE=demo` and `make demo` run on a CPU, DRY_RUN=1 shows the plan")  # fmt: skip
    try:
        pipeline.run(wanted, given.jobs)
    finally:
        for path in write_outputs(runner, seeds):
            print(f"wrote {path}")


def write_outputs(runner: Runner, seeds: Sequence[int]) -> list[Path]:
    """Tables and figures of everything that has been evaluated, from the evaluations' files alone.

    A results.json of another config, or of models that have to be trained again, is left out: it may contradict the others.
    """
    folder, recipe = runner.folder, runner.recipe
    pipeline = runner.pipeline(seeds)
    done = {
        name: [seed for seed in seeds if pipeline.is_done(f"seed{seed}/{name}")] for name in runner.evaluations
    }  # fmt: skip
    comparisons = []
    for table in runner.tables.values():
        ours = [row for name in table.evaluations for row in runner.rows(name, done[name])]
        if ours:
            made = compare(table.number, recipe.paper_base, ours, table.rows)
            over = [f"{name}, seeds {', '.join(map(str, done[name]))}" for name in table.evaluations if done[name]]
            comparisons.append(replace(made, notes=(*made.notes, f"Ours: {'; '.join(over)}.")))
    written = write_tables(comparisons, folder) if comparisons else []
    for name in runner.evaluations:
        rows = runner.rows(name, done[name])
        if rows:
            figures = folder / "figures" / name
            figures.mkdir(parents=True, exist_ok=True)
            written += plots({"rows": rows}, runner.runs_of(name, done[name][0]), figures)
    first = folder / f"seed{seeds[0]}"
    if there := [first / name for name in (*runner.runs, *runner.evaluations) if (first / name).exists()]:
        write_report(there, folder / "report.html")
        written.append(folder / "report.html")
    return written


if __name__ == "__main__":
    cli.run(main)
