"""Problems: answers and levels from every published shape, stable ids, bad rows, choices, and the data order.

Run: python -m pytest tests/data/test_problems.py
The published files are read from ../shared/data where it exists; two rows like theirs are kept below.
"""

import hashlib
import json
import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from nanolapo.config import SourceConfig, UserError
from nanolapo.data.order import batch_indices
from nanolapo.data.problems import load_problems

DATA = Path(__file__).parents[2] / "../shared/data"

# file: (field names, rows, problems kept, two rows as published, what must come out of them)
PUBLISHED = {
    "math500.jsonl": (
        {},
        (500, 500),
        [
            {
                "problem": "Find $p$.",
                "answer": "\\left( 3, \\frac{\\pi}{2} \\right)",
                "level": 2,
                "subject": "X",
            },
            {"problem": "What does it cost?", "answer": "\\$18.90", "level": 5, "unique_id": "test/1.json"},
        ],
        [("\\left( 3, \\frac{\\pi}{2} \\right)", 2), ("\\$18.90", 5)],
    ),
    "aime24.jsonl": (
        {},
        (30, 30),
        [{"id": 60, "problem": "Walk.", "answer": "204"}, {"id": 61, "problem": "Zeros.", "answer": "025"}],
        [("204", None), ("025", None)],
    ),
    "amc23.jsonl": (
        {"question": "question"},
        (40, 40),
        [{"id": 0, "question": "Miles?", "answer": 27.0}, {"id": 1, "question": "$x+y$?", "answer": 0.5}],
        [("27", None), ("0.5", None)],
    ),
    "olympiadbench.jsonl": (
        {"question": "question", "answer": "final_answer"},
        (675, 675),
        [
            {"id": 1, "question": "Largest?", "final_answer": ["$\\frac{1}{2 n+2}$"], "unit": None},
            {"id": 2, "question": "Both?", "final_answer": ["$69$,$84$"], "is_multiple_answer": True},
        ],
        [("\\frac{1}{2 n+2}", None), ("69,84", None)],
    ),
    "gsm8k_test.jsonl": (
        {"question": "question"},
        (1319, 1319),
        [
            {"question": "Eggs?", "answer": "16 - 7 = $<<16-7=9>>9 a day.\n#### 18"},
            {"question": "House?", "answer": "It made $70,000.\n#### 70,000"},
        ],
        [("18", None), ("70000", None)],
    ),
    "math_train.jsonl": (
        {"level": "difficulty"},
        (7474, 7470),  # two rows of the published file have no answer, two an empty one
        [
            {"problem": "Find $a+b$.", "answer": "0", "difficulty": 5.0, "type": "Algebra"},
            {"problem": "How much?", "answer": " \\$ 5", "difficulty": 2.0, "type": "Algebra"},
        ],
        [("0", 5), ("\\$ 5", 2)],
    ),
    "aime_1983_2023.jsonl": (
        {},
        (975, 975),
        [
            {"problem": "Log.", "answer": "60", "year": 1983},
            {"problem": "Min.", "answer": "15", "year": 1983},
        ],
        [("60", None), ("15", None)],
    ),
}


def write_rows(path: Path, rows: list) -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def load_rows(tmp_path: Path, rows: list, **settings):
    path = write_rows(tmp_path / "rows.jsonl", rows)
    return load_problems([SourceConfig(name="set", path=str(path), **settings)])


def rows_of(*answers) -> list:
    return [{"problem": f"question {i}", "answer": answer} for i, answer in enumerate(answers)]


# ---- the published shapes ----


@pytest.mark.parametrize("file", PUBLISHED)
def test_published_rows(file, tmp_path):
    fields, _, rows, expected = PUBLISHED[file]
    problems, _ = load_rows(tmp_path, rows, **fields)
    assert [(p.answer, p.level) for p in problems] == expected


