"""Loads problems from hub data sets, local files and the procedural demo task.

A `SourceConfig` says where the rows are and what their fields are called. `load_problems` turns rows into `Problem`s, whose
ids depend only on the source's name and the question. A row that cannot be used is reported with file and line, and too
many of them stop the run. order.py decides in which order problems are drawn.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any

from nanolapo.config import SourceConfig, UserError
from nanolapo.data.answers_of_rows import reference_answer
from nanolapo.data.demo_task import make_problems
from nanolapo.data.problem_files import BadRow, field_at, first_few, listing, read_rows, source_key
from nanolapo.grader import plainly_equal

LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class Problem:
    """One question with its reference answer. `id` does not depend on the order of rows or on other rows."""

    id: str
    question: str
    answer: str
    level: int | None  # difficulty where the source states one (MATH: 1 to 5)
    source: str

    @cached_property
    def key(self) -> str:
        """Equal for two spellings of one question, see question_key."""
        return question_key(self.question)


def question_key(question: str) -> str:
    r"""What is equal for two spellings of a question: blanks, dollar signs, \dfrac and capitals make no other question.

    >>> question_key(r"Find  $\dfrac{1}{2} + x$.") == question_key(r"find \frac{1}{2}+x .")
    True
    >>> question_key("Add 1 2.") == question_key("Add 12.")
    False
    """
    text = re.sub(r"\\[,;!: ]|\$|~", " ", re.sub(r"\\[dt]frac", r"\\frac", question.casefold()))
    return re.sub(r"\s+", " ", re.sub(r"(?<!\w)\s+|\s+(?!\w)", "", text))


def load_problems(sources: Sequence[SourceConfig], only_questions: bool = False) -> tuple[list[Problem], list[str]]:
    """Load the problems of all sources in a fixed order; also return a report of what was loaded and dropped.

    only_questions: True to read no answers, so that a row without a usable one counts as well.
    """
    problems: dict[str, Problem] = {}
    earlier: dict[str, Problem] = {}  # key of a question -> its first problem, of whatever source
    report: list[str] = []
    for source in sources:
        _check(source)
        found, source_report = _load_source(source, only_questions)
        report += source_report
        repeated = [(p, earlier[p.key]) for p in found if p.key in earlier]
        others = [(here, there) for here, there in repeated if not plainly_equal(here.answer, there.answer)]
        if others:
            here, there = others[0]
            report.append(
                f"  {source.name}: other answers than in an earlier source: {len(others)}, such as {here.answer!r} to "
                f"{here.question[:60]!r}, where {there.source} has {there.answer!r}"
            )
        for problem in found:
            problems.setdefault(problem.id, problem)
            earlier.setdefault(problem.key, problem)
    if not problems:
        raise UserError("data.sources: no problem left to work on; add a source")
    return list(problems.values()), report


# ---- one source ----


def _check(source: SourceConfig) -> None:
    key = source_key(source)
    if not source.name or not source.path:
        raise UserError("data.sources: a source needs a name and a path (hub name, local file or demo)")
    if source.count < 0:
        raise UserError(f"{key}.count is {source.count}: give a number, or 0 for all")
    if source.path == "demo" and source.count == 0:
        raise UserError(f"{key}.count: say how many demo problems to make")
    if not 0 <= source.max_bad_fraction <= 1:
        raise UserError(f"{key}.max_bad_fraction is {source.max_bad_fraction}: give 0 to 1")
    if len(source.choices) == 1 or len(source.choices) > len(LETTERS):
        raise UserError(f"{key}.choices: name 2 to {len(LETTERS)} fields, the right answer's first")


def _load_source(source: SourceConfig, only_questions: bool) -> tuple[list[Problem], list[str]]:
    if source.path == "demo":
        return _demo_problems(source), [f"{source.name}: made {source.count} demo problems"]
    problems: dict[str, Problem] = {}
    places: dict[str, int] = {}  # problem id -> number of its row
    others: list[str] = []  # rows with another answer to the same question
    bad: dict[str, list[int]] = {}  # reason -> numbers of the rows
    num_rows = num_bad = 0
    word, rows = read_rows(source)
    for number, row in rows:
        num_rows += 1
        try:
            problem = _problem(row, source, only_questions)
        except BadRow as error:
            num_bad += 1
            bad.setdefault(str(error), []).append(number)
        else:
            kept = problems.setdefault(problem.id, problem)
            first = places.setdefault(problem.id, number)
            if not plainly_equal(problem.answer, kept.answer):
                others.append(f"{word} {number}: answer {problem.answer!r}, but {word} {first} has the same question with "
                              f"{kept.answer!r}, which is kept")  # fmt: skip
    dropped = listing(bad, word)
    if num_bad > source.max_bad_fraction * num_rows:
        raise UserError(
            f"{source.path}: {num_bad} of {num_rows} rows cannot be used ({'; '.join(dropped)}): mend them, "
            f"check the field names of {source_key(source)}, or raise its max_bad_fraction "
            f"({source.max_bad_fraction:g})"
        )
    if not problems:
        reason = f" that can be used ({dropped[0]})" if dropped else ""
        raise UserError(f"{source_key(source)}.path: {source.path} has no rows{reason}; give one that has")
    chosen = _choose(list(problems.values()), source)
    summary = f"{source.name}: {len(chosen)} problems of {num_rows} rows from {source.path}"
    num_repeated = num_rows - num_bad - len(problems)
    if num_repeated:
        summary += f", {num_repeated} repeated questions left out"
    if others:
        summary += f", {len(others)} of them with another answer"
    if num_bad:
        summary += f", {num_bad} bad rows dropped"
    return chosen, [summary, *(f"  {source.path} {line}" for line in [*dropped, *first_few(others)])]


def _demo_problems(source: SourceConfig) -> list[Problem]:
    try:
        made = make_problems(source.count, source.seed, source.levels)
    except ValueError as error:
        raise UserError(f"{source_key(source)}: {error}; change its count or levels") from error
    return [_make(source.name, question, answer, level) for question, answer, level in made]


def _make(source_name: str, question: str, answer: str, level: int | None) -> Problem:
    try:
        answer.encode()
        digest = sha256(question.encode()).hexdigest()[:16]
    except UnicodeEncodeError as error:  # JSON may spell half a character, such as "\ud800"
        raise BadRow(f"not valid text ({error.reason})") from error
    return Problem(f"{source_name}:{digest}", question, answer, level, source_name)


def _choose(problems: list[Problem], source: SourceConfig) -> list[Problem]:
    """Keep source.levels, and source.count of those. The choice does not depend on the order of the rows."""
    if source.levels:
        problems = [problem for problem in problems if problem.level in source.levels]
        if not problems:
            raise UserError(
                f"{source_key(source)}.levels {list(source.levels)}: no row of {source.path} has one of them in "
                f"its field {source.level!r}; check levels, and the field's name (key level)"
            )
    if source.count == 0:
        return problems
    if source.count > len(problems):
        raise UserError(
            f"{source_key(source)}.count is {source.count}, but there are only {len(problems)} problems; "
            "lower it, or give 0 for all"
        )
    ranked = sorted(problems, key=lambda problem: sha256(f"{source.seed}/{problem.id}".encode()).digest())
    chosen = {problem.id for problem in ranked[: source.count]}
    return [problem for problem in problems if problem.id in chosen]


# ---- rows ----


def _problem(row: Any, source: SourceConfig, only_question: bool) -> Problem:
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, dict):
        raise BadRow(f"a {type(row).__name__}, not an object with fields")
    question = _text(row, source.question)
    if source.choices:
        options = [_text(row, field) for field in source.choices]
        question, answer = _multiple_choice(question, options, source.seed)
    else:
        answer = "" if only_question else reference_answer(field_at(row, source.answer), source.answer)
    try:
        level = _level(field_at(row, source.level))
    except BadRow:  # not every set has levels
        level = None
    return _make(source.name, question, answer, level)


def _text(row: dict[str, Any], name: str) -> str:
    value = field_at(row, name)
    if not isinstance(value, str):
        raise BadRow(f"field {name!r} is {type(value).__name__}, not text")
    if not value.strip():
        raise BadRow(f"field {name!r} is empty")
    return value.strip()


def _multiple_choice(question: str, options: list[str], seed: int) -> tuple[str, str]:
    """Return the question with its options in a seeded order, and the letter of the right one (options[0]).

    >>> text, answer = _multiple_choice("Which is even?", ["4", "3", "5"], seed=0)
    >>> text.splitlines(), answer
    (['Which is even?', '', 'A) 3', 'B) 5', 'C) 4', '', 'Answer with the letter of the right choice.'], 'C')
    """
    if len(set(options)) < len(options):
        raise BadRow("two options read the same")
    # Seeded by the question too, or the right letter would be the same in the whole set.
    order = list(range(len(options)))
    random.Random(f"{seed}/{question}").shuffle(order)
    lines = [f"{letter}) {options[index]}" for letter, index in zip(LETTERS, order, strict=False)]
    text = "\n".join([question, "", *lines, "", "Answer with the letter of the right choice."])
    return text, LETTERS[order.index(0)]


def _level(value: Any) -> int | None:
    """3, 3.0, "3" and "Level 3" -> 3; anything without a number ("Level ?") -> None."""
    found = re.search(r"\d+(\.\d+)?", value) if isinstance(value, str) else None
    if found:
        value = float(found.group())
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return round(value)
