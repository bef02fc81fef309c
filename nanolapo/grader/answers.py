"""Compares two final answers as text: it normalises the LaTeX and decides numbers, words, lists and tuples exactly.

`equal(a, reference, leaf)` walks the structure (lists, tuples, labels, equations) and settles everything that needs no
algebra. It hands two formulas that it cannot settle to `leaf`. In a worker, `leaf` is math-verify. In the trainer's process
it says "ask a worker". All of this is string work on short texts, with regular expressions that take linear time. No text
is ever evaluated here, and `hostile` turns away answers that are too long or too large to look at.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache

Leaf = Callable[[str, str], bool]

UNICODE = str.maketrans(
    {
        **dict.fromkeys("−–—‐‑﹣－", "-"), **dict.fromkeys("\u00a0\u2002\u2003\u3000\t\n\r", " "), "√": r"\sqrt ",
        **dict.fromkeys("\u2009\u202f\u200a", r"\,"), **dict.fromkeys("\u200b\u2060\ufeff°", ""), "×": r"\times ",
        "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "⁄": "/", "π": r"\pi ", "θ": r"\theta ", "∞": r"\infty ",
        "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "±": r"\pm ", "∪": r"\cup ", "∩": r"\cap ",
        "∈": r"\in ", "∅": r"\emptyset ", "²": "^2", "³": "^3", "½": r"\frac12", "¼": r"\frac14", "¾": r"\frac34",
        "，": ",", "（": "(", "）": ")", "％": "%", **{chr(0xFF10 + d): str(d) for d in range(10)},
    }
)  # fmt: skip
UNITS = (
    "mm|cm|km|kg|mg|mL|ml|ft|mi|yd|lbs?|oz|mph|inch(?:es)?|foot|feet|met(?:er|re)s?|miles?|yards?|dollars?|cents?|USD"
    "|degrees?|hours?|hrs?|minutes?|mins?|seconds?|secs?|days?|weeks?|months?|years?|(?:square |cubic )?units?"
)
QUANTITY = (
    r"hundred|thousand|million|billion|trillion|dozen|score|pi|theta|alpha|beta|sqrt|sin|cos|tan|log|squared|cubed"
)
REWRITES: list[tuple[re.Pattern[str], str]] = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"(?<=\d)(?:,\\!|(?<!\\)\\[,;:]|\{,\}|~)\s*(?=\d{3}(?!\d))", ""),  # thousands: 10{,}000, 10,\!000, 10\,000
        (r"(?<!\\)\\[()\[\]]|\\?\$|\\!|\\displaystyle|\\(?:left|right|big|Big)(?![a-zA-Z])\.?", ""),
        (r"(?<!\\)\\[,;: ]|~", " "),
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\(?:mbox|mathrm|mathbf|mathit|mathsf|text(?:bf|rm|it|normal)|bm|boldsymbol)(?=\s*\{)", r"\\text"),
        (r"\\(?:leqslant|leq|le)(?![a-zA-Z])|<=", r"\\le "),
        (r"\\(?:geqslant|geq|ge)(?![a-zA-Z])|>=", r"\\ge "),
        (r"\\(?:neq|ne)(?![a-zA-Z])|!=", r"\\ne "),
        (r"\\lt(?![a-zA-Z])", "<"),
        (r"\\gt(?![a-zA-Z])", ">"),
        (r"\\varnothing", r"\\emptyset"),
        (r"\\lbrace(?![a-zA-Z])", r"\\{"),
        (r"\\rbrace(?![a-zA-Z])", r"\\}"),
        (r"\^\s*\{?\s*\\circ\s*\}?|\\degree", ""),
        (r"\\?%|\\text\s*\{\s*percent\s*\}|\bpercent\b", ""),  # 50% reads 50, never 0.5
        (r",?\s*\\text\s*\{[\s,]*(?:and|or)[\s,]*\}|;|\\q?quad(?![a-zA-Z])", ","),
        (r",?\s*(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])", ","),
        (r"(?<=[\d}).])\s*\\text\s*\{(?!\s*(?:[ie]|" + QUANTITY + r")\s*\})[^{}]*\}"
         r"(?:\s*\^\s*\{?\d\}?)?(?=\s*(?:,|$))", ""),  # 5 \text{ cm}^2
        (r"(?<=\d)\s*(?:" + UNITS + r")(?:\s*\^\s*\{?[23]\}?)?\s*(?=,|$)", ""),
        (r"^([-+]?[\d.,/]+)\s+(?!(?:" + QUANTITY + r")\b)[a-z]{3,}(?:\s+[a-z]+){0,2}$", r"\1"),  # 18 eggs
        (r"\\frac\s*(\\[a-zA-Z]+|[^{\s\\])", r"\\frac{\1}"),
        (r"(\\frac\s*\{[^{}]*\})\s*(\\[a-zA-Z]+|[^{\s\\])", r"\1{\2}"),
        (r"(?<![\d.])(\d+)\s+(\d+)/(\d+)", r"\1\\frac{\2}{\3}"),  # 3 1/2
        (r"(?<=\d)(?<![_^]\d)\s+(?=\d)", ","),  # "3 5" is two numbers, not 35
        (r"(?<![\\a-zA-Z])sqrt", r"\\sqrt"),
        (r"\\sqrt\s*(\\[a-zA-Z]+|[^{\s\\\[(])", r"\\sqrt{\1}"),
        (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"\\text\s*\{([^{}]*\d[^{}]*)\}", r"\1"),  # \mathbf{2340}
        (r"^\s*(?:[A-Za-z]\s*\\in|\\approx)(?![a-zA-Z])", ""),
        (r"(\\[a-zA-Z]+)\s+(?=[a-zA-Z])", r"\1" + "\0"),  # \pi r keeps its space
        (r"\s+", ""),
        (r"\0", " "),
        (r",(?:,)+", ","),
    ]
]  # fmt: skip
THOUSANDS = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d*)?|-?\d{1,3}(?: \d{3})+")
DECIMAL = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)")
FRACTION = re.compile(r"([+-]?)(\d*)\\frac\{([+-]?\d+)\}\{([+-]?\d+)\}|([+-]?\d+)/(\d+)")
BASED = re.compile(r"([0-9A-Z]+)_\{?(\d+)\}?")  # 1010_2
WORDS = re.compile(r"\\text\{[^{}]*\}|[A-Za-z]{4,}|\(?[A-Z]\)?")
NOT_LABELS = re.compile(
    r"\\(?:frac|sqrt|binom|sum|prod|int|pm|in|cup|cap|log|ln|pi|infty|le|ge|ne)(?![a-zA-Z])|[<>!^/*]"
)
LABEL = re.compile(r"(?:[A-Za-z+\-|(),']|\\text\{[^{}]*\}|\\[a-zA-Z]++ ?|\\overline\{[^{}]*\})+")
ONE_SYMBOL = re.compile(r"\(?(?:\\?[A-Za-z](?:,|(?=\))|$))+\)?|[A-Za-z]\([A-Za-z,]+\)|\\[a-zA-Z]+|\\text\{[^{}]*\}")


@lru_cache(1000)  # the rows of a group share a reference answer
def normalise(text: str) -> str:
    r"""Rewrite an answer so that spellings with the same meaning become equal.

    >>> normalise(r"\dfrac12 \text{ cm}"), normalise("1,234"), normalise(r"x \in \left[ 1, 2\right)")
    ('\\frac{1}{2}', '1234', '[1,2)')
    """
    text = re.sub(r"(?<!\.)\.$", "", text.translate(UNICODE).strip().strip("*").rstrip(",; ")).strip()
    for pattern, replacement in REWRITES:
        if THOUSANDS.fullmatch(text):
            text = text.replace(",", "").replace(" ", "")
        text = pattern.sub(replacement, text)
    while text.startswith("{") and text.endswith("}") and _closes_at_end(text):
        text = text[1:-1]
    return text.strip(",")


def number(text: str) -> Fraction | None:
    r"""The exact value of an integer, decimal, fraction or mixed number; None for anything else.

    >>> number("-0.50"), number(r"3\frac{1}{2}"), number("007"), number("x")
    (Fraction(-1, 2), Fraction(7, 2), Fraction(7, 1), None)
    """
    if len(text) > 1000:
        return None
    if DECIMAL.fullmatch(text):
        return Fraction(text)
    match = FRACTION.fullmatch(text)
    if match is None:
        return None
    sign, whole, top, bottom, slash_top, slash_bottom = match.groups()
    above, below = int(top or slash_top), int(bottom or slash_bottom)
    if below == 0:
        return None
    value = int(whole or 0) + Fraction(above, below)
    return -value if sign == "-" else value


def hostile(answer: str, reference: str) -> bool:
    """True if an answer is too long, deep or large for a computer algebra system. Workers check the size of powers."""
    if len(answer) > max(1000, 4 * len(reference)) or re.search(r"\d{500}", answer):
        return True
    depth = deepest = 0
    for char in answer:
        depth += (char in "{([") - (char in "})]")
        deepest = max(deepest, depth)
    if deepest > 30 or re.search(r"\\sqrt\s*\[[^\]]*[\^!]", answer) or re.search(r"\d[eE][+-]?\d{3}", answer):
        return True
    # these are computed while they are parsed, before anyone can look at their size
    eager = re.search(r"binom|\\[Gg]amma|\\operatorname|\\det|rightarrow|\\norm|\\[gl]c[dm]", answer)
    return eager is not None and re.search(r"\d{4}|\^|!", answer) is not None


def equal(answer: str, reference: str, leaf: Leaf) -> bool:
    """True if two normalised answers are equal: numbers exactly, words as text, lists in any order, tuples in order."""
    if answer == reference:
        return True
    left, right = number(answer), number(reference)
    if left is not None and right is not None:
        return left == right
    if WORDS.fullmatch(answer) or WORDS.fullmatch(reference):
        return _plain(answer) == _plain(reference)
    kind_a, items_a = _items(answer)
    kind_r, items_r = _items(reference)
    tuple_a, tuple_r = _tuple(answer), _tuple(reference)
    if (tuple_a and right is not None) or (tuple_r and left is not None):
        return False
    if not (kind_a == kind_r == "bare" and len(items_a) == len(items_r) == 1):  # a set or a list on either side
        if tuple_r:  # "1, 2" may stand for (1,2), in that order; {1,2} may not
            return kind_a == "bare" and _in_order(items_a, tuple_r[1:], leaf)
        if tuple_a:
            return kind_r == "bare" and tuple_a[0] == "()" and _any_order(tuple_a[1:], items_r, leaf)
        return _any_order(items_a, items_r, leaf)
    if tuple_a and tuple_r:
        return tuple_a[0] == tuple_r[0] and _in_order(tuple_a[1:], tuple_r[1:], leaf)
    based_a, based_r = BASED.fullmatch(answer), BASED.fullmatch(reference)
    if based_a and based_r:
        return based_a.groups() == based_r.groups()
    if based_a or based_r:  # the question fixed the base: the answer may leave it out, but not add one
        return based_r is not None and based_r[1] == answer
    parts_a, parts_r = _split(answer, "="), _split(reference, "=")
    if len(parts_a) > 1 and len(parts_r) == 1:  # "x = 5" for 5: every side that is not a label must be right
        values = [part for part in parts_a if not _is_label(part)] or parts_a[-1:]
        return all(equal(value, reference, leaf) for value in values)
    if len(parts_r) > 1 and len(parts_a) == 1:
        if ONE_SYMBOL.fullmatch(_bare(parts_r[0])) or number(parts_r[0]) is not None:
            return any(equal(answer, part, leaf) for part in parts_r if not _is_label(part))
        return False
    if len(parts_a) == len(parts_r) == 2 and parts_a[0] == parts_r[0]:
        return equal(parts_a[1], parts_r[1], leaf)
    return leaf(answer, reference)


def _in_order(answers: list[str], references: list[str], leaf: Leaf) -> bool:
    return len(answers) == len(references) and all(equal(a, r, leaf) for a, r in zip(answers, references, strict=True))


def _any_order(answers: list[str], references: list[str], leaf: Leaf) -> bool:
    """Takes the first match of each answer, which is enough because equality is transitive."""
    if len(answers) != len(references):
        return False
    left = list(references)
    for answer in answers:
        match = next((i for i, reference in enumerate(left) if equal(answer, reference, leaf)), None)
        if match is None:
            return False
        del left[match]
    return True


def _plain(text: str) -> str:
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"[\s().]", "", text)
    return text if len(text) == 1 else text.casefold()


def _bare(text: str) -> str:
    """Drop subscripts and function arguments: a_{10} -> a, f(2) -> f."""
    return re.sub(r"(?<=[A-Za-z}])\(-?\d+\)", "", re.sub(r"_(?:\{[^{}]*\}|\w)", "", text))


def _is_label(text: str) -> bool:
    text = _bare(text)
    return LABEL.fullmatch(text) is not None and NOT_LABELS.search(text) is None


def _closes_at_end(text: str) -> bool:
    """True if the bracket that opens the text is closed by its last character."""
    depth = 0
    for i, char in enumerate(text):
        depth += (char in "{([") - (char in "})]")
        if depth == 0 and char in "})]":
            return i == len(text) - 1
    return False


def _split(text: str, separator: str) -> list[str]:
    """Split outside of brackets. The result is one piece if the brackets do not match."""
    pieces, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "{([") - (char in "})]")
        if depth < 0:
            return [text]
        if char == separator and depth == 0:
            pieces.append(text[start:i])
            start = i + 1
    pieces.append(text[start:])
    return pieces if depth == 0 and all(pieces) else [text]


def _items(text: str) -> tuple[str, list[str]]:
    """The kind ("set" or "bare") and the members of a set or list. A member with +- becomes two."""
    kind = "bare"
    if text.startswith(r"\{") and text.endswith(r"\}") and _closes_at_end(text[1:-2] + "}"):
        kind, text = "set", text[2:-2]
    items = []
    for item in _split(text, ","):
        if item.count(r"\pm") == 1:
            before, after = item.split(r"\pm")
            items += [f"{before}+{after.strip()}" if before else after.strip(), f"{before}-{after.strip()}"]
        else:
            items.append(item)
    return kind, items


def _tuple(text: str) -> list[str]:
    """['()', 'a', 'b'] for (a,b), ['[)', 'a', 'b'] for [a,b); [] if the text is not one bracket with commas."""
    if text[:1] in ("(", "[") and text[-1:] in (")", "]") and _closes_at_end(text):
        items = _split(text[1:-1], ",")
        if len(items) > 1:
            return [text[0] + text[-1], *items]
    return []
