"""AdaptThink: the advantage by hand, given first tokens, the loss on them, what is refused, and a real run.

Run: python -m pytest tests/methods/test_adapt_think.py
"""

from __future__ import annotations

import json
import math
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from round_methods import NUM_PROBLEMS, make_base, make_run
from tiny import make_config, make_problems, make_rows
from transformers import AutoModelForCausalLM

from nanolapo.config import UserError
from nanolapo.config_file import load_config, read_yaml
from nanolapo.data.prompts import GivenTokens, Guidance
from nanolapo.demo.pretrain import make_tokenizer
from nanolapo.loop import train
from nanolapo.methods import load_method
from nanolapo.methods.adapt_think import AdaptThink
from nanolapo.methods.base import MonitorPlan

ROOT = Path(__file__).parents[2]
DEMO_WORDS = {"closing": " Quick", "opening": " Careful"}
CLOSING, OPENING = 5, 6


def make(**options: Any) -> AdaptThink:
    """The method without a tokenizer: ids 5 and 6 stand for its two words."""
    method = AdaptThink(make_config(rollout={"group_size": 4}, method={"options": options}))
    method.closing_id, method.opening_id = CLOSING, OPENING
    return method


def given(rollouts):
    """The first half of every group of 4 begins with the closing token."""
    for b, row in enumerate(rollouts.rows):
        row.response_ids[0] = CLOSING if b % 4 < 2 else OPENING
        row.given = GivenTokens((int(row.response_ids[0]),), math.log(0.5))
    return rollouts


def test_the_advantage_by_hand():
    """p_ref 0.75 and 0, delta 0.05: right without a thought 1 - 0.75 + 0.05, with one 0.25; wrong -0.7 and -0.75. The own
    group does not enter: all four of group 1 are wrong, and its answers without a thought still get delta."""
    method = make()
    method.on_monitor(make_rows([9] * 8, 4, correct=[True, True, True, False] + [False] * 4))
    rollouts = given(make_rows([9, 3, 7, 4] * 2, 4, correct=[True, False, True, False] + [False] * 4))
    parts = method.reward(rollouts)
    assert parts["correct"].tolist() == [1, 0, 1, 0, 0, 0, 0, 0]
    rewards_PG = torch.from_numpy(rollouts.by_group(sum(parts.values())))
    want = [0.3, -0.7, 0.25, -0.75, 0.05, 0.05, 0, 0]
    np.testing.assert_allclose(method.advantage(rollouts, rewards_PG), want, atol=1e-12)
    np.testing.assert_allclose(sum(make_with(method, delta=0.2).reward(rollouts).values())[:3], [0.45, -0.55, 0.25])
    assert method.after_step(rollouts) == {"adapt_think/closed_accuracy": 0.25, "adapt_think/open_accuracy": 0.25}


def make_with(method: AdaptThink, **options: Any) -> AdaptThink:
    other = make(**options)
    other.load_state_dict(json.loads(json.dumps(method.state_dict())))
    assert other.reference == method.reference
    return other


def test_what_begins_with_the_token_by_itself_gets_no_bonus():
    """Only a given token marks an answer without a thought."""
    method = make()
    method.on_monitor(make_rows([9] * 4, 4))
    rollouts = given(make_rows([9] * 4, 4))
    rollouts.rows[1].given = None
    assert method.reward(rollouts)["closed"].tolist() == [0.05, 0, 0, 0]


def test_the_first_model_samples_freely_and_then_half_of_a_group_is_given_each_token():
    method, problems = make(), make_problems(5)
    method.problems, problem = problems, problems[0]
    assert method.monitor(0) == MonitorPlan((0, 1, 2, 3, 4), 16, 1.0, 64) and method.monitor(1) is None
    assert [method.guidance(problem, i, 0) for i in range(4)] == [Guidance()] * 4
    logged = method.on_monitor(make_rows([9] * 4, 4))  # of one problem; the others get its mean
    assert {method.reference[problem.id] for problem in problems} == {(9.0, logged["reference/accuracy"])}
    begun = [method.guidance(problem, i, 0).given for i in range(4)]
    assert begun == [GivenTokens((token,), math.log(0.5)) for token in (5, 5, 6, 6)]
    again = make_with(method)  # after a resume nothing is measured again
    assert again.guidance(problem, 0, 7) == method.guidance(problem, 0, 7) and again.monitor(7) is None


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("adapt") / "base")


def started(base: Path, options: dict[str, Any], **sections: Any) -> AdaptThink:
    prompt = {"prompt": {"template": "{question} <think>"}} | sections
    method = AdaptThink(make_config(base, method={"options": options}, **prompt))
    method.start(make_problems(3))
    return method


def test_words_become_tokens(base):
    tokenizer = make_tokenizer()
    for options in (DEMO_WORDS, {"closing": "</think>", "opening": " Quick"}):
        method = started(base, options)
        words = [tokenizer.decode([token]) for token in (method.closing_id, method.opening_id)]
        assert words == list(options.values()) and len(method.problems) == 3


