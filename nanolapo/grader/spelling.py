r"""Rewrites an answer so that spellings with the same meaning become the same text, before anything is compared.

The order matters. While blanks are still there, it is decided which digits belong together: 1,234 and 12 345 are numbers,
"5, 120" and "5 120 7" are lists, and 2^6 3 is not 2^{63}. Only then do units, words and LaTeX get one spelling, and the
blanks go. Every pattern takes linear time. No text is ever evaluated here.
"""

from __future__ import annotations

import re
from functools import lru_cache

UNICODE = str.maketrans(
    {
        **dict.fromkeys("−–—‐‑﹣－", "-"), **dict.fromkeys("\u00a0\u2002\u2003\u3000\t\n\r", " "), "√": r"\sqrt ",
        **dict.fromkeys("\u2009\u202f\u200a", r"\,"), **dict.fromkeys("\u200b\u2060\ufeff", ""), "×": r"\times ",
        "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "⁄": "/", "π": r"\pi ", "θ": r"\theta ", "∞": r"\infty ",
        "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "±": r"\pm ", "∪": r"\cup ", "∩": r"\cap ",
        "∈": r"\in ", "∅": r"\emptyset ", "²": "^2", "³": "^3", "½": r"\frac12", "¼": r"\frac14", "¾": r"\frac34",
        "⅓": r"\frac13", "⅔": r"\frac23", "⅕": r"\frac15", "⅙": r"\frac16", "⅛": r"\frac18", "€": "$", "£": "$",
        "，": ",", "（": "(", "）": ")", "％": "%", "°": r"^\circ ", **{chr(0xFF10 + d): str(d) for d in range(10)},
    }
)  # fmt: skip

Rules = list[tuple[re.Pattern[str], str]]


def _rules(*pairs: tuple[str, str]) -> Rules:
    return [(re.compile(pattern), replacement) for pattern, replacement in pairs]


# ---- what only changes the look ----

LOOK = _rules(
    (r"\\\\\*?\s*\[\s*-?[\d.]+\s*[a-z]{2}\s*\]|(?<!\\)\\cr(?![a-zA-Z])", r"\\\\ "),  # a new row: \\[4pt], \cr
    (r"(?<=\d)(?:,\\!|\{,\})\s*(?=\d{3}(?!\d))", ""),  # 10{,}000 and 10,\!000 are thousands anywhere
    (r"(?<=\d)\\?\$(?=\d)", ","),  # two prices; no mark between two digits may glue them
    (r"(?<!\\)\\[()\[\]]|\\?\$|\\!|\\(?:displaystyle|limits)(?![a-zA-Z])", ""),
    (r"\\(?:left|right|middle|[bB]igg?[lrm]?)(?![a-zA-Z])\.?", ""),
    (r"(?<!\\)\\[,;: ]|(?<!\\)\\$|~", " "),
    (r"\\(?:mbox|hbox|emph|math(?:rm|sf|tt)|text(?:bf|rm|it|sf|tt|up|normal))(?=\s*\{)", r"\\text"),
    (r"\\text\s*\{(\s*[ie]\s*|[^{}]*(?:\d|\b(?:and|or)\b)[^{}]*)\}", r"\1"),  # \mathrm{i}, \text{5 cm}, \text{ or }
    (r"\\(?:math(?:bf|it|normal)|bm|boldsymbol|pmb|underline)\s*\{([^{}]*)\}", r"\1"),
)

# ---- which digits belong together ----

COMMAS = re.compile(r"(?<![\w.,^/])[1-9]\d{0,2}(?:,\d{3})+(?!\d|,\d)")  # 1,234, but no part of 1,7,103
BLANKS = re.compile(r"(?<![\w.,^/])[1-9]\d{0,2}(?: \d{3})+(?![\d/]| \d)")  # 12 345 and 12\,345, but not 5 120/7
SEPARATOR = re.compile(r",\s|;|\b(?:and|or)\b|\\q?quad")


def group_digits(text: str, is_list: bool = False) -> str:
    """Remove the marks between thousands. Say with `is_list` that a comma separates where it could mean either.

    >>> group_digits("1,234"), group_digits("5, 120"), group_digits("(1,234)")
    ('1234', '5, 120', '(1,234)')
    """

    def group(run: re.Match[str]) -> str:
        members = _inside_bracket(text, run.start()) or (text if is_list else "")
        # In a bracket a comma separates, unless another sign does: (1,234) has two members, so has (1,234, 5).
        return run[0] if members and not SEPARATOR.search(members) else run[0].replace(",", "")

    return BLANKS.sub(lambda run: run[0].replace(" ", ""), COMMAS.sub(group, text))


