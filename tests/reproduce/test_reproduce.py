"""make reproduce: which steps a table needs, what it refuses, and a real small run whose tables come from its files alone.

Run: python -m pytest tests/reproduce/test_reproduce.py
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from round_methods import make_base

from nanolapo.config import UserError
from nanolapo.reproduce.forecast import show_plan
from nanolapo.reproduce.paper import paper_tables
from nanolapo.reproduce.pipeline import Pipeline
from nanolapo.reproduce.reproduce import Runner, write_outputs
from nanolapo.reproduce.steps import ROOT

RECIPES = [path.parent.name for path in sorted((ROOT / "configs").glob("*/reproduce.yaml"))]


def runner_of(recipe: str) -> Runner:
    return Runner(ROOT / "configs" / recipe / "reproduce.yaml", Path("runs/reproduce") / recipe, ["python"])


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_whole(recipe: str) -> None:
    """All configs load, every run that a model comes from is there before it, every row is one of the paper's and is
    filled by a model of its evaluations, and the base is the first model of each."""
    runner = runner_of(recipe)
    pipeline = Pipeline(runner.steps(0), Path("unused"))
    for name, table in runner.tables.items():
        printed = [row for row in paper_tables()[table.number].rows if row.base == runner.recipe.paper_base]
        names = {row.name for row in printed} | {"Base"}
        assert set(table.rows) <= names, name
        labels = [label for evaluation in table.evaluations for label in runner.evaluations[evaluation].models]
        assert {label.partition(", told")[0] for label in table.rows.values()} <= set(labels), name
        for step in runner.wanted(name, [0]):
            assert set(pipeline.steps[step].needs) <= set(pipeline.closure([step]))
    for evaluation in runner.evaluations.values():
        assert next(iter(evaluation.models)) == "base"
    folders = [step.clear for step in pipeline.steps.values() if step.clear]
    assert len(set(folders)) == len(folders)  # no two runs share a directory


def test_a_table_needs_its_own_runs_only() -> None:
    runner = runner_of("demo")
    pipeline = Pipeline(runner.steps(0) + runner.steps(1), Path("unused"))
    needed = pipeline.closure(runner.wanted("table3", [1]))
    assert {name.removeprefix("seed1/") for name in needed} == {
        "base", "stage1", "stage2", "mean", "minimum", "statistic"
    }  # fmt: skip
    with pytest.raises(UserError, match="--step table9: there are table1, table2"):
        runner.wanted("table9", [0])


def test_ablations_change_their_key_and_nothing_else() -> None:
    """Stage 2 of Table 2 differs in lapo.guidance alone, of Table 3 in the statistic, of Table 6 in the data."""
    configs = {step.name: json.loads(step.config)[1] for step in runner_of("demo").steps(0) if step.clear}
    reference = configs["seed0/stage2"]
    for name in ("range", "outside", "implicit"):
        other = configs[f"seed0/{name}"]
        assert other["lapo"] == reference["lapo"] | {"guidance": name}
        same = [key for key in reference if key not in ("lapo", "run")]
        assert [other[key] for key in same] == [reference[key] for key in same]
    for name in ("mean", "minimum"):
        other = configs[f"seed0/{name}"]
        assert other["lapo"] == reference["lapo"] | {"statistic": name}
        assert other["model"] == reference["model"]  # the one stage 1: what it rewards does not depend on the statistic
    for name in ("short", "long"):
        first, second = configs[f"seed0/stage1_{name}"], configs[f"seed0/stage2_{name}"]
        assert first["data"] == second["data"] != reference["data"]
        assert second["train"] == reference["train"] and second["model"]["path"].endswith(f"seed0/stage1_{name}/model")
        assert second["lapo"]["length_map"].endswith(f"seed0/stage1_{name}/length_map.json")


# ------------------------------------------------------------------------------------------------------------ a real run

BASE = """
run: {{threads: 1, print_every: 0}}
model: {{path: {base}, dtype: float32}}
loss: {{kl_coef: 0.0}}
prompt: {{template: "{{question}} <think>"}}
data: {{sources: [{{name: demo, path: demo, count: 8, seed: 1}}]}}
rollout: {{engine: torch, prompts_per_step: 4, group_size: 4, max_prompt_tokens: 128, max_new_tokens: 8}}
train: {{batch_size: 0, warmup_fraction: 0.0, learning_rate: 1e-3, steps: 2}}
"""
REPRODUCE = """
paper_base: B
seeds: [1, 2]
runs:
  stage1: {overrides: [run.export_every=1]}
  stage2: {script: train_stage2.py, config: stage2.yaml, after: [stage1]}
