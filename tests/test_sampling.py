"""What a step samples: rounds of dynamic sampling, problems drawn by weight, the monitor pass; resumed, and on two ranks.

Run: python -m pytest tests/test_sampling.py        The methods it trains with are in round_methods.py.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from round_methods import NUM_PROBLEMS, R2VPO, Dynamic, Everything, Watched, make_base, make_run
from safetensors.torch import load_file
from tiny import CPU, fill, make_config, make_problems, make_rows, score_rows, update

from nanolapo.alarms import MismatchError
from nanolapo.config import Config, RunStopped
from nanolapo.data.load import Data
from nanolapo.data.order import batch_indices, round_indices, weighted_order
from nanolapo.data.problems import Problem
from nanolapo.grader import Grader
from nanolapo.loop import train
from nanolapo.methods.base import Method, MonitorPlan, SamplingPlan
from nanolapo.metrics import Stopwatch
from nanolapo.policy import Policy
from nanolapo.ranks import Ranks
from nanolapo.rollouts import Measured, Rollout, Rollouts, join
from nanolapo.samplers.sampler import Request, Sample
from nanolapo.samplers.torch_sampler import TorchSampler
from nanolapo.sampling import sample, sample_and_grade, sample_and_measure
from nanolapo.session import progress

ROOT = Path(__file__).parents[1]
TIMING = ("seconds/", "tokens_per_second", "memory_gb")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("sampling") / "base")


def run(config: Config, method_class: type[Dynamic]) -> tuple[Any, list[dict[str, Any]]]:
    """Train to the end; returns the method and the lines of metrics.jsonl without their timings."""
    method = method_class(config)
    train(config, method)
    lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
    return method, [{k: v for k, v in json.loads(line).items() if not k.startswith(TIMING)} for line in lines]


def weights_of_run(config: Config) -> dict[str, torch.Tensor]:
    return load_file(config.run_dir / "model" / "model.safetensors")


# ------------------------------------------------------------------------------------------------------ order of problems


@pytest.mark.parametrize("weights", [None, np.arange(1.0, 12.0)])
def test_D3_rounds_are_a_function_of_seed_and_step(weights):
    """No problem twice within a step, all problems in the end, then nothing; another step or seed, another order."""
    orders = {}
    for seed in range(2):
        for step in range(5):
            rounds = [round_indices(11, step, number, 3, seed, weights) for number in range(6)]
            assert [len(r) for r in rounds] == [3, 3, 3, 2, 0, 0]
            assert sorted(sum(rounds, [])) == list(range(11))
            assert rounds == [round_indices(11, step, number, 3, seed, weights) for number in range(6)]
            orders[seed, step] = sum(rounds, [])
            if weights is None:  # round 0 keeps to the epochs, whatever other steps needed; the rest is shuffled
                assert rounds[0] == batch_indices(11, step, 3, seed) and sum(rounds[1:], []) != sorted(
                    sum(rounds[1:], [])
                )
    assert len({tuple(order) for order in orders.values()}) == 10


def test_fewer_problems_than_prompts():
    """A batch that repeats problems leaves none for a second round."""
    assert set(round_indices(3, 0, 0, 4, 0)) == {0, 1, 2} and round_indices(3, 0, 1, 4, 0) == []


def test_weighted_drawing_has_the_right_odds():
    """4000 draws of two out of weights 1, 2, 5, 0: first and second place by enumeration, zero weight never."""
    weights = np.array([1.0, 2.0, 5.0, 0.0])
    draws = Counter(tuple(weighted_order(weights, str(seed))[:2]) for seed in range(4000))
    for (first, second), count in draws.items():
        odds = weights[first] / 8 * weights[second] / (8 - weights[first])
        assert abs(count / 4000 - odds) < 4 * np.sqrt(odds / 4000)
    assert len(draws) == 6 and len(weighted_order(weights, "x")) == 3


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, -1.0], [1.0, np.nan], [np.inf, 1.0]])
def test_impossible_weights_are_refused(weights):
    with pytest.raises(ValueError, match="weights"):
        round_indices(2, 0, 0, 1, 0, np.array(weights))


# ------------------------------------------------------------------------------------------------------ dynamic sampling


def test_dynamic_sampling_fills_the_batch(base, tmp_path):
    """Rounds until 4 groups have spread; exactly the 4 drawn first are trained on; everything sampled is counted and
    reaches after_step; no problem twice in a step."""
    config = make_run(base, tmp_path, train={"steps": 4})
    method, metrics = run(config, Dynamic)
    assert max(m["rounds"] for m in metrics) > 1, "no second round: this test would show nothing"
    assert any(m["kept_groups"] == 4 for m in metrics)
    rounds, trained, after = method.of("reward"), method.of("advantage"), method.of("after_step")
    total = 0
    for m, batch, everything in zip(metrics, trained, after, strict=True):
        mine = [rounds.pop(0) for _ in range(int(m["rounds"]))]
        groups = [(p.id, rows) for r in mine for p, rows in zip(r.problems, r.by_group(first_tokens(r)), strict=True)]
        assert len({name for name, _ in groups}) == len(groups) == len(everything.problems)
        with_spread = [name for name, rows in groups if 0 < (rows % 6 == 0).sum() < 4]
        assert [p.id for p in batch.problems] == with_spread[:4] and m["kept_groups"] == min(4, len(with_spread))
        assert m["rounds"] == 6 or sum(len(r.problems) for r in mine[:-1]) < len(groups)
        enough_before = [name for r in mine[:-1] for name in (p.id for p in r.problems) if name in with_spread]
        assert len(enough_before) < 4, "a round too many"
        total += sum(int(r.lengths_B.sum()) for r in mine)
        assert m["sampled_tokens"] == total and m["trained_tokens"] == batch.lengths_B.sum() and m["updates"] == 2
        assert m["reward/first"] == pytest.approx(np.mean(first_tokens(everything) % 6 == 0))
    assert not rounds and method.of("sampling") == [0, 1, 2, 3]


def first_tokens(rollouts) -> np.ndarray:
    return np.array([ids[0] for ids in rollouts.response_ids])


class Never(Dynamic):
    max_rounds = 3

    def reward(self, rollouts):
        return {name: np.zeros(len(rollouts)) for name in super().reward(rollouts)}


def test_D12_no_signal_ever_is_bounded_skipped_and_said(base, tmp_path, capsys):
    """Reward always 0: three rounds, no update, weights bit-identical, a warning at every such step; the run goes on."""
    config = make_run(base, tmp_path)
    _, metrics = run(config, Never)
    assert [m["rounds"] for m in metrics] == [3, 3] and [m["kept_groups"] for m in metrics] == [0, 0]
    assert [(m["updates"], m["updates_skipped"] > 0) for m in metrics] == [(0, True)] * 2
    assert metrics[0]["mismatch"] < 1e-4  # sampler and trainer are compared all the same
    start, end = load_file(base / "model.safetensors"), weights_of_run(config)
    assert all(torch.equal(start[name], end[name]) for name in start)
    said = capsys.readouterr().out
    assert "WARNING step 0: for 1 step the method has kept no group" in said and "WARNING step 1: for 2 steps" in said


def test_D12_problems_run_out(base, tmp_path):
    """30 problems, 8 prompts a round, 6 rounds allowed: 8, 8, 8, 6, and no fifth round."""
    config = make_run(base, tmp_path, rollout={"prompts_per_step": 8})
    method, metrics = run(config, type("Greedy", (Never,), {"max_rounds": 6}))
    assert [len(r.problems) for r in method.of("reward")] == [8, 8, 8, 6] * 2 and metrics[0]["rounds"] == 4


def test_D12_goes_on_with_what_it_has(base, tmp_path):
    """One round only and rare rewards: fewer groups than planned are trained on, and they alone are in the denominators."""
    config = make_run(base, tmp_path)
    method, metrics = run(config, type("Once", (Dynamic,), {"max_rounds": 1, "every": 12}))
    kept = [m["kept_groups"] for m in metrics]
    assert any(0 < k < 4 for k in kept) and all(m["rounds"] == 1 for m in metrics)
    for m, batch in zip(metrics, method.of("advantage"), strict=True):
        if m["kept_groups"]:
            assert m["trained_tokens"] == batch.lengths_B.sum() and len(batch.problems) == m["kept_groups"]


def test_a_plain_method_has_one_round(base, tmp_path):
    config = make_run(base, tmp_path)
    train(config, Method(config))
    lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [(m["rounds"], m["kept_groups"]) for m in lines] == [(1, 4), (1, 4)]


# ------------------------------------------------------------------------------------------------------ monitor


def test_monitor_pass(base, tmp_path):
    """After sampling(step), before the step's own rollouts: the named problems, graded, counted, logged; seeds of its own,
    so that a problem sampled twice in a step is not answered the same."""

    class Watch(Dynamic):
        max_rounds = 1

        def monitor(self, step):  # the step's own problems first: at the same places of their plan
            own = batch_indices(NUM_PROBLEMS, step, 4, 0)
            return MonitorPlan((*own, *(i for i in range(NUM_PROBLEMS) if i not in own)), 4, 1.0, 6, whole_rows=True)

        def on_monitor(self, rollouts):
            self.seen.append(("on_monitor", rollouts))
            return {"monitor/groups": float(len(rollouts.problems))}

    config = make_run(base, tmp_path)
    method, metrics = run(config, Watch)
    assert [name for name, _ in method.seen] == ["sampling", "on_monitor", "reward", "advantage", "after_step"] * 2
    total = 0
    for m, monitored, own in zip(metrics, method.of("on_monitor"), method.of("reward"), strict=True):
        assert m["monitor/groups"] == NUM_PROBLEMS == len({p.id for p in monitored.problems})
        assert monitored.correct_B.shape == (120,) and len(monitored.texts) == 120 and not monitored.unmatched_B.any()
        total += int(monitored.lengths_B.sum() + own.lengths_B.sum())
        assert m["sampled_tokens"] == total
        answers = {p.id: set(map(bytes, g)) for p, g in zip(monitored.problems, groups_of(monitored), strict=True)}
        for p, g in zip(own.problems, groups_of(own), strict=True):
            assert not set(map(bytes, g)) & answers[p.id]


def test_a_monitor_pass_brings_lengths_and_verdicts_only(base, tmp_path):
    """Unless the plan asks for whole rows: the same numbers in the same order, and no answer that could be read."""

    class Watch(Dynamic):
        whole_rows, max_rounds = False, 1

        def monitor(self, step):
            return MonitorPlan((7, 2, 11, 5, 0), 4, 1.5, 6, self.whole_rows)

        def on_monitor(self, found):
            self.seen.append(("on_monitor", found))
            return {"monitor/length": float(found.lengths_B.mean())}

    short, whole = (
        run(make_run(base, tmp_path / name), type(name, (Watch,), {"whole_rows": name == "whole"}))
        for name in ("short", "whole")
    )
    assert short[1] == whole[1]  # every logged number of every step
    for found, rollouts in zip(short[0].of("on_monitor"), whole[0].of("on_monitor"), strict=True):
        assert type(found) is Measured and type(rollouts) is Rollouts and len(found) == len(rollouts) == 20
        assert found.problems == rollouts.problems and found.correct_B.dtype == bool
        assert found.lengths_B.tolist() == rollouts.lengths_B.tolist()
        assert found.correct_B.tolist() == rollouts.correct_B.tolist()
        assert (found.by_group(found.lengths_B) == rollouts.by_group(rollouts.lengths_B)).all()


def groups_of(rollouts) -> list[list[np.ndarray]]:
    size = rollouts.group_size
    return [rollouts.response_ids[i : i + size] for i in range(0, len(rollouts), size)]


def test_A5_another_temperature_is_for_monitors_only(base, tmp_path):
    """A step's own plan at a temperature that the trainer does not score at is refused. A monitor's rows may be trained on
    at any temperature: they are left out of the mismatch, and nothing else is."""

    class Hot(Dynamic):
        def sampling(self, step):
            return SamplingPlan(4, 4, 1.5, 6)

    config = make_run(base, tmp_path)
    with pytest.raises(ValueError, match="temperature 1.5.*rollout.temperature=1.0"):
        run(config, Hot)
    method, metrics = run(make_run(base, tmp_path / "b"), Everything)
    assert all(rollouts.unmatched_B.all() for rollouts in method.of("on_monitor"))
    assert all(m["mismatch_max"] < 1e-4 for m in metrics)
    first = method.of("reward")[0]
    assert first.unmatched_B.tolist() == [True] * 4 + [False] * 12
    assert [bytes(x) for x in first.response_ids[:4]] == [bytes(x) for x in method.of("on_monitor")[0].response_ids[:4]]

    class Careless(Everything):
        def edit_rollouts(self, rollouts):
            edited = super().edit_rollouts(rollouts)
            fill(rollouts, unmatched=False)
            return edited

    with pytest.raises(MismatchError):
        run(make_run(base, tmp_path / "c", train={"steps": 9, "learning_rate": 3e-2}), Careless)


def test_unmatched_rows_leave_the_mismatch_alone(tied_model):
    """Two rows off by 1, marked: mean and maximum are those of the others; unmarked they show."""
    policy, rollouts = Policy(make_config(tied_model), CPU), make_rows([5, 9, 7, 3])
    score_rows(policy, rollouts)
    rollouts.rows[1].sampler_logprobs = rollouts.sampler_logprobs[1] + 1
    plain = update(Policy(policy.config, CPU), rollouts, [1.0, -1.0, 1.0, -1.0])
    rollouts.rows[1].unmatched = True
    marked = update(Policy(policy.config, CPU), rollouts, [1.0, -1.0, 1.0, -1.0])
    assert plain["mismatch"] == pytest.approx(9 / 24, rel=1e-4) and plain["mismatch_max"] == pytest.approx(1, rel=1e-4)
    assert marked["mismatch"] < 1e-4 and marked["mismatch_max"] < 1e-4
    assert marked["trained_tokens"] == plain["trained_tokens"] == 24
    assert marked["grad_norm"] == pytest.approx(plain["grad_norm"])


# ------------------------------------------------------------------------------------------------------ batches of groups


def test_put_moves_all_that_belongs_to_a_row():
    target, source = make_rows([3, 4, 5, 6]), make_rows([7, 8], seed=1, budgets=[1.0, 2.0], finished=[False, True])
    fill(source, correct=True, unmatched=True)
    target.put(2, source.rows[0])
    for f in dataclasses.fields(Rollout):
        if f.name in ("problem", "place"):  # a row stays in its group
            assert getattr(target.rows[2], f.name) == getattr(target.rows[3], f.name) != getattr(source.rows[0], f.name)
        else:
            assert getattr(target.rows[2], f.name) is getattr(source.rows[0], f.name), f.name
    assert target.lengths_B.tolist() == [3, 4, 7, 6] and source.rows[0].problem.id == "demo:0"


def test_take_and_join():
    rollouts = make_rows([1, 2, 3, 4, 5, 6], budgets=[1, 2, 3, 4, 5, 6])
    rollouts.rows[4].unmatched = True
    last = rollouts.take([2, 0])
    assert last.lengths_B.tolist() == [5, 6, 1, 2] and last.budgets_B.tolist() == [5, 6, 1, 2]
    assert [p.id for p in last.problems] == ["demo:2", "demo:0"] and last.unmatched_B.tolist() == [1, 0, 0, 0]
    both = join([last, rollouts.take([1])])
    assert both.rows == rollouts.rows


def test_kept_groups_come_first_drawn_first_kept():
    """At most so many; all when none is kept, marked as not to be trained on."""
    rollouts = make_rows([1, 2, 3, 4, 5, 6])
    rollouts.set_keep(np.array([False, True, True]))
    assert rollouts.kept(5).lengths_B.tolist() == [3, 4, 5, 6] and rollouts.kept(1).lengths_B.tolist() == [3, 4]
    rollouts.set_keep(np.zeros(3, dtype=bool))
    assert rollouts.kept(2).lengths_B.tolist() == [1, 2, 3, 4, 5, 6] and not rollouts.kept(2).keep_B.any()


# ------------------------------------------------------------------------------------------------------ grading


class CutCounts(Dynamic):
    max_rounds, cut_answers_count = 1, True


def test_answers_are_graded_while_others_are_sampled(base, tmp_path, monkeypatch):
    """Two rows at a time: the first four answers have their verdicts before the last is sampled. Every row gets the verdict
    on its own text: made up here, and right for some."""
    tokens, at_fourth, futures = [0], list[int](), list[Future[bool]]()
    generate, submit = TorchSampler.generate, Grader.submit

    def told_generate(self: TorchSampler, requests: Any, decoding: Any, progress: Any, finished: Any) -> list[Sample]:
        def counted(new: int) -> None:
            tokens[0] += new
            progress(new)

        def then_wait(row: int, sample: Sample) -> None:
            finished(row, sample)
            if len(futures) == 4:
                assert {future.result(60) for future in futures} <= {True, False}
                at_fourth.append(tokens[0])

        return generate(self, requests, decoding, counted, then_wait)

    def told_submit(self: Grader, text: str, answer: str) -> Future[bool]:
        futures.append(submit(self, text, answer))
        return futures[-1]

    monkeypatch.setattr(TorchSampler, "generate", told_generate)
    monkeypatch.setattr(Grader, "submit", told_submit)
    lines = [json.dumps({"problem": f"Start at {i:03}.", "answer": str(i % 3)}) + "\n" for i in range(NUM_PROBLEMS)]
    (tmp_path / "easy.jsonl").write_text("".join(lines))
    monkeypatch.setattr(Data, "decode", lambda _, ids: rf"\boxed{{{ids[0] % 3}}}")
    data = {"sources": [{"name": "easy", "path": str(tmp_path / "easy.jsonl")}]}
    config = make_run(base, tmp_path, data=data, rollout={"max_rows": 2})
    method, _ = run(replace(config, run=replace(config.run, seed=1)), CutCounts)  # none of its first answers ends early
    first_step = method.of("reward")[0].lengths_B
    assert at_fourth == [first_step[:4].sum()] and len(futures) == 2 * 4 * 4
    verdicts = []
    for rollouts in method.of("reward"):
        for row, ids in enumerate(rollouts.response_ids):
            verdicts.append(int(rollouts.problems[row // 4].answer) == ids[0] % 3)
            assert rollouts.correct_B[row] == verdicts[-1]
    assert any(verdicts) and not all(verdicts)


class Scripted:
    """A sampler whose answers, one a request, are finished from the last to the first. Then it may be interrupted."""

    def __init__(self, interrupted: bool = False) -> None:
        self.interrupted = interrupted

    def generate(self, requests: Any, decoding: Any, progress: Any, finished: Any) -> list[Sample]:
        samples = [Sample(np.array([i]), np.zeros(1, np.float32), True) for i in range(len(requests))]
        for i in reversed(range(len(requests))):
            finished(i, samples[i])
        if self.interrupted:
            time.sleep(0.5)
            raise KeyboardInterrupt
        return samples


def scripted_session(grader: Any, decode: Any, interrupted: bool = False) -> Any:
    return SimpleNamespace(
        grader=grader, data=SimpleNamespace(decode=decode), ranks=Ranks(), sampler=Scripted(interrupted)
    )


def requests_for(answers: list[str]) -> list[Request]:
    return [Request([1], 0, 1, Problem(f"demo:{i}", "q", answer, None, "demo")) for i, answer in enumerate(answers)]


def test_a_stop_does_not_wait_for_answers_that_never_end():
    """Eight answers that math-verify never finishes, a deadline of 30 s each: a Ctrl-C ends it within seconds."""
    with pytest.raises(KeyboardInterrupt), Grader(workers=1, deadline_s=30.0) as grader:
        assert grader.grade_all([r"\boxed{x+x}"], ["2x"]) == [True]  # a worker is up
        start = time.monotonic()
        session = scripted_session(grader, lambda _: r"\boxed{(x+1)^{100}(y+1)^{100}(z+1)^{100}}", interrupted=True)
        sample(session, requests_for([f"x+{number}" for number in range(8)]), 1.0)
    assert 0.5 < time.monotonic() - start < 10


def test_verdicts_belong_to_their_rows_whenever_they_come():
    """Answers are finished from last to first, and verdicts come from first to last, after sampling has ended."""
    futures: dict[str, Future[bool]] = {}

    def submit(text: str, answer: str) -> Future[bool]:
        futures[f"{text}/{answer}"] = Future()
        return futures[f"{text}/{answer}"]

    session = scripted_session(SimpleNamespace(submit=submit), lambda ids: f"text {ids[0]}")
    samples, texts, verdicts = sample(session, requests_for(["a", "b", "c"]), 1.0)
    assert list(futures) == ["text 2/c", "text 1/b", "text 0/a"] and texts == ["text 0", "text 1", "text 2"]
    for name, verdict in (("text 0/a", True), ("text 1/b", False), ("text 2/c", True)):
        futures[name].set_result(verdict)
    assert [verdict.result(0) for verdict in verdicts] == [True, False, True] and samples[1].ids.tolist() == [1]


def all_right_session(ranks: Any, vocab_size: int = 9, **rollout: int) -> Any:
    """A scripted session at step 3, whose grader finds every answer right; `said` holds what it said."""
    config, right = make_config(rollout=rollout), Future[bool]()
    right.set_result(True)
    session = scripted_session(SimpleNamespace(submit=lambda *_: right, errors=0, total=8), lambda _: "text")
    session.config, session.method, session.policy = config, Method(config), SimpleNamespace(vocab_size=vocab_size)
    session.step, session.sampled_tokens, session.said, session.ranks = 3, 0, [], ranks
    session.say = session.said.append
    session.data.prompter = SimpleNamespace(ids_and_given=lambda *_: ([1], None))
    return session


def test_ranks_of_one_engine_bring_their_rows_once():
    """rollout.tensor_parallel=2: both ranks of an engine have sampled the same groups."""
    ranks = SimpleNamespace(is_main=True, engine=lambda _: (0, 1), gather=lambda part: [part, part])
    session = all_right_session(ranks, tensor_parallel=2)
    draw = dict(enumerate(make_problems(4)))
    rollouts = sample_and_grade(session, session.method.sampling(0), draw, Stopwatch())
    measured = sample_and_measure(session, session.method.sampling(0), draw, Stopwatch())
    assert measured.problems == rollouts.problems and measured.lengths_B.tolist() == rollouts.lengths_B.tolist()
    session.sampled_tokens -= 8
    assert [p.id for p in rollouts.problems] == [f"demo:{i}" for i in range(4)] and session.sampled_tokens == 8


def on_two_ranks(function: Callable[[int, Callable[[Any], list[Any]]], Any]) -> list[Any]:
    """Call function(rank, gather) in two threads; gather brings the values of both together, in rank order."""
    together, values = threading.Barrier(2, timeout=20), [None, None]

    def gather(rank: int, value: Any) -> list[Any]:
        values[rank] = value
        together.wait()
        both = list(values)
        together.wait()
        return both

    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(function, rank, partial(gather, rank)) for rank in (0, 1)]
        return [future.result() for future in futures]


def test_a_rank_whose_groups_are_all_dropped_brings_none():
    """None of rank 1's groups is usable: both ranks go on with those of rank 0, and count the tokens of all."""

    def of_rank(rank: int, gather: Callable[[Any], list[Any]]) -> tuple[list[str], list[str], int, list[str]]:
        ranks = SimpleNamespace(is_main=rank == 0, engine=lambda _: (rank, 2), gather=gather)
        session = all_right_session(ranks, vocab_size=0 if rank else 9)
        draw = dict(enumerate(make_problems(4)))
        rollouts = sample_and_grade(session, session.method.sampling(0), draw, Stopwatch())
        measured = sample_and_measure(session, session.method.sampling(0), draw, Stopwatch())
        ids = [[p.id for p in found.problems] for found in (rollouts, measured)]
        return ids[0], ids[1], session.sampled_tokens, session.said

    for rollouts, measured, tokens, said in on_two_ranks(of_rank):
        assert rollouts == measured == ["demo:0", "demo:2"] and tokens == 2 * 2 * 4  # of both calls, given tokens: none
        assert [line.split(" had ")[0] for line in said] == [
            "WARNING step 3: 2 of 4 groups (first: problem demo:1)"
        ] * 2


