"""A recipe: which base model, trainings and evaluations its tables need, and the pipeline steps that make them.

There are two kinds of recipe. A configs/*/reproduce.yaml makes the paper's tables. A configs/*/compare.yaml has `tokens`:
every method of configs/methods is trained from one base until it has sampled that many tokens. All get the same evaluation.

All configs are read while the steps are made, so a mistake in the last one shows in the first second.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from nanolapo.config import Config, SourceConfig, UserError
from nanolapo.config_file import build, load_config, read_yaml
from nanolapo.evaluation.scores import model_identity
from nanolapo.losses import load_loss
from nanolapo.reproduce.pipeline import Pipeline, Step

ROOT = Path(__file__).parents[2]  # where the scripts are
METHODS = ROOT / "configs" / "methods"


@dataclass(frozen=True)
class Run:
    """One training. Its name in the recipe is the name of its run directory."""

    script: str = "train_stage1.py"
    config: str = "stage1.yaml"  # of the recipe
    method: str = ""  # a file of configs/methods, without its ending, that is laid over the config
    after: tuple[str, ...] = ()  # runs that it starts from
    share: float = 1.0  # of Recipe.tokens; a run and all that it comes after share them out
    overrides: tuple[str, ...] = ()  # section.key=value


@dataclass(frozen=True)
class Evaluation:
    """One call of evaluate.py."""

    config: str = "evaluate.yaml"
    models: dict[str, Any] = field(default_factory=dict)  # label -> run, run/folder, or base; the first is AES' base
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """A table of the paper, and which of our models stands for each of its rows."""

    number: int
    evaluations: tuple[str, ...]
    rows: dict[str, Any] = field(default_factory=dict)  # the paper's name of a row -> our label


@dataclass(frozen=True)
class RecipeFile:
    """The keys of a recipe's YAML file."""

    paper_base: str = "B"  # A or B: the paper's base model that this recipe is compared with
    runs: dict[str, Any] = field(default_factory=dict)
    evaluations: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    prepare: str = ""  # a module, with its options, that makes the base model from base.yaml; empty: there is one
    hardware: str = ""  # what it needs; empty: any machine
    tokens: int | None = None  # given: a comparison, in which every method samples so many, in all its runs together
    overrides: tuple[str, ...] = ()  # for every training


