"""What holds for every method: the loop does not know it, a YAML reaches it, every recipe takes it, its file stays small.

Run: python -m pytest tests/methods/test_all_methods.py
"""

from __future__ import annotations

import importlib
import inspect
import re
import typing
from pathlib import Path

import pytest
from tiny import make_config

import nanolapo.methods
from nanolapo.config import UserError
from nanolapo.config_file import load_config, read_yaml, validate
from nanolapo.methods import load_method
from nanolapo.methods.base import Method

ROOT = Path(__file__).parents[2]
FILES = sorted(path.stem for path in (ROOT / "nanolapo/methods").glob("*.py"))
HELPERS = {"__init__", "base", "reference", "tools"}  # no methods, but for accuracy-only GRPO in base
YAMLS = sorted((ROOT / "configs/methods").glob("*.yaml"))
RECIPES = sorted(path.parent.name for path in (ROOT / "configs").glob("*/stage1.yaml"))
UNVERIFIED = {"alp", "conciser", "dhpo", "minpro", "palu", "r2vpo"}


def classes(file: str) -> list[str]:
    """The methods that a file defines."""
    module = importlib.import_module(f"nanolapo.methods.{file}")
    found = inspect.getmembers(module, inspect.isclass)
    return [name for name, kind in found if issubclass(kind, Method) and kind.__module__ == module.__name__]


def published_names() -> set[str]:
    """As docs/METHODS.md calls them, in bold before the name of the YAML."""
    page = (ROOT / "docs/METHODS.md").read_text(encoding="utf-8")
    return set(re.findall(r"^- \*\*(.+?)\*\* `", page, re.MULTILINE))


def names_of_methods() -> set[str]:
    """Every spelling by which code could ask for a method. GRPO itself, which is what the loop does, is none."""
    names = {name for file in FILES if file not in HELPERS for name in [file, *classes(file)]}
    names |= {path.stem for path in YAMLS} | published_names()
    return names - {"grpo", "GRPO", "accuracy-only", "Accuracy only"}


@pytest.mark.parametrize("file", ["loop", "sampling", "update", "session"])
def test_no_method_is_named_in_the_loop(file):
    """Not in code, comment or text; `kl-cov` is also found as kl_cov, klcov and KL Cov."""
    text = (ROOT / f"nanolapo/{file}.py").read_text(encoding="utf-8")
    names = names_of_methods()
    assert len(names) > 80, "the list of names is not what it should be"
    for name in sorted(names):
        spelling = r"[\W_]*".join(part for part in re.split(r"[^A-Za-z0-9]+", name) if part)
        found = re.search(rf"(?<![A-Za-z0-9]){spelling}(?![A-Za-z0-9])", text, re.IGNORECASE)
        assert not found, f"nanolapo/{file}.py names {name}: {found}"


def test_every_file_is_reached():
    """By a YAML; LAPO's two classes by the two scripts."""
    named = {load_config(ROOT / "configs/demo/stage1.yaml", [f"method={path}"]).method.name for path in YAMLS}
    for stage in (1, 2):
        script = (ROOT / f"train_stage{stage}.py").read_text()
        named |= {f"lapo:{name}" for name in re.findall(r"from nanolapo.methods.lapo import (\w+)", script)}
    defined = {f"{file}:{name}" for file in FILES if file not in HELPERS - {"base"} for name in classes(file)}
    # What the two stages share, and what LAPO borrows from DLER
    assert named == defined - {"lapo:Lapo", "dler:Optimiser"}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_every_yaml_builds_its_method_on_every_recipe(path, recipe):
    config = load_config(ROOT / f"configs/{recipe}/stage1.yaml", [f"method={path}"])
    validate(config, world_size=4)
    method = load_method(config)
    assert f"{type(method).__module__.split('.')[-1]}:{type(method).__name__}" == config.method.name
    assert set(read_yaml(path)) <= {"method", "loss"}  # data, batch and steps are the recipe's


def test_there_are_recipes_and_methods():
    assert {"demo", "smollm2-135m", "deepscaler-1.5b", "deepseek-r1-1.5b"} <= set(RECIPES) and len(YAMLS) >= 48


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_a_yaml_says_in_its_comment_what_is_unverified(path):
    comment = "".join(line for line in path.read_text().splitlines() if line.startswith("# "))
    assert comment and ("unverified" in comment) == (path.stem in UNVERIFIED)


