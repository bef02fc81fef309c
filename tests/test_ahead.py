"""rollout.ahead: the next step is sampled beside the update, from weights one step old, weighed by TIS.

Run: python -m pytest tests/test_ahead.py        The two-rank run is round_methods.py --ahead.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from round_methods import AHEAD, R2VPO, Everything, Watched, make_base, make_run
from safetensors.torch import load_file
from torch import Tensor

import nanolapo.loop
from nanolapo.config import Config, UserError
from nanolapo.config_checks import validate
from nanolapo.data.problems import Problem
from nanolapo.data.prompts import Guidance
from nanolapo.grader import Grader
from nanolapo.loop import train
from nanolapo.methods.base import Method, SamplingPlan
from nanolapo.methods.l1_max import L1Max
from nanolapo.policy import Policy
from nanolapo.rollouts import Rollouts, row_seed
from nanolapo.samplers.sampler import Decoding, Request, Sample
from nanolapo.samplers.torch_sampler import TorchSampler
from nanolapo.sampling import Abandoned

ROOT = Path(__file__).parents[1]
TIMING = ("seconds/", "tokens_per_second", "memory_gb")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("ahead") / "base")


def ahead_run(base: Path, folder: Path, **sections: dict[str, Any]) -> Config:
    """Seven steps, a checkpoint after each third: steps 0, 3 and 6 are sampled from the newest weights."""
    return make_run(
        base, folder, **{name: AHEAD.get(name, {}) | sections.get(name, {}) for name in {*AHEAD, *sections}}
    )


def lines(config: Config) -> list[dict[str, Any]]:
    text = (config.run_dir / "metrics.jsonl").read_text(encoding="utf-8")
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(TIMING)} for line in text.splitlines()]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def test_every_step_is_sampled_from_the_weights_of_one_step_before(base, tmp_path):
    """Each step's rollouts again, from the exported models: W_{k-1} in a step sampled ahead, W_k in the steps 0, 3 and 6.
    Same problems and seeds as without ahead, same ids, same log-probs."""
    config = ahead_run(base, tmp_path, run={"export_every": 1})
    method = Watched(config)
    train(config, method)
    folders = {0: base} | {k: config.run_dir / "models" / f"step-{k:06d}" for k in range(1, 8)}
    for step, (rollouts, plain) in enumerate(zip(method.rewarded, plain_problems(base, tmp_path), strict=True)):
        assert [p.id for p in rollouts.problems] == plain
        held = step if step % 3 == 0 else step - 1
        sampler = TorchSampler(str(folders[held]), torch.float32, torch.device("cpu"))
        seeds = [row_seed(0, step, place, g) for place in range(4) for g in range(4)]
        requests = [Request(ids.tolist(), seed, 6) for ids, seed in zip(rollouts.prompt_ids, seeds, strict=True)]
        for row, sample in enumerate(sampler.generate(requests, Decoding())):
            assert np.array_equal(sample.ids, rollouts.response_ids[row]), (step, row)
            np.testing.assert_allclose(sample.logprobs, rollouts.sampler_logprobs[row], atol=1e-5)
        assert rollouts.unmatched_B.tolist() == [step % 3 > 0] * 16
        for other in {step, step - 1} - {held, -1}:  # the other weights would have given other log-probs
            drawn = TorchSampler(str(folders[other]), torch.float32, torch.device("cpu")).generate(requests, Decoding())
            assert any(not np.allclose(s.logprobs[:1], rollouts.sampler_logprobs[row][:1], atol=1e-4)
                       for row, s in enumerate(drawn))  # fmt: skip


def plain_problems(base: Path, tmp_path: Path) -> list[list[str]]:
    config = make_run(base, tmp_path / "plain", train={"steps": 7})
    method = Watched(config)
    train(config, method)
    return [[p.id for p in rollouts.problems] for rollouts in method.rewarded]


def test_what_is_logged(base, tmp_path, capsys):
    """A step sampled ahead has no mismatch but a distance to the weights that sampled it, which its TIS weights show; the
    others have a mismatch as ever, and none of the rest. Tokens are counted once, in the step that trains them."""
    config = ahead_run(base, tmp_path)
    method = Watched(config)
    train(config, method)
    console = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    total = 0
    for step, (m, rollouts, said) in enumerate(zip(lines(config), method.rewarded, console, strict=True)):
        total += int(rollouts.lengths_B.sum())
        assert m["sampled_tokens"] == total
        if step % 3:
            assert m["mismatch"] is None and m["mismatch_max"] is None and m["compared_tokens"] == 0
            assert 1e-3 < m["off_policy"] <= m["off_policy_max"] and abs(m["tis_weight"] - 1) > 1e-4
            assert f"off_policy {m['off_policy']:.1e} |" in said and "mismatch" not in said
        else:
            assert m["mismatch"] < 1e-5 and m["compared_tokens"] > 0 and "off_policy" not in m
            assert abs(m["tis_weight"] - 1) < 1e-5 and f"mismatch {m['mismatch']:.1e} |" in said


def test_sampling_and_update_really_run_at_the_same_time(base, tmp_path, monkeypatch):
    """The update waits until the sampler has begun, and the sampler goes on only when the update is over: one after the
    other, this would never end. The step behind a checkpoint, and the last one's successor, are not sampled ahead."""
    begun, updated, threads = threading.Event(), threading.Event(), list[bool]()
    generate, update = TorchSampler.generate, nanolapo.loop.update_policy

    def slow_generate(self: TorchSampler, *arguments: Any) -> list[Sample]:
        beside = threading.current_thread() is not threading.main_thread()
        threads.append(beside)
        if beside:
            begun.set()
            assert updated.wait(60)
        return generate(self, *arguments)

    def slow_update(policy: Policy, *arguments: Any) -> dict[str, float]:
        step = len(threads) - 1
        if step % 3 < 2 and step < 6:
            assert begun.wait(60)
        found = update(policy, *arguments)
        begun.clear()
        updated.set()
        return found

    monkeypatch.setattr(TorchSampler, "generate", slow_generate)
    monkeypatch.setattr(nanolapo.loop, "update_policy", slow_update)
    config = ahead_run(base, tmp_path)
    train(config, Method(config))
    assert threads == [step % 3 > 0 for step in range(7)]


