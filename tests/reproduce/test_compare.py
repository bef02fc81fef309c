"""make compare: its runs for every method, what counts as an input of a step, what it refuses (table: test_comparison.py).

Run: python -m pytest tests/reproduce/test_compare.py
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import yaml
from small_recipe import run_recipe, write_recipe

from nanolapo.config import UserError
from nanolapo.config_file import load_config
from nanolapo.reproduce.pipeline import Pipeline
from nanolapo.reproduce.recipe import METHODS, Recipe, Run
from nanolapo.reproduce.reproduce import unverified
from nanolapo.reproduce.steps import ROOT, base_step, evaluation_step, file_hash, model_hash, training_step

DEMO = ROOT / "configs" / "demo"


def demo(*methods: str, folder: Path = Path("runs/compare/demo")) -> Recipe:
    return Recipe(DEMO / "compare.yaml", folder, ["python"], methods=methods)


def trainings(recipe: Recipe, seed: int, method: str) -> list:
    """The steps of a method's runs, in their order."""
    return [recipe.training_step(seed, name, recipe.runs[name]) for name in recipe.phases(method)]


# ---------------------------------------------------------------------------------------------------------------- the runs


def test_every_method_is_in_and_has_the_same_tokens() -> None:
    """Each file of configs/methods, LAPO, and controls; the runs share out the whole budget, and only that ends them."""
    recipe = demo()
    others = {"lapo-d", "lapo-d-continued", "lapo-d-limit", "lapo-i", "grpo-lapo-limit", "sequence-mean"}
    assert {path.stem for path in METHODS.glob("*.yaml")} | others == set(recipe.methods)
    for name in recipe.methods:
        configs = [json.loads(step.config)[1]["train"] for step in trainings(recipe, 0, name)]
        assert sum(config["sampled_tokens"] for config in configs) == recipe.tokens == 750_000, name
        assert all(config["steps"] == 1000 for config in configs), name


def test_all_start_from_the_same_base_and_continue_from_their_own() -> None:
    recipe = demo()
    for name in recipe.methods:
        steps = trainings(recipe, 1, name)
        paths = [json.loads(step.config)[1]["model"]["path"] for step in steps]
        assert paths[0] == "runs/compare/demo/seed1/base" and steps[0].needs == ("seed1/base",)
        for before, step, path in zip(steps, steps[1:], paths[1:], strict=False):
            assert step.needs == ("seed1/base", before.name) and path == f"{before.clear}/model"
        assert str(steps[-1].clear) == f"runs/compare/demo/seed1/{name}"  # where evaluate looks
    stage2 = json.loads(trainings(recipe, 1, "lapo-i")[1].config)
    assert stage2[0] == "train_stage2.py" and stage2[1]["lapo"]["length_map"].endswith("seed1/stage1/length_map.json")
    folders = {name: str(step.clear) for method in recipe.methods for name, step in
               zip(recipe.phases(method), trainings(recipe, 0, method), strict=True)}  # fmt: skip
    assert set(folders) == set(recipe.runs) and len(set(folders.values())) == len(folders)  # no two share a directory
    methods = {name: run.method for name, run in recipe.runs.items() if run.method != name}
    assert methods == dict.fromkeys(["lapo-d", "stage1", "lapo-i", "lapo-d-continued", "lapo-d-limit"], "") | {
        "da-dler-start": "dler",
        "grpo-lapo-limit": "accuracy-only",
        "l1-max-start": "l1-exact",
        "sequence-mean": "accuracy-only",
    }


def test_lapo_and_plain_grpo_meet_under_the_limit_of_lapos_paper() -> None:
    """4,096 tokens on a base with 6,229 are 65.8 on ours with 100. Nothing else differs from the rows that cut nothing."""
    recipe = demo()
    for name, free in (("grpo-lapo-limit", "accuracy-only"), ("lapo-d-limit", "lapo-d")):
        [[script, config], [other_script, other]] = (
            json.loads(trainings(recipe, 0, row)[0].config) for row in (name, free)
        )
        assert config["rollout"].pop("max_new_tokens") == round(4096 / 6229 * other["rollout"]["base_tokens"]) == 66
        assert other["rollout"].pop("max_new_tokens") == 256 and script == other_script
        for one in (config, other):
            del one["run"]
        assert config == other


