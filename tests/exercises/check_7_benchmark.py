"""Exercise 7: multiple choice as one list of options and the index of the right one. Run: make exercise N=7"""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from nanolapo.config import SourceConfig, UserError
from nanolapo.data.problems import Problem, load_problems

ROWS = [  # question, options, index of the right one, level
    ("Which is prime?", ["4", "6", "7", "9"], 2, "Level 1"),
    ("What is 2 + 3?", ["5", "6"], 0, "Level 1"),
    ("Which is the largest?", ["1/2", "2/3", "3/5"], 1, "Level 2"),
    ("Which is even?", ["1", "3", "5", "7", "8"], 4, "Level 3"),
]
FINE = {"question": "Which is odd?", "choices": ["2", "3"], "answer": 1, "grade": 1}
BAD = {
    "an index beyond the options": FINE | {"answer": 2},
    "a negative index": FINE | {"answer": -1},
    "an index that is text": FINE | {"answer": "1"},
    "true as an index": FINE | {"answer": True},
    "no index": {key: value for key, value in FINE.items() if key != "answer"},
    "options that are one text": FINE | {"choices": "2, 3"},
    "an option that is a number": FINE | {"choices": [2, "3"]},
    "an empty option": FINE | {"choices": ["", "3"]},
    "a single option": FINE | {"choices": ["3"], "answer": 0},
    "two options that read the same": FINE | {"choices": ["3", "3"]},
    "eleven options": FINE | {"choices": [str(n) for n in range(11)]},
    "no options": {key: value for key, value in FINE.items() if key != "choices"},
}


def load(folder: Path, rows: list[dict[str, Any]], **keys: Any) -> tuple[list[Problem], list[str]]:
    assert "options" in {field.name for field in fields(SourceConfig)}, (
        "nanolapo/config.py: SourceConfig has no key options yet"
    )
    path = folder / "quiz.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shape = {"question": "question", "options": "choices", "answer": "answer", "level": "grade"}
    return load_problems([SourceConfig(name="quiz", path=str(path), **shape, **keys)])


def quiz() -> list[dict[str, Any]]:
    return [{"question": q, "choices": o, "answer": a, "grade": level} for q, o, a, level in ROWS]


def lettered(problem: Problem) -> dict[str, str]:
    """The options as the question shows them, by letter."""
    return dict(re.findall(r"^([A-J])\) (.*)$", problem.question, re.MULTILINE))


def test_the_letter_is_that_of_the_right_option(tmp_path):
    problems, _ = load(tmp_path, quiz())
    assert len(problems) == len(ROWS), f"of {len(ROWS)} rows {len(problems)} problems were made"
    for problem, (question, options, right, level) in zip(problems, ROWS, strict=True):
        shown = lettered(problem)
        assert problem.question.startswith(question) and sorted(shown.values()) == sorted(options), (
            f"a question is followed by its options, a letter and ) before each; here it is {problem.question!r}"
        )
        assert shown.get(problem.answer) == options[right], (
            f"{question} The right option is {options[right]!r}, but the reference answer {problem.answer!r} stands for "
            f"{shown.get(problem.answer)!r} among {shown}"
        )
        assert "letter" in problem.question, (
            "the question must ask for a letter, or a right value would be graded wrong"
        )
        assert problem.level == int(level[-1]), f"level {level!r} became {problem.level}"


def test_ids_and_letters_do_not_depend_on_the_other_rows(tmp_path):
    forwards, backwards = load(tmp_path, quiz())[0], load(tmp_path, quiz()[::-1])[0]
    assert forwards == backwards[::-1], "the same row gives another problem when the file is in another order"


@pytest.mark.parametrize("what", BAD)
def test_a_bad_row_is_reported_and_left_out(tmp_path, what):
    rows = [*quiz(), BAD[what]]
    try:
        problems, report = load(tmp_path, rows, max_bad_fraction=0.5)
    except (UserError, TypeError, IndexError, KeyError, AttributeError) as error:
        raise AssertionError(f"a row with {what} should be left out (raise BadRow); it raised {error!r}") from None
    assert len(problems) == len(ROWS), f"a row with {what} became a problem: {problems[-1]}"
    assert "line 5" in " ".join(report), f"a row with {what} was dropped without a word: {report}"


def test_one_field_an_option_still_works(tmp_path):
    """As in configs/deepscaler-1.5b/gpqa.yaml: a field for each option, the right one first."""
    path = tmp_path / "gpqa.jsonl"
    path.write_text(json.dumps({"problem": "Which is even?", "right": "4", "one": "3", "two": "5"}) + "\n")
    problems, _ = load_problems([SourceConfig(name="g", path=str(path), choices=("right", "one", "two"))])
    assert lettered(problems[0])[problems[0].answer] == "4", f"the key choices has changed: {problems[0]}"


def test_a_plain_answer_still_works(tmp_path):
    path = tmp_path / "plain.jsonl"
    path.write_text('{"problem": "What is 2 + 3?", "answer": 5}\n')
    problems, _ = load_problems([SourceConfig(name="p", path=str(path))])
    assert (problems[0].question, problems[0].answer) == ("What is 2 + 3?", "5"), (
        f"plain rows have changed: {problems[0]}"
    )
