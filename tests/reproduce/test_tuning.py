"""The choice of a setting: which one wins, what is kept, and that every setting of the demo is one that its method can run.

Run: python -m pytest tests/reproduce/test_tuning.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from small_recipe import write_recipe

from nanolapo import cli
from nanolapo.config import UserError
from nanolapo.config_file import load_config
from nanolapo.methods import load_method
from nanolapo.provenance import provenance
from nanolapo.reproduce import tuning
from nanolapo.reproduce.recipe import MOST_SETTINGS, Recipe
from nanolapo.reproduce.records import Record, read
from nanolapo.reproduce.steps import ROOT

DEMO = ROOT / "configs" / "demo"
TUNINGS = ["tuning", "tuning_too_long"]


def small(folder: Path, settings: dict[str, object], **keys: object) -> Path:
    """A comparison of the small recipe with these settings."""
    path = write_recipe(folder) / "tuning.yaml"
    keys = {"extends": "compare.yaml", "seeds": [9], "chosen": "chosen.yaml", "settings": settings} | keys
    path.write_text(yaml.safe_dump(keys, sort_keys=False))
    return path


# ------------------------------------------------------------------------------------------------------ the demo's settings


@pytest.mark.parametrize("name", TUNINGS)
def test_every_setting_of_the_demo_can_run_and_differs_from_the_others(name: str) -> None:
    path, seen = DEMO / f"{name}.yaml", dict[str, list[str]]()
    for k in range(MOST_SETTINGS):
        recipe = Recipe(path, Path("runs/tuning"), ["python"], setting=k)
        for method in recipe.methods:
            step = recipe.training_step(100, method, recipe.runs[method])
            seen.setdefault(method, []).append(step.config)
            for phase in recipe.phases(method):
                config = load_config(recipe.configs / recipe.runs[phase].config, phase_overrides(recipe, phase))
                if config.method.name:
                    load_method(config)
    assert len(seen) >= 30 and list(recipe.file.settings["dler"]) == ["published", "limit 0.8", "limit 1.28"]
    for method, configs in seen.items():
        assert len(set(configs)) == len(configs), f"{method}: two settings are the same"


def phase_overrides(recipe: Recipe, phase: str) -> list[str]:
    return list(recipe.training_step(100, phase, recipe.runs[phase]).command[3:])


def test_the_published_setting_comes_first_and_is_scaled_by_the_bases_length() -> None:
    settings = yaml.safe_load((DEMO / "settings.yaml").read_text())["settings"]
    assert all(next(iter(mine)) == "published" for mine in settings.values())
    for name, base in (("tuning", 100), ("tuning_too_long", 155)):
        recipe = Recipe(DEMO / f"{name}.yaml", Path("runs/tuning"), ["python"], setting=0)
        config = json.loads(recipe.training_step(100, "dler", recipe.runs["dler"]).config)[1]
        assert config["rollout"]["max_new_tokens"] == round(0.49 * base)
        for phase in ("da-dler-start", "da-dler"):  # both phases have the setting of the method
            config = json.loads(recipe.training_step(100, phase, recipe.runs[phase]).config)[1]
            assert config["rollout"]["max_new_tokens"] == round(0.49 * base)
        names = ("base", "grpo-lapo-limit", "lapo-d-limit", "da-dler-start")  # for the table's column
        assert [recipe.setting_of(name) for name in names] == ["", "", "published", "published"]
        config = json.loads(recipe.training_step(100, "lapo-d", recipe.runs["lapo-d"]).config)[1]
        assert not {"decay", "sigma"} & set(config.get("lapo", {}))  # null: scaled by the base


def test_seeds_and_problems_of_the_tuning_are_its_own() -> None:
    tune, compare = (
        Recipe(DEMO / f"{name}.yaml", Path("r"), ["python"], None, ["dler"]) for name in ("tuning", "compare")
    )
    assert not set(tune.file.seeds) & set(compare.file.seeds)

    def sources(recipe: Recipe) -> tuple[list, list]:
        [evaluation] = recipe.evaluations.values()
        data = load_config(recipe.configs / evaluation.config).data
        return [s.seed for s in data.sources], [s.seed for s in data.exclude]

    assert sources(compare)[0] == [2] and sources(tune) == ([3], [1, 2])


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lpao": {"published": []}}, r"settings\.lpao of .*: give a method 1 to 3 settings"),
        ({"grpo": {}}, r"settings\.grpo of"),
        ({"grpo": dict.fromkeys("abcd", [])}, r"settings\.grpo of"),
        ({"grpo": []}, r"settings\.grpo of"),
    ],
)
def test_settings_that_do_not_fit(tmp_path: Path, settings: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Recipe(small(tmp_path, settings), tmp_path, ["python"])


def test_a_choice_that_is_no_setting_any_more(tmp_path: Path) -> None:
    path = small(tmp_path, {"grpo": {"published": []}})
    (tmp_path / "chosen.yaml").write_text("grpo: {setting: double}\n")
    with pytest.raises(UserError, match=r"chosen\.yaml: grpo has no setting 'double' any more; run .*tuning again"):
        Recipe(path, tmp_path, ["python"])
    for broken in ("grpo: foo", "grpo:", "grpo: {}", "grpo: {setting: null}", "grpo: {setting: [1]}"):
        (tmp_path / "chosen.yaml").write_text(broken + "\n")
        with pytest.raises(UserError, match=r"chosen\.yaml: grpo has no setting"):
            Recipe(path, tmp_path, ["python"])


def test_without_a_choice_the_runs_are_as_the_recipe_has_them(tmp_path: Path) -> None:
    """make demo in a fresh clone gives the numbers that it always gave."""
    path = small(tmp_path, {"grpo": {"published": ["loss.kl_coef=0.5"], "other": ["loss.kl_coef=0.25"]}})

    def kl() -> float:
        recipe = Recipe(path, tmp_path, ["python"])
        return load_config(tmp_path / "stage1.yaml", phase_overrides(recipe, "grpo")).loss.kl_coef

    assert kl() == 0.04
    (tmp_path / "chosen.yaml").write_text("grpo: {setting: other}\n")
    assert kl() == 0.25
    (tmp_path / "demo.yaml").write_text("extends: compare.yaml\nchosen: ''\n")
    demo = Recipe(tmp_path / "demo.yaml", tmp_path, ["python"])
    assert "loss.kl_coef=0.25" not in phase_overrides(demo, "grpo") and demo.chosen == {}


# ---------------------------------------------------------------------------------------------------------- the choice


def test_the_best_aes_wins_the_published_one_wins_a_tie_and_others_stay(tmp_path: Path) -> None:
    three: dict[str, list] = {"published": [], "half": [], "double": []}
    path = small(tmp_path, {"grpo": three, "laser": three, "spo": three, "hapo": {"published": []}})
    (tmp_path / "chosen.yaml").write_text("spo: {setting: half}\n")
    recipe = Recipe(path, tmp_path, ["python"])
    found = {
        "grpo": {"published": 0.2, "half": 0.5, "double": 0.5},
        "laser": {"published": None, "half": None, "double": None},  # a base without an AES
        "spo": {"published": 1.0},  # the others failed
    }
    tuning.write_choices(path, recipe, {name: results(**scores) for name, scores in found.items()})
    chosen = yaml.safe_load((tmp_path / "chosen.yaml").read_text())
    assert {name: one["setting"] for name, one in chosen.items()} == {
        "grpo": "half", "laser": "published", "spo": "half", "hapo": "published"
    }  # fmt: skip
    assert chosen["grpo"]["aes"] == found["grpo"] and set(chosen["laser"]["aes"].values()) == {None}
    assert "on seed 9" in (tmp_path / "chosen.yaml").read_text()


def test_a_method_without_settings_any_more_loses_its_choice(tmp_path: Path) -> None:
    """Recipe refuses a choice that is no setting, and says: run tuning again."""
    path = small(tmp_path, {"grpo": {"published": []}})
    recipe = Recipe(path, tmp_path, ["python"])
    (tmp_path / "chosen.yaml").write_text("spo: {setting: half}\n")
    tuning.write_choices(path, recipe, {})
    assert yaml.safe_load((tmp_path / "chosen.yaml").read_text()) == {"grpo": {"setting": "published"}}
    assert Recipe(path, tmp_path, ["python"]).chosen == {"grpo": "published"}


def test_a_method_with_one_setting_needs_no_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = small(tmp_path, {"grpo": {"published": [], "other": []}, "hapo": {"published": []}})
    monkeypatch.setattr(sys, "argv", ["tuning", str(path), "--out", str(tmp_path / "out"), "--methods", "hapo"])
    tuning.main()
    assert yaml.safe_load((tmp_path / "chosen.yaml").read_text()) == {"hapo": {"setting": "published"}}
    assert not (tmp_path / "out").exists()


def test_settings_that_started_from_two_bases_are_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same answers have another AES against another base, so the second setting may be the better one."""
    path = small(tmp_path, {name: {"published": [], "half": []} for name in ("grpo", "laser")})
    (tmp_path / "chosen.yaml").write_text("laser: {setting: half}\n")
    mixed = results(published=0.3) | results("another", half=0.2)
    tuning.write_choices(
        path, Recipe(path, tmp_path, ["python"]), {"grpo": results(published=0.1, half=0.2), "laser": mixed}
    )
    chosen = yaml.safe_load((tmp_path / "chosen.yaml").read_text())
    assert chosen["grpo"]["setting"] == "half" and chosen["laser"] == {"setting": "half"}
    assert capsys.readouterr().out.startswith("laser: no new choice: its settings started from several base models")