def test_the_second_base_goes_on_from_the_demos() -> None:
    """The mixture and the start are of the base alone; the runs only know its mean length."""
    recipe = Recipe(DEMO / "compare_too_long.yaml", Path("runs/long"), ["python"], methods=["lapo-d", "truncation"])
    base = load_config(Path(recipe.base_step(3).command[3]), list(recipe.base_step(3).command[4:]))
    assert base.demo.start == "runs/demo/seed3/base" and base.model.path == "runs/long/seed3/base"
    assert (base.demo.mixture, base.demo.steps) == ("too-long", 300)
    for method in recipe.methods:
        [step] = trainings(recipe, 3, method)
        assert "demo" not in json.loads(step.config)[1] and step.needs == ("seed3/base",)
        assert json.loads(step.config)[1]["rollout"]["base_tokens"] == 155


def test_the_evaluation_is_the_same_for_all() -> None:
    recipe = demo("lapo-i", "dler")
    [step] = [recipe.evaluation_step(0, name, one) for name, one in recipe.evaluations.items()]
    config = json.loads(step.config)[1]
    assert [entry.partition("=")[0] for entry in config["evaluate"]["models"]] == ["base", "lapo-i", "dler"]
    assert step.needs == ("seed0/base", "seed0/lapo-i", "seed0/dler") and "guidance_factors" not in config["evaluate"]
    assert step.clear is None  # samples are kept when the list of models changes
    names = recipe.pipeline([0]).closure(recipe.wanted("", [0]))
    assert names == [f"seed0/{name}" for name in ("base", "scores/base", "stage1", "lapo-i", "scores/lapo-i", "dler",
                                                  "scores/dler")]  # fmt: skip


def test_unknown_methods_and_shares_that_do_not_add_up_are_refused(tmp_path: Path) -> None:
    (tmp_path / "stage1.yaml").write_text(f"extends: {DEMO / 'stage1.yaml'}\n")

    def recipe(**runs: object) -> Recipe:
        file = {"tokens": 300, "evaluations": {"evaluate": {}}, "runs": runs}
        (tmp_path / "compare.yaml").write_text(yaml.safe_dump(file, sort_keys=False))
        return Recipe(tmp_path / "compare.yaml", tmp_path, ["python"])

    with pytest.raises(UserError, match=r"nothing\.yaml: no such config file"):
        trainings(recipe(x={"method": "nothing"}), 0, "x")
    for runs in ({"x": {"after": "y"}}, {"x": {"after": "x"}}, {"x": {"after": "y"}, "y": {"after": "x"}}):
        with pytest.raises(UserError, match=r"runs\.x\.after: no run before it is called [xy]"):
            recipe(**runs).phases("x")
    for first, last in ([0.5, 0.6], [1.5, -0.5], [0.3, 0.3]):
        with pytest.raises(
            UserError, match=r"runs\.x in compare\.yaml: the shares of y, x add up to .*; give positive"
        ):
            recipe(y={"share": first}, x={"share": last, "after": "y"})
    with pytest.raises(UserError, match=r"unknown key runs\.x\.shares; did you mean runs\.x\.share"):
        recipe(x={"shares": 1})


def test_folders_and_names_that_yaml_would_read_otherwise(tmp_path: Path) -> None:
    """ "run.dir=out #1/seed0" was "out": the runs of all seeds in one folder, outside of --out."""
    for name in ("out #1", "a: b", "[x", "ä 🚀", "0"):
        recipe = demo("grpo", folder=tmp_path / name)
        evaluate = recipe.evaluation_step(1, "evaluate", recipe.evaluations["evaluate"])
        for step in (recipe.training_step(1, "on", Run()), evaluate):
            run = json.loads(step.config)[1]["run"]
            assert run["dir"] == str(tmp_path / name / "seed1") and run["name"] in ("on", "evaluate")
        assert json.loads(step.config)[1]["evaluate"]["models"][1] == f"grpo={tmp_path}/{name}/seed1/grpo/model"


def test_unverified_methods_are_marked_from_their_files() -> None:
    found = unverified(demo().methods)
    assert {"palu", "r2vpo", "dhpo", "minpro", "conciser"} <= found
    assert not found & {"dler", "l1-exact", "lapo-i", "accuracy-only"}


