"""What a run writes: logs cut back on resume, no NaN in JSON, damaged last lines, no secrets, one console line a step.

Run: python -m pytest tests/test_metrics.py
"""

from __future__ import annotations

import json
import math
import multiprocessing
import time
import tracemalloc
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest
import wandb
import yaml
from small_run import write_config as write_explain_config
from tiny import CPU, make_config, make_rows, score_rows, update

from nanolapo import loop, session
from nanolapo.checkpoint import save_checkpoint
from nanolapo.config import Config
from nanolapo.config_file import load_config
from nanolapo.methods import load_method
from nanolapo.methods.base import Method
from nanolapo.metrics import RunLog, Stopwatch, append, keep_steps_before, repetition, rollout_metrics
from nanolapo.policy import Policy

ROLLOUTS = make_rows([3, 9, 5, 7], correct=[True, False, False, False], budgets=[math.nan, 5, 5, 5])
ROLLOUTS.set_rewards({"correct": ROLLOUTS.correct_B.astype(float), "length": np.array([0.5, 0, 0, 0])})


def step_metrics() -> dict[str, float]:
    """All names that the console line needs."""
    return rollout_metrics(ROLLOUTS) | {
        "mismatch": 1e-6, "grad_norm": 0.5, "tokens_per_second": 10.0, "memory_gb": 1.0, "learning_rate": 1e-3,
    }  # fmt: skip


def repetition_by_tuples(ids: list[int]) -> float:
    grams = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
    return round(1 - len(set(grams)) / len(grams), 6) if grams else 0.0


@pytest.mark.parametrize("vocab", [1, 2, 7, 151_936, 2**31])
def test_repetition_is_that_of_tuples_and_fast(vocab):
    """Every short length, and long rows of which some repeat; then the time for 32 rows of 4,096 tokens."""
    rng = np.random.default_rng(vocab)
    rows = [rng.integers(0, vocab, length) for length in (*range(9), 50, 300)]
    rows += [np.tile(rng.integers(0, vocab, 30), 9), rng.integers(vocab - 1, vocab, 20)]
    assert [repetition(ids) for ids in rows] == [repetition_by_tuples(ids.tolist()) for ids in rows]
    many = [rng.integers(0, vocab, 4096) for _ in range(32)]

    def seconds(measure) -> float:
        start = time.process_time()
        for ids in many:
            measure(ids)
        return time.process_time() - start

    assert min(seconds(repetition) for _ in range(3)) < 0.6 * seconds(lambda ids: repetition_by_tuples(ids.tolist()))


def run_config(folder: Path, **sections: dict[str, object]) -> Config:
    sections["run"] = {"dir": str(folder), "name": "r", "log_rollouts": 3} | sections.get("run", {})
    return make_config(**sections)  # type: ignore[arg-type]


def write_steps(config: Config, start: int, stop: int) -> RunLog:
    log = RunLog(config, start, None, start / 100)
    for step in range(start, stop):
        log.step(step, step_metrics(), (step + 1) / 100)
        log.rollouts(step, ROLLOUTS)
    log.close()
    return log


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_D11_resume_cuts_the_logs_back(tmp_path):
    """Crash after step 12, last checkpoint before step 10: steps 10, 11, 12 appear once, and none is missing."""
    config = run_config(tmp_path)
    write_steps(config, 0, 13)
    write_steps(config, 10, 15)
    assert steps_in(tmp_path / "r/metrics.jsonl") == list(range(15))
    assert steps_in(tmp_path / "r/rollouts.jsonl") == [step for step in range(15) for _ in range(3)]


@pytest.mark.parametrize("tail", ['{"step": 3, "text": "half', '{"step": 3, "text": "\xc3', "{", "\x00\x00\x00"])
def test_D11_a_half_written_last_line_goes(tmp_path, tail):
    """A kill may cut a line anywhere, also in the middle of a character."""
    path = tmp_path / "rollouts.jsonl"
    whole = "".join(json.dumps({"step": step, "text": "ü\u2028"}, ensure_ascii=False) + "\n" for step in range(3))
    path.write_bytes(whole.encode() + tail.encode("latin-1"))
    keep_steps_before(path, 10)
    assert path.read_bytes() == whole.encode()
    keep_steps_before(path, 1)
    assert [json.loads(line)["step"] for line in path.read_text().strip().split("\n")] == [0]
    keep_steps_before(tmp_path / "missing.jsonl", 1)
    assert [file.name for file in tmp_path.iterdir()] == ["rollouts.jsonl"]


