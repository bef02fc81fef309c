"""The scripts as a user runs them: help, dry run, a short run, kill -9 and resume, Ctrl-C, bad input, evaluation.

    python -m pytest tests/test_scripts.py

The base model is conftest's demo_base; where nothing is sampled, one with random weights. What does not depend on a
process of its own runs in this one, which has imported torch already.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import tiny_family
from round_methods import make_base
from safetensors.torch import load_file, save_file

from nanolapo.demo.pretrain import make_tokenizer

ROOT = Path(__file__).parents[1]
TIMING = ("seconds/", "tokens_per_second", "memory_gb")  # the only numbers that may differ between equal runs

CONFIG = """
run: {{dir: {dir}, name: run, threads: 1, checkpoint_every: 2, print_every: 0, export_every: 2}}
model: {{path: {base}, dtype: float32}}
data: {{sources: [{{name: demo, path: demo, count: 40, seed: 1, levels: [0]}}]}}
prompt: {{template: "{{question}} <think>"}}
rollout: {{engine: torch, prompts_per_step: 8, group_size: 4, max_prompt_tokens: 64, max_new_tokens: 96, base_tokens: 73}}
train: {{steps: 6, batch_size: 16, learning_rate: 1e-3, microbatch_tokens: 512}}
loss: {{kl_coef: 0.001}}
evaluate: {{models: ["base={base}", "same={base}"], samples: 2, temperatures: [1.0], max_new_tokens: 48,
            guidance_factors: [1.0], bootstrap: 50}}
"""


@pytest.fixture(scope="module")
def base(demo_base: Path) -> Path:
    return demo_base


@pytest.fixture(scope="module")
def random_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("random"))


def write_config(base: Path, folder: Path) -> Path:
    path = folder / "config.yaml"
    path.write_text(CONFIG.format(dir=folder / "runs", base=base))
    return path


def script(name: str, *arguments: object, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment())


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[object, str, str]]:
    """here(name, *arguments): run a script in this process; its exit code, output and error output."""

    def run(name: str, *arguments: object) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        code: object = 0
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return run


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def metrics(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "runs/run/metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(TIMING)} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train_stage1.py", "train_stage2.py", "evaluate.py"])
def test_help_says_what_the_script_does(name: str) -> None:
    result = script(name, "--help")
    assert result.returncode == 0 and "section.key=value" in result.stdout and "configs/" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train_stage1.py", "train_stage2.py", "evaluate.py"])
@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["configs/demo/stage1.yaml", "run.sede=3"], 2)])
def test_help_and_a_mistake_in_the_config_do_not_wait_for_torch(name: str, arguments: list[str], code: int) -> None:
    command = [sys.executable, "-X", "importtime", str(ROOT / name), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, env=environment())
    imported = {line.split("|")[-1].strip() for line in result.stderr.splitlines() if line.startswith("import time:")}
    assert result.returncode == code and "nanolapo.cli" in imported
    assert not imported & {"torch", "transformers", "numpy"}


def test_dry_run_prints_everything_and_writes_nothing(random_base: Path, tmp_path: Path, here) -> None:
    code, out, err = here("train_stage1.py", write_config(random_base, tmp_path), "--dry-run")
    assert code == 0, err
    for expected in ("group_size: 4", "8 prompts x 4 = 32 rollouts", "at most 18,432 sampled tokens", " <think>"):
        assert expected in out
    for planned in ("forecast for 1 x ", "answers of 96 tokens (the limit", "3,072 tokens sampled in", "6 steps  "):
        assert planned in out
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_an_interrupted_pre_training_says_that_it_starts_again(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nanolapo.demo.pretrain", str(write_config(tmp_path / "base", tmp_path))]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment() | {"PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("pre-training"):
            process.send_signal(signal.SIGINT)
            break
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == "interrupted; the same command starts again: nothing was saved\n"
    assert not (tmp_path / "base").exists()


@pytest.mark.slow
def test_kill_9_and_resume_gives_the_uninterrupted_run_bit_for_bit(base: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = script("train_stage1.py", write_config(base, tmp_path / "a"))
    assert whole.returncode == 0, whole.stderr
    assert sum(m["updates"] for m in metrics(tmp_path / "a")) > 0, "no signal: this test would compare nothing"

    command = [sys.executable, str(ROOT / "train_stage1.py"), str(write_config(base, tmp_path / "b"))]
    killed = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
    assert killed.stdout is not None
    for line in killed.stdout:
        if line.startswith("step 4/6"):  # the checkpoint of step 4 may be half-way
            killed.send_signal(signal.SIGKILL)
            break
    killed.wait()
    assert len(metrics(tmp_path / "b")) < 6
    resumed = script("train_stage1.py", tmp_path / "b/config.yaml")
    assert resumed.returncode == 0 and "resuming" in resumed.stdout, resumed.stderr

    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    one, other = (load_file(tmp_path / x / "runs/run/model/model.safetensors") for x in "ab")
    assert one.keys() == other.keys() and all((one[k] == other[k]).all() for k in one)
    start = load_file(base / "model.safetensors")
    assert any((one[k] != start[k]).any() for k in one), "the run changed nothing"
    maps = [(tmp_path / x / "runs/run/length_map.json").read_text() for x in "ab"]
    assert maps[0] == maps[1]
    exports = [exported(tmp_path / x / "runs/run") for x in "ab"]
    assert list(exports[0]) == list(exports[1]) == ["step-000002", "step-000004", "step-000006"]
    assert all((exports[0][step][k] == exports[1][step][k]).all() for step in exports[0] for k in one)
    assert all((exports[0]["step-000006"][k] == one[k]).all() for k in one)
    assert any((exports[0]["step-000002"][k] != one[k]).any() for k in one)


def exported(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The weights of every model in run/models, by folder name."""
    return {f.name: load_file(f / "model.safetensors") for f in sorted((run / "models").iterdir())}


