"""Samples are reused only for the very prompt that they answered, whatever changed it: a date, a template, a tokenizer.

Run: python -m pytest tests/evaluation/test_rendered_prompts.py
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from benchmark_helpers import benchmark, evaluation_config

from nanolapo.config import Config
from nanolapo.data.prompts import Prompter
from nanolapo.evaluation.evaluate import Benchmark
from nanolapo.evaluation.passes import Pass
from nanolapo.grader import Grader

DATED = "{{ day }} {% for m in messages %}{{ m['content'] }}{% endfor %}"
CLOCK = "{{ strftime_now('%f') }} {% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def grader():
    with Grader() as grader:
        yield grader


def chat_config(folder: Path) -> Config:
    config = evaluation_config(folder)
    return replace(config, prompt=replace(config.prompt, style="chat", instruction="", template_options={}))


def runs_with(config: Config, grader: Grader, template: str) -> Benchmark:
    """A benchmark whose tokenizer has this chat template."""
    runs = benchmark(config, grader, prompt=replace(config.prompt, style="raw", template="{question}"))
    tokenizer = runs.data.tokenizer
    tokenizer.chat_template = template
    runs.data.prompter = Prompter(tokenizer, config.prompt)
    return runs


def asked(runs: Benchmark) -> int:
    return runs.sampler.asked  # type: ignore[union-attr]


def test_samples_of_another_day_are_not_reused(grader, tmp_path):
    """Stopped on one day and resumed on the next: every sample of the second day answers the prompt of that day."""
    config = chat_config(tmp_path)
    monday, tuesday = (DATED.replace("day", repr(day)) for day in ("1", "2"))
    first = runs_with(config, grader, monday)
    first.answers(0.6, Pass(), {})
    assert asked(first) == 12
    again = runs_with(config, grader, monday)
    again.answers(0.6, Pass(), {})
    assert asked(again) == 0
    later = runs_with(config, grader, tuesday)
    later.answers(0.6, Pass(), {})
    assert asked(later) == 12 and len(list(later.folder.iterdir())) == 4


def test_a_clock_in_the_template_gives_one_prompt_to_all_samples_of_a_problem(grader, tmp_path):
    """At midnight a date changes while the samples are drawn. Two samples of a problem never answer two prompts."""
    runs = runs_with(chat_config(tmp_path), grader, CLOCK)
    runs.answers(0.6, Pass(), {})
    prompts = Counter(tuple(ids) for ids in runs.sampler.prompts)  # type: ignore[union-attr]
    assert sorted(prompts.values()) == [1, 1, 1, 3, 3, 3]


def test_another_tokenizer_under_the_same_weights_is_another_prompt(grader, tmp_path):
    config = evaluation_config(tmp_path)
    benchmark(config, grader).answers(0.6, Pass(), {})
    other = benchmark(config, grader)
    tokenizer = other.data.tokenizer
    tokenizer.add_tokens(["q 1"])
    assert other.data.prompter.ids("q 1") != benchmark(config, grader).data.prompter.ids("q 1")
    other.answers(0.6, Pass(), {})
    assert asked(other) == 12


def test_keys_that_render_the_same_reuse_the_samples(grader, tmp_path):
    config = evaluation_config(tmp_path)
    benchmark(config, grader).answers(0.6, Pass(), {})
    prompt = replace(config.prompt, instruction="of another style")  # raw prompts have none
    again = benchmark(replace(config, prompt=prompt), grader, prompt=prompt)
    again.answers(0.6, Pass(), {})
    assert asked(again) == 0


def test_stated_lengths_and_their_place_are_told_apart(grader, tmp_path):
    config = evaluation_config(tmp_path)
    budgets = {f"{s}:{i}": 20.0 for s in ("s", "t/u") for i in range(3)}
    for one in (Pass(), Pass("in", tokens=20), Pass("out", "outside", tokens=20)):
        runs = benchmark(config, grader)
        runs.answers(0.6, one, budgets if one.name else {})
        assert asked(runs) == 12