def test_D2_a_killed_run_does_the_same_steps(base, tmp_path):
    """Back to the checkpoint of step 3, with all later files gone: the same lines and the same weights, to the bit."""
    config = ahead_run(base, tmp_path)
    train(config, Watched(config))
    want, model = lines(config), weights(config.run_dir / "model")
    shutil.rmtree(config.run_dir / "model")
    for folder in (config.run_dir / "checkpoints").glob("step-*"):
        if folder.name != "step-000003":
            shutil.rmtree(folder)
    train(config, Watched(config))
    assert lines(config) == want
    again = weights(config.run_dir / "model")
    assert all(torch.equal(again[name], tensor) for name, tensor in model.items())


def test_with_a_monitor_pass_rounds_and_drawn_weights(base, tmp_path):
    """Only the first round is sampled ahead: the monitor pass and what makes up for dropped groups see the newest weights.
    Weights for drawing are those written by after_step; every step asks for its plan once."""
    config = ahead_run(base, tmp_path)
    method = Everything(config)
    train(config, method)
    found = lines(config)
    assert method.of("sampling") == list(range(7)) and max(m["rounds"] for m in found) > 1
    rounds = method.of("reward")
    for step, m in enumerate(found):
        first, *others = [rounds.pop(0) for _ in range(int(m["rounds"]))]
        rounds.pop(0)  # all of them together: after_step asks for their rewards again
        replaced = 0 if step == 2 else 4  # by the monitor's group, of another temperature
        assert first.unmatched_B.tolist() == [True] * replaced + [step % 3 > 0] * (16 - replaced)
        assert not any(rollouts.unmatched_B.any() for rollouts in others)
    plans = [name for name, _ in method.seen if name in ("sampling", "after_step")]
    assert plans == ["sampling", "after_step"] * 7


def test_guidance_and_rewards_belong_to_the_same_step(base, tmp_path):
    """L1-Max rewards a row by what its prompt said, which it finds out again from the step's number: kind and budget are
    drawn anew at every visit."""
    method_section = {"name": "l1_max:L1Max", "options": {"redraw": True}}  # else a problem says the same in every step
    config = ahead_run(base, tmp_path, method=method_section, rollout={"max_new_tokens": 12})
    seen: list[tuple[np.ndarray, np.ndarray]] = []

    class Listening(L1Max):
        def total(self, rollouts: Rollouts, verdict_B: np.ndarray) -> np.ndarray:
            said = np.array(["maximum" in decode(prompt) for prompt in rollouts.prompt_ids])
            seen.append((self.limits(rollouts), said))
            budgets = [self.budget(p.id, self.step) for p in rollouts.problems]
            assert rollouts.budgets_B.tolist() == np.repeat(budgets, rollouts.group_size).tolist()
            return super().total(rollouts, verdict_B)

    method = Listening(config)
    decode = nanolapo.model.folder.load_tokenizer(str(base)).decode
    train(config, method)
    assert len(seen) == 7 and any(limits.any() for limits, _ in seen) and any(not limits.all() for limits, _ in seen)
    for limits, said in seen:
        assert np.array_equal(limits, said)


