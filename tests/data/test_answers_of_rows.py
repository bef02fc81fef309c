"""Reference answers: what is taken from an answer field, and which fields hold nothing that an answer could reach.

pytest tests/data/test_answers_of_rows.py
"""

from __future__ import annotations

import numpy as np
import pytest

from nanolapo.data.answers_of_rows import reference_answer
from nanolapo.data.problem_files import BadRow

TAKEN = [
    # a solution: read as a completion is read
    ("### Step 1\nAdd.\n#### Final Answer\n$$\\boxed{1}$$", "1"),
    ("### Step 1\n#### Step 2\nSo $x=\\boxed{7}$.\n#### Check\nIt fits.", "7"),
    ("So \\boxed{3} or \\boxed{4}.", "3, 4"),
    ("so $\\boxed{3} \\quad \\text{and} \\quad \\boxed{4}$", "3, 4"),
    ("\\boxed{3} is too small, we take \\boxed{4}.", "4"),
    ("<think>\\boxed{5}?</think> \\boxed{6}", "6"),
    ("thus $\\boxed 2$ or \\fbox{3}", "2, 3"),
    ("so $\\boxed{\\text{(C)}}$", "\\text{(C)}"),
    # GSM8K
    ("She has 16 - 7 = 9.\n#### 9", "9"),
    ("#### 1,042", "1042"),
    ("#### 5, 120", "5, 120"),
    ("#### (1,234)", "(1,234)"),
    # words that announce the answer
    ("Answer: 5", "5"),
    ("#### Answer: 42", "42"),
    ("**Answer:** 42", "42"),
    ("The answer is $\\frac{1}{2}$.", "\\frac{1}{2}"),
    ("the final answer is: $5$", "5"),
    ("Final Answer: The final answer is $\\frac12$. I hope it is correct.", "\\frac12"),
    ("We add.\nThe sum is 7.\nTherefore, the answer is 7.", "7"),
    ("The correct answer is (C).", "(C)"),
    ("Ans: 12", "12"),
    ("Final answer = 12.5", "12.5"),
    ("### Final Answer\n$$\\frac{3}{4}$$", "\\frac{3}{4}"),
    ("Hence, the solution is 12.", "12"),
    ("Solution: $x=4$", "x=4"),
    ("The result is $\\frac{1}{2}$.", "\\frac{1}{2}"),
    ("one solution", "one solution"),
    # what leads to the answer: arrows, an equals sign, one label; but a lone letter is a choice, and 3:5 a ratio
    ("=> 12", "12"),
    ("-> $12$", "12"),
    ("→ x = 5", "x = 5"),
    ("$\\Rightarrow x=12$", "x=12"),
    ("\\(\\implies 3\\)", "3"),
    ("\\therefore x = 2", "x = 2"),
    ("= -5", "-5"),
    ("A: 7", "7"),
    ("A: B", "B"),
    ("x: 7", "7"),
    ("Total: 12", "12"),
    ("Time: 4:30 pm", "4:30 pm"),
    ("The answer is: => 12", "12"),
    ("A", "A"),
    ("-5", "-5"),
    (">5", ">5"),
    ("<=5", "<=5"),
    ("3:5", "3:5"),
    ("x:y", "x:y"),
    ("x \\to 0", "x \\to 0"),
    ("f: x \\to x+1", "f: x \\to x+1"),
    ("Ann: 1, Bob: 2", "Ann: 1, Bob: 2"),
    # tags
    ("<answer>5</answer>", "5"),
    ("<think>3 or 5</think> <answer> $\\frac12$ </answer>", "\\frac12"),
    ("We add.\n<ANSWER>\\boxed{5}</ANSWER>\n", "5"),
    ("<p><b>5</b></p>", "5"),
    ("<ans>A: 7</ans>", "7"),
    ("1<x<2", "1<x<2"),
    ("a <b>c</b>", "a <b>c</b>"),
    # words that look like placeholders
    ("seesaw", "seesaw"),
    ("undefined", "undefined"),
    ("#5", "#5"),
    # formulas in other clothes
    ("\\(x+1\\)", "x+1"),
    ("\\[\\frac{1}{2}\\]", "\\frac{1}{2}"),
    ("$$7$$", "7"),
    ("**7**", "7"),
    ("$7$.", "7"),
    ("1e3", "1e3"),
    ("\\text{none}", "\\text{none}"),
    ("no solution", "no solution"),
    ("8\\!:\\!34 \\text{ p.m.}", "8\\!:\\!34 \\text{ p.m.}"),
    ("$f(x)=ax$, where $a$ is odd", "$f(x)=ax$, where $a$ is odd"),
]  # fmt: skip


@pytest.mark.parametrize(("field", "answer"), TAKEN)
def test_the_answer_is_taken_out_of_its_field(field: str, answer: str) -> None:
    assert reference_answer(field, "answer") == answer


@pytest.mark.parametrize(
    "field",
    ["None", "null", "NaN", "N/A", "?", "...", "see the solution in the appendix of the book", "\\text{}", "-",
     "Final Answer", "The proof goes by induction on the number of vertices.",
     "We add two.\nThen we see that it is done.", "Answer:", ["1", "None"],
     "see above", "See the figure.", "TBD", "tba", "TODO", "to be determined", "#N/A", "#REF!", "#DIV/0!", "proof",
     "notfound", "Answers may vary", "<answer>TBD</answer>", "A: see above", "=>", "<answer></answer>"],
)  # fmt: skip
def test_a_field_without_an_answer_is_a_bad_row(field: str | list[str]) -> None:
    with pytest.raises(BadRow, match=r"field 'answer' (is not a number, formula, list or short word|is empty)"):
        reference_answer(field, "answer")


def test_a_box_that_holds_nothing_is_a_bad_row() -> None:
    for text in ("so \\boxed{}", "so \\boxed{1} and \\boxed{2"):
        with pytest.raises(BadRow, match="its last \\\\boxed is not closed or empty"):
            reference_answer(text, "solution")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.1, "0.1"), (float(np.float32(0.1)), "0.1"), (float(np.float32(3.14)), "3.14"), (1e-05, "0.00001"),
        (2.0**40, "1099511627776"), (-2.5, "-2.5"), (123456789.125, "123456789.125"),
        (0.1 + 0.2, None), (1 / 3, None), (12345678901234567890.0, None),
    ],
)  # fmt: skip
def test_a_computed_number_is_no_reference_answer(value: float, text: str | None) -> None:
    """Nobody writes 0.30000000000000004. A column of 32 bits has 0.1 as 0.10000000149011612."""
    if text is None:
        with pytest.raises(BadRow, match="is .*: a computed number that no answer repeats to the last digit"):
            reference_answer(value, "answer")
    else:
        assert reference_answer(value, "answer") == text
