r"""What counts as a right answer: boxes, think tags, hedging, reference answers, many negatives and positives (C4-C10).

    pytest tests/grader/test_grader_verdicts.py

Every pair goes through a real pool with real worker processes. Pairs are (reference, text inside \boxed{}).
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nanolapo.grader import CANARY, Grader, grade
from nanolapo.grader.boxes import boxed_answer, first_boxed, last_boxed

DATA = Path(__file__).parents[2] / "../shared/data"  # the developers' copy of the public sets; absent in a clone
BUILT_IN_REFERENCES = r"""204|27.0|-3|\frac{14}{3}|\left( 3, \frac{\pi}{2} \right)|p - q|\text{Evelyn}|\text{(C)}
6 - 5i|x \in [-2,7]|4210_{5}|\frac{270}7\text{ degrees}|2, 3, \text{ and } 4|1 \pm \sqrt{19}|5x - 7y + 11z + 4 = 0
\$18.90|50\%|10,080|2k+1|\begin{pmatrix} -1/3 \\ 2/3 \\ 5/3 \end{pmatrix}|(-\infty,-5]\cup[5,\infty)
-80\leq g(x)\leq 82|$f(x)=-1$,$f(x)=x+1$|x=5|\{1\pm\sqrt{5},-2\}|90^\circ|\frac{2 \sqrt{149}}{3}
\left[-3,-\frac{4}{3}\right)|15\mbox{ cm}^2|$(-6,6)$, $(2,6)$|6m|\mathbf{2340}"""

POSITIVES = r"""
\frac{1}{2} ~ 0.5 | \frac{1}{2} ~ \dfrac12 | \frac12 ~ 1/2 | \frac{1}{2} ~ .5 | -\frac{3}{4} ~ \frac{-3}{4}
-\frac34 ~ -0.75 | 1234 ~ 1,234 | 1234567 ~ 1,234,567 | 10000 ~ 10{,}000 | 10000 ~ 10\,000 | 10,\!000 ~ 10000
12345 ~ 12 345 | 25 ~ 025 | 7 ~ 7. | 5 ~ 5\text{ cm} | 5 ~ 5 \mathrm{~cm}^2 | 5 ~ 5 cm | 18 ~ 18 eggs | 18 ~ \$18
18 ~ 18 dollars | \$18.90 ~ 18.9 | 6 ~ 6\ \text{units} | 5.4 \text{ cents} ~ 5.4 | 90 ~ 90^\circ | 90^\circ ~ 90
90 ~ 90° | 90 ~ 90 degrees | 90 ~ 90^{\circ} | 17\% ~ 17 | 17 ~ 17\% | \frac72 ~ 3\frac{1}{2} | 3\frac{1}{2} ~ 3.5
7/2 ~ 3 1/2 | -5 ~ −5 | -5 ~ –5 | 2\sqrt{3} ~ 2√3 | 2\sqrt{3} ~ \sqrt{12} | 5 ~  5 | \sqrt{3} ~ \sqrt3 | 2\sqrt{3} ~ 2sqrt3
\sqrt{x+1} ~ sqrt(x+1) | \pi ~ π | \frac{\pi}{2} ~ \frac\pi2 | 2\pi ~ 2 \cdot \pi | 12 ~ \mathbf{12}
(1,2) ~ (x,y)=(1,2) | (1,2) ~ x=1, y=2 | (1,2) ~ \left( 1, 2 \right) | (1,2) ~ (x, y) = (1.0, \frac{4}{2})
(3,\frac{\pi}{2}) ~ (3,\pi/2) | x\in[-2,7] ~ [-2,7] | [-2,7] ~ -2\le x\le 7 | -2\le x\le 7 ~ [-2,7] | (2,\infty) ~ x>2
x>2 ~ (2,\infty) | x>2 ~ 2<x | 1<x<2 ~ 2>x>1 | 1,2 ~ 2,1 | \{1,2\} ~ \{2,1\} | \{1,2\} ~ 1, 2 | 1,2 ~ 1 \text{ and } 2
-2 \text{ or } -12 ~ -12, -2 | 1,2 ~ x=2 or x=1 | 1,2,3 ~ \{3,2,1\} | 1\pm\sqrt{19} ~ 1+\sqrt{19},1-\sqrt{19}
2,-2 ~ \pm 2 | (1,2),(3,4) ~ (3,4), (1,2) | \emptyset ~ \varnothing | \{5\} ~ 5 | \text{Evelyn} ~ Evelyn
\text{Evelyn} ~ \text{evelyn} | \text{(C)} ~ C | \text{(C)} ~ \textbf{(C)} | C ~ (C)
\text{no solution} ~ no solution | x=5 ~ 5 | 5 ~ x=5 | 5 ~ f(2) = 5 | 5 ~ 5 = x | y = 2x + 3 ~ y=3+2x | y=2x+3 ~ 2x+3
2x+3 ~ y=2x+3 | 100 ~ m+n=100 | 5 ~ 2+3=5 | 5 ~ AB = 5 | x^2-1 ~ (x-1)(x+1) | \frac{1}{\sqrt2} ~ \frac{\sqrt2}{2}
\frac{a b}{2} ~ \frac{ab}{2} | \sin^2 x ~ 1-\cos^2 x | \log_2 3 ~ \frac{\ln 3}{\ln 2} | 3+4i ~ 4i+3 | 2i ~ (1+i)^2
120 ~ 5! | 120 ~ \binom{10}{3} | 55 ~ \sum_{k=1}^{10}k | 300000 ~ 3\times10^5 | 2^{10} ~ 1024 | 4 ~ \sqrt{16}
\frac{1}{2^{2008}} ~ 2^{-2008} | 5x-7y+4=0 ~ 4+5x-7y=0 | x+y=3 ~ 2x+2y=6 | 4210_{5} ~ 4210_5 | 4210_5 ~ 4210
x=\frac13 ~ 1/3 | \begin{pmatrix}1\\2\end{pmatrix} ~ \begin{pmatrix} 1 \\ 2.0 \end{pmatrix}
(-\infty,1)\cup(2,\infty) ~ (2,\infty)\cup(-\infty,1)
"""

NEGATIVES = r"""
5 ~ 3,5 | 5 ~ 5,3 | 5 ~ 3 \text{ or } 5 | 35 ~ 3 5 | 5 ~ 5, 5.1 | 5 ~ \{3,5\} | 5 ~ (3,5) | 5 ~ [5,5] | 2 ~ \pm 2
\pm 2 ~ 2 | 5 ~ 4 to 5 | 5 ~ 3=5 | 5 ~ x+1=5 | 5 ~ 2x=5 | 5 ~ y=3=5 | x=5 ~ y=5 | x=5 ~ x=-5 | x=5 ~ 2x=5
y=2x+3 ~ y=2x | 5x-7y+4=0 ~ 0 | x+y=0 ~ 0 | x+y=3 ~ x+y=4 | 0 ~ 0.0000001 | 0 ~ 10^{-60} | 0.0000001 ~ 0.0000002
\frac13 ~ 0.333333 | 0.333 ~ 1/3 | 1 ~ 0.9999999999 | 27 ~ 27.0001 | \pi ~ 3.14159265 | 2^{-60} ~ 2^{-61}
\frac{1}{2^{2008}} ~ \frac{1}{2^{2007}} | \frac{1}{2^{4000}} ~ \frac{1}{2^{4001}} | 0 ~ \sqrt{2}\cdot10^{-60}
\sqrt2 ~ 1.41421356 | \frac{\pi}{10^{20}} ~ \frac{2\pi}{10^{20}} | e ~ 2.718281828
123456789012345678 ~ 123456789012345679 | 1e-9 ~ 2e-9 | 3t ~ 3 | 3 ~ 3t | x^2+5d ~ x^2+5 | 2m ~ 2 | 12 ~ 12 theta
5 ~ 5 million | 5 ~ 5\text{ thousand} | 5 ~ 5 dozen | R-r ~ 0 | \frac{R}{r} ~ 1 | X ~ x | \text{seat} ~ \text{east}
seat ~ east | \text{A} ~ \text{B} | \text{Evelyn} ~ \text{Carla} | B ~ b | (1,2) ~ (2,1) | (1,2) ~ [1,2]
(1,2) ~ \{1,2\} | [1,2) ~ [1,2] | (1,2] ~ [1,2) | (1,2) ~ (1,2,3) | (1,2) ~ (1) | (1,2) ~ 2,1 | (1,2) ~ 1 | 1,2 ~ 1
1,2,3 ~ 1,2 | 1,2 ~ 1,2,3 | 1,2 ~ 1,1 | 1,2 ~ [1,2] | (1,2),(3,4) ~ (1,2) | (1,2),(3,4) ~ (1,3),(2,4) | 12 ~ 1,2
1,2 ~ 12 | 0.5 ~ 50\% | 50\% ~ 0.5 | 50 ~ 0.50\% | 101_2 ~ 101_3 | 101 ~ 101_2 | 5 ~ 101_2 | \frac{\pi}{2} ~ 90^\circ
5 ~ ... | 5 ~ 5... | 5 ~ 5..6 | 1.5 ~ 1.5.0 | 5 ~ ? | 5 ~ - | 5 ~ \ | 5 ~ \text{five} | 5 ~ five | 5 ~ \text{} | 5 ~ x
5 ~ () | 5 ~ \infty | -5 ~ 5 | 5 ~ -5 | 5 ~ |5| + 1 | 5 ~ 5! | 4 ~ 5-2 | 10 ~ 1 | 1234 ~ 1.234 | 1.234 ~ 1234
1,234 ~ 1.234 | 7 ~ 7 \times 10^3 | 70 ~ 7 | 0.7 ~ .07 | \frac{3}{4} ~ \frac{4}{3} | \frac{1}{2} ~ \frac{1}{0}
3\frac12 ~ \frac32 | -\frac12 ~ \frac12 | \infty ~ -\infty | \sqrt{3} ~ 3 | \sqrt[3]{2} ~ \sqrt{2} | x>2 ~ x\ge2
(2,\infty) ~ x<2 | x>2 ~ x>3 | 1<x<2 ~ 1<x\le2 | x>2 ~ x=2 | x\ne2 ~ x=2 | (-\infty,1)\cup(2,\infty) ~ (-\infty,1)
2x ~ 2y | x^2 ~ x^3 | 2x+3 ~ 2x-3 | 3+4i ~ 3-4i | i ~ 1 | \sin x ~ \cos x | \ln 2 ~ \log 2 | f(x)=2x ~ 2
f(x)=2x ~ f(x)=3x | n^2 ~ n^2+n | \begin{pmatrix}1\\2\end{pmatrix} ~ \begin{pmatrix}2\\1\end{pmatrix}
\begin{pmatrix}1\\2\end{pmatrix} ~ \begin{pmatrix}1&2\end{pmatrix}
"""


def pairs(table: str) -> list[tuple[str, str]]:
    rows = [row.split(" ~ ") for line in table.strip("\n").splitlines() for row in line.split(" | ")]
    return [(reference.strip(), answer) for reference, answer in rows]


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(workers=2) as pool:
        yield pool


def verdicts(grader: Grader, table: str) -> list[tuple[str, str, bool]]:
    rows = pairs(table)
    right = grader.grade_all([rf"So \boxed{{{a}}}." for _, a in rows], [g for g, _ in rows])
    return [(reference, answer, ok) for (reference, answer), ok in zip(rows, right, strict=True)]


def test_C4_the_last_box_with_balanced_braces_counts() -> None:
    five_deep = r"\frac{\sqrt{\frac{\sqrt{\frac{1}{2}}}{3}}}{5}"
    assert last_boxed(rf"\boxed{{{five_deep}}}") == five_deep
    assert last_boxed(r"\boxed{1}, no, \boxed{2}, hence \boxed{\frac{1}{2}}") == r"\frac{1}{2}"
    assert last_boxed(r"\boxed{\boxed{5}}") == "5" and last_boxed(r"\boxed { 5 }") == "5"
    assert (
        last_boxed(r"\boxed{\{1, 2\}}") == r"\{1, 2\}" and last_boxed(r"\boxed{\left\{1\right.}") == r"\left\{1\right."
    )
    for nothing in (
        r"\boxed{1} \boxed{}",
        r"\boxed{1} then \boxed{2",
        r"\boxed{1} then \boxed{{2}",
        "5",
        r"\boxed",
        "",
    ):
        assert last_boxed(nothing) is None
    assert grade(r"so \boxed{\frac{1}{2}}", r"\frac12") and grade(r"\boxed{3} is too small, take \boxed{4}", "4")
    assert grade(r"\boxed{x=\boxed{5}}", "5") and not grade(r"\boxed{3 \boxed{5}}", "35")
    assert not grade(r"\boxed{4}. So \boxed{}", "4") and not grade(r"\boxed{4}. So \boxed{4", "4")


@pytest.mark.parametrize("read", [last_boxed, first_boxed])
@pytest.mark.parametrize(
    ("text", "content"),
    [("\\boxed{" * 30_000, None), ("\\boxed{" * 3000 + "5" + "}" * 3000, "5"), ("\\boxed{5 " * 3000 + "}" * 3000, ...)],
    ids=["never closed", "one in the other", "nested with text"],
)
def test_C4_many_boxes_take_linear_time(read: Callable[[str], str | None], text: str, content: str | None) -> None:
    """This runs in the trainer, without a deadline."""
    started = time.monotonic()
    found = read(text)
    assert time.monotonic() - started < 2
    assert read is first_boxed or content is ... or found == content


@pytest.mark.parametrize("before", ["\\", "\\\\", "x\\,", "\\\\ ", "\\" * 64_000 + " "])
def test_C4_backslashes_before_a_box(before: str) -> None:
    """A model may fall into a loop of them; this runs in the trainer, without a deadline."""
    started = time.monotonic()
    assert last_boxed(before + r"\boxed{5}") == "5" and time.monotonic() - started < 2


def test_C5_only_boxes_after_the_thinking_count() -> None:
    assert grade(r"<think> \boxed{4}? no </think> It is \boxed{5}.", "5")
    assert not grade(r"<think> \boxed{5} </think> It is five.", "5")
    assert not grade("The answer is 5.", "5") and not grade("**5**", "5") and not grade("$5$", "5")
    assert grade(r"\boxed{5}", "5")  # a model without think tags
    assert boxed_answer(r"still thinking \boxed{5}", require_think_close=True) is None
    assert boxed_answer(r"hm </think> \boxed{5}", require_think_close=True) == "5"
    assert grade(r"a </think> \boxed{4} b </think> \boxed{5}", "5")
    assert not grade(r"a </think> \boxed{5} b </think> It is five.", "5")


@pytest.mark.parametrize(
    "tag", ["</think>", "[/THINK]", "</seed:think>", "</thinking>", "</thought>", "<|end_of_thought|>", "◁/think▷"]
)
def test_C5_a_thought_ends_at_a_tag_of_any_kind(tag: str) -> None:
    assert not grade(rf"x \boxed{{4}} {tag} It is four.", "4")
    assert boxed_answer(rf"x \boxed{{4}} {tag} \boxed{{5}}", require_think_close=True) == "5"
    opening = tag.replace("/", "").replace("end_of", "begin_of")
    assert boxed_answer(opening + r" \boxed{5}", require_think_close=True) is None


def test_C6_hedging_is_not_an_answer(grader: Grader) -> None:
    hedges = [
        r"\boxed{3} or \boxed{5}",
        r"either \boxed{5} or perhaps \boxed{3}",
        r"$\boxed{3}$, $\boxed{5}$",
        r"\boxed{3}\boxed{5}",
    ]
    hedges += [
        r"\boxed{3} \text{ or } \boxed{5}",
        r"\boxed{3}. Alternatively, it is \boxed{5}.",
        r"\boxed{3, 5}",
        r"\boxed{3 or 5}",
    ]
    hedges += [
        r"\boxed{5 \text{ or } 3}",
        r"\boxed{3;5}",
        r"\boxed{[3, 5]}",
        r"\boxed{3=5}",
        r"\boxed{x=3, x=5}",
        r"\boxed{3/5, 5}",
    ]
    numbers = range(1, 101)
    hedges += [rf"\boxed{{{', '.join(map(str, numbers))}}}", rf"\boxed{{{' '.join(map(str, numbers))}}}"]
    hedges += ["\n".join(rf"\boxed{{{n}}}" for n in [*range(6, 101), *range(1, 6)]), r"\boxed{1, 2, \ldots, 100}"]
    assert grader.grade_all(hedges, ["5"] * len(hedges)) == [False] * len(hedges)
    subsets = [r"\boxed{2}", r"\boxed{2,3}", r"\boxed{2} and \boxed{3}", r"\boxed{2,3,4,5}", r"\boxed{2,3,3}"]
    assert not any(grader.grade_all(subsets, ["2,3,4"] * len(subsets)))
    assert grade(r"\boxed{2}, \boxed{4} and \boxed{3}", "2,3,4")  # every value, a box each
    assert grade(r"First \boxed{3}. The next step adds two to it and gives \boxed{5}", "5")  # steps, not alternatives
    assert grade(r"So \boxed{5}. The answer is \boxed{5}", "5") and grade(r"\boxed{5} \boxed{5}", "5")


@pytest.mark.slow
def test_C7_every_reference_answer_accepts_itself_and_nothing_unrelated(grader: Grader) -> None:
    references: list[str] = []
    if not DATA.is_dir():
        references = BUILT_IN_REFERENCES.replace("\n", "|").split("|")
    for path in sorted(DATA.glob("*.jsonl")):
        for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            reference = ", ".join(row["final_answer"]) if "final_answer" in row else str(row["answer"] or "")
            references.append(reference.split("####")[-1].strip())
    failing = [references[i] for i in grader.references_that_fail(references)]
    assert set(failing) <= {""}, failing  # four rows of math_train have no answer; a loader must drop and list them
    assert grader.references_that_fail([r"\frac{1}{2", "", "}", "7"]) == [0, 1, 2]
    assert not any(grader.grade_all([r"\boxed{5}"] * 4, [r"\begin{broken", "see text", r"\frac{", ""]))


def test_C7_a_reference_answer_that_accepts_an_unrelated_number_fails(grader: Grader) -> None:
    assert grader.references_that_fail(["7", CANARY.removeprefix(r"\boxed{").removesuffix("}")]) == [1]


def test_C8_the_reference_answer_comes_first() -> None:
    """math-verify is not symmetric. One call site in the package, and pairs that differ when turned round."""
    package = Path(__file__).parents[2] / "nanolapo"
    users = [path for path in package.rglob("*.py") if "import verify" in path.read_text()]
    assert [path.name for path in users] == ["worker.py"]
    assert [call.strip() for call in re.findall(r"(?<=\bverify)\(.*?,.*?,", users[0].read_text())] == ["(r, a,"]
    for reference, answer in [("4210_5", "4210"), ("5", "m+n=5"), ("(1,2)", "x=1, y=2"), ("x=5", "5")]:
        assert grade(rf"\boxed{{{answer}}}", reference)
    for reference, answer in [("4210", "4210_5"), ("m+n=5", "5"), ("2", "x+y=z=3"), ("x+5=0", "0")]:
        assert not grade(rf"\boxed{{{answer}}}", reference)


def test_C9_no_false_positives(grader: Grader) -> None:
    table = verdicts(grader, NEGATIVES)
    assert len(table) >= 100
    assert [row for row in table if row[2]] == [] and grader.errors == 0


def test_C10_no_false_negatives(grader: Grader) -> None:
    table = verdicts(grader, POSITIVES)
    assert len(table) >= 100
    assert [row for row in table if not row[2]] == [] and grader.errors == 0


def test_the_reference_codes_rule() -> None:
    r"""First \boxed{ up to the first }: fractions can never match, and a first wrong box hides a right one."""
    half = r"\frac{1}{2}"
    answers = [r"\boxed{5}", r"\boxed{5} then \boxed{6}", r"\boxed{05}", r"\boxed{5.0}", rf"\boxed{{{half}}}", "5"]
    with Grader(rule="exact_first_boxed") as pool:
        found = pool.grade_all(answers, ["5", "5", "5", "5", half, "5"])
    assert found == [True, True, False, False, False, False]
