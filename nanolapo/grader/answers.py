"""Compares two final answers that spelling.py has normalised: numbers, words, lists, tuples and equations, exactly.

`equal(a, reference, leaf)` walks the structure (lists, tuples, labels, equations) and settles everything that needs no
algebra. It hands two formulas that it cannot settle to `leaf`. In a worker, `leaf` is math-verify. In the trainer's process
it says "ask a worker". All of this is string work on short texts, with regular expressions that take linear time. No text
is ever evaluated here, and `hostile` turns away answers that are too long or too large to look at.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from string import ascii_letters

from nanolapo.grader.spelling import closes_at_end

Leaf = Callable[[str, str], bool]

DECIMAL = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)")
FRACTION = re.compile(r"([+-]?)(\d*)\\frac\{([+-]?\d+)\}\{([+-]?\d+)\}|([+-]?\d+)/(\d+)")
BASED = re.compile(r"([0-9A-Z]+)_\{?(\d+)\}?")  # 1010_2
REPEATING = re.compile(r"([+-]?)(\d*)\.(\d*)\\overline\{(\d+)\}")  # 0.1\overline{6}
CLOCK = re.compile(r"(\d{1,2})((?::\d\d)*)(?:\\text\{([aApP])\.?[mM]\.?\})?")  # 8:30 is no ratio
TEMPERATURE = re.compile(r"(.*[\d}])\\text\{deg([CF])\}")
TEXT = re.compile(r"\\text\{([^{}]*)\}")
WORDS = re.compile(TEXT.pattern + r"|[A-Za-z]{3,}|(?i:no|on|up|am|pm)|\(?[A-Z]\)?")  # but xy is a product
NOT_LABELS = re.compile(
    r"\\(?:frac|sqrt|binom|sum|prod|int|pm|in|cup|cap|log|ln|pi|infty|le|ge|ne)(?![a-zA-Z])|[<>!^/*]"
)
LABEL = re.compile(r"(?:[A-Za-z+\-|(),']|\\text\{[^{}]*\}|\\[a-zA-Z]++ ?|\\(?:over[a-z]+|bar|hat|vec)\{[^{}]*\})+")
FUNCTION = re.compile(  # f^{-1}(x), P(X=2), E[X], \frac{dy}{dx}. But x(x+1)=6 may be an equation that x solves
    r"(?:[A-Zf-h]|\\Pr|\\(?:text|mathbb|operatorname)\{[^{}]*\})(?:_\{[^{}]*\})?'*(?:\^\{-1\})?"
    r"(?:\((?:[^()]|\([^()]*\))*\)|\[[^\[\]]*\])|\\frac\{d[a-z]\}\{d[a-z]\}"
)
RAY = re.compile(r"([A-Za-z])(<|>|\\[lg]e)([^<>=\\A-Za-z]+)")  # x<1
RANGE = re.compile(r"[^<>=\\]+(?:<|\\le ?)([A-Za-z])(?:<|\\le)[^<>=\\]+")  # 0<x<1
ONE_SYMBOL = re.compile(r"\(?(?:\\?[A-Za-z](?:,|(?=\))|$))+\)?|[A-Za-z]\([A-Za-z,]+\)|\\[a-zA-Z]+|\\text\{[^{}]*\}")


@dataclass(frozen=True)
class Members:
    r"""What an answer consists of: a list ("kind" is empty), a set ("{}"), or a tuple or interval ("()", "[)", ...).

    >>> _members("x=2,y=1"), _members("[1,2)").kind
    (Members(kind='', items=['2', '1'], labels=['x', 'y']), '[)')
    """

    kind: str
    items: list[str]
    labels: list[str] = field(default_factory=list)  # one per item if the items have different labels, else empty

    @property
    def is_single(self) -> bool:
        return self.kind == "" and len(self.items) == 1

    @property
    def is_tuple(self) -> bool:
        return self.kind not in ("", "{}")

    @property
    def has_order(self) -> bool:
        """True for a tuple, and for x=2, y=1, but not for x_1=2, x_2=1: these are two values of one unknown."""
        return self.is_tuple or bool(self.labels) and len({*map(_bare, self.labels)}) == len(self.labels)

    @property
    def in_order(self) -> list[str]:
        """The items; labels that are neighbours in the alphabet have an order of their own: b=1, a=2 is (2,1)."""
        if self.labels and "".join(sorted(self.labels)) in ascii_letters:
            return [item for _, item in sorted(zip(self.labels, self.items, strict=True))]
        return self.items


def number(text: str) -> Fraction | None:
    r"""The exact value of an integer, decimal, fraction or mixed number; None for anything else.

    >>> number("-0.50"), number(r"3\frac{1}{2}"), number("007"), number("x")
    (Fraction(-1, 2), Fraction(7, 2), Fraction(7, 1), None)
    """
    if len(text) > 1000:
        return None
    if DECIMAL.fullmatch(text):
        return Fraction(text)
    if match := REPEATING.fullmatch(text):
        sign, whole, once, again = match.groups()
        period = Fraction(int(again), 10 ** len(again) - 1)
        value = (int(whole + once or 0) + period) / 10 ** len(once)
        return -value if sign == "-" else value
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
    if (time := _clock(answer)) and (wanted := _clock(reference)):
        return time == wanted
    warm_a, warm_r = TEMPERATURE.fullmatch(answer), TEMPERATURE.fullmatch(reference)
    if warm_a or warm_r:  # one of them may leave the unit out
        same_unit = not (warm_a and warm_r) or warm_a[2] == warm_r[2]
        return same_unit and equal(warm_a[1] if warm_a else answer, warm_r[1] if warm_r else reference, leaf)
    a, r = _members(answer), _members(reference)
    if (a.is_tuple and right is not None) or (r.is_tuple and left is not None):
        return False
    # One formula beside a tuple or interval may be x>2 for (2,\infty): that is not settled by the members.
    if (a.is_single or a.is_tuple) and (r.is_single or r.is_tuple) and (a.is_single or r.is_single):
        return _same_formula(answer, reference, leaf)
    return _same_members(_ranges(a, r), _ranges(r, a), leaf)


def is_list(text: str) -> bool:
    """True if a normalised answer has several members, so that the comma in an answer such as 81,256 separates."""
    return len(_members(text).items) > 1


def _ranges(one: Members, other: Members) -> Members:
    r"""The intervals of a union, if the other answer is a list of inequalities: x<1 or x>2."""
    found = [RAY.fullmatch(item) or RANGE.fullmatch(item) for item in other.items]
    if not one.is_single or len({match and match[1] for match in found}) > 1 or None in found:
        return one
    rays = [match for match in found if match and match.re is RAY]
    ends, starts = ([number(ray[3]) for ray in rays if (ray[2] in ("<", r"\le")) is wanted] for wanted in (True, False))
    # "x>2 and x<5" is no union
    if any(end is None or start is None or end > start for end in ends for start in starts):
        return one
    return Members("", _split(one.items[0].replace(r"\cup", "∪"), "∪"))


def _same_members(a: Members, r: Members, leaf: Leaf) -> bool:
    """By label where both have labels, in order where one has or where a tuple asks for it, otherwise in any order."""
    if a.labels and r.labels:
        value = dict(zip(a.labels, a.items, strict=True))
        same = len(a.labels) == len(r.labels) and value.keys() == {*r.labels}
        return same and _in_order([value[label] for label in r.labels], r.items, leaf)
    if r.has_order or (a.has_order and not a.is_tuple):  # "1, 2" may stand for (1,2), but not for [1,2), nor may {1,2}
        is_interval = len(r.items) == 2 and r.kind not in ("", "()", "{}")
        same = a.kind == (r.kind or "()") or (a.kind == "" and not is_interval)
        return same and _in_order(a.in_order, r.in_order, leaf)
    return (not a.is_tuple or (a.kind, r.kind) == ("()", "")) and _any_order(a.items, r.items, leaf)


def _in_order(answers: list[str], references: list[str], leaf: Leaf) -> bool:
    return len(answers) == len(references) and all(equal(a, r, leaf) for a, r in zip(answers, references, strict=True))


def _any_order(answers: list[str], references: list[str], leaf: Leaf) -> bool:
    """True if each reference has an answer of its own. Another answer may only repeat a value: 1/2, 0.5 is 1/2.

    The first match of each answer is enough, because equality is transitive.
    """
    left, used = list(references), []
    for answer in answers if len(answers) >= len(references) else []:
        match = next((reference for reference in left if equal(answer, reference, leaf)), None)
        if match is not None:
            left.remove(match)
            used.append(match)
        elif not any(equal(answer, reference, leaf) for reference in used):
            return False
    return not left


def _same_formula(answer: str, reference: str, leaf: Leaf) -> bool:
    based_a, based_r = BASED.fullmatch(answer), BASED.fullmatch(reference)
    if based_a and based_r:
        return based_a.groups() == based_r.groups()
    if based_a or based_r:  # the question fixed the base: the answer may leave it out, but not add one
        return based_r is not None and based_r[1] == answer
    parts_a, parts_r = _split(answer, "="), _split(reference, "=")
    if len(parts_a) > 1 and len(parts_r) == 1:  # "x = 5" for 5: every side that is not a label must be right
        values = [part for part in parts_a if not _is_label(part)] or parts_a[-1:]
        return all(equal(value, reference, leaf) for value in values)
    if len(parts_r) > 1 and len(parts_a) == 1:  # 5 for "x = 5", but 0 = x-1 asks for an equation
        values = [part for part in parts_r if not (ONE_SYMBOL.fullmatch(_bare(part)) or FUNCTION.fullmatch(part))]
        named = parts_r[0] not in values or parts_r[-1] not in values
        return named and any(equal(answer, value, leaf) for value in values)
    if len(parts_a) == len(parts_r) == 2:
        if parts_a[0] == parts_r[0]:
            return equal(parts_a[1], parts_r[1], leaf)
        if ONE_SYMBOL.fullmatch(_bare(parts_a[0])) and _bare(parts_a[0]) == _bare(parts_r[0]):
            return False  # f(1) = 3 says nothing about f(2)
    words_a, words_r = TEXT.findall(answer), TEXT.findall(reference)
    if words_a or words_r:  # words that are left change the value: 4:30 pm is not 4:30
        same = [*map(_plain, words_a)] == [*map(_plain, words_r)]
        return same and equal(TEXT.sub("", answer), TEXT.sub("", reference), leaf)
    return leaf(answer, reference)


def _clock(text: str) -> tuple[int, str, bool] | None:
    r"""(hour, minutes, whether the half of the day is known) of a time of day, None for anything else.

    >>> _clock(r"5:00\text{pm}"), _clock("17:00"), _clock("5:00"), _clock("17")
    ((17, '', True), (17, '', True), (5, '', False), None)
    """
    match = CLOCK.fullmatch(text)
    if match is None or not (match[2] or match[3]):
        return None
    hour, minutes, half = int(match[1]), re.sub("(?::00)+$", "", match[2]), (match[3] or "").lower()
    in_half = 1 <= hour <= 12
    if not half:
        return hour, minutes, not in_half
    return (hour % 12 + 12 * (half == "p"), minutes, True) if in_half else None


def _plain(text: str) -> str:
    text = re.sub(r"[\s().]", "", TEXT.sub(r"\1", text))
    return text if len(text) == 1 else text.casefold()


def _bare(text: str) -> str:
    """Drop subscripts and function arguments: a_{10} -> a, f(2) -> f."""
    return re.sub(r"(?<=[A-Za-z}])\(-?\d+\)", "", re.sub(r"_(?:\{[^{}]*\}|\w)", "", text))


def _is_label(text: str) -> bool:
    if FUNCTION.fullmatch(text):
        return True
    text = _bare(text)
    if text.startswith("-"):  # -x = 5 does not say that x is 5
        return False
    return LABEL.fullmatch(text) is not None and NOT_LABELS.search(text) is None


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


def _members(text: str) -> Members:
    names, *value = _split(text, "=")
    if len(value) == 1 and names[0] == "(" and _is_label(names):  # (x,y)=(2,1)
        left, right = _members(names), _members(value[0])
        if left.kind == right.kind == "()" and len(left.items) == len(right.items):
            return Members("()", right.items, left.items)
    if text[:1] in ("(", "[") and text[-1:] in (")", "]") and closes_at_end(text):
        coordinates = _split(text[1:-1], ",")
        return Members(text[0] + text[-1], coordinates) if len(coordinates) > 1 else Members("", [text])
    is_set = text.startswith(r"\{") and text.endswith(r"\}") and closes_at_end(text[1:-2] + "}")
    kind, items = ("{}", _both_signs(_split(text[2:-2], ","))) if is_set else ("", _both_signs(_split(text, ",")))
    sides = [_split(item, "=") for item in items]
    labels = [side[0] for side in sides]
    if len({*labels}) == len(items) > 1 and all(len(side) == 2 and _is_label(side[0]) for side in sides):
        return Members(kind, [side[1] for side in sides], labels)
    return Members(kind, items)


def _both_signs(items: list[str]) -> list[str]:
    """A member with +- becomes two."""
    found = []
    for item in items:
        before, sign, after = item.partition(r"\pm")
        if sign and r"\pm" not in after:
            found += [f"{before}+{after.strip()}" if before else after.strip(), f"{before}-{after.strip()}"]
        else:
            found.append(item)
    return found
