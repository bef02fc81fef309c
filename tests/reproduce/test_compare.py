"""make compare: its plan for every method and recipe, its table against numbers made up by hand, and a real small run.

Run: python -m pytest tests/reproduce/test_compare.py
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from round_methods import make_base

from nanolapo.config import UserError
from nanolapo.config_file import build, read_yaml
from nanolapo.evaluation.scores import bootstrap_interval
from nanolapo.reproduce.compare import METHODS, Comparison, Runner, make_steps, method_names, unverified
from nanolapo.reproduce.compare_table import comparison_table, costs, mark_pareto, summarize_methods, write_comparison
from nanolapo.reproduce.over_seeds import mean_row
from nanolapo.reproduce.pipeline import Pipeline
from nanolapo.reproduce.steps import ROOT, base_step, evaluation_step, file_hash, model_hash, training_step

DEMO = ROOT / "configs" / "demo"


def demo_runner(**changes: object) -> Runner:
    comparison = build(Comparison, read_yaml(DEMO / "compare.yaml") | changes, "")
    return Runner(DEMO, comparison, Path("runs/compare/demo"), ("python",))


# ---------------------------------------------------------------------------------------------------------------- the plan


def test_every_method_is_in_and_has_the_same_tokens() -> None:
    """Each file of configs/methods, and LAPO; its phases share out the whole budget, and only that ends a run."""
    runner = demo_runner()
    names = method_names(runner.comparison)
    assert {path.stem for path in METHODS.glob("*.yaml")} | {"lapo", "lapo-d"} == set(names)
    for name in names:
        trainings = [json.loads(step.config)[1]["train"] for step in runner.train(0, name)]
        assert sum(training["sampled_tokens"] for training in trainings) == runner.comparison.tokens, name
        assert all(training["steps"] == 1000 and "match_runs" not in training for training in trainings), name


def test_all_start_from_the_same_base_and_continue_from_their_own() -> None:
    runner = demo_runner()
    for name in method_names(runner.comparison):
        steps = runner.train(1, name)
        paths = [json.loads(step.config)[1]["model"]["path"] for step in steps]
        assert paths[0] == "runs/compare/demo/seed1/base" and steps[0].needs == ("seed1/base",)
        for before, step, path in zip(steps, steps[1:], paths[1:], strict=False):
            assert step.needs == (before.name,) and path == f"{before.clear}/model"
        assert str(steps[-1].clear) == f"runs/compare/demo/seed1/{name}"  # where evaluate looks
    stage2 = json.loads(runner.train(1, "lapo")[1].config)
    assert stage2[0] == "train_stage2.py" and stage2[1]["lapo"]["length_map"].endswith("seed1/stage1/length_map.json")
    assert len({str(step.clear) for name in method_names(runner.comparison) for step in runner.train(0, name)}) == sum(
        len(runner.train(0, name)) for name in method_names(runner.comparison)
    )  # no two runs share a directory


def test_the_evaluation_is_the_same_for_all() -> None:
    step = demo_runner().evaluate(0, ["lapo", "dler"])
    config = json.loads(step.config)[1]
    assert [entry.partition("=")[0] for entry in config["evaluate"]["models"]] == ["base", "lapo", "dler"]
    assert step.needs == ("seed0/lapo", "seed0/dler") and "guidance_factors" not in config["evaluate"]
    assert step.clear is None  # samples are kept when the list of models changes


def test_unknown_method_of_a_phase_and_an_empty_list_are_refused() -> None:
    with pytest.raises(UserError, match=r"nothing\.yaml: no such config file"):
        demo_runner(phases={"x": [{"method": "nothing"}]}).train(0, "x")
    with pytest.raises(UserError, match=r"phases\.x in compare\.yaml: give a list of phases"):
        demo_runner(phases={"x": []}).train(0, "x")
    for shares in ([0.5, 0.6], [1.5, -0.5], [0.3]):
        with pytest.raises(UserError, match=r"phases\.x in compare\.yaml: the shares add up to .*; give positive ones"):
            demo_runner(phases={"x": [{"share": share} for share in shares]}).train(0, "x")
    with pytest.raises(UserError, match=r"unknown key phases\.x\[0\]\.shares; did you mean phases\.x\[0\]\.share"):
        demo_runner(phases={"x": [{"shares": 1}]}).train(0, "x")


def test_folders_and_names_that_yaml_would_read_otherwise(tmp_path: Path) -> None:
    """ "run.dir=out #1/seed0" was "out": the runs of all seeds in one folder, outside of --out."""
    comparison = build(Comparison, read_yaml(DEMO / "compare.yaml") | {"phases": {"on": [{"method": "grpo"}]}}, "")
    for name in ("out #1", "a: b", "[x", "ä 🚀", "0"):
        runner = Runner(DEMO, comparison, tmp_path / name, ("python",))
        for step in (runner.train(1, "on")[0], runner.evaluate(1, ["on"])):
            run = json.loads(step.config)[1]["run"]
            assert run["dir"] == str(tmp_path / name / "seed1") and run["name"] in ("on", "evaluate")
        assert json.loads(step.config)[1]["evaluate"]["models"][1] == f"on={tmp_path}/{name}/seed1/on/model"


def test_unverified_methods_are_marked_from_their_files() -> None:
    found = unverified(method_names(demo_runner().comparison))
    assert {"palu", "r2vpo", "dhpo", "minpro", "conciser", "grpo-lambda"} <= found
    assert not found & {"dler", "l1-exact", "lapo", "accuracy-only"}


# --------------------------------------------------------------------------------------------------------------- the table


def evaluation_row(model: str, accuracy: float, tokens: float, aes: float | None) -> dict[str, object]:
    return {
        "model": model, "set": "demo", "temperature": 0.6, "guidance": "", "accuracy": accuracy, "tokens": tokens,
        "truncated": 0.0, "aes": aes, "accuracy_interval": [accuracy - 0.1, accuracy + 0.1],
        "by_level": {"1": {"accuracy": 1.0, "tokens": tokens / 2}, "10": {"accuracy": 0.5, "tokens": tokens * 2}},
    }  # fmt: skip


def two_seeds() -> list[dict[str, object]]:
    return [
        {"rows": [evaluation_row(*row) for row in rows]}
        for rows in (
            [("base", 0.8, 100, 0.0), ("a", 0.9, 50, 0.9), ("b", 0.7, 60, -0.2)],
            [("base", 0.8, 120, 0.0), ("a", 0.7, 70, -0.2), ("b", 0.7, 40, 0.1)],
        )
    ]


def test_rows_over_seeds_by_hand() -> None:
    rows = summarize_methods(two_seeds(), {}, {"b"})
    assert [r["model"] for r in rows] == ["a", "base", "b"]  # by mean AES: 0.35, 0, -0.05
    a = rows[0]
    assert (a["accuracy"], a["tokens"]) == (pytest.approx(0.8), 60) and a["aes"] == pytest.approx(0.35)
    assert a["accuracy_interval"] == pytest.approx((0.7, 0.9))  # the seeds share their problems
    assert a["by_level"] == {"1": {"accuracy": 1.0, "tokens": 30}, "10": {"accuracy": 0.5, "tokens": 120}}
    assert (a["best"]["tokens"], a["worst"]["tokens"]) == (50, 70) and a["worst"]["accuracy"] == 0.7
    assert [r["unverified"] for r in rows] == [False, False, True]
    text = comparison_table(rows)
    assert "| b (u) \\* |" in text and "| base |" in text and "| a \\* |" in text


def test_the_interval_over_seeds_is_not_narrower_than_that_of_drawing_problems() -> None:
    """Three seeds answer the same 200 problems, and a problem's length is mostly its own: reference is a bootstrap that
    draws each problem with the answers of all seeds."""
    rng = np.random.default_rng(1)
    tokens_SQ = rng.gamma(2.0, 40.0, 200) + rng.normal(0, 5, (3, 200))
    rows = [
        {"set": "s", "temperature": 0.6, "model": "m", "guidance": "", "accuracy": 1.0, "aes": 0.0,
         "tokens": float(tokens_Q.mean()), "tokens_interval": bootstrap_interval(tokens_Q.tolist(), 2000)}
        for tokens_Q in tokens_SQ
    ]  # fmt: skip
    low, high = bootstrap_interval(tokens_SQ.mean(axis=0).tolist(), 2000)
    found = mean_row(rows)["tokens_interval"]
    assert 0.97 < (found[1] - found[0]) / (high - low) < 1.1


def test_pareto_front_by_brute_force() -> None:
    rng = np.random.default_rng(0)
    rows = [{"set": "s", "temperature": 1.0, "accuracy": float(a), "tokens": float(t)}
            for a, t in rng.integers(0, 6, (40, 2))]  # fmt: skip
    mark_pareto(rows)
    for r in rows:
        better = [q for q in rows if (q["accuracy"] > r["accuracy"] and q["tokens"] <= r["tokens"])
                  or (q["accuracy"] == r["accuracy"] and q["tokens"] < r["tokens"])]  # fmt: skip
        assert r["pareto"] == (not better)
    assert 0 < sum(r["pareto"] for r in rows) < len(rows)


def test_a_model_that_is_never_right_comes_last() -> None:
    results = two_seeds()
    results[0]["rows"][1]["aes"] = None  # type: ignore[index]
    rows = summarize_methods(results, {}, set())
    assert rows[-1]["model"] == "a" and rows[-1]["aes"] is None and "| - |" in comparison_table(rows)


def test_costs_add_up_over_phases_and_average_over_seeds(tmp_path: Path) -> None:
    def run(name: str, *sampled: int) -> Path:
        (tmp_path / name).mkdir()
        lines = [{"step": i, "sampled_tokens": n, "trained_tokens": 7 if i else None, "seconds/sample": 1.5,
                  "seconds/update": 0.5} for i, n in enumerate(sampled)]  # fmt: skip
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return tmp_path / name

    seeds = [[run("a", 10, 20, 30), run("b", 5)], [run("c", 11, 25), run("d", 4, 8)]]
    assert costs(seeds) == {"sampled_tokens": (35 + 33) / 2, "trained_tokens": (14 + 14) / 2, "steps": 4, "seconds": 8}
    assert costs([]) == {}


# --------------------------------------------------------------------------------------------------------------- a real run


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of its own, with a random model of 32 dimensions and 8 problems."""
    folder = tmp_path_factory.mktemp("recipe")
    base = make_base(folder / "model")
    (folder / "base.yaml").write_text(
        f"run: {{threads: 1, print_every: 0}}\nmodel: {{path: {base}, dtype: float32}}\nloss: {{kl_coef: 0.0}}\n"
        'prompt: {template: "{question} <think>"}\ndata: {sources: [{name: demo, path: demo, count: 8, seed: 1}]}\n'
        "rollout: {engine: torch, prompts_per_step: 4, group_size: 4, max_prompt_tokens: 128, max_new_tokens: 8}\n"
        "train: {batch_size: 0, warmup_fraction: 0.0, learning_rate: 1e-3}\n"
    )
    (folder / "stage1.yaml").write_text("extends: base.yaml\n")
    (folder / "stage2.yaml").write_text(
        'extends: base.yaml\nmodel: {path: "${run.dir}/stage1/model"}\n'
        'lapo: {length_map: "${run.dir}/stage1/length_map.json"}\n'
    )
    (folder / "evaluate.yaml").write_text(
        "extends: base.yaml\nevaluate: {samples: 2, max_new_tokens: 8, bootstrap: 10, guidance_factors: [2]}\n"
    )
    (folder / "compare.yaml").write_text(
        "tokens: 300\nseeds: [3]\nphases:\n  lapo:\n    - {share: 0.5, overrides: [run.name=stage1]}\n"
        "    - {script: train_stage2.py, config: stage2.yaml, share: 0.5}\n"
    )
    return folder


