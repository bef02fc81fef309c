"""The demo's problems, tokenizer and written solutions, against independent recomputation.

Run: python -m pytest tests/data/test_demo_task.py
"""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanolapo.config import DemoConfig
from nanolapo.data.demo_task import LEVELS, Sums, make_problems, parse_question, random_sums
from nanolapo.demo import pretrain as demo
from nanolapo.grader import grade

LENGTHS = {"Quick": 42, "Careful": 78, "Thorough": 216}
QUESTION = re.compile(r"Start at (\d{3})\. A: add (\d{3})\. B: add (\d{3})\. C: add (\d{3})\. Last 3 digits\?")
STATED = re.compile(r"(with|for|maximum|within|exactly) (\d+)(?: to (\d+))? tokens")


def numbers(text: str) -> list[int]:
    found = QUESTION.search(text)
    assert found
    return [int(number) for number in found.groups()]


def answer_by_hand(question: str) -> str:
    """The answer from the text alone: plain integers, the last three digits at the very end."""
    return f"{sum(numbers(question)):04}"[-3:]


def level_by_hand(question: str) -> int:
    """Additions in which the last or the middle column has a sum above 9, column by column."""
    value, *added = numbers(question)
    level = 0
    for n in added:
        carry, carried = 0, []
        for place in (1, 10, 100):
            carry = (value // place % 10 + n // place % 10 + carry) // 10
            carried.append(carry)
        level += any(carried[:2])  # the third carries into a digit that does not count
        value += n
    return level


def test_problems_are_right_distinct_and_repeatable() -> None:
    problems = make_problems(700, seed=3)
    assert problems == make_problems(700, seed=3, levels=LEVELS)
    assert problems != make_problems(700, seed=4)
    assert len({question for question, _, _ in problems}) == 700
    for question, answer, level in problems:
        assert QUESTION.fullmatch(question), "all questions have the same surface"
        assert answer == answer_by_hand(question) and len(answer) == 3
        assert level == level_by_hand(question) == parse_question(question).level()
        assert parse_question(question).question() == question
        assert level > 0 or set("".join(f"{n:03}" for n in numbers(question))) <= set("012")
    assert {level for _, _, level in problems} == {0, 1, 2, 3}
    assert any(answer.startswith("0") for _, answer, _ in problems), "leading zeros occur"
    assert all(len({question[i] for question, _, level in problems if level}) == 10 for i in (9, 10, 11, 21, 22, 23))


def test_from_level_1_on_any_of_the_additions_may_carry() -> None:
    """Which of them do is drawn: each for a third, two thirds, all of the problems."""
    for level in (1, 2, 3):
        carried = Counter[int]()
        for question, _, _ in make_problems(600, seed=0, levels=[level]):
            start, *added = numbers(question)
            for i in range(3):
                one = Sums((start + sum(added[:i])) % 1000, (added[i], 0, 0))
                carried[i] += level_by_hand(one.question())
        assert sum(carried.values()) == 600 * level
        assert all(abs(carried[i] - 200 * level) < 60 for i in range(3)), (level, carried)


def test_levels_have_the_shares_they_are_named_with() -> None:
    problems = make_problems(800, seed=0, levels=[0, 0, 0, 0, 1, 1, 2, 3])
    assert Counter(level for _, _, level in problems) == {0: 400, 1: 200, 2: 100, 3: 100}
    assert {level for _, _, level in make_problems(40, seed=0, levels=[2])} == {2}
    for levels in ([4], [0, -1], [1, 99]):
        with pytest.raises(ValueError, match="levels 0 to 3"):
            make_problems(10, seed=0, levels=levels)
    with pytest.raises(ValueError, match="too many"):  # before it searches for ever
        make_problems(600_000, seed=0, levels=[0])


def check_from_left(text: str, value: int, n: int) -> None:
    """ " 3+2=6 4+8=3 7+5=2": the digits of both numbers, and of their sum, from the left."""
    columns = re.fullmatch(r"(?: \d\+\d=\d){3}", text)
    assert columns, text
    a, b, c = zip(*re.findall(r"(\d)\+(\d)=(\d)", text), strict=True)
    assert int("".join(a)) == value and int("".join(b)) == n
    assert int("".join(c)) == (value + n) % 1000


def check_from_right(text: str, value: int, n: int) -> None:
    """ " 7+5+0=12 carry 1 4+8+1=13 carry 1 3+2+1=6 carry 0 632": every equation holds, and the digits are the numbers'."""
    found = re.fullmatch(r"((?: \d\+\d\+[01]=\d+ carry [01]){3}) (\d{3})", text)
    assert found, text
    carry, result = 0, ""
    for place, column in enumerate(re.findall(r"(\d)\+(\d)\+(\d)=(\d+) carry (\d)", found[1])):
        a, b, brought, total, carried = map(int, column)
        assert (a, b, brought) == (value // 10**place % 10, n // 10**place % 10, carry)
        assert a + b + brought == total == 10 * carried + total % 10
        carry, result = carried, str(total % 10) + result
    assert found[2] == result


def check_solution(text: str, question: str, manner: str) -> None:
    """Parses a solution without the code that wrote it."""
    value, *added = numbers(question)
    found = re.fullmatch(rf" {manner}\. A:(.*)\. B:(.*)\. C:(.*)\. </think> \\boxed{{(\d{{3}})}} <end>", text)
    assert found, text
    for addition, n in zip(found.groups(), added, strict=False):
        if manner == "Quick":
            check_from_left(addition, value, n)
        elif manner == "Careful":
            check_from_right(addition, value, n)
        else:
            first, rest = addition.split(". Wait:")
            wait, check = rest.split(". Check:")
            check_from_right(first, value, n)
            check_from_right(wait, n, value)
            check_from_right(check, value, n)
        value = (value + n) % 1000
    assert found[4] == answer_by_hand(question)


@pytest.mark.parametrize("manner", LENGTHS)
def test_written_solutions_are_right_and_as_long_as_they_say(manner: str) -> None:
    tokenizer, rng = demo.make_tokenizer(), random.Random(0)
    for level in LEVELS * 50:
        sums = random_sums(rng, level)
        solution = demo.write_solution(sums, manner)
        check_solution(solution, sums.question(), manner)
        assert grade(solution.removesuffix(" <end>"), answer_by_hand(sums.question()))
        assert len(tokenizer(solution)["input_ids"]) == LENGTHS[manner]


def test_a_leading_zero_is_a_digit_like_others() -> None:
    for answer, reference, right in (("042", "042", True), ("42", "042", True), ("007", "007", True),
                                     ("024", "042", False), ("420", "042", False), ("000", "000", True),
                                     ("010", "010", True), ("8", "010", False)):  # fmt: skip
        assert grade(rf" </think> \boxed{{{answer}}}", reference) is right, (answer, reference)


@pytest.mark.parametrize("mixture", demo.MIXTURES)
def test_prompts_and_solutions_are_lossless_and_cut_at_the_seam(mixture: str) -> None:
    tokenizer, rng = demo.make_tokenizer(), random.Random(0)
    for _ in range(300):
        prompt, solution = demo.draw_example(rng, mixture, False, tokenizer)
        ids = tokenizer(prompt + solution)["input_ids"]
        assert tokenizer.decode(ids) == prompt + solution
        assert tokenizer(prompt)["input_ids"] + tokenizer(solution)["input_ids"] == ids
        assert ids[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in ids[:-1]
        check_solution(solution, prompt, manner_of(solution))


def manner_of(solution: str) -> str:
    return solution.split(".")[0].strip()


def test_the_stated_length_asks_for_the_manner() -> None:
    """A limit is kept whenever a manner can keep it, by the longest that does; other sentences ask for the nearest."""
    tokenizer, rng, seen, numbers_seen = demo.make_tokenizer(), random.Random(1), Counter[str](), set()
    for _ in range(800):
        manner, guidance = demo.state_length(rng, LENGTHS)
        text = guidance.outside + guidance.inside
        [(words, low, high)] = STATED.findall(text)
        n, length = int(low), LENGTHS[manner]
        if high:
            assert int(high) - n == 20
            n += 10
        assert n == guidance.budget and n % 10 == 0 and 20 <= n <= 240
        if words in ("maximum", "within"):
            within = [at for at in LENGTHS.values() if at <= n]
            assert length == (max(within) if within else 42), text
        else:
            assert abs(length - n) == min(abs(at - n) for at in LENGTHS.values()), text
        assert f" {low}" in tokenizer.tokenize(text), "the number is one token, whatever the sentence"
        seen[words + "-to" * bool(high)] += 1
        numbers_seen.add(n)
    assert set(seen) == {"with", "with-to", "for", "maximum", "within", "exactly"}
    assert 0.6 < seen["with"] / 800 < 0.75 and len(numbers_seen) == 23  # the paper's sentence is the most frequent


@pytest.mark.parametrize("mixture", demo.MIXTURES)
def test_the_shares_of_the_manners(mixture: str) -> None:
    """Without guidance they follow the mixture, on level 0 and on the others; four prompts of ten have guidance. An
    easy example is never Thorough, and without guidance it is Quick twice as often as Careful."""
    tokenizer, rng = demo.make_tokenizer(), random.Random(2)
    drawn, guided = {True: Counter[str](), False: Counter[str]()}, 0
    for _ in range(3000):
        prompt, solution = demo.draw_example(rng, mixture, False, tokenizer)
        if prompt.endswith("Last 3 digits? <think>"):
            drawn[level_by_hand(prompt) > 0][manner_of(solution)] += 1
        else:
            guided += 1
            assert STATED.search(prompt)
    assert abs(guided / 3000 - 0.4) < 0.03
    expected = {
        "typical": {False: (0.55, 0.25, 0.20), True: (0.15, 0.55, 0.30)},
        "too-long": {False: (0.20, 0.20, 0.60), True: (0.10, 0.30, 0.60)},
    }[mixture]
    for carrying, shares in expected.items():
        for manner, share in zip(LENGTHS, shares, strict=True):
            assert abs(drawn[carrying][manner] / drawn[carrying].total() - share) < 0.06, (carrying, manner, drawn)
    assert abs(drawn[False].total() / drawn[True].total() - 1 / 3) < 0.06, "the four levels are equally frequent"
    easy = [demo.draw_example(rng, mixture, True, tokenizer) for _ in range(800)]
    assert {manner_of(solution) for _, solution in easy} == {"Quick", "Careful"}
    free = Counter(manner_of(solution) for prompt, solution in easy if prompt.endswith("Last 3 digits? <think>"))
    assert abs(free.total() / 800 - 0.6) < 0.06 and abs(free["Quick"] / free.total() - 2 / 3) < 0.07


def test_other_prompts_survive_the_tokenizer() -> None:
    """Text the demo never writes (rivals' sentences, odd numbers) round-trips in characters and small words."""
    tokenizer = demo.make_tokenizer()
    for text in ("Think for maximum 173 tokens.", "with 105 tokens, with 60 tokens", "{\\frac{1}{2}}~Somewhere\n",
                 "attempt, =105, 7+12=19, Awaits: Check: Checks"):  # fmt: skip
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert [token for token in tokenizer.tokenize("=105 =12 attempt") if len(token) > 2] == ["=12"]


@pytest.mark.slow
def test_pretraining_is_repeatable_and_loads(tmp_path: Path) -> None:
    """Twelve steps, twice: bit-identical weights, in a folder that transformers loads; another seed differs."""
    torch.set_num_threads(1)
    settings = DemoConfig(steps=12, batch_tokens=400)
    weights = []
    for run, seed in (("a", 0), ("b", 0), ("c", 1)):
        demo.pretrain(str(tmp_path / run), settings, seed)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / run, dtype=torch.float32)
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["model.norm.weight"], weights[2]["model.norm.weight"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    for text in ("A: add 128.", "Start at 303. B: add 017. Last 3 digits? <think>"):  # not the class of the model
        assert tokenizer(text)["input_ids"] == demo.make_tokenizer()(text)["input_ids"]
    assert tokenizer.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id


@pytest.mark.slow
def test_pretraining_goes_on_from_a_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With demo.start it begins with that base's weights and has no easy part; the same command gives the same weights."""
    torch.set_num_threads(1)
    real, easy = demo.draw_batches, []

    def one_batch(*arguments: Any, **named: Any) -> Any:
        easy.append(named["easy"])
        return real(*arguments, **named)[:1]

    monkeypatch.setattr(demo, "draw_batches", one_batch)

    def run(name: str, seed: int = 0, **settings: Any) -> dict[str, torch.Tensor]:
        demo.pretrain(str(tmp_path / name), DemoConfig(batch_tokens=400, **settings), seed)
        return AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).state_dict()

    base = run("base", seed=7, steps=5, hidden_size=32, layers=1)
    assert easy == [True, True, False, False, False], "the first 35 % are easy"
    easy.clear()
    first, second = (run(name, start=str(tmp_path / "base"), steps=2, mixture="too-long") for name in ("a", "b"))
    assert easy == [False] * 4
    assert first.keys() == base.keys(), "it has the base's sizes, not those of the settings"
    assert all(torch.equal(first[name], second[name]) for name in base)
    assert any(not torch.equal(first[name], base[name]) for name in base)
    fresh = run("fresh", steps=2, hidden_size=32, layers=1)
    embedding = "model.embed_tokens.weight"
    moved, apart = ((first[embedding] - other[embedding]).norm() for other in (base, fresh))
    assert 0 < moved < 0.2 * apart
    step = {}  # how far one step goes; at the full rate 300 steps blurred what the base could
    for rate in (demo.START_LR, 1.0):
        monkeypatch.setattr(demo, "START_LR", rate)
        made = run(f"rate {rate}", start=str(tmp_path / "base"), steps=1, mixture="too-long")
        step[rate] = {name: (made[name] - base[name]).norm().item() for name in base}
    monkeypatch.setattr(demo, "learning_rate_factor", lambda step, steps: 0.01)  # half of the first step's 1/50
    made = run("half of the rate", start=str(tmp_path / "base"), steps=1, mixture="too-long")
    for name, far in step[1.0].items():
        assert step[0.1][name] == pytest.approx(0.1 * far, rel=0.02), name
        assert (made[name] - base[name]).norm().item() == pytest.approx(0.5 * far, rel=0.02), name