# --------------------------------------------------------------------------------------------------------------- a real run


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


# -------------------------------------------------------------------------------------------------------- what is an input


def problem_file(path: Path, first: int) -> None:
    rows = [{"problem": f"What is {first + i} + 1?", "answer": str(first + i + 1)} for i in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_problems_and_models_edited_in_place_are_other_inputs(recipe: Path, tmp_path: Path, ending: str) -> None:
    """The config names the same file, but what is in it has changed: a training on the old one is no longer done."""
    data, model = tmp_path / f"mine.{ending}", tmp_path / "model"
    overrides = [f"data.sources=[{{name: mine, path: '{data}'}}]", f"model.path={model}", f"run.dir={tmp_path}/runs"]

    def inputs() -> tuple[str, str]:
        file_hash.cache_clear()
        model_hash.cache_clear()
        train = training_step("a", "train_stage1.py", recipe / "stage1.yaml", overrides, (), ("python",))
        return train.config, evaluation_step("b", recipe / "evaluate.yaml", overrides, (), ("python",)).config

    missing = inputs()
    problem_file(data, 1)
    some = inputs()
    problem_file(data, 2)
    other = inputs()
    (model).mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    with_model = inputs()
    (model / "model.safetensors").write_bytes(b"others!")
    for before, after in itertools.pairwise((missing, some, other, with_model, inputs())):
        assert before[0] != after[0] and before[1] != after[1]
    assert all(inputs() == inputs() for _ in range(2))


def test_a_base_outside_the_runs_is_no_other_input_once_it_is_made(recipe: Path, tmp_path: Path) -> None:
    """Seeds may share a base. It is not there yet when the first command plans its steps, and all that it trained would be
    deleted by the next one."""
    for file in recipe.glob("*.yaml"):
        (tmp_path / file.name).write_text(file.read_text())
    shared = tmp_path / "shared"
    base = yaml.safe_load((tmp_path / "base.yaml").read_text())
    base["model"]["path"] = str(shared)
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    with (tmp_path / "compare.yaml").open("a") as file:
        file.write("prepare: nanolapo.demo.pretrain\n")

    def configs() -> dict[str, str]:
        model_hash.cache_clear()
        one = Recipe(tmp_path / "compare.yaml", tmp_path / "out", ["python"], methods=["grpo"])
        return {name: step.config for name, step in one.pipeline([0]).steps.items()}

    before = configs()
    shared.mkdir()
    (shared / "model.safetensors").write_bytes(b"weights")
    assert configs() == before


def test_what_the_steps_make_is_no_such_file() -> None:
    """Steps that name each other's outputs must not change when those appear: their needs stand for them."""
    for step in demo().steps(0):
        json.loads(step.config)  # one JSON value: nothing of files behind it


@pytest.mark.slow
def test_a_base_model_of_another_config_is_made_anew(recipe: Path, tmp_path: Path) -> None:
    """warm_start keeps a model that is there. The pipeline took that for the new config's."""

    def base(steps: int) -> bytes:
        overrides = [f"run.dir={tmp_path}/runs", "model.path=${run.dir}/warm", f"warm_start.model={recipe}/model",
                     f"warm_start.steps={steps}", "warm_start.batch_tokens=200"]  # fmt: skip
        step = base_step("base", "nanolapo.demo.warm_start", recipe / "base.yaml", overrides)
        Pipeline([step], tmp_path, lambda line: None).run()
        return (tmp_path / "runs/warm/model.safetensors").read_bytes()

    first = base(1)
    assert base(1) == first != base(2)


@pytest.mark.slow
def test_bad_arguments_are_one_line(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in [
        (("--methods", "lap"), "--methods: no lap; there are a-dlp, accuracy-only"),
        (("--seeds", "one"), "--seeds 'one': give whole numbers"),
        (("--jobs", "0"), "--jobs 0: at least 1"),
        (("--tokens", "0"), "tokens=0: give at least 1"),
    ]:
        with pytest.raises(SystemExit, match="2"):
            run_recipe(recipe / "compare.yaml", tmp_path, *arguments)
        assert words in (err := capsys.readouterr().err) and err.count("\n") == 1
