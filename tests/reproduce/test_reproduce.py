"""make reproduce: which steps a table needs, what it refuses, and a real small run whose tables come from its files alone.

Run: python -m pytest tests/reproduce/test_reproduce.py
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from small_recipe import REPRODUCE, run_recipe, write_recipe

from nanolapo.config import UserError
from nanolapo.reproduce.forecast import print_forecast
from nanolapo.reproduce.paper import paper_tables
from nanolapo.reproduce.pipeline import Pipeline
from nanolapo.reproduce.recipe import ROOT, Recipe
from nanolapo.reproduce.reproduce import write_outputs

RECIPES = [path.parent.name for path in sorted((ROOT / "configs").glob("*/reproduce.yaml"))]


def recipe_of(name: str) -> Recipe:
    return Recipe(ROOT / "configs" / name / "reproduce.yaml", Path("runs/reproduce") / name, ["python"])


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_whole(name: str) -> None:
    """All configs load, every run that a model comes from is there before it, every row is one of the paper's and is
    filled by a model of its evaluations, and the base is the first model of each."""
    recipe = recipe_of(name)
    pipeline = Pipeline(recipe.steps(0), Path("unused"))
    for name, table in recipe.tables.items():
        printed = [row for row in paper_tables()[table.number].rows if row.base == recipe.file.paper_base]
        names = {row.name for row in printed} | {"Base"}
        assert set(table.rows) <= names, name
        labels = [label for evaluation in table.evaluations for label in recipe.evaluations[evaluation].models]
        assert {label.partition(", told")[0] for label in table.rows.values()} <= set(labels), name
        for step in recipe.wanted(name, [0]):
            assert set(pipeline.steps[step].needs) <= set(pipeline.closure([step]))
    for evaluation in recipe.evaluations.values():
        assert next(iter(evaluation.models)) == "base"
    folders = [step.clear for step in pipeline.steps.values() if step.clear]
    assert len(set(folders)) == len(folders)  # no two runs share a directory


def test_a_table_needs_its_own_runs_only() -> None:
    recipe = recipe_of("demo")
    pipeline = Pipeline(recipe.steps(0) + recipe.steps(1), Path("unused"))
    needed = pipeline.closure(recipe.wanted("table3", [1]))
    assert {name.removeprefix("seed1/") for name in needed} == {
        "base", "stage1", "stage2", "mean", "minimum", "statistic"
    }  # fmt: skip
    with pytest.raises(UserError, match="--step table9: there are table1, table2"):
        recipe.wanted("table9", [0])


def test_ablations_change_their_key_and_nothing_else() -> None:
    """Stage 2 of Table 2 differs in lapo.guidance alone, of Table 3 in the statistic, of Table 6 in the data."""
    configs = {step.name: json.loads(step.config)[1] for step in recipe_of("demo").steps(0) if step.clear}
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
    for name in ("easy", "hard"):
        first, second = configs[f"seed0/stage1_{name}"], configs[f"seed0/stage2_{name}"]
        assert first["data"] == second["data"] != reference["data"]
        assert second["train"] == reference["train"] and second["model"]["path"].endswith(f"seed0/stage1_{name}/model")
        assert second["lapo"]["length_map"].endswith(f"seed0/stage1_{name}/length_map.json")


# ------------------------------------------------------------------------------------------------------------ a real run


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def done(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole reproduction."""
    out = tmp_path_factory.mktemp("out")
    run_recipe(recipe / "reproduce.yaml", out, "--jobs", "2")
    return out


def results(folder: Path) -> list[dict]:
    return list(json.loads((folder / "results.json").read_text())["rows"])


@pytest.mark.slow
def test_a_real_reproduction(done: Path) -> None:
    rows = {row["model"]: row for row in json.loads((done / "tables.json").read_text())["tables"][0]["rows"]}
    measured = {row["model"]: row for row in results(done / "seed0/main") if not row["guidance"]}
    for name, label in {"Base": "base", "+LAPO-D": "D", "+LAPO-I": "I"}.items():
        assert rows[name]["tokens"] == measured[label]["tokens"] and rows[name]["samples"] == 16
    assert rows["+Acc-Only"].get("tokens") is None and rows["+Acc-Only"]["paper_tokens"] > 0
    assert (done / "figures/main/training.png").exists() and (done / "tables.tex").exists()
    assert (done / "report.html").stat().st_size > 20_000
    exported = [row["model"] for row in results(done / "seed0/dynamics") if not row["guidance"]]
    assert exported == ["base", "D step 1", "D step 2"]


@pytest.mark.slow
def test_evaluations_share_their_samples(done: Path) -> None:
    """The base is in both evaluations and is sampled once."""
    base = [path.name for path in (done / "seed0/samples").glob("base--*")]
    assert len(base) == 1 and len((done / "seed0/samples" / base[0]).read_text().splitlines()) == 16


