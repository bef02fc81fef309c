"""The steps that comparisons and reproductions are made of: make a base model, train, evaluate; one per script and config.

Configs are read here, before anything runs: a mistake in the last one is known in the first second.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from nanolapo.config_file import load_config
from nanolapo.pipeline import Step, identity

ROOT = Path(__file__).parents[1]  # where the scripts are


def seed_overrides(folder: Path, seed: int) -> list[str]:
    """What tells one seed's runs from another's."""
    return [f"run.dir={folder / f'seed{seed}'}", f"run.seed={seed}"]


def base_step(name: str, module: str, config_path: Path, overrides: Sequence[str]) -> Step:
    """Make the base model with a module that writes model.path: nanolapo.demo or nanolapo.warm_start."""
    config = load_config(config_path, list(overrides))
    command = (sys.executable, "-m", module, str(config_path), *overrides)
    return Step(name, command, identity(module, config), output=Path(config.model.path) / "config.json")


def training_step(
    name: str, script: str, config_path: Path, overrides: Sequence[str], needs: Sequence[str], launcher: Sequence[str]
) -> Step:
    """A training run; it is made anew when its config changes, and resumes when it was interrupted."""
    config = load_config(config_path, list(overrides))
    command = (*launcher, str(ROOT / script), str(config_path), *overrides)
    done = config.run_dir / "model" / "config.json"
    return Step(name, command, identity(script, config), tuple(needs), done, config.run_dir)


def evaluation_step(
    name: str, config_path: Path, overrides: Sequence[str], needs: Sequence[str], launcher: Sequence[str]
) -> Step:
    """An evaluation. Its folder is never cleared: every sample file says in its name what it was sampled with."""
    config = load_config(config_path, list(overrides))
    command = (*launcher, str(ROOT / "evaluate.py"), str(config_path), *overrides)
    return Step(name, command, identity("evaluate.py", config), tuple(needs), config.run_dir / "results.json")


def words(text: str) -> list[str]:
    """Names given on the command line, separated by commas or blanks."""
    return text.replace(",", " ").split()