@pytest.mark.parametrize("middle", ["", "{", "\x00\n", "\n", '{"step": 2, "te\n'])
def test_a_log_is_cut_where_the_step_or_a_broken_line_begins(tmp_path, middle):
    """What stays has its bytes, also those that are not UTF-8; nothing behind the cut comes back."""
    lines = [json.dumps({"step": step // 3, "text": "ü\u2028\r"}).encode() + b"\n" for step in range(12)]
    lines[1] = lines[1].replace(b"}", b', "bytes": "\xff\xfe"}')
    path = tmp_path / "rollouts.jsonl"
    for step, stay in ((9, 12), (3, 9), (1, 3), (0, 0)):
        kept = min(stay, 7) if middle else stay
        path.write_bytes(b"".join(lines[:7]) + middle.encode() + b"".join(lines[7:]))
        keep_steps_before(path, step)
        assert path.read_bytes() == b"".join(lines[:kept])


def test_a_log_larger_than_the_memory_can_be_cut(tmp_path):
    """Its rows are read one by one: the peak is a few of them, not the 20 MB of the file."""
    path = tmp_path / "rollouts.jsonl"
    with path.open("w") as file:
        file.writelines(json.dumps({"step": step, "text": "x" * 20_000}) + "\n" for step in range(1000))
    size = path.stat().st_size
    tracemalloc.start()
    try:
        keep_steps_before(path, 999)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert steps_in(path) == list(range(999)) and size > 20e6 and peak < 1e6


def test_nan_and_infinity_become_null(tmp_path):
    log = RunLog(run_config(tmp_path), 0, None)
    log.step(0, step_metrics() | {"length_correct": math.nan, "grad_norm": math.inf, "other": np.float32(2)}, 0.01)
    text = (tmp_path / "r/metrics.jsonl").read_text()
    row = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert row["length_correct"] is None and row["grad_norm"] is None and row["other"] == 2
    log.rollouts(0, ROLLOUTS)
    first, second, *_ = map(json.loads, (tmp_path / "r/rollouts.jsonl").read_text().splitlines())
    assert first["budget"] is None and second["budget"] == 5


def test_rollouts_keep_text_verdict_length_and_every_reward_part(tmp_path):
    write_steps(run_config(tmp_path), 0, 1)
    row = json.loads((tmp_path / "r/rollouts.jsonl").read_text().splitlines()[0])
    want = {"step": 0, "problem": "demo:0", "question": "question 0", "reference_answer": "0",
            "text": "text 0", "correct": True, "finished": True, "length": 3, "budget": None,
            "reward": {"correct": 1.0, "length": 0.5}}  # fmt: skip
    assert {key: row[key] for key in want} == want


def test_accuracy_is_the_verdict_and_reward_the_sum_of_parts():
    metrics = rollout_metrics(ROLLOUTS)
    assert metrics["accuracy"] == 0.25 and metrics["reward"] == 1.5 / 4
    assert (metrics["reward/correct"], metrics["reward/length"]) == (0.25, 0.125)
    assert metrics["length"] == 6 and metrics["length_correct"] == 3 and metrics["length_p90"] == pytest.approx(8.4)
    none_right = make_rows([3, 9])
    assert math.isnan(rollout_metrics(none_right)["length_correct"])


def test_a_method_without_a_length_reward_logs_none():
    """A 0 would look like a length reward that nobody gets."""
    rollouts = make_rows([3, 9])
    rollouts.set_rewards(Method(make_config()).reward(rollouts))
    logged = rollout_metrics(rollouts)
    assert [name for name in logged if name.startswith("reward/")] == ["reward/correct"]


def test_config_yaml_of_a_run_reads_back_and_names_versions(tmp_path):
    config = run_config(tmp_path, train={"steps": 7})
    RunLog(config, 0, None)
    path = tmp_path / "r/config.yaml"
    assert load_config(path) == config
    head = [line for line in path.read_text().splitlines() if line.startswith("# ")]
    assert {line.split(": ")[0] for line in head} >= {"# git", "# torch", "# transformers"}


def test_one_console_line_a_step_and_two_examples(tmp_path, capsys):
    log = RunLog(run_config(tmp_path, train={"steps": 5}), 0, None)
    log.step(0, step_metrics(), 0.2)
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and out.startswith("step 1/5 | reward 0.375 | acc 25.0% | len 6.0")
    log.show_examples(0, ROLLOUTS)
    out = capsys.readouterr().out
    assert "best rollout: correct 1.00, length 0.50 | length 3 | budget none" in out
    assert "worst rollout: correct 0.00, length 0.00 | length 9 | budget 5" in out


@pytest.mark.parametrize(("before", "now", "left"), [(0.0, 0.25, "3.0"), (0.5, 0.75, "1.0"), (0.0, 1.1, "0.0")])
def test_the_time_left_follows_the_share_that_is_done(tmp_path, capsys, before, now, left):
    """A minute for a quarter of the run leaves three for the rest, whatever the step's number. More than all: the last step
    may sample more tokens than were left."""
    log = RunLog(run_config(tmp_path, train={"steps": 400}), 3, None, before)
    log.started = time.time() - 60
    log.step(3, step_metrics(), now)
    assert capsys.readouterr().out.endswith(f" | {left} min left\n")


@pytest.mark.slow
def test_a_run_that_ends_by_its_tokens_counts_them_for_the_time_left(tmp_path, monkeypatch, demo_base):
    """Resumed, too: the share that is told after a step is that of the sampled tokens in its line."""
    told = []

    class Told(RunLog):
        def step(self, step: int, metrics: dict[str, float], share: float) -> None:
            told.append((step, self.start_share, share))
            super().step(step, metrics, share)

    monkeypatch.setattr(session, "RunLog", Told)
    for steps in (2, 400):  # the first time its steps end the run
        overrides = [
            f"train.steps={steps}",
            "train.sampled_tokens=10000",
            "rollout.group_size=4",
            "train.batch_size=16",
            "train.learning_rate=1e-4",
            "run.log_rollouts=0",
        ]
        config = write_explain_config(demo_base, tmp_path, *overrides)
        loop.train(config, load_method(config))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    tokens = [line["sampled_tokens"] / 10000 for line in lines]
    assert tokens[1] < 1 <= tokens[-1] and 3 < len(tokens) < 10
    assert told[:2] == [(0, 0.0, 0.5), (1, 0.0, 1.0)]
    assert told[2:] == [(i, tokens[1], tokens[i]) for i in range(2, len(tokens))]


def test_stopwatch_adds_up():
    watch = Stopwatch()
    for phase in ("sample", "update", "sample"):
        with watch(phase):
            pass
    assert set(watch.seconds) == {"sample", "update"} and watch.total() == sum(watch.seconds.values())


CANARY = "c4nary" + 34 * "0"  # 40 characters, as long as a real wandb key
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY")


@pytest.mark.parametrize("mode", ["disabled", "offline"])
def test_F4_no_secret_reaches_the_run_directory(tmp_path, monkeypatch, tied_model, mode):
    """Canaries in the token variables are found in no file of a run: config, logs, rollouts, tracker, checkpoint."""
    for name in SECRETS:
        monkeypatch.setenv(name, CANARY)
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = run_config(tmp_path, wandb={"mode": mode})
    log = write_steps(config, 0, 2)
    assert (log.wandb_id is None) == (mode == "disabled")
    policy = Policy(make_config(tied_model), CPU)
    score_rows(policy, ROLLOUTS)
    update(policy, ROLLOUTS, [1.0, -1.0, 0.0, 0.0])
    state = {
        "fingerprint": {},
        "wandb_id": log.wandb_id,
        "config": yaml.safe_load((log.dir / "config.yaml").read_text()),
    }
    save_checkpoint(log.dir / "checkpoints", 2, policy, state, keep=2)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"config.yaml", "metrics.jsonl", "rollouts.jsonl", "model.safetensors"} <= {path.name for path in files}
    assert (mode == "offline") == any(path.suffix == ".wandb" for path in files)
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []


def test_D11_no_tracker_no_problem(tmp_path, monkeypatch, capsys):
    """wandb asked for, but it cannot start (no key, no terminal to ask for one): said once, and the run goes on."""
    wandb.teardown()  # or it remembers the environment of the test before
    for name in ("WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    write_steps(run_config(tmp_path, wandb={"mode": "online"}), 0, 2)
    assert steps_in(tmp_path / "r/metrics.jsonl") == [0, 1]
    assert "wandb could not start" in capsys.readouterr().out


def test_two_processes_may_append_to_one_file(tmp_path: Path) -> None:
    """Evaluations that share their samples run beside each other (make reproduce JOBS=2): no line may break another."""
    path = tmp_path / "samples.jsonl"
    rows = [{"row": i, "text": "x" * (300_000 + i)} for i in range(50)]  # long answers: more than a buffer holds

    def write(ready: Barrier) -> None:
        for _ in range(3):
            ready.wait()
            append(path, rows)

    context = multiprocessing.get_context("fork")
    ready = context.Barrier(2)
    both = [context.Process(target=write, args=(ready,)) for _ in "ab"]
    for process in both:
        process.start()
    for process in both:
        process.join(timeout=120)
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(found) == 2 * 3 * 50 and all(len(row["text"]) == 300_000 + row["row"] for row in found)