def _inside_bracket(text: str, place: int) -> str:
    r"""What stands in the bracket, (...), [...] or \{...\}, around a place in the text. Empty if there is none."""
    depth = 0
    for i in range(place - 1, -1, -1):
        depth += (text[i] in ")]}") - (text[i] in "([{")
        if depth < 0:
            is_list = text[i] in "([" or text[i - 1 : i] == "\\"
            return re.match(r"[^()\[\]{}]*", text[i + 1 :])[0] if is_list else ""  # type: ignore[index]
    return ""


# ---- numbers and names that people type ----

SCALES = {"hundred": "10^{2}", "thousand": "10^{3}", "million": "10^{6}", "billion": "10^{9}", "trillion": "10^{12}",
          "quadrillion": "10^{15}", "lakh": "10^{5}", "crore": "10^{7}", "dozen": "12"}  # fmt: skip
SCALE = re.compile(r"(?<=[\d}])\s*(\\text\s*\{\s*)?(" + "|".join(SCALES) + r")s?(?![a-zA-Z])")
TYPED = "pi|theta|alpha|beta|sin|cos|tan|log|ln|sqrt|gcd|lcm"  # without a backslash, or in upright letters
NAMES = _rules(
    (r"(?<=\d)[eE]([+-]?\d{1,3})(?![\w.^])", r"\\cdot10^{\1}"),  # 5e3
    (r"(?<![\\a-zA-Z])infinity(?![a-zA-Z])", r"\\infty "),
    (rf"\\(?:text|operatorname)\s*\{{\s*({TYPED})\s*\}}|(?<![\\a-zA-Z])({TYPED})(?![a-zA-Z])", r"\\\1\2 "),
    (r"(?<=[.\d])\\bar\s*\{(\d+)\}", r"\\overline{\1}"),  # 0.\bar{3}
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\[dt]binom", r"\\binom"),
    (r"\{([^{}]*)\\choose(?![a-zA-Z])([^{}]*)\}|^([^{}]*)\\choose(?![a-zA-Z])([^{}]*)$", r"\\binom{\1\3}{\2\4}"),
    (r"\{([^{}]*)\\over(?![a-zA-Z])([^{}]*)\}", r"\\frac{\1}{\2}"),
    (r"\\bmod(?![a-zA-Z])", r"\\mod "),
    (r"\\(?:leqslant|leq|le)(?![a-zA-Z])|<=", r"\\le "),
    (r"\\(?:geqslant|geq|ge)(?![a-zA-Z])|>=", r"\\ge "),
    (r"\\(?:neq|ne)(?![a-zA-Z])|!=", r"\\ne "),
    (r"\\lt(?![a-zA-Z])", "<"),
    (r"\\gt(?![a-zA-Z])", ">"),
    (r"\\varnothing", r"\\emptyset"),
    (r"\\lbrace(?![a-zA-Z])", r"\\{"),
    (r"\\rbrace(?![a-zA-Z])", r"\\}"),
)
TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])[^=,;]*")
DEGREE = r"\^\s*(?:\\circ|\{\s*\\circ\s*\})"
DEGREES = re.compile(r"(\d[\d.]*|[a-zA-Z])\s*" + DEGREE)

# ---- units ----

UNITS = (
    "mm|cm|km|kg|mg|mL|ml|ft|mi|yd|lbs?|oz|mph|inch(?:es)?|foot|feet|met(?:er|re)s?|miles?|yards?|dollars?|cents?|USD"
    "|degrees?|hours?|hrs?|minutes?|mins?|seconds?|secs?|days?|weeks?|months?|years?|(?:square |cubic )?units?"
)
END = r"(?=\s*(?:[,)\]]|\\\}|$))"  # of a member
PHRASES = [  # words behind a number
    re.compile(r"(?:(?<=[\d}).])|(?<=\\pi)|(?<=\\pi ))\s*\\text\s*\{(?P<words>[^{}]*)\}(?:\s*\^\s*\{?-?\d\}?)?" + END),
    re.compile(rf"(?<=[\d}}])\s*(?P<words>{UNITS})(?:\s*\^\s*\{{?[23]\}}?)?" + END),
    re.compile(r"(?<=[\d}])\s+(?P<words>[a-z]{3,}(?:\s+[a-z]+){0,2})" + END),
]
CHANGES_VALUE = re.compile(  # a number with such a word is another number, or none: no unit
    r"k|M|B|am|pm|noon|midnight|ad|bce?|ce|(?:" + "|".join(SCALES) + r"|score|pair|gross|myriad)s?"
    r"|ths|hal(?:f|ves)|(?:third|quarter)s?|(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|(?:hundred|thousand|[mbtr]+illion)"
    r"|(?:thir|four|fif|six|seven|eigh|nine)teen|(?:twen|thir|for|fif|six|seven|eigh|nine)tie)ths?"
    r"|doubled|tripled|halved|twice|thrice|tens|zeros|reciprocal|inverse|conjugate|complement|reversed|backwards|wrong"
    r"|squared|cubed|factorial|grand|than|times|plus|minus|negative|below|zero|point|remainder|mod|modulo|base|over|out"
    r"|to|or|and|not|if|when|for|where|odd|even|deg[cf]|pi|theta|alpha|beta|sqrt|sin|cos|tan|log"
)


