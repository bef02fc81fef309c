"""Takes the reference answer out of a row's field: a number, a final answer, or a whole solution that ends in one.

A field in which no answer can be found, or only one that no model could ever match, is a `BadRow`.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import Any

import numpy as np

from nanolapo.data.problem_files import BadRow
from nanolapo.grader.boxes import boxed_answer
from nanolapo.grader.spelling import group_digits, is_reachable

ANNOUNCED = re.compile(
    r".*\b(?:answer|ans|solution|result)\b(?:\s+is\b\s*:?|\**\s*[:=])|.*\bfinal answer\**\s*(?:\n|$)",
    re.DOTALL | re.IGNORECASE,
)
TAGGED = re.compile(r"(?:.*</think>|.*(?=<\w*answer>))?\s*<([a-z]\w*)>(.*)</\1>\s*", re.DOTALL | re.IGNORECASE)
# What stands in front of an answer: an arrow, an equals sign, or one label ("Total: 12", but not "Ann: 1, Bob: 2")
LEADING = re.compile(
    r"\s*(?:(?:[=-]+>|[→⇒∴=]|\\(?:(?:long|Long)?(?:R|r)ightarrow|implies|therefore|to)(?![a-zA-Z]))\s*"
    r"|[A-Za-z][A-Za-z ]{0,20}:\s+(?=\S)(?!.*(?:[A-Za-z]:|->|→|\\(?:to|mapsto)(?![a-zA-Z]))))+"
)
FLOAT_DIGITS = 15  # a float holds no more of them for certain
FORMULA = r"\$+(?:[^$\\]|\\.)+\$+"
FORMULAS = re.compile(rf"{FORMULA}(\s*,\s*{FORMULA})*", re.DOTALL)


def reference_answer(value: Any, field: str) -> str:
    """Return the reference answer as plain text, from the forms that published sets use. Raises BadRow if there is none.

    >>> [reference_answer(v, "answer") for v in (36.0, 0.25, "6 * 7 = 42\\n#### 1,042", ["$2$"], ["1", "3"])]
    ['36', '0.25', '1042', '2', '1, 3']
    >>> reference_answer("So $x = \\\\boxed{\\\\frac{1}{2}}$ or $\\\\boxed{3}$.", "solution")
    '\\\\frac{1}{2}, 3'
    """
    if isinstance(value, list):
        if not value:
            raise BadRow(f"field {field!r} is an empty list")
        if any(isinstance(item, list) for item in value):
            raise BadRow(f"field {field!r} is a list of lists")
        return ", ".join(reference_answer(item, field) for item in value)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadRow(f"field {field!r} is {type(value).__name__}, not text, a number or a list of these")
    if isinstance(value, float) and not math.isfinite(value):
        raise BadRow(f"field {field!r} is {value}")
    text = _final_answer(value) if isinstance(value, str) else _number_text(value)
    if isinstance(value, float) and len(text.replace(".", "").strip("-0")) > FLOAT_DIGITS:
        raise BadRow(f"field {field!r} is {value}: a computed number that no answer repeats to the last digit")
    if not text:
        raise BadRow(f"field {field!r} is empty")
    if not is_reachable(text):
        raise BadRow(f"field {field!r} is not a number, formula, list or short word")
    return text


def _number_text(value: int | float) -> str:
    if isinstance(value, int) or value.is_integer():
        return str(int(value))
    if float(np.float32(value)) == value:  # of a column of 32 bits: 0.1, not 0.10000000149011612
        return f"{Decimal(str(np.float32(value))):f}"
    return f"{Decimal(repr(value)):f}"  # 1e-05 -> 0.00001


def _final_answer(text: str) -> str:
    """What a solution states as its answer: its boxes, as the grader reads them, or what follows #### or "Answer:". Tags
    around an answer go, and so does what leads to it."""
    while tagged := TAGGED.fullmatch(text):
        text = tagged[2]
    if re.search(r"\\(?:boxed|fbox)(?![a-zA-Z])", text):
        boxed = boxed_answer(text)
        if boxed is None:
            raise BadRow("its last \\boxed is not closed or empty")
        return _without_dollars(boxed)
    if "####" in text:  # GSM8K: rationale #### 1,042
        text = group_digits(text.rpartition("####")[2])
    if announced := ANNOUNCED.match(text):
        text = re.split(r"\.\s+(?=[A-Z])", text[announced.end() :])[0]
    text = _without_dollars(re.sub(r"(?<!\.)\.$", "", text.strip("* \n\t")))
    return _without_dollars(text[leading.end() :]) if (leading := LEADING.match(text)) else text


def _without_dollars(text: str) -> str:
    r"""$2$ -> 2, and $69$,$84$ -> 69,84. But \$18.90 is a price, and words between formulas stay."""
    formulas = re.sub(r"(?<!\\)\\[()\[\]]", "$", text)
    return re.sub(r"(?<!\\)\$", "", formulas if FORMULAS.fullmatch(formulas) else "").strip() or text.strip()
