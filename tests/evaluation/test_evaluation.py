"""Evaluation numbers against brute force and hand-computed cases, the sample files of several ranks, tables, user errors.

Run: python -m pytest tests/evaluation/test_evaluation.py
"""

from __future__ import annotations

import errno
import itertools
import math
import random
import runpy
import sys
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from benchmark_helpers import FakeRanks, FakeSampler, benchmark, evaluation_config
from folders import train_byte_bpe
from tiny import make_answer, make_config
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from nanolapo import cli
from nanolapo.config import EvaluateConfig, PromptConfig, RunStopped, UserError
from nanolapo.config_file import load_config
from nanolapo.data.demo_task import parse_question
from nanolapo.data.load import Data
from nanolapo.data.prompts import Prompter
from nanolapo.demo.pretrain import MANNERS, DemoConfig, make_model, make_tokenizer
from nanolapo.demo.warm_start import draw_example, warm_start
from nanolapo.evaluation.evaluate import evaluate
from nanolapo.evaluation.passes import Pass, parse_models
from nanolapo.evaluation.scores import (
    Answer,
    aes,
    bootstrap_interval,
    interval_of_average,
    keyword_counts,
    pass_at_k,
    pass_at_powers,
    rank_correlation,
    read_answers,
    sample_file,
    score_sets,
    summarize,
)
from nanolapo.grader import Grader, _finished, grade
from nanolapo.metrics import append
from nanolapo.model.folder import load_tokenizer
from nanolapo.provenance import model_identity
from nanolapo.samplers.choose import make_sampler
from nanolapo.samplers.sampler import Sample

ROOT = Path(__file__).parents[2]


SETS = (("a1", 10), ("a2", 20), ("b1", 25))  # problem (its first letter is its set), length


# ---- numbers ----


@pytest.mark.parametrize("num_samples", [1, 4, 6])
def test_pass_at_k_is_the_share_of_k_subsets_with_a_right_one(num_samples):
    for right, k in itertools.product(range(num_samples + 1), range(1, num_samples + 1)):
        verdicts = [True] * right + [False] * (num_samples - right)
        brute = np.mean([any(chosen) for chosen in itertools.combinations(verdicts, k)])
        assert pass_at_k(num_samples, right, k) == pytest.approx(brute)
    with pytest.raises(ValueError, match="needs at least"):
        pass_at_k(num_samples, 0, num_samples + 1)


def test_pass_at_1_weighs_problems_alike():
    answers = [make_answer("a", i, correct=i == 0) for i in range(4)] + [
        make_answer("b", i, correct=True) for i in range(2)
    ]
    assert pass_at_powers(answers)["1"] == summarize(answers, 10)["accuracy"] == (0.25 + 1.0) / 2


def test_pass_at_powers_of_two_on_problems_of_unequal_luck():
    """By brute force over all subsets, problem by problem; k stops at the samples that every problem has."""
    right = {"a": (4, 0), "b": (4, 1), "c": (4, 3), "d": (8, 2)}  # problem: (samples, right ones)
    answers = [make_answer(q, i, correct=i < c) for q, (n, c) in right.items() for i in range(n)]
    made = pass_at_powers(answers)
    assert list(made) == ["1", "2", "4"]
    for k, value in made.items():
        brute = [
            np.mean([any(i < c for i in chosen) for chosen in itertools.combinations(range(n), int(k))])
            for n, c in right.values()
        ]
        assert value == pytest.approx(np.mean(brute))
    assert summarize(answers, 10)["pass_at_k"] == made
    assert pass_at_powers(answers[:1]) == {"1": 0.0}


def test_aes_worked_values():
    assert aes(73.4, 932, 73.4, 932) == 0.0
    assert aes(50, 50, 50, 100) == 0.5  # half the tokens, the same accuracy
    assert aes(55, 100, 50, 100) == pytest.approx(0.3)  # + 10 % accuracy counts three times
    assert aes(45, 100, 50, 100) == pytest.approx(-0.5)  # - 10 % five times
    assert aes(64.8, 3832, 62.5, 6229) == pytest.approx(0.495, abs=5e-4)  # LAPO-I, base B, from the paper's averages
    assert math.isnan(aes(10, 100, 0, 100)) and math.isnan(aes(10, 100, 10, 0))


