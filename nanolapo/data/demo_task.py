"""The procedural problems of the CPU demo: sums of which some need care, and look no longer than those that do not.

A problem is a start and three additions of three-digit numbers. Only the last three digits count. Its level is the
number of additions in which a digit carries into a digit that counts. At level 0 all digits are 0, 1 or 2, so nothing
can carry, and the question shows it. From level 1 on the digits do not show how many additions carry. At a carry the
digits on the left depend on those on their right. Pure Python, no torch; the same (count, seed, levels) gives the same
problems everywhere.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

OPERATIONS = 3
LEVELS = tuple(range(OPERATIONS + 1))
LABELS = "ABC"


@dataclass(frozen=True)
class Sums:
    """The content of one question: a start, then what is added to it, one after the other. All are below 1000."""

    start: int
    added: tuple[int, ...]

    def question(self) -> str:
        """The text of the problem.

        >>> Sums(347, (285, 16)).question()
        'Start at 347. A: add 285. B: add 016. Last 3 digits?'
        """
        steps = (f"{label}: add {n:03}." for label, n in zip(LABELS, self.added, strict=False))
        return " ".join([f"Start at {self.start:03}.", *steps, "Last 3 digits?"])

    def values(self) -> list[int]:
        """The start and the value after each addition.

        >>> Sums(347, (285, 900)).values()
        [347, 632, 532]
        """
        values = [self.start]
        for n in self.added:
            values.append((values[-1] + n) % 1000)
        return values

    def level(self) -> int:
        """The number of additions that carry into a digit that counts.

        >>> Sums(347, (285, 900)).level()
        1
        """
        return sum(carries(value, n) for value, n in zip(self.values(), self.added, strict=False))


def carries(value: int, n: int) -> bool:
    """True if the last or the middle digits of value + n carry. What the first digits carry is dropped.

    >>> carries(347, 285), carries(347, 900), carries(108, 2)
    (True, False, True)
    """
    return value % 10 + n % 10 >= 10 or value % 100 + n % 100 >= 100


def parse_question(question: str) -> Sums:
    """The Sums of a question made by Sums.question."""
    start, *added = re.findall(r"(?:at|add) (\d{3})", question)
    return Sums(int(start), tuple(map(int, added)))


def random_sums(rng: random.Random, level: int) -> Sums:
    """Level 0 has digits up to 2 only. On another level it is drawn which of the additions carry."""
    if level == 0:
        start, *added = (int("".join(rng.choices("012", k=3))) for _ in range(OPERATIONS + 1))
        return Sums(start, tuple(added))
    carrying = set(rng.sample(range(OPERATIONS), level))
    while True:
        values, added = [rng.randrange(1000)], list[int]()
        for i in range(OPERATIONS):
            n = random_addend(rng, values[-1], i in carrying)
            added.append(n)
            values.append((values[-1] + n) % 1000)
        if (sums := Sums(values[0], tuple(added))).level() == level:  # to a value such as 500 nothing carries
            return sums


def random_addend(rng: random.Random, value: int, carrying: bool) -> int:
    """A number below 1000 that carries when added to `value`, if there is one, or one that does not carry."""
    if not carrying:
        hundreds, tens, ones = rng.randint(0, 9), rng.randint(0, 9 - value // 10 % 10), rng.randint(0, 9 - value % 10)
        return 100 * hundreds + 10 * tens + ones
    drawn = (rng.randrange(1000) for _ in range(1000))
    return next((n for n in drawn if carries(value, n)), 0)


def make_problems(count: int, seed: int, levels: Sequence[int] = LEVELS) -> list[tuple[str, str, int]]:
    """`count` distinct problems as (question, answer, level), the levels in turn; no levels given: LEVELS.

    A level may be named several times to have a larger share.

    >>> make_problems(2, seed=0, levels=(0, 2))[0]
    ('Start at 110. A: add 212. B: add 021. C: add 220. Last 3 digits?', '563', 0)
    """
    levels = list(levels or LEVELS)
    if any(level not in LEVELS for level in levels):
        raise ValueError(f"demo levels {levels}: the demo task has levels {LEVELS[0]} to {LEVELS[-1]}")
    rng, made = random.Random(f"demo problems {seed}"), dict[str, tuple[str, int]]()
    if levels.count(0) * count > len(levels) * 100_000:  # drawing the last ones of 531,441 would take forever
        raise ValueError(f"{count} demo problems are too many: at most 100,000 of level 0")
    while len(made) < count:
        level = levels[len(made) % len(levels)]
        sums = random_sums(rng, level)
        made.setdefault(sums.question(), (f"{sums.values()[-1]:03}", level))
    return [(question, answer, level) for question, (answer, level) in made.items()]