evaluations:
  main: {models: {base: base, D: stage1, I: stage2}}
  dynamics: {models: {base: base, D: stage1/models}}
tables:
  table1: {number: 1, evaluations: [main], rows: {Base: base, +LAPO-D: D, +LAPO-I: I}}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "base.yaml").write_text(BASE.format(base=make_base(folder / "model")))
    (folder / "stage1.yaml").write_text("extends: base.yaml\n")
    (folder / "stage2.yaml").write_text(
        'extends: base.yaml\nmodel: {path: "${run.dir}/stage1/model"}\n'
        'lapo: {length_map: "${run.dir}/stage1/length_map.json"}\n'
    )
    (folder / "evaluate.yaml").write_text(
        "extends: base.yaml\nevaluate: {samples: 2, max_new_tokens: 8, bootstrap: 10}\n"
    )
    (folder / "reproduce.yaml").write_text(REPRODUCE)
    return folder


def reproduce(recipe: Path, out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "nanolapo.reproduce.reproduce",
        str(recipe / "reproduce.yaml"),
        "--out",
        str(out),
        *arguments,
    ]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)


@pytest.mark.slow
def test_a_real_reproduction_and_its_second_run(recipe: Path, tmp_path: Path) -> None:
    done = reproduce(recipe, tmp_path, "--jobs", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    tables = json.loads((tmp_path / "tables.json").read_text())["tables"]
    rows = {row["model"]: row for row in tables[0]["rows"]}
    measured = [json.loads((tmp_path / f"seed{seed}" / "main" / "results.json").read_text())["rows"] for seed in (1, 2)]
    for name, label in {"Base": "base", "+LAPO-D": "D", "+LAPO-I": "I"}.items():
        tokens = [row["tokens"] for one in measured for row in one if row["model"] == label]
        assert rows[name]["tokens"] == pytest.approx(sum(tokens) / 2) and rows[name]["samples"] == 2 * 16
    assert rows["+Acc-Only"].get("tokens") is None and rows["+Acc-Only"]["paper_tokens"] > 0
    assert (tmp_path / "figures" / "main" / "training.png").exists() and (tmp_path / "tables.tex").exists()
    steps = [row["model"] for row in json.loads((tmp_path / "seed1" / "dynamics" / "results.json").read_text())["rows"]]
    assert steps == ["base", "D step 1", "D step 2"]
    base = [path.name for path in (tmp_path / "seed1" / "samples").glob("base--*")]  # in both evaluations, sampled once
    assert len(base) == 1 and len((tmp_path / "seed1" / "samples" / base[0]).read_text().splitlines()) == 16
    again = reproduce(recipe, tmp_path, "--seeds", "1")
    assert again.returncode == 0 and "4 of 4 steps are done already" in again.stdout

    # Tables are made from the files alone: another number in a results.json is another number in the table.
    path = tmp_path / "seed1" / "main" / "results.json"
    changed = json.loads(path.read_text())
    changed["rows"][-1]["tokens"] += 100
    path.write_text(json.dumps(changed))
    write_outputs(Runner(recipe / "reproduce.yaml", tmp_path, ["python"]), [1, 2])
    table = json.loads((tmp_path / "tables.json").read_text())["tables"][0]
    rows_now = {row["model"]: row for row in table["rows"]}
    assert rows_now["+LAPO-I"]["tokens"] == pytest.approx(rows["+LAPO-I"]["tokens"] + 50)


def test_a_result_of_another_config_is_left_out(recipe: Path, tmp_path: Path) -> None:
    """Its models have to be trained again: beside the new results of another table it would contradict them. Files and
    stamps are those of three evaluated seeds; the stage 1 of the second was another one, that of the third did not end."""
    runner = Runner(recipe / "reproduce.yaml", tmp_path, ["python"])
    pipeline = Pipeline([step for seed in (1, 2, 3) for step in runner.steps(seed)], tmp_path)
    for name, step in pipeline.steps.items():
        assert step.output is not None
        step.output.parent.mkdir(parents=True, exist_ok=True)
        rows = [evaluated(model, 10.0 * int(name[4])) for model in ("base", "D", "I")]
        step.output.write_text(json.dumps({"rows": rows}))
        pipeline.write_stamp(name, name != "seed3/stage1", 1.0)
    stamp = tmp_path / "steps" / "seed2-stage1.json"
    stamp.write_text(json.dumps(json.loads(stamp.read_text()) | {"digest": "of another config"}))
    write_outputs(runner, [1, 2, 3])
    table = json.loads((tmp_path / "tables.json").read_text())["tables"][0]
    assert table["notes"][-1] == "Ours: main, seeds 1."
    assert {row["tokens"] for row in table["rows"] if row["ours"]} == {10.0}


def evaluated(model: str, tokens: float) -> dict[str, object]:
    row = {"model": model, "set": "demo", "temperature": 0.6, "guidance": "", "accuracy": 0.5, "tokens": tokens}
    return row | {"truncated": 0.0, "aes": 0.0, "tokens_correct": tokens, "problems": 8, "samples": 16, "by_level": {}}


@pytest.mark.slow
def test_refusals_are_one_line(recipe: Path, tmp_path: Path) -> None:
    (recipe / "gpu.yaml").write_text(REPRODUCE + 'hardware: "8 GPUs of 80 GB"\n')
    command = [sys.executable, "-m", "nanolapo.reproduce.reproduce", str(recipe / "gpu.yaml"), "--out", str(tmp_path)]
    gpu = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60,
                         env={"CUDA_VISIBLE_DEVICES": "", "PATH": ""})  # fmt: skip
    assert gpu.returncode == 2 and "needs 8 GPUs of 80 GB" in gpu.stderr and "make demo" in gpu.stderr
    assert gpu.stderr.count("\n") == 1
    wrong = reproduce(recipe, tmp_path, "--step", "tabel1")
    assert wrong.returncode == 2 and "--step tabel1: there are table1, stage1, stage2, main, dynamics" in wrong.stderr