def test_bootstrap_interval_on_known_cases():
    assert bootstrap_interval([0.3] * 7, 50) == (pytest.approx(0.3), pytest.approx(0.3))
    coin = [0.0, 1.0] * 200  # standard error 0.025
    low, high = bootstrap_interval(coin, 4000)
    assert low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.005) and high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.005)
    assert bootstrap_interval(coin, 100) == bootstrap_interval(coin, 100)  # seeded


def test_the_interval_of_an_average_over_sets_resamples_within_each():
    """Two sets of coins, 400 and 100: the average's standard error is sqrt(0.025^2 + 0.05^2) / 2."""
    error = math.sqrt(0.025**2 + 0.05**2) / 2
    low, high = interval_of_average([[0.0, 1.0] * 200, [0.0, 1.0] * 50], 4000)
    assert (low, high) == (pytest.approx(0.5 - 1.96 * error, abs=0.004), pytest.approx(0.5 + 1.96 * error, abs=0.004))
    assert interval_of_average([[0.0] * 9, [1.0] * 3], 50) == (0.5, 0.5)  # each set counts once, whatever its size
    rows = score_sets("m", 0.6, "", [make_answer(q, source=q[0], length=n) for q, n in SETS], make_config())
    assert [(row["set"], row["problems"], row["samples"]) for row in rows] == [
        ("a", 2, 2),
        ("b", 1, 1),
        ("average", 3, 3),
    ]
    assert rows[2]["tokens"] == 20 and rows[2]["tokens_interval"] == (17.5, 22.5)  # half of 10 to 20, half of 25


def test_rank_correlation_with_ties_by_hand():
    # x ranks 0.5 0.5 2 3, y ranks 0 1 2.5 2.5; centred -1 -1 .5 1.5 and -1.5 -.5 1 1: 4 / sqrt(4.5 * 4.5)
    assert rank_correlation([1, 1, 2, 3], [10, 20, 30, 30]) == pytest.approx(4 / 4.5)
    assert rank_correlation([1, 2, 3], [9, 5, 1]) == pytest.approx(-1)
    assert math.isnan(rank_correlation([1, 1, 1], [1, 2, 3])) and math.isnan(rank_correlation([1, 2], [5, 5]))


# problem: level and the lengths of its answers. The numbers of samples differ, so answers and problems weigh differently.
NEEDS = {"a": (0, [10, 14]), "b": (0, [20, 20, 20, 32]), "c": (1, [30, 50]), "d": (2, [36, 36, 36]), "e": (2, [80])}


def needs() -> list[Answer]:
    """Answers of NEEDS, and of one problem without a level, which must not count."""
    made = [make_answer(q, i, n, level=level) for q, (level, found) in NEEDS.items() for i, n in enumerate(found)]
    return [*made, make_answer("x", 0, 500), make_answer("x", 1, 500)]


def test_adaptivity_is_what_the_levels_above_the_lowest_take_more():
    """By hand: problem means 12, 23 at the lowest level and 40, 36, 80 above it; their levels 0 0 1 2 2."""
    row = summarize(needs(), 4000)
    assert row["adaptivity"] == pytest.approx((40 + 36 + 80) / 3 - (12 + 23) / 2)
    # ranks of the levels 0.5 0.5 2 3.5 3.5, of the lengths 0 1 3 2 4; without their means -1.5 -1.5 0 1.5 1.5, -2 -1 1 0 2
    assert row["need_correlation"] == pytest.approx((3 + 1.5 + 0 + 0 + 3) / math.sqrt(9 * 10))
    spreads = [2.0, math.sqrt(((23 - 20) ** 2 * 3 + (32 - 23) ** 2) / 4), 10.0, 0.0, 0.0, 0.0]
    assert row["length_spread"] == pytest.approx(sum(spreads) / 6)
    one_each = [a for a in needs() if a.index == 0]
    assert summarize(one_each, 10)["length_spread"] is None
    assert summarize([a for a in needs() if a.level == 2], 10)["adaptivity"] is None  # one level: nothing to compare