def test_an_error_while_sampling_ahead_stops_the_run(base, tmp_path, monkeypatch):
    generate = TorchSampler.generate

    def failing(self: TorchSampler, *arguments: Any) -> list[Sample]:
        if threading.current_thread() is not threading.main_thread():
            raise ValueError("the engine broke")
        return generate(self, *arguments)

    monkeypatch.setattr(TorchSampler, "generate", failing)
    config = ahead_run(base, tmp_path)
    with pytest.raises(ValueError, match="the engine broke"):
        train(config, Method(config))
    assert not (config.run_dir / "model").exists()


def test_an_error_in_the_update_ends_the_sampling(base, tmp_path, monkeypatch):
    """The sampler would have gone on for a minute; the error itself comes out, and nothing is written."""
    generate, begun, ended = TorchSampler.generate, threading.Event(), threading.Event()

    def endless(self: TorchSampler, requests: Any, decoding: Any, progress: Any, finished: Any) -> list[Sample]:
        if threading.current_thread() is threading.main_thread():
            return generate(self, requests, decoding, progress, finished)
        begun.set()
        end = time.monotonic() + 60
        try:
            while time.monotonic() < end:
                progress(1)
        except Abandoned:
            ended.set()
            raise
        return []

    def interrupted(*_: Any) -> dict[str, float]:
        assert begun.wait(60)
        raise KeyboardInterrupt

    monkeypatch.setattr(TorchSampler, "generate", endless)
    monkeypatch.setattr(nanolapo.loop, "update_policy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config := ahead_run(base, tmp_path), Method(config))
    assert ended.is_set()


@pytest.mark.parametrize("limit", [0, 400])
def test_hooks_are_told_the_progress_of_their_own_step(base, tmp_path, limit):
    """By steps, and by sampled tokens, of which what was sampled ahead counts only when its step has come: nothing is
    sampled ahead of a run's last step."""
    config = ahead_run(base, tmp_path, train={"sampled_tokens": limit})
    told: dict[str, list[float]] = {"sampling": [], "guidance": [], "reward": []}

    class Told(Watched):
        def sampling(self, step: int) -> SamplingPlan:
            told["sampling"].append(self.progress)
            return super().sampling(step)

        def guidance(self, problem: Problem, rollout_index: int, step: int) -> Guidance:
            told["guidance"] += [self.progress] * (problem.id == self.first and not rollout_index)
            return super().guidance(problem, rollout_index, step)

        def start(self, problems: list[Problem]) -> None:
            self.first = problems[0].id

        def reward(self, rollouts: Rollouts) -> dict[str, np.ndarray]:
            told["reward"].append(self.progress)
            return super().reward(rollouts)

    method = Told(config)
    train(config, method)
    found = lines(config)
    tokens = [0, *(m["sampled_tokens"] for m in found)]
    want = [max(k / 7, tokens[k] / limit if limit else 0.0) for k in range(len(found))]
    assert len(found) == 7 if not limit else 2 < len(found) < 7 and tokens[-2] < limit <= tokens[-1]
    assert told["sampling"] == told["reward"] == want
    visits = [k for k, rollouts in enumerate(method.rewarded) if method.first in [p.id for p in rollouts.problems]]
    assert visits and told["guidance"] == [want[k] for k in visits]


def test_new_weights_wait_for_the_last_sample(base, tmp_path, monkeypatch):
    """The sampler is still at work when the update is over: its weights must not change under it."""
    generate, load = TorchSampler.generate, TorchSampler.load_weights
    update, at_work, updated = nanolapo.loop.update_policy, threading.Event(), threading.Event()

    def slow_generate(self: TorchSampler, *arguments: Any) -> list[Sample]:
        at_work.set()
        if threading.current_thread() is not threading.main_thread():
            assert updated.wait(60)
            time.sleep(0.2)  # long enough to be overtaken
        samples = generate(self, *arguments)
        at_work.clear()
        return samples

    def announced(*arguments: Any) -> dict[str, float]:
        updated.clear()
        found = update(*arguments)
        updated.set()
        return found

    def watched_load(self: TorchSampler, named_tensors: Any) -> None:
        assert not at_work.is_set()
        load(self, named_tensors)

    monkeypatch.setattr(TorchSampler, "generate", slow_generate)
    monkeypatch.setattr(TorchSampler, "load_weights", watched_load)
    monkeypatch.setattr(nanolapo.loop, "update_policy", announced)
    config = ahead_run(base, tmp_path, train={"steps": 3})
    train(config, Method(config))
    assert len(lines(config)) == 3


def test_a_stopped_run_samples_its_next_step_anew(base, tmp_path):
    """Ctrl-C in step 4: what was sampled ahead for step 5 is dropped and counted nowhere. The resumed run samples step 5
    from the newest weights, with the same problems and seeds as ever."""

    class Stopping(Watched):
        def advantage(self, rollouts: Rollouts, rewards_PG: Tensor) -> Tensor:
            if len(self.rewarded) == 5:
                os.kill(os.getpid(), signal.SIGINT)
            return super().advantage(rollouts, rewards_PG)

    config = ahead_run(base, tmp_path)
    first, second = Stopping(config), Stopping(config)
    train(config, first)
    assert (config.run_dir / "checkpoints" / "step-000005").is_dir() and not (config.run_dir / "model").exists()
    train(config, second)
    found, rewarded, plain = lines(config), first.rewarded + second.rewarded, plain_problems(base, tmp_path)
    assert [m["step"] for m in found] == list(range(7)) and len(first.rewarded) == 5
    assert [[p.id for p in rollouts.problems] for rollouts in rewarded] == plain
    assert [m["sampled_tokens"] for m in found] == np.cumsum([int(r.lengths_B.sum()) for r in rewarded]).tolist()
    assert [m["compared_tokens"] > 0 for m in found] == [step in (0, 3, 5, 6) for step in range(7)]
    assert max(m["mismatch"] for m in found if m["compared_tokens"]) < 1e-5


def test_what_was_sampled_ahead_is_graded(base, tmp_path, monkeypatch):
    """The model knows no answer: a grader that likes odd lengths says which text and gold a verdict was given for."""

    def odd(text: str, gold: str) -> bool:
        return bool((len(text) + len(gold)) % 2)

    class CutCounts(Watched):
        cut_answers_count = True

    monkeypatch.setattr(Grader, "grade_all", lambda self, texts, golds: [*map(odd, texts, golds)])
    config = ahead_run(base, tmp_path, train={"steps": 3})
    method = CutCounts(config)
    train(config, method)
    for rollouts in method.rewarded:
        golds = [p.answer for p in rollouts.problems for _ in range(rollouts.group_size)]
        assert rollouts.correct_B.tolist() == [
            odd(text, gold) for text, gold in zip(rollouts.texts, golds, strict=True)
        ]
        assert rollouts.correct_B.any() and not rollouts.correct_B.all()


def test_a_step_without_signal_is_compared_with_the_weights_that_sampled_it(base, tmp_path):
    """Nothing is trained, so weights one step old are the newest: off_policy is as small as a mismatch."""

    class Flat(Watched):
        def reward(self, rollouts: Rollouts) -> dict[str, np.ndarray]:
            return {"correct": np.zeros(len(rollouts))}

    config = ahead_run(base, tmp_path, train={"steps": 3})
    train(config, Flat(config))
    for m in lines(config):
        assert m["updates"] == 0 and (m["compared_tokens"] > 0) == (m["step"] == 0)
        assert m["mismatch" if m["step"] == 0 else "off_policy"] < 1e-5


def test_gradient_of_a_step_sampled_ahead(base, tmp_path):
    """The first update of step 1, by plain transformers: sum over tokens of -A min(p / p_sampler, 2) grad log p, over all
    tokens. Advantages by hand; the weights before it are those of step 1, the samples' those of step 0."""
    from transformers import AutoModelForCausalLM

    config = ahead_run(base, tmp_path, run={"export_every": 1}, train={"steps": 2, "batch_size": 0, "grad_clip": 1e9})
    method = Watched(config)
    train(config, method)
    rollouts = method.rewarded[1]
    first = np.array([ids[0] for ids in rollouts.response_ids])
    rewards_PG = ((first % 6 == 0) + rollouts.correct_B).astype(float).reshape(4, 4)
    spread_P1 = rewards_PG.std(axis=1, ddof=1, keepdims=True)
    advantages_B = ((rewards_PG - rewards_PG.mean(axis=1, keepdims=True)) / (spread_P1 + 1e-6)).flatten()
    model = AutoModelForCausalLM.from_pretrained(config.run_dir / "models" / "step-000001", dtype=torch.float64)
    loss, tokens = torch.zeros((), dtype=torch.float64), int(rollouts.lengths_B.sum())
    for row, ids in enumerate(rollouts.response_ids):
        whole = torch.from_numpy(np.concatenate([rollouts.prompt_ids[row], ids]))
        logits = model(whole[None]).logits[0, len(whole) - len(ids) - 1 : -1]
        logprobs = logits.log_softmax(-1).gather(1, torch.from_numpy(ids)[:, None])[:, 0]
        ratio = (logprobs.detach() - torch.from_numpy(rollouts.sampler_logprobs[row]).double()).exp()
        loss = loss - (float(advantages_B[row]) * ratio.clamp(max=2.0) * logprobs).sum() / tokens
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert lines(config)[1]["grad_norm"] == pytest.approx(float(norm), rel=1e-4)  # float32 against float64


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("rollout", {"ahead": 2}, "rollout.ahead=2: 0, or 1"),
        ("rollout", {"ahead": -1}, "rollout.ahead=-1: 0, or 1"),
        ("loss", {"tis_cap": 0.0}, "set loss.tis_cap=2 to weigh them .or loss.old_logprobs=sampler"),
        ("rollout", {"engine": "vllm", "tensor_parallel": 2}, "rollout.tensor_parallel=1 or rollout.ahead=0"),
        ("run", {"checkpoint_every": 1}, "run.checkpoint_every=2"),
    ],
)
def test_what_cannot_work_is_refused(base, tmp_path, section, values, message):
    sections = {name: dict(entries) for name, entries in AHEAD.items()}
    sections[section] = sections.get(section, {}) | values
    with pytest.raises(UserError, match=message):
        validate(make_run(base, tmp_path, **sections), 2)