def built(name: str, *overrides: str) -> Method:
    """The method of this YAML on the demo's recipe."""
    files = [ROOT / "configs/demo/stage1.yaml", ROOT / f"configs/methods/{name}.yaml"]
    return load_method(load_config(files[0], [f"method={files[1]}", "train.batch_size=0", *overrides]))


def number_options() -> list[tuple[str, str, bool]]:
    """(YAML, option, whether it is a list) of every option that is a number or a list of numbers."""
    found = []
    for path in YAMLS:
        for name, hint in typing.get_type_hints(built(path.stem).Options).items():
            if "int" in str(hint) or "float" in str(hint):
                found.append((path.stem, name, "tuple" in str(hint)))
    return found


@pytest.mark.parametrize(("name", "option", "is_list"), number_options())
def test_no_option_takes_a_negative_number(name, option, is_list):
    """None of them means anything there. Most would train the opposite of what is meant, or stop the run at its end."""
    with pytest.raises(UserError, match=rf"^method\.options\.{option}"):
        built(name, f"method.options.{option}={[-1] if is_list else -1}")


IMPOSSIBLE = [  # also: no positive number, a percentage where a share is meant
    *[(name, option, 0) for name, option in [
        ("drpo", "tau"), ("drpo", "length_temperature"), ("train-long-think-short", "decays"),
        ("train-long-think-short", "interval"), ("train-long-think-short", "start_budget"),
        ("train-long-think-short", "final_budget"), ("aepo", "low"), ("aepo", "high"), ("laser", "target"),
        ("laser-d", "interval"), ("laser-d", "monitor_problems"), ("l1-exact", "min_budget"), ("l1-exact", "max_budget"),
        ("dapo", "max_rounds"), ("dler", "max_rounds"), ("conciser", "max_rounds"), ("lapo-dler", "max_rounds"),
        ("hapo-tokens", "cache"), ("da-dler", "short_target"), ("siri", "max_tokens"), ("siri", "min_tokens"),
        ("dot", "spread"), ("dot", "min_cut"), ("gfpo", "k"),
    ]],
    *[(name, option, 80) for name, option in [
        ("palu", "tau"), ("palu", "pass_rate"), ("sas", "share"), ("dler", "cut_reward"), ("hapo-tokens", "quantile"),
        ("kimi-k1.5", "warmup_fraction"), ("conciser", "first_stage"), ("grpo-lambda", "share"), ("grpo-lambda", "weight"),
        ("efficient-reasoning", "weight"), ("aepo", "prompts"), ("l1-max", "max_fraction"), ("l1-max", "delta"),
        ("train-long-think-short", "gamma"), ("spo", "rho"), ("a-dlp", "reference"),
    ]],
    ("palu", "tau", 1.5), ("sas", "share", 1.5), ("thinkprune-iterative", "limits", [50, 0]),
    ("hbpo", "budgets", [0, 10]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "option", "value"), IMPOSSIBLE)
def test_impossible_options_are_refused(name, option, value):
    with pytest.raises(UserError, match=rf"^method\.options\.{option}"):
        built(name, f"method.options.{option}={value}")