def _drop_unit(phrase: re.Match[str]) -> str:
    words = re.findall("[A-Za-z]+", phrase["words"].replace(".", ""))
    words = [word if len(word) == 1 else word.lower() for word in words]  # 5 M is 5 million, 5 m is a length
    is_number = re.search(r"\d|\\(?!text)", phrase.string[: phrase.start()])
    is_variable = len(words) == 1 and words[0] in {*"bnxyzXYZ"}
    return phrase[0] if not is_number or is_variable or any(map(CHANGES_VALUE.fullmatch, words)) else ""


ORDINAL = re.compile(  # 21st, 4^{\text{th}}: a whole member, or before a word; 3st is a product
    r"(?:(?<=^)|(?<=[=,(/])|(?<=, ))(?P<n>\d+)(?:\s*\^)?[\s{]*(?:\\text\s*\{\s*)?(?P<ending>st|nd|rd|th)(?![a-zA-Z])[\s}]*"
    rf"(?:{END}|(?<= )(?=[a-zA-Z]{{3}}))"
)


def _drop_ending(ordinal: re.Match[str]) -> str:
    n = ordinal["n"]
    right = "th" if n[-2:-1] == "1" else {"1": "st", "2": "nd", "3": "rd"}.get(n[-1], "th")
    return f"{n} " if ordinal["ending"] == right else ordinal[0]


# ---- lists, LaTeX and the blanks ----

PARTS = {"half": 2, "third": 3, "quarter": 4}
# 3 and a half
AND_A_PART = re.compile(r"(?<![\w.\\^{}])(\d+)\s+and\s+(?:a|one)[\s-]+(" + "|".join(PARTS) + r")(?![a-zA-Z])")
IN_TEXT = r"(?:\\text\s*\{\s*)?"
SHAPES = _rules(
    (
        rf"(?<=[\d}}])\s*{IN_TEXT}(?:{DEGREE}|\\degree|degrees?)\s*{IN_TEXT}([CF])(?:elsius|ahrenheit)?\s*(?:\}}|(?=[,)]|$))",
        r"\\text{deg\1}",
    ),  # 30°C reads 30, but never 30°F
    (r"\b([Nn]o (?:[a-z]+ ){0,2}[a-z]*[a-rt-z])s(?![a-zA-Z])", r"\1"),  # no solutions
    (rf"(?<=\d)\s*(?:{DEGREE}|\\degree|\\?%)\s*(?=\d)", ","),
    (DEGREE + r"|\\degree", ""),
    (r"\\?%|\\text\s*\{\s*percent\s*\}|\bpercent\b", ""),  # 50% reads 50, never 0.5
    (r"(?<=\d)\s*([aApP])\.?[mM](?![a-zA-Z])\.?", r"\\text{\1m}"),
    (r";|\\(?:q?quad|lor)(?![a-zA-Z])", ","),
    (r",?\s*(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])", ","),
)
LATEX = _rules(
    (r"\\frac\s*(\\[a-zA-Z]+|[^{\s\\])", r"\\frac{\1}"),
    (r"(\\frac\s*\{[^{}]*\})\s*(\\[a-zA-Z]+|[^{\s\\])", r"\1{\2}"),
    (r"(?<![\d.])(\d+)\s+(\d+)/(\d+)", r"\1\\frac{\2}{\3}"),  # 3 1/2
    (r"(?<![\w.^}/])(\d+)/(\d+)(?=\s*[a-zA-Z\\(])", r"\\frac{\1}{\2}"),  # 1/2i is i/2
    (r"\\sqrt\s*(\\[a-zA-Z]+|[^{\s\\\[(])", r"\\sqrt{\1}"),
    (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"\\log_\s*(\d)", r"\\log_{\1}"),
    (r"([_^])\s*(-?\s*(?:\d+|[a-zA-Z]))", r"\1{\2}"),  # 2^6 3 is 2^{6}3, and 10^-2 is 10^{-2}
    (r"(?<=[\d.])\s+(?=[\d.])", ","),  # "3 5" is two numbers, not 35
    (r"^\s*(?:[A-Za-z]\s*\\in|\\approx)(?![a-zA-Z])", ""),
    (r"(\\[a-zA-Z]+)\s+(?=[a-zA-Z])", r"\1" + "\0"),  # \pi r keeps its space
    (r"\\\\\s*", r"\\\\" + "\0"),  # so does a new row: the algebra reads \\\frac as letters
    (r"\s+", ""),
    (r"\0", " "),
    (r",(?:,)+", ","),
)