@pytest.mark.parametrize("file", PUBLISHED)
def test_published_file(file):
    if not (DATA / file).exists():
        pytest.skip("the published files are not on this machine; test_published_rows covers their formats")
    fields, (num_rows, num_kept), _, _ = PUBLISHED[file]
    problems, report = load_problems([SourceConfig(name="set", path=str(DATA / file), **fields)])
    assert len(problems) == num_kept == len({p.id for p in problems})
    assert f"{num_kept} problems of {num_rows} rows" in report[0]
    assert all(p.question and p.answer and "####" not in p.answer for p in problems)
    if num_kept < num_rows:
        assert "4 bad rows dropped" in report[0]
        assert "line 887, 1010: field 'answer' is NoneType" in report[1]
        assert "line 5329, 5331: field 'answer' is empty" in report[2]
    if file == "gsm8k_test.jsonl":
        assert all(p.answer.lstrip("-").isdigit() for p in problems)
    if file in ("math500.jsonl", "math_train.jsonl"):
        assert {p.level for p in problems} >= {1, 2, 3, 4, 5}


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (36.0, "36"),
        (-3, "-3"),
        (10**400, "1" + "0" * 400),
        (1e-5, "0.00001"),
        (0.25, "0.25"),
        ("  7 ", "7"),
        ("$\\frac{1}{2}$", "\\frac{1}{2}"),
        ("$(0,1)$,$(1,0)$", "(0,1),(1,0)"),
        ("$f(x)=ax$, where $a$ is odd", "$f(x)=ax$, where $a$ is odd"),
        ("\\$32,\\!348", "\\$32,\\!348"),
        ("$\\$5$", "\\$5"),
        (["2"], "2"),
        (["$2$", 3, 4.0], "2, 3, 4"),
        ("so 5.\n#### 1,042,000", "1042000"),
        ("first \\boxed{1}, then $x=\\boxed{\\frac{a}{\\sqrt{b}}}$.", "\\frac{a}{\\sqrt{b}}"),
        ("thus $\\boxed{\\{1, 2\\}}$", "\\{1, 2\\}"),
        ("thus $\\boxed{\\left\\{ x \\right.}$ as said", "\\left\\{ x \\right."),
        ("thus $\\boxed 2$.", "2"),
        ("thus \\fbox{$12$}", "12"),
    ],
)
def test_answer_shapes(raw, expected, tmp_path):
    problems, _ = load_rows(tmp_path, rows_of(raw))
    assert problems[0].answer == expected


@pytest.mark.parametrize(
    ("raw", "expected"),
    [(3, 3), ("Level 4", 4), ("2", 2), (4.6, 5), ("Level ?", None), (None, None), (True, None), ("3.4", 3)],
)
def test_level_shapes(raw, expected, tmp_path):
    problems, _ = load_rows(tmp_path, [{"problem": "q", "answer": "1", "level": raw}])
    assert problems[0].level == expected


# ---- ids, choice and order ----


def test_ids_depend_on_source_and_question_only(tmp_path):
    rows = rows_of(*range(20))
    ids = {p.question: p.id for p in load_rows(tmp_path, rows)[0]}
    assert ids["question 3"] == "set:" + hashlib.sha256(b"question 3").hexdigest()[:16]
    random.Random(0).shuffle(rows)
    assert {p.question: p.id for p in load_rows(tmp_path, rows[:10])[0]}.items() <= ids.items()


def test_repeated_questions_are_counted_and_left_out(tmp_path):
    rows = rows_of(1, 2) + rows_of(1, 2) + [{"problem": " question 0 ", "answer": "9"}]
    problems, report = load_rows(tmp_path, rows)
    assert [p.answer for p in problems] == ["1", "2"]
    assert "2 problems of 5 rows" in report[0] and "3 repeated questions left out, 1 of them" in report[0]


