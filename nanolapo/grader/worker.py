"""A grader worker, `python -m nanolapo.grader.worker DEADLINE_S MEMORY_GB`: reads questions, writes verdicts, one per line.

This is the only file that loads sympy and math-verify. It runs in its own process, whose memory is capped and which the
parent kills at the deadline. Nothing that a model writes is executed. math-verify 0.9 and latex2sympy2_extended need care:
- The plain mode of `math_verify.parse` ends in eval. We do not use it: LaTeX goes straight to the ANTLR grammar.
- Numerals go through sympify, which is eval too. `Reader` replaces it with exact fractions.
- R and r are one symbol by default. We switch that off.
- Numbers are compared to six places or 1e-15. `same_value` adds a relative check.
Two fences stand behind this: sympy's evaluation of strings is replaced, and an audit hook refuses files, programs and
sockets.
"""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import signal
import sys
from typing import Any

import sympy
import sympy.parsing.sympy_parser as sympy_parser
from latex2sympy2_extended import NormalizationConfig, normalize_latex
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, _Latex2Sympy
from math_verify import verify
from sympy.core.relational import Relational

from nanolapo.grader.answers import equal

MAX_DIGITS = 3e4  # digits, or terms, of what is worth evaluating: 2^{2008} is, 9^{9^9} is not
IMAGINARY_UNIT = re.compile(r"(?<![A-Za-z\\])i(?![A-Za-z])")
INDEX = re.compile(r"\\(?:sum|prod)\s*_\s*\{\s*i\s*=")
CLEANING = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none", equations=False
)
CHECKS = [  # answer, reference, verdict
    (r"\frac{\sqrt{4}}{3}+x", r"x+\frac{2}{3}", True),
    ("1<x<2", "(1,2)", True),
    (r"\sin^2x+\cos^2x", "1", True),
    ("2x=1", "y=2", False),
]


class Reader(_Latex2Sympy):
    """The LaTeX reader, but with exact numerals: 0.1 is one tenth, and its text is never evaluated."""

    def parse_number(self, text: str) -> Any:
        return sympy.Rational(text.replace(",", ""))


def parse(text: str, is_real: bool) -> Any:
    if INDEX.search(text):  # in \sum_{i=1}^{n} i, the letter i is an index
        text = IMAGINARY_UNIT.sub(next(letter for letter in "kjmnpqst" if letter not in text), text)
    elif not is_real:
        text = IMAGINARY_UNIT.sub("{I}", text)  # the reader would drop the power of a bare I
    reader = Reader(is_real=is_real, config=ConversionConfig(lowercase_symbols=False))
    return reader.parse(normalize_latex(text, CLEANING))


def digits(e: Any) -> float:
    """Roughly how many digits, or terms, evaluating this tree takes. Works on the unevaluated tree, from the leaves up.

    >>> digits(parse("2^{2008}", True)) < MAX_DIGITS < digits(parse("9^{9^9}", True))
    True
    """
    if not isinstance(e, sympy.Basic):  # a matrix
        return sum(map(digits, e)) if isinstance(e, sympy.MatrixBase) else 0.0
    parts = [digits(arg) for arg in e.args]
    if isinstance(e, sympy.Rational):
        return max(abs(int(e.p)).bit_length(), int(e.q).bit_length()) * 0.302
    if isinstance(e, (sympy.Pow, sympy.exp)):
        base, power = max(parts[0] if len(parts) == 2 else 0.5, 0.5), 10 ** min(parts[-1], 99)
        terms = len(e.args[0].args) - 1 if e.args[0].is_Add and e.free_symbols else 0
        return base * power + (power**terms if terms > 1 else 0)  # (x+y+z)^n has about n^2 terms
    if isinstance(e, (sympy.factorial, sympy.binomial, sympy.gamma)):
        return max(parts[0], 0.5) * 10 ** min(parts[0], 99)
    if isinstance(e, (sympy.Sum, sympy.Product)):
        return parts[0] + max(10 ** min(part, 99) for part in parts[1:])
    return sum(parts)


def remainders(e: Any) -> Any:
    """Evaluate 17 mod 5 and gcd(4, 6), which math-verify cannot compare as long as they are not numbers."""
    if not isinstance(e, sympy.Basic) or not e.has(sympy.Mod, sympy.UnevaluatedExpr):
        return e
    return e.replace(sympy.Mod, sympy.Mod).replace(sympy.UnevaluatedExpr, lambda inner: inner)


