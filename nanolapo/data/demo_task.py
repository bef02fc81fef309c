"""The procedural problems of the CPU demo: chains of small operations that ask for the last digit only.

A problem of level k has k operations. Adding and multiplying by 3, 7 or 9 are one-to-one on last digits, so the answer
depends on every step and cannot be guessed from some of them. Pure Python, no torch; the same (count, seed, levels)
gives the same problems everywhere.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

LEVELS = (1, 2, 3, 4, 6, 8, 10)  # the right length of a solution differs by a factor of five
LABELS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class Chain:
    """The content of one question: a first digit, then operations such as ("+", 8) or ("*", 7)."""

    start: int
    operations: tuple[tuple[str, int], ...]

    def question(self) -> str:
        """The text of the problem.

        >>> Chain(3, (("+", 8), ("*", 7))).question()
        'Start with 3. A: add 8. B: times 7. Last digit?'
        """
        words = {"+": "add", "*": "times"}
        steps = (f"{LABELS[i]}: {words[sign]} {n}." for i, (sign, n) in enumerate(self.operations))
        return " ".join([f"Start with {self.start}.", *steps, "Last digit?"])

    def digits(self) -> list[int]:
        """The last digit at the start and after each operation.

        >>> Chain(3, (("+", 8), ("*", 7))).digits()
        [3, 1, 7]
        """
        digits = [self.start]
        for sign, n in self.operations:
            digits.append((digits[-1] + n if sign == "+" else digits[-1] * n) % 10)
        return digits


def parse_question(question: str) -> Chain:
    """The Chain of a question made by Chain.question."""
    start, *_ = re.findall(r"\d", question)
    operations = tuple(("+" if w == "add" else "*", int(n)) for w, n in re.findall(r"(add|times) (\d)", question))
    return Chain(int(start), operations)


def random_chain(rng: random.Random, level: int) -> Chain:
    signs = [rng.choice("+*") for _ in range(level)]
    operations = tuple((sign, rng.choice((3, 7, 9)) if sign == "*" else rng.randint(1, 9)) for sign in signs)
    return Chain(rng.randint(0, 9), operations)


def make_problems(count: int, seed: int, levels: Sequence[int] = LEVELS) -> list[tuple[str, str, int]]:
    """`count` distinct problems as (question, answer, level), the levels in turn; no levels given: LEVELS.

    A level is empty when all its questions are used (level 1 has 120); the others then share the rest.

    >>> make_problems(2, seed=0, levels=(1, 2))[0]
    ('Start with 6. A: times 7. Last digit?', '2', 1)
    """
    remaining = list(levels or LEVELS)
    if any(not 1 <= level <= len(LABELS) for level in remaining):
        raise ValueError(f"demo levels {remaining}: the demo task has levels 1 to {len(LABELS)}")
    rng, made, position = random.Random(f"demo problems {seed}"), dict[str, tuple[str, int]](), 0
    while len(made) < count:
        if not remaining:
            raise ValueError(f"there are only {len(made)} distinct demo problems of levels {list(levels)}, not {count}")
        level = remaining[position % len(remaining)]
        for _ in range(1000):  # a level without a new question in a thousand tries counts as empty
            chain = random_chain(rng, level)
            if chain.question() not in made:
                made[chain.question()] = (str(chain.digits()[-1]), level)
                position += 1
                break
        else:
            remaining.remove(level)
    return [(question, answer, level) for question, (answer, level) in made.items()]