def test_levels_and_count(tmp_path):
    rows = [{"problem": f"q{i}", "answer": "1", "level": f"Level {i % 5 + 1}"} for i in range(100)]
    problems, _ = load_rows(tmp_path, rows, levels=(3, 4, 5), count=25)
    assert len(problems) == 25 and {p.level for p in problems} == {3, 4, 5}
    questions = {p.question for p in problems}
    # the same choice in any row order, another one with another seed
    random.Random(1).shuffle(rows)
    assert {p.question for p in load_rows(tmp_path, rows, levels=(3, 4, 5), count=25)[0]} == questions
    other, _ = load_rows(tmp_path, rows, levels=(3, 4, 5), count=25, seed=1)
    assert len(questions & {p.question for p in other}) < 25
    with pytest.raises(UserError, match="count is 61, but there are only 60"):
        load_rows(tmp_path, rows, levels=(3, 4, 5), count=61)
    with pytest.raises(UserError, match="levels"):
        load_rows(tmp_path, rows, levels=(9,))


def test_several_sources_keep_their_order_and_names(tmp_path):
    one = SourceConfig(name="one", path=str(write_rows(tmp_path / "one.jsonl", rows_of(1, 2))))
    two = replace(one, name="two", count=1)
    problems, report = load_problems([two, one, one])
    assert [p.source for p in problems] == ["two", "one", "one"]
    assert len(report) == 3


def test_demo_source():
    problems, report = load_problems([SourceConfig(name="demo", path="demo", count=40, seed=3)])
    assert len({p.id for p in problems}) == 40 and report == ["demo: made 40 demo problems"]
    assert all(p.level is not None and p.answer for p in problems)
    again, _ = load_problems([SourceConfig(name="demo", path="demo", count=40, seed=3)])
    assert again == problems
    with pytest.raises(UserError, match=r"data.sources\[demo\].*99.*levels"):
        load_problems([SourceConfig(name="demo", path="demo", count=4, levels=(99,))])


# ---- bad rows ----