@pytest.mark.slow
def test_a_second_run_has_nothing_left_to_do(recipe: Path, done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_recipe(recipe / "reproduce.yaml", done)
    assert "4 of 4 steps are done already" in (out := capsys.readouterr().out) and "[" not in out, "a step ran again"


@pytest.mark.slow
def test_tables_are_made_from_the_files_alone(recipe: Path, done: Path) -> None:
    """Another number in a results.json is another number in the table."""
    path = done / "seed0/main/results.json"
    before = path.read_text()
    changed = json.loads(before)
    [row] = [row for row in changed["rows"] if (row["model"], row["guidance"]) == ("D", "")]
    row["tokens"] += 100
    path.write_text(json.dumps(changed))
    write_outputs(Recipe(recipe / "reproduce.yaml", done, ["python"]), [0])
    path.write_text(before)
    rows = {row["model"]: row for row in json.loads((done / "tables.json").read_text())["tables"][0]["rows"]}
    assert rows["+LAPO-D"]["tokens"] == row["tokens"]


def test_a_result_of_another_config_is_left_out(recipe: Path, tmp_path: Path) -> None:
    """Its models have to be trained again: beside the new results of another table it would contradict them. Files and
    stamps are those of four evaluated seeds; the stage 1 of the third was another one, that of the fourth did not end."""
    mine = Recipe(recipe / "reproduce.yaml", tmp_path, ["python"])
    pipeline = mine.pipeline([1, 2, 3, 4])
    for name, step in pipeline.steps.items():
        assert step.output is not None
        step.output.parent.mkdir(parents=True, exist_ok=True)
        rows = [evaluated(model, 10.0 * int(name[4])) for model in ("base", "D", "I")]
        step.output.write_text(json.dumps({"rows": rows}))
        pipeline.write_stamp(name, pipeline.new_stamp(name) | {"done": name != "seed4/stage1"})
    stamp = tmp_path / "steps" / "seed3-stage1.json"
    stamp.write_text(json.dumps(json.loads(stamp.read_text()) | {"config": "of another"}))
    write_outputs(mine, [1, 2, 3, 4])
    table = json.loads((tmp_path / "tables.json").read_text())["tables"][0]
    assert table["notes"][-1] == "Ours: main, seeds 1, 2."
    assert {(row["tokens"], row["samples"]) for row in table["rows"] if row["ours"]} == {(15.0, 32)}  # mean, and sum


def evaluated(model: str, tokens: float) -> dict[str, object]:
    row = {"model": model, "set": "demo", "temperature": 0.6, "guidance": "", "accuracy": 0.5, "tokens": tokens}
    return row | {"truncated": 0.0, "aes": 0.0, "tokens_correct": tokens, "problems": 8, "samples": 16, "by_level": {}}


@pytest.mark.slow
def test_refusals_are_one_line(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (recipe / "gpu.yaml").write_text(REPRODUCE + 'hardware: "8 GPUs of 80 GB"\n')
    command = [sys.executable, "-m", "nanolapo.reproduce.reproduce", str(recipe / "gpu.yaml"), "--out", str(tmp_path)]
    gpu = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60,
                         env={"CUDA_VISIBLE_DEVICES": "", "PATH": ""})  # fmt: skip
    assert gpu.returncode == 2 and "needs 8 GPUs of 80 GB" in gpu.stderr and "make demo" in gpu.stderr
    assert gpu.stderr.count("\n") == 1
    for arguments, words in [
        (["--step", "tabel1"], "--step tabel1: there are table1, stage1, stage2, main, dynamics"),
        (["--methods", "lapo"], "reproduce.yaml is no comparison: --methods and --tokens go with a compare.yaml"),
    ]:
        with pytest.raises(SystemExit, match="2"):
            run_recipe(recipe / "reproduce.yaml", tmp_path, *arguments)
        assert words in (err := capsys.readouterr().err) and err.count("\n") == 1


def test_a_forecast_before_the_base_is_there_lists_the_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a fresh clone a dry run says what would be run; what it costs depends on a model that a step has yet to make."""
    compare = ROOT / "configs/demo/compare.yaml"
    run_recipe(compare, tmp_path, "--dry-run", "--seeds", "0", "--methods", "truncation")
    out = capsys.readouterr().out
    assert [line.split(" | ")[0] for line in out.splitlines() if line.startswith("| seed0")] == [
        f"| seed0/{step}" for step in ("base", "scores/base", "truncation", "scores/truncation")
    ]
    assert f"{tmp_path}/seed0/base is not there yet; --step base makes it" in out
    run_recipe(compare, tmp_path, "--dry-run", "--seeds", "0", "--methods", "truncation", "--launcher",
               "torchrun --nnodes 1 --node_rank 0 --master_addr host --nproc_per_node 2")  # fmt: skip
    assert capsys.readouterr().out == out  # a base's command has no launcher, which is longer than that command


@pytest.mark.parametrize(
    ("name", "machine"), [("deepscaler-1.5b", "4xA100-80GB"), ("deepseek-r1-1.5b", "8xH200-141GB")]
)
def test_the_forecast_of_a_paper_recipe(name: str, machine: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Tokens by hand: steps x rollouts x the paper's mean length for a training, answers x length for an evaluation; hours
    of all GPUs are hours times their number; the last line is the sum."""
    recipe = recipe_of(name)
    pipeline = Pipeline(recipe.steps(0), Path("unused"))
    print_forecast(recipe, pipeline, list(pipeline.steps), 0, machine)
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    rows = {line[0]: [float(cell.replace(",", "")) if cell.strip() else 0.0 for cell in line[1:]] for line in lines[2:]}
    mean = {"B": (3280 + 2365) / 2, "A": (4031 + 2566) / 2}[recipe.file.paper_base]
    assert rows["seed0/stage1"][0] == pytest.approx(234 * 1024 * mean / 1e6, abs=0.1)
    sets = {"B": (3280, 9246, 6416, 5974), "A": (4031, 12150, 7222, 8942)}[recipe.file.paper_base]
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
