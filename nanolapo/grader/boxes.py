r"""Where the answer is in a completion: the last \boxed{...} after the thinking. __init__.py tells the conventions."""

from __future__ import annotations

import re

BOX_TOKEN = re.compile(r"\\+boxed\s*\{|\\.|[{}]", re.DOTALL)
WORD_OR_COMMAND = re.compile(r"\\(?:text|mathrm|q?quad)(?![a-zA-Z])|\\[^a-zA-Z]|[^A-Za-z]+")
ALTERNATIVE = {"or", "either", "alternatively", "maybe", "perhaps", "possibly", "otherwise"}


def _boxes(text: str) -> list[tuple[int, int, str | None]]:
    """(start, end, content) of the outermost boxes in order; content None where the box is never closed."""
    stack: list[int | None] = []  # starts of open boxes, None for plain braces
    starts: dict[int, int] = {}
    closed: list[tuple[int, int, str | None]] = []
    for token in BOX_TOKEN.finditer(text):
        if token[0].endswith("{") and "boxed" in token[0]:
            stack.append(token.start())
            starts[token.start()] = token.end()
        elif token[0] == "{":
            stack.append(None)
        elif token[0] == "}" and stack:
            start = stack.pop()
            if start is not None:
                while closed and closed[-1][0] > start:  # a box inside this box
                    closed.pop()
                closed.append((start, token.end(), text[starts[start] : token.start()]))
    return sorted(closed + [(start, len(text), None) for start in stack if start is not None])


def last_boxed(text: str) -> str | None:
    r"""The content of the last box; None when there is none, or when it is empty or unterminated.

    >>> last_boxed(r"\boxed{1} so \boxed{\frac{1}{2}}"), last_boxed(r"\boxed{\boxed{5}}"), last_boxed(r"\boxed{1} \boxed{2")
    ('\\frac{1}{2}', '5', None)
    """
    boxes = _boxes(text)
    return _content(boxes[-1][2]) if boxes else None


def _content(box: str | None) -> str | None:
    while box is not None and (inner := _boxes(box)) and (inner[0][0], inner[0][1]) == (0, len(box)):
        box = inner[0][2]
    return re.sub(r"\\+boxed\s*\{", "{", box).strip() or None if box is not None else None


def _joined(between: str) -> bool:
    """Are two boxes with this text between them alternatives or parts of one list?"""
    if len(between) > 100:
        return False
    words = WORD_OR_COMMAND.sub(" ", between).lower().split()
    return all(len(w) == 1 or w in ("and", "or") for w in words) or (len(words) <= 8 and bool(ALTERNATIVE & {*words}))


def boxed_answer(completion: str, require_think_close: bool) -> str | None:
    """The boxed answer of a completion, joined boxes as one comma list."""
    head, closing, tail = completion.rpartition("</think>")
    if require_think_close and not closing:
        return None
    boxes = _boxes(tail)
    answer = _content(boxes[-1][2]) if boxes else None
    if answer is None:
        return None
    parts = [answer]
    for before, after in zip(boxes[-2::-1], boxes[:0:-1], strict=True):
        part = _content(before[2])
        if part is None or len(parts) > 200 or not _joined(tail[before[1] : after[0]]):
            break
        if part not in parts:
            parts.insert(0, part)
    return ", ".join(parts)


def exact_first_boxed(completion: str, reference: str) -> bool:
    r"""The reference LAPO code's rule: text from the first \boxed{ to the first } equals the reference exactly."""
    return first_boxed(completion) == reference


def first_boxed(completion: str) -> str | None:
    r"""Text from the first \boxed{ to the first }; None without one.

    >>> first_boxed(r"\boxed{5} or \boxed{6}"), first_boxed(r"\boxed{\frac{1}{2}}")
    ('5', '\\frac{1')
    """
    match = re.search(r"\\boxed\{(.*?)\}", completion)
    return match[1] if match else None