class Recipe:
    """A recipe that has been read and checked. Every step and file of it lies in `folder`."""

    def __init__(
        self,
        path: Path,
        folder: Path,
        launcher: Sequence[str],
        tokens: int | None = None,
        methods: Sequence[str] = (),
    ) -> None:
        """launcher: what stands before a script in a command. tokens, methods: of a comparison, in place of the file's."""
        self.configs, self.folder, self.launcher = path.parent, folder, tuple(launcher)
        self.file = build(RecipeFile, read_yaml(path), "")
        self.runs: dict[str, Run] = self.parts(Run, "runs")
        self.evaluations: dict[str, Evaluation] = self.parts(Evaluation, "evaluations")
        self.tables: dict[str, Table] = self.parts(Table, "tables")
        self.tokens, self.methods = (self.file.tokens or 0) if tokens is None else tokens, list[str]()
        if self.file.tokens is not None:
            self.compare(path, methods)
        elif methods or tokens is not None:
            raise UserError(f"{path} is no comparison: --methods and --tokens go with a compare.yaml")
        elif not self.tables:
            raise UserError(f"{path}: a recipe has tables, a comparison has tokens; this file has neither")
        for name, table in self.tables.items():
            if missing := [e for e in table.evaluations if e not in self.evaluations]:
                raise UserError(f"tables.{name} of {path}: no evaluation is called {', '.join(missing)}")

    def parts(self, kind: type, section: str) -> dict[str, Any]:
        found = getattr(self.file, section).items()
        return {name: build(kind, value or {}, f"{section}.{name}") for name, value in found}

    def compare(self, path: Path, methods: Sequence[str]) -> None:
        """Add a run for each file of configs/methods that has none, and choose which methods are evaluated."""
        if self.tokens < 1:
            raise UserError(
                f"tokens={self.tokens}: give at least 1; without a limit no two methods would cost the same"
            )
        self.runs |= {p.stem: Run(method=p.stem) for p in sorted(METHODS.glob("*.yaml")) if p.stem not in self.runs}
        others = {other for run in self.runs.values() for other in run.after}
        known = sorted(set(self.runs) - others)  # a run that another one comes after is only a phase of that method
        if wrong := [name for name in methods if name not in known]:
            raise UserError(f"--methods: no {', '.join(wrong)}; there are {', '.join(known)}")
        self.methods = list(methods) or known
        for name in self.methods:
            shares = [self.runs[phase].share for phase in self.phases(name)]
            if min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
                raise UserError(
                    f"runs.{name} in {path.name}: the shares of {', '.join(self.phases(name))} add up to {sum(shares):g}; "
                    "give positive ones that add up to 1"
                )

    def phases(self, name: str) -> list[str]:
        """The runs that make one method, in their order: those that the run comes after, and itself."""
        after, before_it = self.runs[name].after, list(self.runs)[: list(self.runs).index(name)]
        if wrong := [other for other in after if other not in before_it]:
            raise UserError(f"runs.{name}.after: no run before it is called {', '.join(wrong)}")
        return [*(phase for other in after for phase in self.phases(other)), name]

    def run_dir(self, seed: int, name: str) -> Path:
        return self.folder / f"seed{seed}" / name

    def runs_of(self, evaluation: str, seed: int) -> dict[str, Path]:
        """Run directories that an evaluation's models come from: label -> directory."""
        places = {label: str(place).partition("/")[0] for label, place in self.evaluations[evaluation].models.items()}
        return {label: self.run_dir(seed, run) for label, run in places.items() if run in self.runs}

    def seed_overrides(self, seed: int) -> list[str]:
        """What tells one seed's runs from another's."""
        return [override("run.dir", str(self.folder / f"seed{seed}")), f"run.seed={seed}"]

    def base_model(self, seed: int) -> str:
        return load_config(self.configs / "base.yaml", self.seed_overrides(seed)).model.path

    def steps(self, seed: int) -> list[Step]:
        """Base, trainings and evaluations of one seed."""
        made = [self.base_step(seed)] if self.file.prepare else []
        made += [self.training_step(seed, name, run) for name, run in self.runs.items()]
        return made + [self.evaluation_step(seed, name, one) for name, one in self.evaluations.items()]

    def base_step(self, seed: int) -> Step:
        module, *options = self.file.prepare.split()
        return base_step(f"seed{seed}/base", module, self.configs / "base.yaml", self.seed_overrides(seed), options)

    def training_step(self, seed: int, name: str, run: Run) -> Step:
        overrides = [f"method={METHODS / run.method}.yaml"] if run.method else []
        overrides += self.seed_overrides(seed)
        if self.tokens:
            overrides.append(f"train.sampled_tokens={round(run.share * self.tokens)}")
        overrides += [override("run.name", name), *self.file.overrides, *run.overrides]
        needs = [*(["base"] if self.file.prepare else []), *run.after]
        needs = [f"seed{seed}/{need}" for need in needs]
        return training_step(
            f"seed{seed}/{name}", run.script, self.configs / run.config, overrides, needs, self.launcher
        )

    def evaluation_step(self, seed: int, name: str, evaluation: Evaluation) -> Step:
        base = self.base_model(seed)
        models, needs = [], ["base"] if self.file.prepare else []
        for label, place in (evaluation.models or {name: name for name in ("base", *self.methods)}).items():
            run, _, rest = str(place).partition("/")
            if run not in {"base", *self.runs}:
                raise UserError(f"evaluations.{name}.models.{label}: no run is called {run}")
            models.append(f"{label}={base if run == 'base' else self.run_dir(seed, run) / (rest or 'model')}")
            needs += [run] if run != "base" and run not in needs else []
        overrides = [*self.seed_overrides(seed), override("run.name", name), override("evaluate.models", models)]
        overrides += [override("evaluate.samples_dir", str(self.run_dir(seed, "samples"))), *evaluation.overrides]
        needs = [f"seed{seed}/{need}" for need in needs]
        return evaluation_step(f"seed{seed}/{name}", self.configs / evaluation.config, overrides, needs, self.launcher)

    def pipeline(self, seeds: Sequence[int]) -> Pipeline:
        """Seed by seed, so that a first table is there early."""
        return Pipeline([step for seed in seeds for step in self.steps(seed)], self.folder)

    def wanted(self, step: str, seeds: Sequence[int]) -> list[str]:
        """Names of the pipeline's steps that --step asks for: a table, a run, an evaluation. By default everything."""
        known = [*(["base"] if self.file.prepare else []), *self.runs, *self.evaluations]
        if step and step not in known and step not in self.tables:
            raise UserError(f"--step {step}: there are {', '.join([*self.tables, *known])}")
        parts = self.tables[step].evaluations if step in self.tables else [step] if step else known
        if self.methods and not step:
            parts = list(self.evaluations)  # with --methods not every run is wanted
        return [f"seed{seed}/{part}" for seed in seeds for part in parts]