class Damaged(TorchSampler):
    """An answer of group 1 has a log-prob that is no number; with `all`, one of every group."""

    all = False

    def generate(self, *arguments: Any) -> list[Sample]:
        samples = super().generate(*arguments)
        for damaged in samples[1::4] if self.all else samples[5:6]:
            damaged.logprobs[-1] = np.nan
        return samples


def test_a_group_with_an_answer_that_cannot_be_trained_on_is_dropped_and_counted(base, tmp_path, monkeypatch, capsys):
    """It is not rewarded, trained on or remembered, but its tokens were sampled. `broken` is the share of groups, and a
    warning names its problem."""
    tokens, told = [], []
    for name, sampler in (("whole", TorchSampler), ("damaged", Damaged)):
        monkeypatch.setattr("nanolapo.samplers.choose.TorchSampler", sampler)
        method, metrics = run(make_run(base, tmp_path / name, train={"steps": 1}), Watched)
        ((rewarded,), (trained,), (after,)) = (method.of(hook) for hook in ("reward", "advantage", "after_step"))
        tokens.append(metrics[0]["sampled_tokens"])
        groups = [place for place in range(4) if place != 1 or name == "whole"]
        for rollouts in (rewarded, trained, after):
            assert [row.place for row in rollouts.rows[::4]] == groups
        assert metrics[0]["broken"] == 1 - len(groups) / 4 and np.isfinite(metrics[0]["grad_norm"])
        told.append([line for line in capsys.readouterr().out.splitlines() if "log-prob that is not finite" in line])
        if name == "whole":
            second = rewarded.problems[1].id
    assert tokens[0] == tokens[1] and told[0] == []
    assert [line.split(" had ")[0] for line in told[1]] == [f"WARNING step 0: 1 of 4 groups (first: problem {second})"]


