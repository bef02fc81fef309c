"""The pipeline's steps: one for each script with a config. A step is done again when its config or its files change."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from nanolapo.config import Config, SourceConfig
from nanolapo.config_file import load_config
from nanolapo.losses import load_loss
from nanolapo.provenance import model_identity
from nanolapo.reproduce.pipeline import Step

ROOT = Path(__file__).parents[2]  # where the scripts are


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
    name: str,
    script: str,
    config_path: Path,
    overrides: Sequence[str],
    needs: Sequence[str],
    launcher: Sequence[str],
    base: str = "",
) -> Step:
    """A training run. It is repeated when its config changes, and resumes when it was interrupted.

    base: see hashes_of_files.
    """
    config = load_config(config_path, list(overrides))
    load_loss(config)  # a mistake in loss.* shows here, before anything runs
    command = (*launcher, str(ROOT / script), str(config_path), *overrides)
    done = config.run_dir / "model" / "config.json"
    inputs = identity(script, config) + hashes_of_files(config, base)
    return Step(name, command, inputs, tuple(needs), done, config.run_dir)


def evaluation_step(
    name: str,
    config_path: Path,
    overrides: Sequence[str],
    needs: Sequence[str],
    launcher: Sequence[str],
    base: str = "",
) -> Step:
    """An evaluation. Its folder is never cleared: every sample file says in its name what it was sampled with."""
    config = load_config(config_path, list(overrides))
    command = (*launcher, str(ROOT / "evaluate.py"), str(config_path), *overrides)
    inputs = identity("evaluate.py", config) + hashes_of_files(config, base)
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


def hashes_of_files(config: Config, base: str) -> str:
    """Hashes, as JSON, of the local problems and models that the config names and no step makes; "" without any. So a file
    that was edited in place counts as another input. base: the model of a base step, which may lie outside run.dir."""
    sources = {source.path for source in (*config.data.sources, *config.data.exclude)}
    models = {config.model.path, *(entry.partition("=")[2] for entry in config.evaluate.models)}
    made_here = Path(config.run.dir)
    hashes = {path: file_hash(path) for path in sources if Path(path).is_file()}
    hashes |= {path: model_hash(path) for path in models if path not in ("", base) and Path(path).is_dir()
               and not Path(path).is_relative_to(made_here)}  # fmt: skip
    return json.dumps(hashes, sort_keys=True) if hashes else ""


@cache  # a recipe asks once for each of its steps
def file_hash(path: str) -> str:
    return sha256(Path(path).read_bytes()).hexdigest()


model_hash = cache(model_identity)