def results(base: str = "one", **scores: float | None) -> dict[str, list[Record]]:
    return {name: [Record("m", 9, "d", base, name, {}, [{"row": {"aes": aes}}])] for name, aes in scores.items()}


@pytest.mark.slow
def test_a_real_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"grpo": {"published": [], "other": ["train.learning_rate=0.5"]}, "hapo": {"published": []}}
    (tmp_path / "configs").mkdir()
    path = small(tmp_path / "configs", settings)
    monkeypatch.setattr(sys, "argv", ["tuning", str(path), "--out", str(tmp_path / "out"), "--jobs", "2"])
    cli.run(tuning.main)
    chosen = yaml.safe_load((tmp_path / "configs/chosen.yaml").read_text())
    scores = {}
    for k, name in enumerate(settings["grpo"]):
        [one] = read(tmp_path / f"out/records/setting{k}", "grpo")
        assert (one.setting, one.seed, one.commit) == (name, 9, provenance()["git"])
        scores[name] = one.scores[0]["row"]["aes"]
    best = max(scores, key=lambda name: scores[name] if scores[name] is not None else -1.0)
    assert chosen["hapo"] == {"setting": "published"} and chosen["grpo"]["setting"] == best
    assert not (tmp_path / "out/records/setting0/hapo.jsonl").exists()  # nothing to choose: not trained
    assert capsys.readouterr().out.count("seed9/grpo: ") == 2