@pytest.mark.slow
def test_B2_two_ranks_train_the_same_model_as_one(base: Path, tmp_path: Path) -> None:
    """Same prompts, same samples, one denominator: after two steps the weights agree to float32 rounding."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    assert script("train_stage1.py", write_config(base, tmp_path / "one"), "train.steps=2").returncode == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arguments = [str(ROOT / "train_stage1.py"), str(write_config(base, tmp_path / "two")), "train.steps=2"]
    result = subprocess.run(launch + arguments, capture_output=True, text=True, timeout=240, env=environment())
    assert result.returncode == 0, result.stderr
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    for name in ("length", "accuracy", "reward", "trained_tokens", "sampled_tokens", "no_signal"):
        assert [m[name] for m in one] == [m[name] for m in two], name
    for name in ("grad_norm", "loss", "kl"):
        assert [m[name] for m in one] == pytest.approx([m[name] for m in two], rel=1e-4, abs=1e-6), name
    weights = [load_file(tmp_path / x / "runs/run/model/model.safetensors") for x in ("one", "two")]
    # Adam divides by the root of the second moment, which blows rounding up where a gradient is nearly zero.
    for name, tensor in weights[0].items():
        assert (tensor - weights[1][name]).abs().mean() < 1e-6, name
    maps = [(tmp_path / x / "runs/run/length_map.json").read_text() for x in ("one", "two")]
    assert maps[0] == maps[1]


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_resumes(base: Path, tmp_path: Path) -> None:
    config = write_config(base, tmp_path)
    command = [sys.executable, str(ROOT / "train_stage1.py"), str(config), "run.checkpoint_every=100"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
    assert run.stdout is not None
    for line in run.stdout:
        if line.startswith("step 1/6"):
            run.send_signal(signal.SIGINT)
            break
    rest = run.stdout.read()
    assert run.wait() == 0 and "the same command resumes" in rest
    steps_done = len(metrics(tmp_path))
    assert 1 <= steps_done < 6 and (tmp_path / f"runs/run/checkpoints/step-{steps_done:06d}").is_dir()
    assert script("train_stage1.py", config, "run.checkpoint_every=100").returncode == 0
    assert [m["step"] for m in metrics(tmp_path)] == list(range(6))


@pytest.mark.slow
def test_stage2_starts_from_stage1_and_evaluate_makes_the_table(base: Path, tmp_path: Path) -> None:
    config = write_config(base, tmp_path)
    assert script("train_stage1.py", config).returncode == 0
    trained = tmp_path / "runs/run"
    length_map = f"lapo.length_map={trained}/length_map.json"
    second = script(
        "train_stage2.py", config, "run.name=two", "train.steps=2", f"model.path={trained}/model", length_map
    )
    assert second.returncode == 0, second.stderr
    rows = [json.loads(x) for x in (tmp_path / "runs/two/rollouts.jsonl").read_text().splitlines()]
    assert all(row["budget"] is not None for row in rows)

    result = script(
        "evaluate.py", config, "run.name=evaluate", f"evaluate.models=[base={base}, LAPO-D={trained}/model]"
    )
    assert result.returncode == 0, result.stderr
    numbers = json.loads((tmp_path / "runs/evaluate/results.json").read_text())["rows"]
    assert [row["model"] for row in numbers] == ["base", "LAPO-D", "LAPO-D"]
    assert numbers[0]["samples"] == 80 and numbers[0]["aes"] == 0.0
    assert "| base |" in (tmp_path / "runs/evaluate/results.md").read_text()

    files = sorted((tmp_path / "runs/evaluate/samples").glob("*.jsonl"))
    before = {file: file.read_bytes() for file in files}
    victim = files[0]  # a kill -9 in mid-write: the last line is half there
    victim.write_bytes(before[victim][: len(before[victim]) // 2])
    arguments = ("run.name=evaluate", f"evaluate.models=[base={base}, LAPO-D={trained}/model]")
    assert script("evaluate.py", config, *arguments).returncode == 0
    again = json.loads((tmp_path / "runs/evaluate/results.json").read_text())["rows"]
    assert again == numbers  # nothing lost, nothing sampled twice
    assert all(file.read_bytes() == before[file] for file in files if file != victim)


@pytest.mark.slow
def test_kill_9_of_an_evaluation_loses_and_repeats_nothing(base: Path, tmp_path: Path) -> None:
    """Killed between chunks of samples, again and again: what was on disk stays as it is, the rest is drawn once."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    # chunks of 8 answers; a fixed instruction is one more pass
    asked = ("run.name=e", "rollout.max_rows=2", "evaluate.instructions=[outside:20]")
    whole = script("evaluate.py", write_config(base, tmp_path / "a"), *asked)
    assert whole.returncode == 0, whole.stderr
    samples, config = tmp_path / "b/runs/e/samples", write_config(base, tmp_path / "b")
    on_disk: dict[str, bytes] = {}
    for answers in (20, 250):  # of 320: 4 passes of 40 problems x 2
        killed = subprocess.Popen(
            [sys.executable, str(ROOT / "evaluate.py"), str(config), *asked],
            stdout=subprocess.DEVNULL,
            env=environment(),
        )
        while sum(file.read_bytes().count(b"\n") for file in samples.glob("*.jsonl")) < answers:
            assert killed.poll() is None, "it ended before the kill"
            time.sleep(0.01)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        now = {file.name: file.read_bytes() for file in samples.glob("*.jsonl")}
        assert all(now[name].startswith(before) for name, before in on_disk.items())
        on_disk = {name: content[: content.rfind(b"\n") + 1] for name, content in now.items()}
    assert not (tmp_path / "b/runs/e/results.json").exists()
    resumed = script("evaluate.py", config, *asked)
    assert resumed.returncode == 0, resumed.stderr

    results = [json.loads((tmp_path / x / "runs/e/results.json").read_text()) for x in "ab"]
    assert results[0] == results[1]
    assert [(row["model"], row["guidance"]) for row in results[0]["rows"]] == [
        ("base", ""), ("same", ""), ("same", "1x own length"), ("same", "20 tokens, outside")
    ]  # fmt: skip
    files = {file.name: file.read_bytes() for file in samples.glob("*.jsonl")}
    assert all(files[name].startswith(before) for name, before in on_disk.items())
    for name, content in files.items():
        answers = [json.loads(line) for line in content.splitlines() if line.startswith(b"{") and line.endswith(b"}")]
        drawn = [(answer["problem"], answer["index"]) for answer in answers]
        assert len(drawn) == len(set(drawn)) == 80, name