def test_a_sampler_without_any_usable_group_stops_the_run(base, tmp_path, monkeypatch):
    monkeypatch.setattr("nanolapo.samplers.choose.TorchSampler", Damaged)
    monkeypatch.setattr(Damaged, "all", True)
    with pytest.raises(RunStopped, match="^step 0: 4 of 4 groups .* had an answer .* no group is left"):
        run(make_run(base, tmp_path), Watched)


# ------------------------------------------------------------------------------------------------------ resume and ranks


def test_D3_resuming_is_bit_exact_with_every_hook_in_use(base, tmp_path):
    """Dynamic sampling, weights that remember, a monitor pass and R2VPO's lam: 2 steps, resumed for 3 more, equal 5."""
    runs = []
    for name, stops in (("whole", [5]), ("resumed", [2, 5])):
        for steps in stops:
            config = make_run(base, tmp_path / name, loss=R2VPO, train={"steps": steps})
            method, metrics = run(config, Everything)
        saved = json.loads((config.run_dir / "checkpoints/step-000005/state.json").read_text())
        runs.append((metrics, weights_of_run(config), method.state_dict(), method.loss.state, saved["alarms"]))
    (metrics, weights, state, loss_state, alarms), again = runs
    assert alarms == again[4] and alarms["base_mismatch"] == metrics[0]["mismatch"]
    assert metrics == again[0] and max(m["rounds"] for m in metrics) > 1
    assert [m["r2vpo_lam"] for m in metrics] == [m["r2vpo_lam"] for m in again[0]] and len(metrics) == 5
    assert len({m["r2vpo_lam"] for m in metrics}) == 5, "lam never moved: this test would show nothing"
    assert all(torch.equal(weights[name], again[1][name]) for name in weights)
    assert state == again[2] and loss_state == again[3] and max(state["weights"]) != min(state["weights"])


