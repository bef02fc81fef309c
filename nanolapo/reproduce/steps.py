"""The steps that comparisons and reproductions are made of: make a base model, train, evaluate; one per script and config.

Configs are read here, before anything runs: a mistake in the last one is known in the first second.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path

from nanolapo.config import Config
from nanolapo.config_file import load_config
from nanolapo.evaluation.scores import model_identity
from nanolapo.reproduce.pipeline import Step, identity

ROOT = Path(__file__).parents[2]  # where the scripts are


def seed_overrides(folder: Path, seed: int) -> list[str]:
    """What tells one seed's runs from another's."""
    return [override("run.dir", str(folder / f"seed{seed}")), f"run.seed={seed}"]


def override(key: str, value: object) -> str:
    """section.key=value for any value: a path such as "out #1" or a name such as "on" is more than text to YAML.

    >>> override("run.dir", "out #1")
    'run.dir="out #1"'
    """
    return f"{key}={json.dumps(value, ensure_ascii=False)}"


def base_step(name: str, module: str, config_path: Path, overrides: Sequence[str]) -> Step:
    """Make the base model with a module that writes model.path: nanolapo.demo.pretrain or nanolapo.demo.warm_start.

    Those keep a model that is there. So the folder is cleared when the config has changed, if it lies in run.dir; one that
    recipes or seeds share has to be removed by hand.
    """
    config = load_config(config_path, list(overrides))
    command, path = (sys.executable, "-m", module, str(config_path), *overrides), Path(config.model.path)
    clear = path if path.is_relative_to(config.run.dir) else None
    return Step(name, command, identity(module, config), output=path / "config.json", clear=clear)


def training_step(
    name: str, script: str, config_path: Path, overrides: Sequence[str], needs: Sequence[str], launcher: Sequence[str]
) -> Step:
    """A training run; it is made anew when its config changes, and resumes when it was interrupted."""
    config = load_config(config_path, list(overrides))
    command = (*launcher, str(ROOT / script), str(config_path), *overrides)
    done = config.run_dir / "model" / "config.json"
    return Step(name, command, identity(script, config) + contents(config), tuple(needs), done, config.run_dir)


def evaluation_step(
    name: str, config_path: Path, overrides: Sequence[str], needs: Sequence[str], launcher: Sequence[str]
) -> Step:
    """An evaluation. Its folder is never cleared: every sample file says in its name what it was sampled with."""
    config = load_config(config_path, list(overrides))
    command = (*launcher, str(ROOT / "evaluate.py"), str(config_path), *overrides)
    inputs = identity("evaluate.py", config) + contents(config)
    return Step(name, command, inputs, tuple(needs), config.run_dir / "results.json")


def contents(config: Config) -> str:
    """Hashes of the local files that the config names and no step makes, problems and models, as JSON; "" without any. So a
    file that was edited in place is another input."""
    sources = {source.path for source in (*config.data.sources, *config.data.exclude) if source.path.endswith(".jsonl")}
    models = {config.model.path, *(entry.partition("=")[2] for entry in config.evaluate.models)}
    made_here = Path(config.run.dir)
    hashes = {path: file_hash(path) for path in sources if Path(path).is_file()}
    hashes |= {path: model_hash(path) for path in models if path and not Path(path).is_relative_to(made_here)
               and Path(path).is_dir()}  # fmt: skip
    return json.dumps(hashes, sort_keys=True) if hashes else ""


@cache  # a comparison asks once for each of its steps
def file_hash(path: str) -> str:
    return sha256(Path(path).read_bytes()).hexdigest()


@cache
def model_hash(path: str) -> str:
    return model_identity(path)


def words(text: str) -> list[str]:
    """Names given on the command line, separated by commas or blanks."""
    return text.replace(",", " ").split()