TOO_LONG = [  # name, overrides: the demo's limit is 256
    ("l1-exact", ["max_budget=257"]), ("l1-exact", ["min_budget=257"]), ("l1-exact", ["min_budget=9", "max_budget=8"]),
    ("l1-max", ["max_budget=257"]), ("train-long-think-short", ["start_budget=257"]),
    ("train-long-think-short", ["start_budget=99", "final_budget=100"]), ("laser", ["target=100000"]),
    ("laser", ["target=257"]), ("laser-d", ["target=257"]), ("laser-de", ["target=257"]), ("hbpo", ["budgets=[9, 256]"]),
    ("thinkprune-4k", ["limits=[257]"]), ("truncation", ["limits=[257]"]), ("siri", ["max_tokens=257"]),
    ("dler", ["target=257"]), ("da-dler", ["target=257"]), ("da-dler", ["target=99", "short_target=100"]),
    ("dapo", ["cache=257"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), TOO_LONG)
def test_no_budget_is_above_the_runs_limit(name, options):
    """Nothing of that length is ever sampled, so it could not be kept to, and a bonus below it would be for all."""
    with pytest.raises(UserError, match=r"^method\.options\..*rollout\.max_new_tokens=256"):
        built(name, *(f"method.options.{option}" for option in options))


@pytest.mark.parametrize(
    ("name", "option"),
    [("l1-exact", "max_budget=256"), ("laser", "target=256"), ("train-long-think-short", "start_budget=256")],
)
def test_the_limit_itself_may_be_a_budget(name, option):
    assert built(name, f"method.options.{option}").config.rollout.max_new_tokens == 256


UNREAD = [  # name, overrides, the first option that nothing reads beside the others
    ("train-long-think-short", ["final_budget=50", "interval=30"], "interval"),
    ("train-long-think-short", ["final_budget=50", "gamma=0.1"], "gamma"),
    ("train-long-think-short", ["interval=30", "decays=2"], "decays"),
    ("siri", ["period=20", "cycles=2.5"], "cycles"),
    ("alp", ["form=paper", "weight=0.5"], "weight"),
    ("alp", ["beta=1e-3"], "beta"),
    ("dler", ["short_target=20"], "short_target"),
    ("dapo-overlong-filter", ["cache=20"], "cache"),
    ("dapo", ["overlong=none", "cache=20"], "cache"),
    ("hapo-tokens", ["overlong=filter", "cache=20"], "cache"),
    ("gfpo", ["adaptive=true", "k=4"], "k"),
]


@pytest.mark.parametrize(("name", "options", "unread"), UNREAD)
def test_an_option_that_nothing_would_read_is_refused(name, options, unread):
    with pytest.raises(UserError, match=rf"method\.options\.{unread}\b"):
        built(name, *(f"method.options.{option}" for option in options))
    rest = [option for option in options if not option.startswith(unread)]
    built(name, *(f"method.options.{option}" for option in rest))


OWN_FORMULA = {  # their advantage is not (R - mean) / std of a group
    "dler", "da-dler", "lapo-dler", "spo", "o1-pruner", "drpo", "adapt-think", "hapo-tokens", "ddca", "efficient-reasoning",
}  # fmt: skip
ALONE = {"spo", "o1-pruner", "adapt-think"}  # they compare an answer with the problem's past or with the first model


@pytest.mark.parametrize("name", [path.stem for path in YAMLS])
def test_normalize_std_is_refused_exactly_where_nothing_reads_it(name):
    if name not in OWN_FORMULA:
        assert not built(name, "loss.normalize_std=false").config.loss.normalize_std
        return
    with pytest.raises(UserError, match="^loss.normalize_std=false: the advantage of .*; set loss.normalize_std=true$"):
        built(name, "loss.normalize_std=false")


@pytest.mark.parametrize("name", [path.stem for path in YAMLS])
def test_a_group_of_one_is_refused_where_answers_are_compared(name):
    if name in ALONE - {"adapt-think"}:
        assert built(name, "rollout.group_size=1").config.rollout.group_size == 1
        return
    message = "must be even" if name in ALONE else "an advantage compares the answers of a group; use 2 or more$"
    with pytest.raises(UserError, match=f"^rollout.group_size=1: .*{message}"):
        built(name, "rollout.group_size=1")


def test_method_files_stay_small():
    """One sitting each. LAPO is two stages and their readings, base is the hooks."""
    lines = {file: len((ROOT / f"nanolapo/methods/{file}.py").read_text().splitlines()) for file in FILES}
    assert {file for file, count in lines.items() if count > 130} <= {"lapo", "base"}


def test_an_error_inside_a_method_file_is_not_taken_for_a_wrong_name(tmp_path, monkeypatch):
    (tmp_path / "half_written.py").write_text("from nanolapo.methods.tools import as_part\n")
    monkeypatch.setattr(nanolapo.methods, "__path__", [*nanolapo.methods.__path__, str(tmp_path)])
    with pytest.raises(ImportError, match="as_part"):
        load_method(make_config(method={"name": "half_written:Mine"}))
    with pytest.raises(UserError, match="write it as file:Class"):
        load_method(make_config(method={"name": "half_writen:Mine"}))
    for name in ("Laser", "HAPO", "Rollouts", "Hapo.reward", ""):
        with pytest.raises(
            UserError, match=f"hapo:{name}': write it as file:Class; in nanolapo/methods/hapo.py there is Hapo$"
        ):
            load_method(make_config(method={"name": f"hapo:{name}"}))
