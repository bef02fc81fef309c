r"""Finds the answer in a completion: the last \boxed{...} after the thought. __init__.py states the conventions."""

from __future__ import annotations

import re

# What opens and closes a thought: <think>, </think>, <seed:think>, [THINK], [/THINK], <|end_of_thought|>, ◁/think▷, ...
THOUGHT_TAG = re.compile(
    r"[<\[◁]\|?(?P<end>/|end_of_)?(?:[a-z]+[:_])*(?:think|thinking|thought)\|?[>\]▷]", re.IGNORECASE
)
BOX = re.compile(r"(?<!\\)\\++(?:boxed|fbox)\s*\{")  # ++: a run of backslashes is read once
BOX_TOKEN = re.compile(BOX.pattern + r"|\\.|[{}]", re.DOTALL)
UNBRACED = re.compile(r"\\boxed\s+(-?\d+(?:[./]\d+)?)")  # \boxed 2
LAYOUT = re.compile(r"\\(?:begin|end|[hv]space)\s*\*?\{[^{}]*\}|\\(?:[a-zA-Z]+|.)|[^A-Za-z\\]+", re.DOTALL)
JOINING = {"and", "or", "also", "as", "well", "else", "both"}
ALTERNATIVE = {"or", "either", "alternatively", "maybe", "perhaps", "possibly", "otherwise"}


def _boxes(text: str) -> list[tuple[int, int, str | None]]:
    r"""(start, end, content) of the outermost boxes, in order. The content of a box that is never closed is None.

    >>> _boxes(r"\boxed{\boxed{5}} \boxed{2")
    [(0, 17, '5'), (18, 26, None)]
    """
    stack: list[int | None] = []  # starts of open boxes, None for plain braces
    starts: dict[int, int] = {}
    closed: list[tuple[int, int, str | None]] = []
    for token in BOX_TOKEN.finditer(text):
        if BOX.fullmatch(token[0]):
            stack.append(token.start())
            starts[token.start()] = token.end()
        elif token[0] == "{":
            stack.append(None)
        elif token[0] == "}" and stack:
            start = stack.pop()
            if start is not None:
                first = None
                while closed and closed[-1][0] > start:  # a box inside this box
                    first = closed.pop()
                only = first is not None and first[:2] == (starts[start], token.start())
                content = first[2] if first and only else text[starts[start] : token.start()]
                closed.append((start, token.end(), content))
    return sorted(closed + [(start, len(text), None) for start in stack if start is not None])


def last_boxed(text: str) -> str | None:
    r"""The content of the last box. None if there is no box, or if the last one is empty or unterminated.

    >>> last_boxed(r"\boxed{1} so \boxed{\frac{1}{2}}"), last_boxed(r"\boxed{\boxed{5}}"), last_boxed(r"\boxed{1} \boxed{2")
    ('\\frac{1}{2}', '5', None)
    """
    boxes = _boxes(UNBRACED.sub(r"\\boxed{\1}", text))
    return _content(boxes[-1][2]) if boxes else None


def _content(box: str | None) -> str | None:
    return BOX.sub("{", box).strip() or None if box is not None else None


def _joined(between: str) -> bool:
    r"""True if two boxes with this text between them are alternatives or parts of one list, not steps of a calculation.

    >>> _joined(r"} \quad \text{ and } x ="), _joined(" cm or "), _joined(" is too small, so take ")
    (True, True, False)
    """
    if len(between) > 100:
        return False
    words = [word for word in LAYOUT.sub(" ", between).lower().split() if len(word) > 1]
    return {*words} <= JOINING or (len(words) <= 8 and (words[-1] in ("and", "or") or bool(ALTERNATIVE & {*words})))


def split_thought(text: str) -> tuple[bool, str]:
    r"""Whether a tag in the text closes a thought, and what follows the last such tag, or all of the text.

    >>> split_thought(r"\boxed{1}? [/THINK] \boxed{2}"), split_thought("<think> 2")
    ((True, ' \\boxed{2}'), (False, '<think> 2'))
    """
    _, closing, rest = text.rpartition("</think>")  # a hundred times faster than the pattern, which reads only the rest
    ends = [tag.end() for tag in THOUGHT_TAG.finditer(rest) if tag["end"]]
    return bool(closing or ends), rest[ends[-1] :] if ends else rest


def boxed_answer(completion: str, require_think_close: bool = False) -> str | None:
    """The boxed answer of a completion; with `require_think_close` only of one that closes a thought. Boxes that belong
    together become one list with commas."""
    closed, tail = split_thought(completion)
    if require_think_close and not closed:
        return None
    tail = UNBRACED.sub(r"\\boxed{\1}", tail)
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


def first_boxed(completion: str) -> str | None:
    r"""The text from the first \boxed{ to the first }, which the LAPO authors' code compares. None if there is no box.

    >>> first_boxed(r"\boxed{5} or \boxed{6}"), first_boxed(r"\boxed{\frac{1}{2}}")
    ('5', '\\frac{1')
    """
    for line in completion.split("\n"):  # the rule is a regular expression whose dot matches no line break
        _, box, rest = line.partition(r"\boxed{")
        content, brace, _ = rest.partition("}")
        if box and brace:
            return content
    return None