def test_the_interval_of_adaptivity_draws_problems_within_the_two_parts():
    """All pairs of draws of 2 of 2 and of 3 of 3 problems, each as likely: 4 x 27 differences, with their 95 % range."""
    below, above = (12, 23), (40, 36, 80)
    exact = [
        sum(high) / 3 - sum(low) / 2
        for high in itertools.product(above, repeat=3)
        for low in itertools.product(below, repeat=2)
    ]
    low, high = summarize(needs(), 4000)["adaptivity_interval"]
    assert (low, high) == (
        pytest.approx(np.percentile(exact, 2.5), abs=2),
        pytest.approx(np.percentile(exact, 97.5), abs=2),
    )
    assert (low, high) == summarize(needs(), 4000)["adaptivity_interval"]  # seeded


def test_keywords_are_whole_words_and_counted_once():
    counts = keyword_counts("Wait. RECHECK, re-check, checks; awaiting. So the final answer is given: let thus letter.")
    assert counts == {"self-correction": 3, "alternatives": 0, "context": 2, "conclusion": 2}


def test_summary_without_levels_or_right_answers():
    row = summarize([make_answer("a", i, 4 + i, correct=False, finished=i > 0) for i in range(2)], 10)
    assert (row["accuracy"], row["tokens"], row["truncated"], row["tokens_correct"]) == (0.0, 4.5, 0.5, None)
    assert row["by_level"] == {} and row["length_spread"] == 0.5
    assert [row[key] for key in ("adaptivity", "adaptivity_interval", "need_correlation")] == [None] * 3


# ---- sample files ----


def test_torn_lines_are_left_out_even_inside_a_character(tmp_path):
    path = tmp_path / "x.jsonl"
    append(path, [asdict(make_answer(index=0, text="für"))])
    whole = path.read_bytes()
    for cut in range(1, len(whole) - 1):  # a kill after any byte of the second line
        path.write_bytes(whole + whole[:cut])
        assert [a.index for a in read_answers(path)] == [0]
        append(path, [asdict(make_answer(index=1))])
        assert [a.index for a in read_answers(path)] == [0, 1]


def test_names_with_slashes_and_brackets_make_one_file(tmp_path):
    path = sample_file(tmp_path, "org/model [v1]*", "Org/MATH-500", 0.6, {"seed": 0})
    assert path.parent == tmp_path and not set("/[]*?") & set(path.name)
    assert sample_file(tmp_path, "LAPO-D continued", "demo", 0.6, {}).name.startswith("LAPO-D continued--demo--T0.6--")


def test_ranks_share_the_work_and_a_lost_line_is_sampled_again(tmp_path):
    with Grader() as grader:
        alone = benchmark(evaluation_config(tmp_path / "alone"), grader)
        want = alone.answers(0.6, Pass(), {})
        assert len(want) == 3 * 1 + 3 * 3 == alone.sampler.asked  # type: ignore[union-attr]

        config = evaluation_config(tmp_path / "two")
        first, second = benchmark(config, grader, 0, 2), benchmark(config, grader, 1, 2)
        with pytest.raises(UserError, match="6 samples of m are not there"):  # in earnest it waits for rank 1's half
            first.answers(0.6, Pass(), {})
        second.ranks = FakeRanks(0, 1)  # type: ignore[assignment]
        assert second.answers(0.6, Pass(), {}) == want
        assert first.sampler.asked + second.sampler.asked == len(want)  # type: ignore[union-attr]

        files = sorted((tmp_path / "two/e/samples").glob("*.jsonl"))
        files[0].write_bytes(files[0].read_bytes()[:-9])
        append(files[1], [asdict(read_answers(files[1])[0])])  # a sample that is there twice counts once
        again = benchmark(config, grader)
        assert again.answers(0.6, Pass(), {}) == want and again.sampler.asked == 1  # type: ignore[union-attr]
        assert again.answers(0.6, Pass("told"), {"s:0": 4.0})[0].budget == 4  # other prompts: nothing is reused
        sampler = again.sampler
        again.close()
        assert sampler.closed and again.sampler is None  # type: ignore[union-attr]