BAD_INPUT = [
    (["rollout.grup_size=4"], "rollout.grup_size; did you mean rollout.group_size"),
    (["rollout.group_size=3"], "train.batch_size=16 must be a multiple of rollout.group_size=3"),
    (["rollout.top_p=0.9"], "rollout.top_p=0.9"),
    (["train.steps=many"], "train.steps='many'"),
    (["model.path=/nowhere"], "model.path='/nowhere'"),
    (["lapo.fidelity=papre"], "did you mean 'paper'"),
    (["data.sources=[{name: x, path: missing.jsonl}]"], "missing.jsonl"),
    (["method.name=lapo:Discover"], "method.name='lapo:Discover'"),
    (["rollout.group_size=1", "train.batch_size=8"], "rollout.group_size=1: an advantage compares"),
]


@pytest.mark.parametrize(("overrides", "message"), BAD_INPUT)
def test_bad_input_is_one_line_and_exit_code_2(
    random_base: Path, tmp_path: Path, here, overrides: list[str], message: str
) -> None:
    code, _, err = here("train_stage1.py", write_config(random_base, tmp_path), *overrides)
    last = err.strip().splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and message in last, err


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [["rollout.grup_size=4"], ["model.path=/nowhere"]])
def test_bad_input_ends_the_process_with_code_2(random_base: Path, tmp_path: Path, overrides: list[str]) -> None:
    result = script("train_stage1.py", write_config(random_base, tmp_path), *overrides)
    assert result.returncode == 2 and result.stderr.strip().splitlines()[-1].startswith("error: "), result.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpt2", "docs/MODELS.md"),
        ("llama, dynamic NTK, longer rows", "llama cannot be trained here: short rows are right"),
    ],
)
def test_a_kind_of_model_that_does_not_train_is_one_line(tmp_path: Path, here, name: str, message: str) -> None:
    """gpt2 has no sampler, and its broken weights are never read. Llama's rotary factors would depend on the batch."""
    model = tiny_family(name, max_position_embeddings=64, vocab_size=200)
    make_tokenizer().save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "base")
    if name == "gpt2":
        tensors = load_file(tmp_path / "base/model.safetensors")
        save_file({key: tensors[key] for key in list(tensors)[:1]}, tmp_path / "base/model.safetensors")
    overrides = ["rollout.engine=torch", "rollout.max_new_tokens=90"]
    code, _, err = here("train_stage1.py", write_config(tmp_path / "base", tmp_path), *overrides)
    last = err.strip().splitlines()[-1]
    assert code == 2 and last.startswith("error: model.path=") and message in last, err