# -------------------------------------------------------------------------------------------------------- what is an input


def problem_file(path: Path, first: int) -> None:
    rows = [{"problem": f"What is {first + i} + 1?", "answer": str(first + i + 1)} for i in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_problems_and_models_edited_in_place_are_other_inputs(recipe: Path, tmp_path: Path) -> None:
    """The config names the same file, but what is in it has changed: a training on the old one is no longer done."""
    data, model = tmp_path / "mine.jsonl", tmp_path / "model"
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


def test_what_the_steps_make_is_no_such_file() -> None:
    """Steps that name each other's outputs must not change when those appear: their needs stand for them."""
    runner = demo_runner()
    for step in make_steps(runner, [0], method_names(runner.comparison)):
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


def compare(recipe: Path, out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nanolapo.reproduce.compare", str(recipe / "compare.yaml"), "--out", str(out)]
    command += arguments
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)


def test_a_name_that_is_no_formula_can_be_drawn(tmp_path: Path) -> None:
    seeds = [{"rows": [row | {"model": f"{row['model']} $\\bad{{$"} for row in seed["rows"]]} for seed in two_seeds()]
    write_comparison(tmp_path, summarize_methods(seeds, {}, set()), 300, [0, 1])
    assert (tmp_path / "pareto.png").stat().st_size > 5000


@pytest.mark.slow
def test_a_real_comparison_and_its_second_run(recipe: Path, tmp_path: Path) -> None:
    done = compare(recipe, tmp_path, "--methods", "lapo accuracy-only", "--jobs", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    rows = {(r["model"], r["temperature"]): r for r in found["rows"]}
    assert set(rows) == {(m, 0.6) for m in ("base", "lapo", "accuracy-only")} and found["tokens"] == 300
    for model in ("lapo", "accuracy-only"):  # each phase overshoots by at most the last step: 16 answers of 8 tokens
        assert 300 <= rows[model, 0.6]["sampled_tokens"] < 300 + 2 * 128
    assert (tmp_path / "pareto.png").stat().st_size > 5000 and "accuracy-only" in (tmp_path / "results.md").read_text()
    again = compare(recipe, tmp_path, "--methods", "lapo accuracy-only")
    assert again.returncode == 0 and "4 of 4 steps are done already" in again.stdout
    assert "[" not in again.stdout.split("###")[0].replace("are done already", ""), "a step ran again"
    listing = compare(recipe, tmp_path, "--methods", "lapo grpo", "--dry-run").stdout
    assert "done  seed3/lapo\n" in listing and "to do  seed3/grpo\n" in listing


@pytest.mark.slow
def test_bad_arguments_are_one_line(recipe: Path, tmp_path: Path) -> None:
    for arguments, words in [
        (("--methods", "lap"), "--methods: no lap; there are accuracy-only, aepo"),
        (("--seeds", "one"), "--seeds 'one': give whole numbers"),
        (("--jobs", "0"), "--jobs 0: at least 1"),
        (("--tokens", "0"), "tokens=0: give at least 1"),
    ]:
        done = compare(recipe, tmp_path, *arguments)
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