def test_the_levels_of_resumed_samples_are_those_of_the_data(tmp_path):
    """The same samples under other levels: nothing is sampled, and what follows the levels is that of today's."""
    config = evaluation_config(tmp_path)
    with Grader() as grader:
        for levels in ([None] * 3, [5, 3, 3]):
            runs = benchmark(config, grader)
            given = zip(runs.data.problems, levels * 2, strict=True)
            runs.data.problems = [replace(problem, level=level) for problem, level in given]
            answers = runs.answers(0.6, Pass(), {})
        assert runs.sampler.asked == 0  # type: ignore[union-attr]
    lengths = {a.problem: a.length for a in answers if a.source == "s"}
    row = score_sets("m", 0.6, "", answers, config)[0]
    assert {k: v["tokens"] for k, v in row["by_level"].items()} == {
        "3": (lengths["s:1"] + lengths["s:2"]) / 2, "5": lengths["s:0"]
    }  # fmt: skip
    assert row["adaptivity"] == lengths["s:0"] - (lengths["s:1"] + lengths["s:2"]) / 2


def failing_grader(failing: Iterable[int]) -> Grader:
    """A grader that takes every answer for right, but has no reply to those with these numbers, as if its workers died."""
    grader, asked = Grader(), itertools.count()
    grader._reply = lambda *_: _finished(None if next(asked) in failing else True)  # type: ignore[method-assign]
    return grader


def test_a_grader_that_fails_stops_the_evaluation_and_keeps_no_verdict(tmp_path):
    with Grader() as grader:
        runs = benchmark(evaluation_config(tmp_path), grader)
        grader.total, grader.errors = 400, 100
        with pytest.raises(RunStopped, match="the grader failed on 2"):
            runs.answers(0.6, Pass(), {})
    assert not list(runs.folder.iterdir())


@pytest.mark.parametrize(
    ("max_rows", "failing", "stored"), [(2, range(12), 0), (1, range(8, 12), 8), (50, (0, 5, 7), 0)]
)
def test_answers_that_could_not_be_graded_are_not_stored_as_wrong(tmp_path, max_rows, failing, stored):
    """A grader without a reply in chunks of 8, 4 and 200; a healthy second run asks for all that was not stored."""
    config = evaluation_config(tmp_path)
    config = replace(config, rollout=replace(config.rollout, max_rows=max_rows))
    runs = benchmark(config, failing_grader(failing))
    with pytest.raises(RunStopped, match=r"the grader failed on \d+% of \d+ answers .* can no longer be trusted"):
        runs.answers(0.6, Pass(), {})
    assert sum(len(read_answers(file)) for file in runs.folder.glob("*.jsonl")) == stored
    again = benchmark(config, failing_grader(()))
    assert all(a.correct for a in again.answers(0.6, Pass(), {}))
    assert again.sampler.asked == 12 - stored  # type: ignore[union-attr]


def test_a_few_answers_that_could_not_be_graded_count_as_wrong_and_are_told(tmp_path, capsys):
    """Two in the first chunk of 8 answers, which are the three of set s and five of the other; one in the second."""
    answers = benchmark(evaluation_config(tmp_path), failing_grader((1, 6, 9))).answers(0.6, Pass(), {})
    assert sum(not a.correct for a in answers) == 3
    told = capsys.readouterr().out.splitlines()
    assert [line.partition(" answers could not be graded ")[0] for line in told] == ["m: 2 of 8", "m: 1 of 4"]
    assert all(line.endswith("count as wrong") for line in told)