@pytest.mark.parametrize(
    ("options", "sections", "words"),
    [
        ({}, {}, "method.options.opening='Alright' is 7 tokens of .*; give one token"),  # the defaults on the demo
        (DEMO_WORDS | {"closing": " Quick."}, {}, "method.options.closing=' Quick.' is 2 tokens"),
        (DEMO_WORDS | {"closing": ""}, {}, "method.options.closing='' is 0 tokens"),
        (DEMO_WORDS | {"opening": " Quick"}, {}, "method.options.opening=' Quick' is the same token as closing"),
        ({"opening": " Careful"}, {"prompt": {"template": "{question}"}}, "the prompt does not end in an open <think>"),
        (DEMO_WORDS, {"rollout": {"group_size": 3}}, "rollout.group_size=3: .*must be even"),
        (DEMO_WORDS, {"rollout": {"max_new_tokens": 1}}, "rollout.max_new_tokens=1: "),
        (DEMO_WORDS | {"reference_samples": 0}, {}, "method.options.reference_samples=0 must be positive"),
        (DEMO_WORDS | {"delta": -0.1}, {}, "method.options.delta=-0.1 must not be negative"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(base, options, sections, words):
    with pytest.raises(UserError, match=words) as error:
        started(base, options, **sections)
    assert "\n" not in str(error.value)


def test_the_comparison_names_the_manners_of_the_demo(base):
    """Its row starts as it stands in compare.yaml; without its overrides the method is refused on the demo's base."""
    row = read_yaml(ROOT / "configs/demo/compare.yaml")["runs"]["adapt-think"]
    method_file = f"method={ROOT / 'configs/methods/adapt-think.yaml'}"
    for overrides in (row["overrides"], []):
        config = load_config(ROOT / "configs/demo/stage1.yaml", [method_file, *overrides, f"model.path={base}"])
        method = load_method(config)
        if overrides:
            method.start(make_problems(3))
            words = make_tokenizer().decode([method.closing_id, method.opening_id])
            assert words == " Quick Careful" and method.monitor(0).group_size == 2
        else:
            with pytest.raises(UserError, match="'Alright' is 7 tokens"):
                method.start(make_problems(3))


def test_a_prompt_without_a_thought_is_fine_if_no_thought_is_closed(base):
    started(base, DEMO_WORDS, prompt={"template": "{question}"})


# ---------------------------------------------------------------------------------------------------- a real run


def first_word(folder: Path, problems: list[str]) -> float:
    """Mean probability of " Quick" as the first token of an answer."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), make_tokenizer()
    [quick] = tokenizer(" Quick")["input_ids"]
    with torch.no_grad():
        scored = [model(tokenizer(f"{q} <think>", return_tensors="pt")["input_ids"]).logits[0, -1] for q in problems]
    return float(torch.stack(scored).softmax(-1)[:, quick].mean())


@pytest.mark.slow
@pytest.mark.parametrize("source", ["trainer", "sampler"])
def test_a_run_gives_half_of_the_answers_each_word_and_teaches_the_rewarded_one(base, tmp_path, source):
    """A model with random weights is never right, so A is delta without a thought and 0 with one: its first word is
    learned. The mismatch does not see the given tokens. The reference is sampled once and freely, also across a resume."""
    loss = {"kind": "gspo", "aggregation": "sequence_mean", "kl_coef": 0.0, "old_logprobs": source}
    options = DEMO_WORDS | {"reference_samples": 2, "delta": 0.5}
    method = {"name": "adapt_think:AdaptThink", "options": options}
    for steps in (2, 3):
        config = make_run(base, tmp_path, loss=loss, method=method, train={
            "steps": steps, "batch_size": 8, "learning_rate": 3e-3, "warmup_fraction": 0.0, "final_lr_fraction": 1.0,
        })  # fmt: skip
        train(config, load_method(config))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert [line.get("reference/accuracy") for line in lines] == [0.0, None, None]
    assert all(line["mismatch"] < 1e-4 and line["updates"] == 2 for line in lines)
    assert all(line["reward"] == pytest.approx(0.25) for line in lines)  # half of delta
    rows = [json.loads(line) for line in (tmp_path / "run/rollouts.jsonl").read_text().splitlines()]
    groups = [list(g) for _, g in groupby(rows, key=lambda row: (row["step"], row["problem"]))]
    assert len(groups) == 3 * 4 and all(len(group) == 4 for group in groups)
    for group in groups:
        words = [" Quick", " Quick", " Careful", " Careful"]
        assert all(row["text"].startswith(word) for row, word in zip(group, words, strict=True))
        assert all(row["length"] <= 6 for row in group)
    sampled = lines[-1]["sampled_tokens"] - sum(row["length"] for row in rows)
    assert NUM_PROBLEMS * 2 <= sampled <= NUM_PROBLEMS * 2 * 6  # what is left is the reference pass
    questions = [row["question"] for row in rows]
    assert first_word(tmp_path / "run/model", questions) > 1.5 * first_word(base, questions)