@pytest.mark.parametrize(
    ("recipe", "machine"), [("deepscaler-1.5b", "4xA100-80GB"), ("deepseek-r1-1.5b", "8xH200-141GB")]
)
def test_the_plan_of_a_paper_recipe(recipe: str, machine: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Tokens by hand: steps x rollouts x the paper's mean length for a training, answers x length for an evaluation; hours
    of all GPUs are hours times their number; the last line is the sum."""
    runner = runner_of(recipe)
    pipeline = Pipeline(runner.steps(0), Path("unused"))
    base = (
        "agentica-org/DeepScaleR-1.5B-Preview"
        if recipe == "deepscaler-1.5b"
        else "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
    )
    show_plan(pipeline, list(pipeline.steps), 1, base, runner.recipe.paper_base, machine)
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    rows = {line[0]: [float(cell.replace(",", "")) if cell.strip() else 0.0 for cell in line[1:]] for line in lines[2:]}
    mean = {"B": (3280 + 2365) / 2, "A": (4031 + 2566) / 2}[runner.recipe.paper_base]
    assert rows["seed0/stage1"][0] == pytest.approx(234 * 1024 * mean / 1e6, abs=0.1)
    sets = {"B": (3280, 9246, 6416, 5974), "A": (4031, 12150, 7222, 8942)}[runner.recipe.paper_base]
    answers = (500 * 4, 30 * 32, 40 * 32, 675 * 4)
    assert rows["seed0/main"][0] == pytest.approx(
        4 * sum(n * t for n, t in zip(answers, sets, strict=True)) / 1e6, abs=0.1
    )
    gpus = int(machine[0])
    for name, (_, hours, gpu_hours, memory, _) in rows.items():
        if name != "all":
            assert gpu_hours == pytest.approx(gpus * hours, abs=0.06 + 0.005 * gpus) and 20 < memory < 141
    assert rows["all"][0] == pytest.approx(sum(row[0] for name, row in rows.items() if name != "all"), abs=2)
    assert len(rows) == len(pipeline.steps) + 1