def test_answers_are_graded_while_others_are_being_sampled(tmp_path):
    """The sampler ends its rows one by one; each is with the grader before the next one ends, and verdicts stay with their
    rows."""

    class Slow(FakeSampler):
        def generate(self, requests, decoding, progress=None, finished=None):
            def watched(number: int, sample: Sample) -> None:
                finished(number, sample)
                graded.append(grader.total)

            return super().generate(requests, decoding, progress, watched)

    graded: list[int] = []
    with Grader() as grader:
        runs = benchmark(evaluation_config(tmp_path), grader)
        runs.sampler = Slow()  # type: ignore[assignment]
        runs.data.decode = lambda ids: rf"\boxed{{{len(ids) - 3}}}"  # type: ignore[method-assign]
        answers = runs.answers(0.6, Pass(), {})
    assert graded == list(range(1, 13))
    assert [a.correct for a in answers] == [a.text == r"\boxed{1}" for a in answers]
    assert {a.correct for a in answers} == {True, False}


def test_a_model_trained_anew_is_another_model(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"one")
    before = model_identity(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert model_identity(str(tmp_path)) != before and model_identity("org/name") == "org/name"


@pytest.mark.parametrize(
    ("file", "text", "end", "asked"),
    [("generation_config.json", '{"eos_token_id": [1, 3]}', None, 12), ("config.json", '{"eos_token_id": 3}', None, 12),
     ("model.safetensors", "of another training", None, 12), ("config.json", "{}", "</think>", 12),
     ("README.md", "A model.", None, 0), ("config.json", "{}", None, 0)],
)  # fmt: skip
def test_a_mended_config_of_the_same_weights_is_sampled_again(tmp_path, file, text, end, asked):
    """The troubleshooting page has users add an end token: the answers with and without it are never mixed."""
    for name, before in (("model.safetensors", "weights"), ("config.json", "{}"), ("tokenizer.json", "{}")):
        (tmp_path / name).write_text(before)
    with Grader() as grader:
        benchmark(evaluation_config(tmp_path), grader, path=str(tmp_path)).answers(0.6, Pass(), {})
        (tmp_path / file).write_text(text)
        again = benchmark(evaluation_config(tmp_path), grader, path=str(tmp_path), end=end)
        again.answers(0.6, Pass(), {})
    assert again.sampler.asked == asked  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("asked", "stem"), [(Pass(), "m--s--T0.6--d657858c6e"), (Pass("told", tokens=20), "m--s--T0.6--de8ff6fb7f")]
)
def test_evaluations_share_the_sets_that_both_have(tmp_path, asked, stem):
    """Set s alone asks for 3 answers; with a second set only for the 9 of that one. The names are those of a version that
    hashed all sets together: an update of ours must not sample an evaluation of one set again."""
    told, runs = 20.0 * bool(asked.tokens), []
    with Grader() as grader:
        for folder, sets in ("fresh", ("s", "t/u")), ("shared", ("s",)), ("shared", ("s", "t/u")):
            run = benchmark(evaluation_config(tmp_path / folder), grader)
            run.data.problems = [p for p in run.data.problems if p.source in sets]
            found = run.answers(0.6, asked, {p.id: told for p in run.data.problems if told})
            runs.append((run.sampler.asked, run.files["s"], found))  # type: ignore[union-attr]
    assert [(num_asked, file) for num_asked, file, _ in runs] == [(12, stem), (3, stem), (9, stem)]
    assert runs[2][2] == runs[0][2]


def test_a_set_has_the_same_answers_alone_and_behind_another(tmp_path):
    seeds = []
    with Grader() as grader:
        for sets in ("s", "t/u"), ("t/u",):
            run = benchmark(evaluation_config(tmp_path / str(len(sets))), grader)
            run.data.problems = [p for p in run.data.problems if p.source in sets]
            run.answers(0.6, Pass(), {})
            seeds.append(run.sampler.seeds["t/u"])  # type: ignore[union-attr]
    assert seeds[0] == seeds[1] and len(set(seeds[0])) == 9


# ---- what users do ----