BAD_ROWS = [
    (b'{"problem": "q", "answer": ', "not JSON"),
    (b'{"problem": "\xff", "answer": "1"}', "not UTF-8"),
    (b"[1, 2]", "a list, not an object"),
    (b"[" * 100_000, "not JSON"),
    ({"problem": "q"}, "no field 'answer' (it has problem)"),
    ({"question": "q", "answer": "1"}, "no field 'problem' (it has question, answer)"),
    ({"problem": "  ", "answer": "1"}, "field 'problem' is empty"),
    ({"problem": 7, "answer": "1"}, "field 'problem' is int"),
    ({"problem": "q", "answer": ""}, "field 'answer' is empty"),
    ({"problem": "q", "answer": "step 1 ####"}, "field 'answer' is empty"),
    ({"problem": "q", "answer": None}, "field 'answer' is NoneType"),
    ({"problem": "q", "answer": True}, "field 'answer' is bool"),
    ({"problem": "q", "answer": []}, "field 'answer' is an empty list"),
    ({"problem": "q", "answer": [["1"]]}, "list of lists"),
    ({"problem": "q", "answer": float("nan")}, "field 'answer' is nan"),
    ({"problem": "q", "answer": "thus \\boxed{\\frac{1}{2}"}, "\\boxed is not closed"),
    ({"problem": "\ud800", "answer": "1"}, "not valid text"),
    ({"problem": "q", "answer": "\ud800"}, "not valid text"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD_ROWS)
def test_bad_row_is_reported_with_its_line(bad, reason, tmp_path):
    rows = [*rows_of(1, 2), bad, *rows_of(1, 2, 3)[2:]]
    problems, report = load_rows(tmp_path, rows, max_bad_fraction=0.25)
    assert [p.answer for p in problems] == ["1", "2", "3"]
    assert "3 problems of 4 rows" in report[0] and "1 bad rows dropped" in report[0]
    assert len(report) == 2 and "rows.jsonl line 3: " in report[1] and reason in report[1]
    with pytest.raises(UserError) as error:
        load_rows(tmp_path, rows, max_bad_fraction=0.24)
    message = str(error.value)
    for part in ("rows.jsonl", "1 of 4 rows", "line 3: ", reason, "data.sources[set]", "max_bad_fraction"):
        assert part in message
    assert "\n" not in message


def test_many_bad_rows_are_listed_up_to_ten(tmp_path):
    rows = [{"question": "q", "answer": "1"}] * 12 + rows_of(*[1] * 15)
    with pytest.raises(UserError, match=r"line 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, \.\.\.: no field 'problem'"):
        load_rows(tmp_path, rows)
    rows = [{"problem": "q", "answer": float(f"{sign}{kind}")} for sign in "+-" for kind in ("nan", "inf")]
    rows += [{f"other{i}": 1} for i in range(12)] + rows_of(*[1] * 20)
    _, report = load_rows(tmp_path, rows, max_bad_fraction=0.5)
    assert len(report) == 12 and report[-1].endswith("...")


def test_lines_are_cut_at_newlines_only(tmp_path):
    rows = [b"\xef\xbb\xbf" + b'{"problem": "q1", "answer": "1"}\r', b"", b"  "]
    rows += [json.dumps({"problem": "a\u2028b\x85c", "answer": "2"}, ensure_ascii=False).encode(), b"oops"]
    problems, report = load_rows(tmp_path, rows, max_bad_fraction=0.4)
    assert [p.question for p in problems] == ["q1", "a\u2028b\x85c"]
    assert "line 5: not JSON" in report[1]  # blank lines count as lines, not as rows


def test_errors_name_the_key(tmp_path):
    for settings, words in [
        ({"path": str(tmp_path / "absent.jsonl")}, r"data.sources\[set\].path.*absent.jsonl"),
        ({"path": "demo"}, r"data.sources\[set\].count"),
        ({"path": "x.jsonl", "count": -1}, r"\.count is -1"),
        ({"path": "x.jsonl", "max_bad_fraction": 1.5}, r"\.max_bad_fraction is 1.5"),
        ({"path": "x.jsonl", "choices": ("one",)}, r"\.choices"),
        ({"path": str(write_rows(tmp_path / "empty.jsonl", []))}, "has no rows; give"),
        (
            {"path": str(write_rows(tmp_path / "bad.jsonl", [{"question": "q"}] * 2)), "max_bad_fraction": 1.0},
            r"data.sources\[set\].path.*has no rows that can be used \(line 1, 2: no field 'problem' \(it has question\)\)",
        ),
    ]:
        with pytest.raises(UserError, match=words):
            load_problems([SourceConfig(name="set", **settings)])
    with pytest.raises(UserError, match="no problem left"):
        load_problems([])


# ---- multiple choice ----

GPQA = {
    "question": "Question",
    "choices": ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"),
}


def gpqa_row(index: int) -> dict:
    wrong = {f"Incorrect Answer {i}": f" wrong {i} \n" for i in (1, 2, 3)}
    return {"Question": f"Which one, {index}?\n", "Correct Answer": "right\n", **wrong}


def test_multiple_choice_letter_points_at_the_right_option(tmp_path):
    problems, _ = load_rows(tmp_path, [gpqa_row(i) for i in range(200)], **GPQA)
    for index, problem in enumerate(problems):
        lines = problem.question.split("\n")
        assert lines[0] == f"Which one, {index}?" and lines[1] == ""
        options = dict(line.split(") ") for line in lines[2:6])
        assert sorted(options) == list("ABCD") and sorted(options.values()) == [
            "right",
            *map("wrong {}".format, "123"),
        ]
        assert options[problem.answer] == "right"
    # the right letter is spread evenly, does not depend on row order, and moves with the seed
    assert all(30 < n < 70 for n in Counter(p.answer for p in problems).values())
    backwards, _ = load_rows(tmp_path, [gpqa_row(i) for i in reversed(range(200))], **GPQA)
    assert backwards[::-1] == problems
    other, _ = load_rows(tmp_path, [gpqa_row(i) for i in range(200)], **GPQA, seed=1)
    assert sum(a.answer == b.answer for a, b in zip(problems, other, strict=True)) < 100


def test_multiple_choice_with_equal_options_is_a_bad_row(tmp_path):
    row = gpqa_row(0) | {"Incorrect Answer 2": "right"}
    with pytest.raises(UserError, match="two options read the same"):
        load_rows(tmp_path, [row], **GPQA)


# ---- the hub ----


def test_hub_set_is_loaded_by_name(tmp_path):
    """A folder in the hub's layout goes the same way as a hub name: `datasets` with subset and split."""
    write_rows(
        tmp_path / "test.jsonl",
        [{"question": "q", "final_answer": ["$2$"], "level": "Level 3"}, {"question": ""}],
    )
    card = "---\nconfigs:\n- config_name: maths\n  data_files:\n  - split: test\n    path: test.jsonl\n---\n"
    (tmp_path / "README.md").write_text(card)
    fields = {"question": "question", "answer": "final_answer", "max_bad_fraction": 0.5}
    source = SourceConfig(name="hub", path=str(tmp_path), subset="maths", split="test", **fields)
    problems, report = load_problems([source])
    assert [(p.question, p.answer, p.level) for p in problems] == [("q", "2", 3)]
    assert "row 2: field 'question' is empty" in report[1]
    with pytest.raises(UserError, match=r"data.sources\[hub\].*check path, subset, split"):
        load_problems([replace(source, split="train")])


@pytest.mark.slow
def test_hub_out_of_reach_is_one_line_with_the_remedy():
    code = (
        "from nanolapo.config import SourceConfig, UserError\n"
        "from nanolapo.data.problems import load_problems\n"
        "try:\n    load_problems([SourceConfig(name='gsm', path='openai/gsm8k', subset='main')])\n"
        "except UserError as error:\n    print(error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    (line,) = run.stdout.splitlines()
    assert "data.sources[gsm]" in line and "openai/gsm8k" in line and "give a local file as path" in line


@pytest.mark.slow
def test_local_files_do_not_import_datasets(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", rows_of(1))
    code = (
        "import sys\nfrom nanolapo.config import SourceConfig\nfrom nanolapo.data.problems import load_problems\n"
        f"load_problems([SourceConfig(name='set', path={str(path)!r})])\n"
        "assert not {'datasets', 'torch', 'transformers'} & set(sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


# ---- the data order ----

SIZES = [(1, 1), (5, 2), (7, 7), (7, 5), (10, 4), (12, 128), (64, 8), (97, 32), (100, 60)]


@pytest.mark.parametrize(("num_problems", "prompts_per_step"), SIZES)
def test_batches_are_epochs_without_repeats(num_problems, prompts_per_step):
    steps = range(6 * num_problems // prompts_per_step + 8)
    batches = [batch_indices(num_problems, step, prompts_per_step, seed=4) for step in steps]
    stream = [index for batch in batches for index in batch]
    for start in range(0, len(stream) - num_problems + 1, num_problems):  # every epoch sees every problem once
        assert sorted(stream[start : start + num_problems]) == list(range(num_problems))
    if prompts_per_step <= num_problems:
        assert all(len(set(batch)) == prompts_per_step for batch in batches)


@pytest.mark.parametrize(("num_problems", "prompts_per_step"), SIZES)
def test_D3_batches_are_a_pure_function_of_seed_and_step(num_problems, prompts_per_step):
    def batch(step: int, seed: int = 0) -> list[int]:
        return batch_indices(num_problems, step, prompts_per_step, seed)

    in_order = [batch(step) for step in range(40)]
    random.seed(123)  # neither the global generator nor earlier calls matter
    assert [batch(step) for step in reversed(range(40))] == in_order[::-1]
    if num_problems > 6:
        assert in_order != [batch(step, seed=1) for step in range(40)]
        epoch = -(-num_problems // prompts_per_step)
        assert in_order[:epoch] != in_order[epoch : 2 * epoch]  # epochs differ


@pytest.mark.slow
def test_D3_same_order_in_another_process():
    code = "from nanolapo.data.order import batch_indices; print([batch_indices(97, s, 32, 5) for s in range(9)])"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONHASHSEED": "77"},
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip() == str([batch_indices(97, step, 32, 5) for step in range(9)])