def test_the_clipped_ratio_may_stand_in_for_tis(base, tmp_path):
    """loss.old_logprobs=sampler: the ratio is counted from the weights that sampled, so it is no longer 1 at the first
    update of a step sampled ahead."""
    config = ahead_run(base, tmp_path, loss={"tis_cap": 0.0, "old_logprobs": "sampler"}, train={"batch_size": 0})
    train(config, Watched(config))
    for m in lines(config):
        assert (abs(m["ratio"] - 1) > 1e-4) == (m["step"] % 3 > 0), m["step"]


def in_processes(base: Path, folder: Path, ranks: int, *flags: str) -> list[dict[str, Any]]:
    """round_methods.py, with one thread, on so many ranks; the lines of its metrics.jsonl."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}",
               str(ROOT / "tests/helpers/round_methods.py"), str(base), str(folder), "--ahead", *flags]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": str(3 - ranks), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_B2_two_ranks_sample_what_one_does(base, tmp_path):
    """A monitor pass, further rounds and drawing by weights on two ranks: the same metrics as one rank's, within the order
    of float32 sums."""
    config = ahead_run(base, tmp_path / "one", loss=R2VPO)
    train(config, Everything(config))
    for mine, other in zip(lines(config), in_processes(base, tmp_path / "two", 2), strict=True):
        for name in ("reward", "length", "sampled_tokens", "rounds", "compared_tokens", "trained_tokens", "off_policy"):
            assert mine.get(name, -1) == pytest.approx(other.get(name, -1), rel=1e-3), (mine["step"], name)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_vllm_engine_works_beside_the_update(tmp_path, ranks):
    """The engine is driven from another thread, on two ranks while these add up gradients; on one with fewer threads than
    OpenMP would take, which vLLM checks. After every wait it holds the
    newest weights: the steps not sampled ahead agree with the trainer, the others are one step off."""
    metrics = in_processes(make_base(tmp_path / "base", hidden_size=128), tmp_path, ranks, "--vllm")
    assert [m["step"] for m in metrics] == list(range(7))
    for m in metrics:
        if m["step"] % 3:
            assert m["compared_tokens"] == 0 and m["off_policy"] > 1e-3
        else:
            assert m["compared_tokens"] > 0 and m["mismatch"] < 1e-4 and "off_policy" not in m