@pytest.mark.parametrize(
    ("key", "value"),
    [("models", ()), ("models", ("x",)), ("models", ("x=a", "x=b")), ("temperatures", ()), ("temperatures", (-1.0,)),
     ("samples", 0), ("bootstrap", 0), ("max_new_tokens", 0), ("top_p", 0.0)],
)  # fmt: skip
def test_settings_that_sample_nothing_are_refused(key, value):
    config = replace(make_config(), evaluate=replace(EvaluateConfig(models=("m=x",)), **{key: value}))
    with pytest.raises(UserError, match=f"evaluate.{key}"):
        parse_models(config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_tokenizer().save_pretrained(path)
    make_model(make_tokenizer(), DemoConfig(hidden_size=32, layers=1)).config.save_pretrained(path)
    return path


def test_dry_run_needs_no_model_path_and_finds_a_missing_model(tmp_path, folder, capsys, monkeypatch):
    config = tmp_path / "c.yaml"
    config.write_text(
        f'run: {{dir: {tmp_path}/runs}}\nprompt: {{template: "{{question}} <think>"}}\n'
        f"data: {{sources: [{{name: demo, path: demo, count: 5, samples: 3}}]}}\n"
        f"evaluate: {{models: [a={folder}, b={folder}], temperatures: [0.6, 1.0], guidance_factors: [2], "
        "max_new_tokens: 10}"
    )
    script = runpy.run_path(str(ROOT / "evaluate.py"))["main"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(config), "--dry-run", "run.seed=1"])
    script()
    out = capsys.readouterr().out
    assert "a: 5 problems, 30 answers" in out and "b: 5 problems, 60 answers" in out and "at most 900 sampled" in out
    assert "seed: 1" in out and "Last 3 digits? <think>\n---" in out and not (tmp_path / "runs").exists()
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(config), f"evaluate.models=[a={folder}, b={tmp_path}/no]"])
    with pytest.raises(UserError, match="no such folder"):  # before the first model is sampled
        script()


@pytest.mark.parametrize(("file", "text"), [("tokenizer.json", "{}"), ("tokenizer_config.json", "[]")])
def test_a_damaged_model_folder_is_a_user_error(tmp_path, folder, file, text):
    for source in folder.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match="no tokenizer to be had"):
        load_tokenizer(str(tmp_path))


def test_a_model_folder_without_weights_is_a_user_error(folder):
    ranks = FakeRanks(0, 1)
    ranks.device = "cpu"  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="cannot be loaded"):
        make_sampler(make_config(), str(folder), 8, ranks)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "runs/x"), 2, "error: runs/x: Permission denied"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (UserError("mend this"), 2, "error: mend this"),
        (RunStopped("no"), 3, "stopped: no"),
        (UserError("m: bad (one\ntwo)"), 2, "error: m: bad (one two)"),  # a library may say it in several lines
    ],
)
def test_what_a_user_can_mend_is_one_line(capsys, error, code, words):
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as stop:
        cli.run(main)
    err = capsys.readouterr().err
    assert stop.value.code == code and err.startswith(words) and err.count("\n") == 1


@pytest.mark.parametrize(
    "override", ["evaluate.samples_dir={}", "evaluate.samples_dir={}/s", "run.dir={}", "run.dir={}/r"]
)
def test_a_file_where_a_folder_should_be_is_one_line(tmp_path, folder, capsys, override):
    (tmp_path / "file").write_text("")
    values = {"run": {"dir": str(tmp_path)}, "evaluate": {"models": [f"m={folder}"], "max_new_tokens": 8},
              "data": {"sources": [{"name": "demo", "path": "demo", "count": 2}]}}  # fmt: skip
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    config = load_config(tmp_path / "c.yaml", [override.format(tmp_path / "file")])
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: evaluate(config))  # type: ignore[arg-type, return-value]
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and err.startswith(f"error: {tmp_path}/file")
    assert err.endswith(("File exists; mend that and run the same command again\n",
                         "Not a directory; mend that and run the same command again\n"))  # fmt: skip


def test_other_errors_keep_their_traceback():
    with pytest.raises(FileNotFoundError):
        cli.run(lambda: Path("/no/such/file").read_text())  # type: ignore[arg-type, return-value]


