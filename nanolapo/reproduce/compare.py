"""The fair fight: every method from the same base, for the same number of sampled tokens, evaluated on the same samples.

    python -m nanolapo.reproduce.compare configs/demo/compare.yaml [--methods lapo,laser-de] [--seeds 0,1,2] [--jobs 2]
        [--dry-run]

What is equal is what costs: tokens sampled, by all phases of a method together, a monitor pass or dropped groups included;
steps, and tokens trained on, differ and are in the table. It goes on where it was stopped, and leaves results.md,
results.json and pareto.png in runs/compare/RECIPE. `make compare` calls it.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nanolapo import cli
from nanolapo.config import UserError
from nanolapo.config_file import build, load_config, read_yaml
from nanolapo.reproduce.compare_table import summarize_methods, write_comparison
from nanolapo.reproduce.pipeline import Pipeline, Step
from nanolapo.reproduce.steps import ROOT, base_step, evaluation_step, override, seed_overrides, training_step, words

METHODS = ROOT / "configs" / "methods"


@dataclass(frozen=True)
class Phase:
    """One training run of a method."""

    script: str = "train_stage1.py"
    config: str = "stage1.yaml"  # of the recipe
    method: str = ""  # file in configs/methods laid over it, without ending
    share: float = 1.0  # of the tokens
    overrides: tuple[str, ...] = ()  # section.key=value


@dataclass(frozen=True)
class Comparison:
    """A recipe's compare.yaml."""

    tokens: int  # sampled by every method
    seeds: tuple[int, ...] = (0, 1, 2)
    prepare: str = ""  # a module that makes the base model from base.yaml; empty: base.yaml names one that exists
    overrides: tuple[str, ...] = ()  # for every training run
    phases: dict[str, Any] | None = (
        None  # method -> its list of Phase, where it is not one run with configs/methods/NAME
    )


def method_names(comparison: Comparison) -> list[str]:
    """All there are: the files of configs/methods and what compare.yaml adds, sorted."""
    return sorted({path.stem for path in METHODS.glob("*.yaml")} | set(comparison.phases or {}))


def phases_of(comparison: Comparison, method: str) -> list[Phase]:
    given = (comparison.phases or {}).get(method)
    if given is None:
        return [Phase(method=method)]
    if not isinstance(given, list) or not given:
        raise UserError(f"phases.{method} in compare.yaml: give a list of phases")
    phases = [build(Phase, item, f"phases.{method}[{i}]") for i, item in enumerate(given)]
    total = sum(phase.share for phase in phases)
    if min(phase.share for phase in phases) <= 0 or abs(total - 1) > 1e-6:
        raise UserError(
            f"phases.{method} in compare.yaml: the shares add up to {total:g}; give positive ones that add up to 1"
        )
    return phases


@dataclass(frozen=True)
class Runner:
    """What the steps of one comparison share."""

    recipe: Path  # folder of the recipe's configs
    comparison: Comparison
    folder: Path  # where everything goes
    launcher: tuple[str, ...]  # in front of a script

    def prepare(self, seed: int) -> Step:
        """Make the base model."""
        overrides = seed_overrides(self.folder, seed)
        return base_step(f"seed{seed}/base", self.comparison.prepare, self.recipe / "base.yaml", overrides)

    def train(self, seed: int, method: str) -> list[Step]:
        """The method's phases, one after the other."""
        steps, needs = list[Step](), (f"seed{seed}/base",) if self.comparison.prepare else ()
        phases = phases_of(self.comparison, method)
        for i, phase in enumerate(phases):
            tokens = round(phase.share * self.comparison.tokens)
            overrides = [f"method={METHODS / phase.method}.yaml"] if phase.method else []
            overrides += [*seed_overrides(self.folder, seed), f"train.sampled_tokens={tokens}"]
            overrides += [override("run.name", method), *self.comparison.overrides, *phase.overrides]
            name = f"seed{seed}/{method}" + (f"/phase{i}" if i < len(phases) - 1 else "")
            path = self.recipe / phase.config
            steps.append(training_step(name, phase.script, path, overrides, needs, self.launcher))
            needs = (name,)
        return steps

    def evaluate(self, seed: int, methods: Sequence[str]) -> Step:
        """One evaluation of the base and all methods; samples that are there are not drawn again."""
        overrides, folder = seed_overrides(self.folder, seed), self.folder / f"seed{seed}"
        base = load_config(self.recipe / "base.yaml", overrides).model.path
        models = [f"base={base}", *(f"{method}={folder / method / 'model'}" for method in methods)]
        overrides += ["run.name=evaluate", override("evaluate.models", models), "evaluate.guidance_factors=[]"]
        needs = [f"seed{seed}/{method}" for method in methods]
        return evaluation_step(f"seed{seed}/evaluate", self.recipe / "evaluate.yaml", overrides, needs, self.launcher)

    def run_dirs(self, seed: int, method: str) -> list[Path]:
        """The run directories of a method's phases."""
        return [step.clear for step in self.train(seed, method) if step.clear]