# ------------------------------------------------------------------------------------- one step per script and config


def override(key: str, value: object) -> str:
    """section.key=value for any value: a path such as "out #1" or a name such as "on" is more than text to YAML.

    >>> override("run.dir", "out #1")
    'run.dir="out #1"'
    """
    return f"{key}={json.dumps(value, ensure_ascii=False)}"


def base_step(name: str, module: str, config_path: Path, overrides: Sequence[str], options: Sequence[str] = ()) -> Step:
    """Make the base model with a module that writes model.path, such as nanolapo.demo.pretrain or nanolapo.demo.warm_start.

    Those keep a model that is there. So the folder is cleared when the config has changed, if it lies in run.dir. A folder
    that recipes or seeds share has to be removed by hand.
    """
    config = load_config(config_path, list(overrides))
    command, path = (sys.executable, "-m", module, str(config_path), *options, *overrides), Path(config.model.path)
    clear = path if path.is_relative_to(config.run.dir) else None
    return Step(name, command, identity(" ".join([module, *options]), config), output=path / "config.json", clear=clear)


def training_step(
    name: str, script: str, config_path: Path, overrides: Sequence[str], needs: Sequence[str], launcher: Sequence[str]
) -> Step:
    """A training run. It is repeated when its config changes, and resumes when it was interrupted."""
    config = load_config(config_path, list(overrides))
    load_loss(config)  # a mistake in loss.* shows here, before anything runs
    command = (*launcher, str(ROOT / script), str(config_path), *overrides)
    done = config.run_dir / "model" / "config.json"
    return Step(name, command, identity(script, config) + hashes_of_files(config), tuple(needs), done, config.run_dir)


def evaluation_step(
    name: str, config_path: Path, overrides: Sequence[str], needs: Sequence[str], launcher: Sequence[str]
) -> Step:
    """An evaluation. Its folder is never cleared: every sample file says in its name what it was sampled with."""
    config = load_config(config_path, list(overrides))
    command = (*launcher, str(ROOT / "evaluate.py"), str(config_path), *overrides)
    inputs = identity("evaluate.py", config) + hashes_of_files(config)
    return Step(name, command, inputs, tuple(needs), config.run_dir / "results.json")


def identity(script: str, config: Config) -> str:
    """Step.config for a script that reads a Config. Keys at their defaults are left out, so that a key which a later
    version adds does not make everything anew."""
    return json.dumps([script, changed(config, Config())], sort_keys=True, default=str)


def changed(value: Any, default: Any) -> Any:
    """What differs from `default`, as plain values: of a dataclass the fields that differ, of anything else all of it."""
    if isinstance(value, tuple):
        return [changed(item, None) for item in value]
    if not dataclasses.is_dataclass(value):
        return value
    if isinstance(value, SourceConfig):
        default = SourceConfig("", "")
    pairs = {f.name: (getattr(value, f.name), getattr(default, f.name)) for f in dataclasses.fields(value)}
    return {name: changed(mine, other) for name, (mine, other) in pairs.items() if mine != other}


def hashes_of_files(config: Config) -> str:
    """Hashes, as JSON, of the local problems and models that the config names and no step makes; "" without any. So a file
    that was edited in place counts as another input."""
    sources = {source.path for source in (*config.data.sources, *config.data.exclude) if source.path.endswith(".jsonl")}
    models = {config.model.path, *(entry.partition("=")[2] for entry in config.evaluate.models)}
    made_here = Path(config.run.dir)
    hashes = {path: file_hash(path) for path in sources if Path(path).is_file()}
    hashes |= {path: model_hash(path) for path in models if path and not Path(path).is_relative_to(made_here)
               and Path(path).is_dir()}  # fmt: skip
    return json.dumps(hashes, sort_keys=True) if hashes else ""


@cache  # a recipe asks once for each of its steps
def file_hash(path: str) -> str:
    return sha256(Path(path).read_bytes()).hexdigest()


@cache
def model_hash(path: str) -> str:
    return model_identity(path)