def _apply(rules: Rules, text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


@lru_cache(1000)  # the rows of a group share a reference answer
def normalise(text: str, is_list: bool = False) -> str:
    r"""One spelling for answers with the same meaning. Say with `is_list` that 81,256 is read as 81 and 256.

    >>> normalise(r"\dfrac12 \text{ cm}"), normalise("1,234"), normalise(r"x \in \left[ 1, 2\right)"), normalise("2^6 3")
    ('\\frac{1}{2}', '1234', '[1,2)', '2^{6}3')
    """
    text = _apply(LOOK, text.translate(UNICODE).strip().strip("*")).strip(" ,;")
    text = group_digits(re.sub(r"(?<!\.)\.$", "", text).strip(), is_list)
    text = SCALE.sub(lambda scale: rf"\cdot{SCALES[scale[2]]} {scale[1] or ''}", text)
    text = _apply(NAMES, text)
    text = TRIGONOMETRY.sub(lambda formula: DEGREES.sub(r"\\frac{\1\\pi }{180}", formula[0]), text)
    text = AND_A_PART.sub(lambda part: rf"{part[1]}\frac{{1}}{{{PARTS[part[2]]}}}", text)
    text = _apply(SHAPES, ORDINAL.sub(_drop_ending, text))
    for phrase in PHRASES:
        text = phrase.sub(_drop_unit, text)
    text = _apply(LATEX, text)
    while text.startswith("{") and text.endswith("}") and closes_at_end(text):
        text = text[1:-1]
    return text.strip(",")


NO_ANSWER = re.compile(
    r"None|null|NULL|[Nn]a[Nn]|N/?A|n/a|[\s!-/:-@\[\]^_`|~]*|.*:"
    r"|\[\s*['\"].*['\"]\s*\]"  # a list of Python: ['5']
    r"|\(?[A-F]\)\s+(?!.*[,;]\s*\(?[A-F]\))[^\s,;].*|[A-F]\.\s+[-\d\\$(].*"  # a choice with its letter: B. 5
    r"|\(?[a-f]\)\s+(?!.*\b[b-f]\)).*\S.*"
    r"|#(?:N/A|[A-Z]+[!?]|DIV/0!)"  # of a spreadsheet
    r"|(?i:TB[ADC]|to ?do|to be \w+|fixme|proof|not ?found|see .*|answers? (?:may|will|can)? ?var(?:y|ies))"
)
WRAPPING = re.compile(r"\\(?:[hm]box|emph|boldsymbol|(?:text|math)[a-z]*)(?![a-zA-Z])|\\[ ,;:!]|[\s{}$*~]")
CHOICE = re.compile(r" *(?:(?i:option|choice|answer) *:? *\(?([A-J])(?= *(?:[().:,]|$))|\(?([A-J]) *[).:] )")
OTHER_CHOICE = re.compile(r"(?<![A-Za-z\\])(?:[A-HJ](?![A-Za-z])|I *[).:])")  # a bare I is a word or a number


def chosen_letter(answer: str) -> str | None:
    r"""The letter of an answer that is one choice with its text, or named as a choice. None if other letters stand in it.

    >>> chosen_letter("B) 3.5"), chosen_letter(r"\textbf{(B)}\ 5"), chosen_letter("Option B"), chosen_letter("B) 5 or C) 6")
    ('B', 'B', 'B', None)
    """
    text = WRAPPING.sub(" ", answer)
    letter = (match[1] or match[2]) if (match := CHOICE.match(text)) else None
    others = {found.rstrip(" ).:") for found in OTHER_CHOICE.findall(text)} - {letter}
    return None if others else letter


MAX_WORDS = 7  # more of them are a sentence, which no answer repeats word by word


def is_reachable(reference: str) -> bool:
    r"""True if this is a number, formula, list or short word, so that an answer can be equal to it.

    >>> is_reachable(r"\frac{1}{2} \text{ cm}"), is_reachable("no solution"), is_reachable("None"), is_reachable("...")
    (True, True, False, False)
    """
    text = re.sub(r"\\(?:text[a-z]*|mbox|math(?:rm|bf))(?![a-zA-Z])|\\ |~", " ", reference).strip(" {}.")
    text = re.sub(r"^\{?\s*(\([A-F]\))\s*\}", r"\1 ", text)
    words = [re.findall(r"[^\W\d_]{2,}", item) for item in re.split("[,;]", re.sub(r"\\[a-zA-Z]+", " ", text))]
    return NO_ANSWER.fullmatch(text) is None and max(map(len, words)) <= MAX_WORDS


def closes_at_end(text: str) -> bool:
    """True if the bracket that opens the text is closed by its last character."""
    depth = 0
    for i, char in enumerate(text):
        depth += (char in "{([") - (char in "})]")
        if depth == 0 and char in "})]":
            return i == len(text) - 1
    return False