@pytest.mark.parametrize("program", ["evaluate.py", "nanolapo/demo/warm_start.py"])
@pytest.mark.parametrize("damaged", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_broken_folder_ends_the_other_scripts_with_one_line(
    random_base: Path, tmp_path: Path, here, program: str, damaged: str
) -> None:
    broken = Path(shutil.copytree(random_base, tmp_path / "broken"))
    (broken / damaged).write_bytes(b"{")
    config, out = write_config(random_base, tmp_path), tmp_path / "out"
    key, overrides = "evaluate.models: base", [f"evaluate.models=[base={broken}]"]
    if program != "evaluate.py":
        key, overrides = "warm_start.model", [f"warm_start.model={broken}", f"model.path={out}"]
    code, _, err = here(program, config, *overrides)
    last = err.strip().splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and (key in last or str(broken) in last), err
    assert "Traceback" not in err and not out.exists()


def test_an_evaluation_with_answers_longer_than_the_model_is_one_line(random_base: Path, tmp_path: Path, here) -> None:
    code, _, err = here("evaluate.py", write_config(random_base, tmp_path), "--dry-run", "evaluate.max_new_tokens=9999")
    assert code == 2 and err.strip().splitlines()[-1].startswith("error: evaluate.max_new_tokens: with the longest"), (
        err
    )


def test_stage2_refuses_a_map_of_other_problems(random_base: Path, tmp_path: Path, here) -> None:
    other = tmp_path / "map.json"
    other.write_text(json.dumps({"statistic": "median", "entries": {"demo:0000": 30.0}}))
    code, _, err = here("train_stage2.py", write_config(random_base, tmp_path), f"lapo.length_map={other}")
    assert code == 2 and "lacks 40 of the 40 problems" in err


def test_stage1_refuses_the_settings_of_stage2(random_base: Path, tmp_path: Path, here) -> None:
    config = write_config(random_base, tmp_path)
    code, _, err = here("train_stage1.py", config, "lapo.length_map=map.json", "--dry-run")
    assert code == 2 and "did you mean train_stage2.py?" in err


@pytest.mark.slow
def test_resuming_with_other_settings_is_refused(random_base: Path, tmp_path: Path, here) -> None:
    config = write_config(random_base, tmp_path)
    assert here("train_stage1.py", config, "train.steps=2")[0] == 0
    started = time.monotonic()
    code, _, err = here("train_stage1.py", config, "rollout.group_size=8")
    assert code == 2 and "rollout.group_size=4" in err and time.monotonic() - started < 60
