"""Chooses each method's setting before a comparison, by AES, on a seed and on problems that the comparison does not use.

    python -m nanolapo.reproduce.tuning configs/demo/tuning.yaml [--methods "laser dler"] [--jobs 2]

Every method trains once with each of its settings (`settings` in the recipe, three at most), for as many tokens as in the
comparison. The best AES at the evaluation's first temperature wins; the published setting wins a tie. The choices are
written to the file that the recipe's key `chosen` names, which belongs into the repository. The command resumes as the
comparison does: what has a record is not trained again. docs/PROTOCOL.md says what this is for.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml

from nanolapo import cli
from nanolapo.config import RunStopped, UserError
from nanolapo.config_file import read_yaml
from nanolapo.reproduce import records
from nanolapo.reproduce.over_seeds import none_first
from nanolapo.reproduce.recipe import MOST_SETTINGS, Recipe, words
from nanolapo.reproduce.records import Record
from nanolapo.reproduce.reproduce import train_missing

HEAD = "# Written by `python -m nanolapo.reproduce.tuning {}`: the setting of the highest AES, on seed {}.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, metavar="tuning.yaml")
    parser.add_argument("--methods", default="", help="separated by commas or blanks; default: all that have settings")
    parser.add_argument("--jobs", type=int, default=1, help="steps at a time")
    parser.add_argument("--launcher", default=shlex.quote(sys.executable))
    parser.add_argument("--out", type=Path, help="default: runs/tuning/RECIPE")
    parser.add_argument("--records", type=Path, help="folder of the records; default: records in --out")
    given = parser.parse_args()
    folder = given.out or Path("runs") / given.config.stem / given.config.parent.name
    recipes = []
    for k in range(MOST_SETTINGS):
        there = Recipe(given.config, folder / f"setting{k}", shlex.split(given.launcher), None, words(given.methods), k)
        there.methods = there.scored = [name for name in there.methods if len(there.file.settings[name]) > 1]
        recipes.append(there)
    if not recipes[0].file.chosen:
        raise UserError(f"{given.config} has no key `chosen`: it names the file, beside this one, for the choices")
    found, failed = records_of_settings(recipes, given.records or folder / "records", given.jobs)
    print(f"wrote {write_choices(given.config, recipes[0], found)}")
    if failed:
        raise failed[0]


Found = dict[str, dict[str, list[Record]]]  # method -> setting -> one record a seed


def records_of_settings(recipes: Sequence[Recipe], folder: Path, jobs: int) -> tuple[Found, list[RunStopped]]:
    """Train what has no record. Returns the records, and what failed."""
    found: Found = {}
    failed = list[RunStopped]()
    for recipe in recipes:
        if not recipe.methods:  # none has so many settings: no base is needed
            continue
        seeds, here = list(recipe.file.seeds), folder / recipe.folder.name
        pipeline = recipe.pipeline(seeds)
        try:
            train_missing(recipe, pipeline, here, seeds, jobs)
        except RunStopped as error:
            failed.append(error)
        for name in recipe.methods:
            mine = records.valid(recipe, pipeline, here, name, seeds)
            if len(mine) == len(seeds):
                found.setdefault(name, {})[recipe.chosen[name]] = list(mine.values())
    return found, failed


def mean_aes(seeds: Sequence[Record]) -> float:
    return float(np.mean([none_first(one.scores[0]["row"]["aes"]) for one in seeds]))


def write_choices(config: Path, recipe: Recipe, found: Found) -> Path:
    """Put the choices of the methods whose settings are all there beside those of earlier calls."""
    path = config.parent / recipe.file.chosen
    before = read_yaml(path) if path.exists() else {}
    chosen = {name: choice for name, choice in before.items() if name in recipe.file.settings}
    for name, settings in recipe.file.settings.items():
        mine = found.get(name, {})
        scores = {setting: mean_aes(seeds) for setting, seeds in mine.items()}
        if records.of_other_bases(mine):  # the AES of two bases cannot be compared
            print(f"{name}: no new choice: its settings started from several base models; delete the older records")
        elif list(scores) == list(settings):
            best = max(scores, key=lambda setting: scores[setting])  # the first of equal ones
            shown = {setting: round(score, 4) if np.isfinite(score) else None for setting, score in scores.items()}
            chosen[name] = {"setting": best, "aes": shown}  # null: the base is never right
        elif len(settings) == 1:
            chosen[name] = {"setting": next(iter(settings))}
        elif scores:
            print(f"{name}: no choice without {', '.join(setting for setting in settings if setting not in scores)}")
    text = HEAD.format(config, ", ".join(map(str, recipe.file.seeds)))
    path.write_text(text + yaml.safe_dump(chosen, default_flow_style=None, width=120), encoding="utf-8")
    return path


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    cli.run(main)
