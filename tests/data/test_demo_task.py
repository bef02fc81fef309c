"""The demo's problems, tokenizer and written solutions, against independent recomputation.

Run: python -m pytest tests/data/test_demo_task.py
"""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanolapo.data.demo_task import LEVELS, make_problems, parse_question, random_chain
from nanolapo.demo import pretrain as demo
from nanolapo.grader import grade


def answer_by_hand(question: str) -> str:
    """The answer from the text alone: exact big integers, last digit at the very end."""
    value = int(question.split("Start with ")[1][0])
    for word, n in re.findall(r"(add|times) (\d)", question):
        value = value + int(n) if word == "add" else value * int(n)
    return str(value)[-1]


def test_problems_are_right_distinct_and_repeatable() -> None:
    problems = make_problems(700, seed=3, levels=LEVELS)
    assert problems == make_problems(700, seed=3, levels=LEVELS)
    assert problems != make_problems(700, seed=4, levels=LEVELS)
    assert len({question for question, _, _ in problems}) == 700
    for question, answer, level in problems:
        assert answer == answer_by_hand(question)
        assert question.count(":") == level
        assert parse_question(question).question() == question
    assert {level for _, _, level in problems} == set(LEVELS)
    assert len({answer for _, answer, _ in problems}) == 10


def test_small_levels_run_dry_and_others_fill_in() -> None:
    problems = make_problems(400, seed=0, levels=(1, 2))
    assert sum(level == 1 for _, _, level in problems) == 120  # 10 starts x (9 additions + 3 multiplications)
    with pytest.raises(ValueError, match="only 120"):
        make_problems(121, seed=0, levels=(1,))


def test_every_operation_matters() -> None:
    """Changing any digit before an operation changes the answer: no step can be skipped over."""
    rng = random.Random(0)
    for _ in range(50):
        chain = random_chain(rng, 4)
        outcomes = {tuple(type(chain)(start, chain.operations).digits())[-1] for start in range(10)}
        assert len(outcomes) == 10


def test_written_solutions_are_right_and_lossless() -> None:
    """Every digit in a solution is right, the grader accepts it, and the tokenizer gives the text back."""
    for i in range(600):
        if i % 300 == 0:
            rng, settings = random.Random(0), (demo.DemoConfig(), demo.ALL_SENTENCES)[i // 300]
            tokenizer = demo.make_tokenizer(settings.guided_otherwise > 0)
        prompt, solution = demo.draw_example(rng, settings, easy=False)
        ids = tokenizer(prompt + solution)["input_ids"]
        assert tokenizer.decode(ids) == prompt + solution
        assert tokenizer(prompt)["input_ids"] + tokenizer(solution)["input_ids"] == ids  # cut exactly at the seam
        assert ids[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in ids[:-1]
        assert len(tokenizer(solution)["input_ids"]) <= settings.max_new_tokens
        assert grade(solution.removesuffix(" <end>"), answer_by_hand(prompt))
        for step in re.findall(r": (\d(?: [+*] \d)+) = (?:\d+, so )?(\d)\.", solution):  # also merged, left to right
            value, *terms = step[0].split(" ")
            for sign, n in zip(terms[::2], terms[1::2], strict=True):
                value = str(int(value) + int(n) if sign == "+" else int(value) * int(n))
            assert value[-1] == step[1]


def test_the_stated_length_is_true() -> None:
    """Exact sentences name the length within its rounding to tens, limits are kept, ranges hold it; all are drawn."""
    tokenizer, rng = demo.make_tokenizer(all_sentences=True), random.Random(1)
    settings, seen = demo.DemoConfig(guided=0.4, guided_otherwise=0.6), set()
    for _ in range(600):
        prompt, solution = demo.draw_example(rng, settings, easy=False)
        length = len(tokenizer(solution)["input_ids"])
        words, low, high = re.findall(r"(with|for|maximum|within|exactly) (\d+)(?: to (\d+))? tokens", prompt)[0]
        seen.add(words + "-to" * bool(high))
        if high:
            assert int(low) <= length <= int(high) or length < 15
        elif words in ("maximum", "within"):
            assert length <= int(low)
        else:
            assert abs(int(low) - length) <= 5 or length < 10
        ids = tokenizer(prompt)["input_ids"]
        assert f" {low}" in tokenizer.convert_ids_to_tokens(ids)  # one token, whatever the sentence
    assert seen == {"with", "with-to", "for", "maximum", "within", "exactly"}


def test_other_prompts_survive_the_tokenizer() -> None:
    """Text the demo never writes (rivals' sentences, odd numbers) round-trips in characters and small words."""
    tokenizer = demo.make_tokenizer()
    for text in ("Think for maximum 173 tokens.", "with 105 tokens, with 60 tokens", "{\\frac{1}{2}}~Somewhere\n"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.slow
def test_pretraining_is_repeatable_and_loads(tmp_path: Path) -> None:
    """Twelve steps, twice: bit-identical weights, in a folder that transformers loads; another seed differs."""
    torch.set_num_threads(1)
    settings = demo.DemoConfig(steps=12, batch_tokens=400)
    weights = []
    for run, seed in (("a", 0), ("b", 0), ("c", 1)):
        demo.pretrain(str(tmp_path / run), settings, seed)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / run, dtype=torch.float32)
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["model.norm.weight"], weights[2]["model.norm.weight"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    for text in (
        "A: add 8.",
        "Start with 3. B: times 7. Last digit? <think>",
    ):  # not replaced by the class of the model
        assert tokenizer(text)["input_ids"] == demo.make_tokenizer()(text)["input_ids"]
    assert tokenizer.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id
