"""A recipe: which base model, trainings and evaluations its tables need, and the pipeline steps that make them.

There are two kinds of recipe. A configs/*/reproduce.yaml makes the paper's tables. A configs/*/compare.yaml has `tokens`:
every method of configs/methods is trained from one base until it has sampled that many tokens, in the setting that
tuning.py chose. Each is evaluated by itself, so that one that fails stops no other. docs/PROTOCOL.md says what is fair.

All configs are read while the steps are made, so a mistake in the last one shows before the first run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from nanolapo.config import UserError
from nanolapo.config_file import build, load_config, read_yaml
from nanolapo.reproduce.pipeline import Pipeline, Step
from nanolapo.reproduce.steps import ROOT, base_step, evaluation_step, override, training_step

METHODS = ROOT / "configs" / "methods"
MOST_SETTINGS = 3  # that a method may choose from
IN_BASES = re.compile(r"(?<![\w./])([\d.]+)([*/])base\b")


@dataclass(frozen=True)
class Run:
    """One training. Its name in the recipe is the name of its run directory."""

    script: str = "train_stage1.py"
    config: str = "stage1.yaml"  # of the recipe
    method: str = ""  # a file of configs/methods, without its ending, that is laid over the config
    after: tuple[str, ...] = ()  # runs that it starts from
    share: float = 1.0  # of Recipe.tokens; a run and all that it comes after share them out
    overrides: tuple[str, ...] = ()  # section.key=value; 0.64*base stands for that part of rollout.base_tokens
    tuned_as: str = ""  # a phase that gets the setting of this method


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
    # of a comparison: method -> name -> overrides; published first
    settings: dict[str, Any] = field(default_factory=dict)
    chosen: str = ""  # a file beside this one that tuning.py writes: method -> setting; without it the runs as they are


class Recipe:
    """A recipe that has been read and checked. Every step and file of it lies in `folder`."""

    def __init__(
        self,
        path: Path,
        folder: Path,
        launcher: Sequence[str],
        tokens: int | None = None,
        methods: Sequence[str] = (),
        setting: int | None = None,
    ) -> None:
        """launcher: what stands before a script in a command. tokens, methods: of a comparison, in place of the file's.
        setting: train, of the methods that have so many settings, this one (from 0), in place of what was chosen."""
        self.configs, self.folder, self.launcher = path.parent, folder, tuple(launcher)
        self.file = build(RecipeFile, read_yaml(path), "")
        self.runs: dict[str, Run] = self.parts(Run, "runs")
        self.evaluations: dict[str, Evaluation] = self.parts(Evaluation, "evaluations")
        self.tables: dict[str, Table] = self.parts(Table, "tables")
        self.tokens = (self.file.tokens or 0) if tokens is None else tokens
        # of a comparison: all methods, those to train, those with an evaluation of their own
        self.known, self.methods, self.scored = list[str](), list[str](), list[str]()
        self.chosen, self.base_models = dict[str, str](), dict[int, str]()
        if self.file.tokens is not None:
            self.compare(path, methods)
            self.choose(path, setting)
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
        self.known, self.methods = known, list(methods) or known
        self.scored = self.methods
        if len(self.evaluations) != 1:
            raise UserError(f"evaluations of {path}: a comparison has one, for all methods")
        for name in self.methods:
            shares = [self.runs[phase].share for phase in self.phases(name)]
            if min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
                raise UserError(
                    f"runs.{name} in {path.name}: the shares of {', '.join(self.phases(name))} add up to {sum(shares):g}; "
                    "give positive ones that add up to 1"
                )

    def choose(self, path: Path, setting: int | None) -> None:
        """Find the setting of each method. Raises UserError for settings that do not fit their method."""
        for name, settings in self.file.settings.items():
            if name not in self.known or not isinstance(settings, dict) or not 0 < len(settings) <= MOST_SETTINGS:
                raise UserError(
                    f"settings.{name} of {path}: give a method 1 to {MOST_SETTINGS} settings, each a name and overrides"
                )
        if setting is not None:
            self.chosen = {m: list(found)[setting] for m, found in self.file.settings.items() if len(found) > setting}
            self.methods = self.scored = [name for name in self.methods if name in self.chosen]
        elif self.file.chosen and (file := path.parent / self.file.chosen).exists():
            for method, found in read_yaml(file).items():
                chosen = found.get("setting") if isinstance(found, dict) else found
                if chosen not in list(self.file.settings.get(method, {})):
                    raise UserError(
                        f"{file}: {method} has no setting {chosen!r} any more; run nanolapo.reproduce.tuning again"
                    )
                self.chosen[method] = str(chosen)

    def setting_of(self, name: str) -> str:
        """The name of a run's setting; empty for the base, and for a run that is as the recipe has it."""
        return self.chosen.get(self.runs[name].tuned_as or name, "") if name in self.runs else ""

    def overrides(self, name: str, run: Run) -> list[str]:
        """Those of the recipe, the run and its setting, with the base's length filled in."""
        chosen = self.setting_of(name)
        setting = self.file.settings[run.tuned_as or name][chosen] if chosen else ()
        given = [*self.file.overrides, *run.overrides, *setting]
        if not any(map(IN_BASES.search, given)):
            return given
        base = load_config(self.configs / run.config, list(self.file.overrides)).rollout.base_tokens
        return [in_tokens(text, base) for text in given]

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
        if seed not in self.base_models:
            self.base_models[seed] = load_config(self.configs / "base.yaml", self.seed_overrides(seed)).model.path
        return self.base_models[seed]

    def made_base(self, seed: int) -> str:
        """The base model if a step makes it, else nothing."""
        return self.base_model(seed) if self.file.prepare else ""

    def steps(self, seed: int) -> list[Step]:
        """Base, trainings and evaluations of one seed. A method of a comparison is evaluated as soon as it is trained."""
        made = [self.base_step(seed)] if self.file.prepare else []
        made += [self.score_step(seed, "base")] if self.known else []
        for name, run in self.runs.items():
            made.append(self.training_step(seed, name, run))
            made += [self.score_step(seed, name)] if name in self.scored else []
        return made + [self.evaluation_step(seed, name, one) for name, one in self.evaluations.items()]

    def score_step(self, seed: int, method: str) -> Step:
        """The evaluation of one method beside the base. That of the base comes first, so that no two sample it at once."""
        [evaluation] = self.evaluations.values()
        alone = replace(evaluation, models={name: name for name in dict.fromkeys(("base", method))})
        step = self.evaluation_step(seed, f"scores/{method}", alone)
        return replace(step, needs=(*step.needs, f"seed{seed}/scores/base")) if method != "base" else step

    def base_step(self, seed: int) -> Step:
        module, *options = self.file.prepare.split()
        return base_step(f"seed{seed}/base", module, self.configs / "base.yaml", self.seed_overrides(seed), options)

    def training_step(self, seed: int, name: str, run: Run) -> Step:
        overrides = [f"method={METHODS / run.method}.yaml"] if run.method else []
        overrides += self.seed_overrides(seed)
        if self.tokens:
            overrides.append(f"train.sampled_tokens={round(run.share * self.tokens)}")
        overrides += [override("run.name", name), *self.overrides(name, run)]
        needs = [*(["base"] if self.file.prepare else []), *run.after]
        needs = [f"seed{seed}/{need}" for need in needs]
        return training_step(f"seed{seed}/{name}", run.script, self.configs / run.config, overrides, needs, self.launcher,
                             self.made_base(seed))  # fmt: skip

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
        return evaluation_step(f"seed{seed}/{name}", self.configs / evaluation.config, overrides, needs, self.launcher,
                               self.made_base(seed))  # fmt: skip

    def pipeline(self, seeds: Sequence[int]) -> Pipeline:
        """Seed by seed, so that a first table is there early."""
        return Pipeline([step for seed in seeds for step in self.steps(seed)], self.folder)

    def digest(self, pipeline: Pipeline, step: str) -> str:
        """Return a digest of the configs of a step and of all that it needs, but for the folder. It does not see the code,
        the packages, the number of ranks and the base's weights (a record has these apart)."""
        begin = re.escape(json.dumps(str(self.folder / "seed"))[1:-1])
        path = re.compile(rf'(?<=["=]){begin}(?=\d)')  # only where a path begins: "demo" is a word of the configs, too
        configs = [path.sub("/seed", pipeline.steps[name].config) for name in pipeline.closure([step])]
        return sha256("\0".join(configs).encode()).hexdigest()[:16]

    def wanted(self, step: str, seeds: Sequence[int]) -> list[str]:
        """Names of the pipeline's steps that --step asks for: a table, a run, an evaluation. By default everything."""
        known = [*(["base"] if self.file.prepare else []), *self.runs, *self.evaluations]
        if step and step not in known and step not in self.tables:
            raise UserError(f"--step {step}: there are {', '.join([*self.tables, *known])}")
        if self.known and not step:
            alone = [(seed, name) for seed in seeds for name in ("base", *self.methods)]
            return [f"seed{seed}/scores/{name}" for seed, name in alone]
        parts = self.tables[step].evaluations if step in self.tables else [step] if step else known
        return [f"seed{seed}/{part}" for seed in seeds for part in parts]


def in_tokens(text: str, base: float) -> str:
    """An override with lengths given in bases: 0.64*base is a number of tokens, 2/base a price per token.

    >>> in_tokens("method.options.limits=[0.64*base, 1.28*base]", 155), in_tokens("method.options.beta=8/base", 100)
    ('method.options.limits=[99, 198]', 'method.options.beta=0.08')
    >>> in_tokens("model.path=runs/seed0/base", 100)
    'model.path=runs/seed0/base'
    """
    return IN_BASES.sub(
        lambda m: str(max(1, round(float(m[1]) * base))) if m[2] == "*" else f"{float(m[1]) / base:g}", text
    )


def words(text: str) -> list[str]:
    """Names given on the command line, separated by commas or blanks."""
    return text.replace(",", " ").split()