def test_warm_start_names_its_own_key(tmp_path):
    config = make_config(
        "out", warm_start={"model": str(tmp_path)}, data={"sources": [{"name": "d", "path": "demo", "count": 3}]}
    )
    with pytest.raises(UserError, match="^warm_start.model="):
        warm_start(config)


@pytest.mark.parametrize(
    ("mixture", "shares"),
    [
        ("typical", {0: (0.55, 0.25, 0.20), 2: (0.15, 0.55, 0.30)}),
        ("too-long", {0: (0.2, 0.2, 0.6), 2: (0.1, 0.3, 0.6)}),
    ],
)
def test_a_warm_start_writes_right_solutions_in_the_shares_of_its_mixture(mixture, shares):
    sources = [{"name": "d", "path": "demo", "count": 3, "levels": [0, 2]}]
    config, rng = make_config("out", demo={"mixture": mixture}, data={"sources": sources}), random.Random(0)
    manners = {0: [], 2: []}
    for _ in range(3000):
        question, solution = draw_example(rng, config)
        sums = parse_question(question)
        assert solution.endswith(rf" The answer is \boxed{{{sum((sums.start, *sums.added)) % 1000:03}}}")
        manners[sums.level()].append(solution.split(".")[0])
    for level, found in manners.items():
        assert [found.count(m) / len(found) for m in MANNERS] == pytest.approx(shares[level], abs=0.05)
        assert len(found) == pytest.approx(1500, abs=150)


def test_warm_start_without_sources_says_so():
    config = make_config("out", warm_start={"model": "x"})
    with pytest.raises(UserError, match="data source"):
        warm_start(config)


def test_A21_training_and_evaluation_decode_ids_beyond_the_tokenizer_alike():
    """A padded vocabulary can yield ids that no tokenizer knows: they are left out of the text, without an exception."""
    tokenizer = make_tokenizer()
    known = tokenizer(r" A: 3+2=6 4+8=3. </think> \boxed{63}")["input_ids"]
    data = Data([], Prompter(tokenizer, PromptConfig(template="{question}")))
    ids = np.array([known[0], len(tokenizer) + 7, -1, *known[1:]])
    assert data.decode(ids) == r" A: 3+2=6 4+8=3. </think> \boxed{63}"


def test_A21_an_id_behind_a_gap_is_read():
    """Ids need not be dense: len(tokenizer) is 4 here, and the end of the thought has id 9."""
    vocabulary = {r"\boxed{1}": 0, r"\boxed{2}": 1, "<unk>": 2, "</think>": 9}
    core = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    data = Data([], Prompter(PreTrainedTokenizerFast(tokenizer_object=core), PromptConfig(template="{question}")))
    text = data.decode(np.array([0, 5, 9, 12, 1]))  # 5 lies in the gap, 12 beyond
    assert text.split() == [r"\boxed{1}", "</think>", r"\boxed{2}"] and grade(text, "2") and not grade(text, "1")


@pytest.mark.parametrize(("opening", "closing"), [("<think>", "</think>"), ("[THINK]", "[/THINK]")])
def test_a_thought_ends_where_its_tags_are_special_tokens_too(opening, closing):
    """Special tokens are no text, but without the tag a box in the thought would be the answer."""
    core = train_byte_bpe([r"Start at 3. \boxed{4}"], ["<s>", "<|im_end|>", opening, closing])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="<|im_end|>")
    data = Data([], Prompter(tokenizer, PromptConfig(template="{question}")))
    text = rf"{opening} Is it \boxed{{4}}? {closing} It is four."
    ids = np.array(tokenizer(f"<s>{text}<|im_end|>", add_special_tokens=False)["input_ids"])
    assert closing not in tokenizer.decode(ids, skip_special_tokens=True)
    assert data.decode(ids) == text and not grade(data.decode(ids), "4")
    no_tags = ids[~np.isin(ids, tokenizer.convert_tokens_to_ids([opening, closing]))]
    assert data.decode(no_tags) == tokenizer.decode(no_tags, skip_special_tokens=True)