def same_value(a: Any, r: Any) -> bool:
    """Guard against math-verify's absolute tolerance: 2^{-60} is not 2^{-61}. Formulas with variables pass."""
    if not (isinstance(a, sympy.Expr) and isinstance(r, sympy.Expr)) or a.free_symbols or r.free_symbols:
        return True
    value_a, value_r = a.evalf(30), r.evalf(30)
    if not (value_a.is_number and value_r.is_number) or value_r.is_infinite:
        return True
    if value_r == 0:
        return bool(sympy.simplify(a - r).is_zero)
    return bool(abs((value_a - value_r) / value_r) < 1e-20)


def same_range(a: Any, r: Any) -> bool:
    """1 < x < 2 and 2 > x > 1: inequalities in one variable are equal as sets."""
    kinds = (Relational, sympy.And, sympy.Or)
    if not (isinstance(a, kinds) and isinstance(r, kinds)) or isinstance(a, sympy.Eq) or isinstance(r, sympy.Eq):
        return False
    if a.free_symbols != r.free_symbols or len(a.free_symbols) != 1:
        return False
    try:
        return bool(a.as_set() == r.as_set())
    except (NotImplementedError, TypeError, ValueError):  # what sympy cannot solve
        return False


PRIMED = re.compile(r"[A-Za-z)}]'+")


def algebra(answer: str, reference: str) -> bool:
    """True if these two formulas are equal: the leaf of `answers.equal`."""
    # math-verify drops primes: f'(x) is not f(x)
    if sorted(PRIMED.findall(answer)) != sorted(PRIMED.findall(reference)):
        return False
    is_real = not re.search(r"\\det|matrix", answer + reference) and not IMAGINARY_UNIT.search(answer + " " + reference)
    try:
        a, r = parse(answer, is_real), parse(reference, is_real)
    except (MemoryError, PermissionError):
        raise
    except Exception:  # the parser raises bare Exceptions: text it cannot read matches nothing (equal text was settled)
        return False
    if a is None or r is None or max(digits(a), digits(r)) > MAX_DIGITS:
        return False
    a, r = remainders(a), remainders(r)
    # The one call site: reference first, the comparison is not symmetric. No alarm: the parent keeps the time.
    right = verify(r, a, numeric_precision=100, allow_set_relation_comp=True, timeout_seconds=None)
    return bool(right) and same_value(a, r) or same_range(a, r)


def fence(event: str, args: tuple[Any, ...]) -> None:
    """An audit hook: once it is set, this process writes no file, starts no program and opens no socket."""
    writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    reads = event in ("os.listdir", "os.scandir")
    if writes or (event.startswith(("os.", "subprocess.", "socket.", "shutil.")) and not reads):
        raise PermissionError(f"a grader worker may not do this: {event}")


def evaluate_ratio(code: str, *_: Any) -> Any:
    """Replaces sympy's eval of strings. Only its own constants come here, such as 3/2, and roots guessed by mpmath. Sympy
    can do without those: nsimplify expects a ValueError."""
    match = re.fullmatch(r"\s*Integer\s*\(\s*(\d+)\s*\)\s*(?:/\s*Integer\s*\(\s*(\d+)\s*\))?\s*", code)
    if match is None:
        raise ValueError("a grader worker evaluates no text")
    return sympy.Rational(int(match[1]), int(match[2] or 1))


def self_check() -> None:
    """A broken installation must stop the worker, not look like wrong answers."""
    for answer, reference, verdict in CHECKS:
        if equal(answer, reference, algebra) != verdict:
            raise RuntimeError(
                f"math-verify does not compare {answer} with {reference} as it should: are the pins installed?"
            )


def serve(deadline_s: float, max_memory_gb: float) -> None:
    """Answer one question per line until the pipe closes."""
    replies = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints must not look like a reply
    logging.disable(logging.CRITICAL)  # math-verify warns that its alarm is off
    self_check()  # also loads what sympy loads when it is first needed, which the fences would refuse
    sympy_parser.eval_expr = evaluate_ratio  # parse_expr and sympify of a string both end in this function
    limit = int(max_memory_gb * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.addaudithook(fence)
    self_check()
    os.write(replies, b"ready\n")
    for line in sys.stdin:
        # The parent kills a late worker. Should the parent be gone, the kernel does: no Python handler to swallow it.
        signal.setitimer(signal.ITIMER_REAL, deadline_s + 5)
        answer, reference = json.loads(line)
        try:
            reply = b"right\n" if equal(answer, reference, algebra) else b"wrong\n"
        except RecursionError:  # nested deeper than any honest answer
            reply = b"wrong\n"
        except Exception as error:
            print(f"grader: {type(error).__name__} on {answer[:80]!r} for {reference[:80]!r}", file=sys.stderr)
            reply = b"error\n"
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(replies, reply)


if __name__ == "__main__":
    serve(float(sys.argv[1]), float(sys.argv[2]))
