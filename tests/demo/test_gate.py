"""The gate of the demo's base: what counts as a wrong addition, and what fails the gate.

Run: python -m pytest tests/demo/test_gate.py
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from nanolapo.data.demo_task import LEVELS, random_sums
from nanolapo.data.problems import Problem
from nanolapo.demo.gate import errors, failures, summarize, written_results
from nanolapo.demo.pretrain import MANNERS, write_solution


def problem_of(question: str, level: int = 1) -> Problem:
    return Problem("", question, "", level, "demo")


def carries_by_columns(value: int, n: int) -> bool:
    """Addition by hand: does the last or the middle column reach ten?"""
    ones = value % 10 + n % 10
    tens = value // 10 % 10 + n // 10 % 10 + (ones > 9)
    return ones > 9 or tens > 9


@pytest.mark.parametrize("manner", MANNERS)
def test_a_written_solution_has_no_error(manner: str) -> None:
    rng = random.Random(0)
    for level in LEVELS * 25:
        sums = random_sums(rng, level)
        thought = write_solution(sums, manner)
        assert written_results(thought) == sums.values()[1:]
        found = errors(problem_of(sums.question(), level), thought)
        expected = [carries_by_columns(a, n) for a, n in zip(sums.values(), sums.added, strict=False)]
        assert len(found.get("carry", [])) == sum(expected) == level
        assert len(found.get("no carry", [])) == 3 - level
        assert len(found.get("level 0", [])) == (3 if level == 0 else 0)
        assert not any(wrong for kind in found.values() for wrong in kind)


def test_an_error_counts_where_it_is_made() -> None:
    """A wrong result is one error; the next addition starts from what was written."""
    asked = problem_of("Start at 347. A: add 285. B: add 111. C: add 009. Last 3 digits?")
    thought = " Quick. A: 3+2=5 4+8=2 7+5=2. B: 5+1=6 2+1=3 2+1=3. C: 6+0=6 3+0=3 3+9=2."
    assert errors(asked, thought) == {"carry": [True, True], "no carry": [False]}  # 522, 633, 632 instead of 642
    careful = " Careful. A: 7+5+0=12 carry 1 4+8+1=13 carry 1 3+2+1=6 carry 0 632. B: 2+1+0=3 carry 0 3+1+0=4 carry 0"
    assert errors(asked, careful) == {
        "carry": [False],
        "no carry": [True],
    }  # B has no result: wrong; C is not looked at
    assert errors(asked, " Quick.") == {"carry": [True]}


def test_shares_over_problems() -> None:
    safe = problem_of("Start at 111. A: add 111. B: add 111. C: add 111. Last 3 digits?", 0)
    hard = problem_of("Start at 347. A: add 285. B: add 111. C: add 009. Last 3 digits?", 2)
    right = " Quick. A: 1+1=2 1+1=2 1+1=2. B: 2+1=3 2+1=3 2+1=3. C: 3+1=4 3+1=4 3+1=4."
    wrong = " Quick. A: 3+2=5 4+8=2 7+5=2. B: 5+1=6 2+1=3 2+1=3. C: 6+0=6 3+0=4 3+9=2."
    row = summarize([safe, hard], [right, wrong], [True, False])
    assert row == {"carry": 0.5, "level 0": 0.0, "no carry": 0.0, "right at level 0": 1.0, "right at level 2": 0.0}


ROW = {"model": "base", "temperature": 1.0, "manner": "Quick", "carry": 0.3, "no carry": 0.1, "level 0": 0.0}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, []),
        ({"carry": 0.09}, ["Quick: wrong at 9.0% of carry, wanted at least 10%"]),
        ({"model": "truncation", "carry": 0.09}, ["truncation, temperature 1, Quick: wrong at 9.0%"]),
        ({"level 0": 0.04}, ["Quick: wrong at 4.0% of level 0, wanted at most 3%"]),
        ({"model": "truncation", "level 0": 0.04}, []),  # only the base must be exact there
        ({"model": "truncation", "level 0": 0.11}, ["wrong at 11.0% of level 0, wanted at most 10%"]),
        ({"model": "truncation", "manner": "Careful", "carry": 1.0}, ["Careful: wrong at 100.0% of carry"]),
        ({"manner": "Careful", "carry": 0.04}, ["Careful: wrong at 4.0% of carry, wanted at most 3%"]),
        ({"manner": "Careful", "carry": 0.01, "level 0": 0.5}, []),
        ({"manner": "Thorough", "carry": 0.5, "right at level 0": 0.9, "right at level 1": 0.9}, []),
        (
            {"manner": "Thorough", "carry": 0.0, "right at level 0": 0.98, "right at level 1": 0.8},
            ["Thorough: 89.0% of the answers are right, wanted at least 90%"],
        ),
    ],
)
def test_what_fails_the_gate(changed: dict[str, Any], words: list[str]) -> None:
    found = failures([ROW, ROW | changed])
    assert len(found) == len(words)
    assert all(word in line for word, line in zip(words, found, strict=True))