def make_steps(runner: Runner, seeds: Sequence[int], methods: Sequence[str]) -> list[Step]:
    """Everything, seed by seed, so that a first table is there early."""
    steps = []
    for seed in seeds:
        steps += [runner.prepare(seed)] if runner.comparison.prepare else []
        for method in methods:
            steps += runner.train(seed, method)
        steps.append(runner.evaluate(seed, methods))
    return steps


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, metavar="compare.yaml")
    parser.add_argument("--methods", default="", help="names separated by commas or blanks; default: all")
    parser.add_argument("--seeds", default="", help="numbers separated by commas or blanks; default: those of the file")
    parser.add_argument("--tokens", type=int, help="sampled by every method; default: that of the file")
    parser.add_argument("--jobs", type=int, default=1, help="training runs at a time")
    parser.add_argument("--launcher", default=shlex.quote(sys.executable), help='e.g. "torchrun --nproc_per_node=8"')
    parser.add_argument("--out", type=Path, help="default: runs/compare/RECIPE")
    parser.add_argument("--dry-run", action="store_true", help="check all configs and list the steps")
    return parser.parse_args()


def main() -> None:
    given = parse_arguments()
    comparison = build(Comparison, read_yaml(given.config), "")
    if given.tokens is not None:
        comparison = replace(comparison, tokens=given.tokens)
    if comparison.tokens < 1:
        raise UserError(
            f"tokens={comparison.tokens}: give at least 1; without a limit no two methods would cost the same"
        )
    known, recipe = method_names(comparison), given.config.parent
    methods = words(given.methods) or known
    if wrong := [name for name in methods if name not in known]:
        raise UserError(f"--methods: no {', '.join(wrong)}; there are {', '.join(known)}")
    try:
        seeds = [int(word) for word in words(given.seeds)] or list(comparison.seeds)
    except ValueError:
        raise UserError(f"--seeds {given.seeds!r}: give whole numbers") from None
    folder = given.out or Path("runs") / "compare" / recipe.name
    runner = Runner(recipe, comparison, folder, tuple(shlex.split(given.launcher)))
    pipeline = Pipeline(make_steps(runner, seeds, methods), folder)
    if given.dry_run:
        for name in pipeline.steps:
            print(f"{'done' if pipeline.is_done(name) else 'to do'}  {name}")
        return
    pipeline.run(jobs=given.jobs)
    results = [json.loads((folder / f"seed{seed}" / "evaluate" / "results.json").read_text()) for seed in seeds]
    costs = {method: [runner.run_dirs(seed, method) for seed in seeds] for method in methods}
    rows = summarize_methods(results, costs, unverified(methods))
    write_comparison(folder, rows, comparison.tokens, seeds)
    print((folder / "results.md").read_text(encoding="utf-8"))


def unverified(methods: Sequence[str]) -> set[str]:
    """Methods whose file says that something of them is unverified."""
    found = set()
    for method in methods:
        path = METHODS / f"{method}.yaml"
        if path.exists() and "unverified" in path.read_text(encoding="utf-8").lower():
            found.add(method)
    return found


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    cli.run(main)