@pytest.mark.slow
def test_B2_two_ranks_sample_and_train_the_same(base, tmp_path):
    """Rounds, weights, regrading and a monitor pass of one and of three problems (a rank may have none) on two ranks: the
    same problems and samples as on one, the same counts, and the same model to float32 rounding."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, str(ROOT / "tests/helpers/round_methods.py"), str(base), str(tmp_path / "two")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert result.returncode == 0, result.stderr
    config = make_run(base, tmp_path / "one", loss=R2VPO, train={"steps": 3})
    _, one = run(config, Everything)
    two = [json.loads(line) for line in (tmp_path / "two/run/metrics.jsonl").read_text().splitlines()]
    assert max(m["rounds"] for m in one) > 1
    for name in ("rounds", "kept_groups", "sampled_tokens", "length", "reward", "no_signal", "trained_tokens"):
        assert [m[name] for m in one] == [m[name] for m in two], name
    for name in ("grad_norm", "loss", "r2vpo_lam", "ratio_variance"):
        assert [m[name] for m in one] == pytest.approx([m[name] for m in two], rel=1e-3, abs=1e-6), name
    left, right = weights_of_run(config), load_file(tmp_path / "two/run/model/model.safetensors")
    assert all((left[name] - right[name]).abs().mean() < 1e-5 for name in left)


def test_progress_goes_by_steps_or_tokens_whichever_is_further():
    """A run under a token limit is as far as its tokens, so schedules end with it; without one, as far as its steps."""
    config = make_config(train={"steps": 40})
    assert [progress(config, step, 10**9) for step in (0, 10, 40)] == [0, 0.25, 1]
    limited = replace(config, train=replace(config.train, sampled_tokens=1000))
    assert progress(limited, 4, 750) == 0.75 and progress(limited, 36, 750) == 0.9
    assert progress(limited, 4, 1000) == 1


def test_method_and_learning_rate_are_told_the_progress_of_the_run(base, tmp_path):
    """A limit of 500 tokens ends it after few of 50 steps; the learning rate has followed its cosine, a floor of 0."""
    train = {"steps": 50, "sampled_tokens": 500, "learning_rate": 1e-4, "final_lr_fraction": 0.0}
    method, metrics = run(make_run(base, tmp_path, train=train), Dynamic)
    before = [0.0, *[m["sampled_tokens"] / 500 for m in metrics]]
    assert method.told == before[:-1] and before[-2] < 1 <= before[-1] and len(metrics) < 50
    cosine = [1e-4 * (1 + math.cos(math.pi * done)) / 2 for done in before[:-1]]
    assert [m["learning_rate"] for m in metrics] == pytest.approx(cosine)
