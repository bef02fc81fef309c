"""Problem files of every kind give the same problems, fields are found by path, and contradictions are listed.

Run: python -m pytest tests/data/test_problem_files.py
"""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanolapo.config import SourceConfig, UserError
from nanolapo.data.problems import load_problems

ROWS = [
    {"problem": 'q,1 "quoted"\nsecond line', "answer": "025", "level": "3"},
    {"problem": "a\u2028b é", "answer": "no", "level": "5"},
    {"problem": "half", "answer": "1.50", "level": ""},
]
EXPECTED = [(row["problem"], row["answer"], int(row["level"]) if row["level"] else None) for row in ROWS]
# As DAPO-Math-17k and verl write their rows.
NESTED = [
    {
        "prompt": [{"content": f"How many, {i}?", "role": "user"}, {"content": "x", "role": "assistant"}],
        "reward_model": {"ground_truth": str(30 + i), "style": "rule"},
        "extra_info": {"level": i + 1},
    }
    for i in range(3)
]
PATHS = {"question": "prompt.0.content", "answer": "reward_model.ground_truth", "level": "extra_info.level"}


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write_file(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows in the format that the name asks for."""
    name = path.name.lower().removesuffix(".gz")
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    if name.endswith(".csv"):
        with (path.parent / "plain.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        content = (path.parent / "plain.csv").read_bytes()
    elif name.endswith(".json") and "lines" not in name:
        content = json.dumps(rows, indent=1).encode()
    else:
        content = lines(rows)
    path.write_bytes(gzip.compress(content) if path.name.endswith(".gz") else content)
    return path


def load(path: Path, **settings: Any) -> tuple[list, list[str]]:
    return load_problems([SourceConfig(name="set", path=str(path), **settings)])


NAMES = ["r.jsonl", "r.ndjson", "r.json", "lines.json", "r.csv", "r.parquet", "r.jsonl.gz", "r.ndjson.gz", "r.json.gz",
         "r.csv.gz", "R.JSONL", "odd [1]* name.parquet"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_local_file_gives_the_same_problems(name, tmp_path):
    """Texts come back as they are: 025 and 1.50 keep their zeros, "no" stays text, fields may hold commas and line ends."""
    problems, report = load(write_file(tmp_path / name, ROWS))
    assert [(p.question, p.answer, p.level) for p in problems] == EXPECTED
    assert report[0].startswith("set: 3 problems of 3 rows from ") and len(report) == 1


@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.parquet", "r.jsonl.gz"])
def test_fields_by_path(name, tmp_path):
    problems, _ = load(write_file(tmp_path / name, NESTED), **PATHS)
    assert [(p.question, p.answer, p.level) for p in problems] == [
        (f"How many, {i}?", str(30 + i), i + 1) for i in range(3)
    ]


def test_class_labels_are_read_by_their_names(tmp_path):
    """A data set stores them as numbers: the answer B would be graded as 1, and -1 stands for an unknown one."""
    kinds = {"question": datasets.Value("string"), "answer": datasets.ClassLabel(names=["A", "B", "C"])}
    rows = {"question": ["p", "q", "r", "s"], "answer": [1, 0, -1, None]}
    datasets.Dataset.from_dict(rows, features=datasets.Features(kinds)).to_parquet(tmp_path / "r.parquet")
    problems, report = load(tmp_path / "r.parquet", question="question", max_bad_fraction=0.5)
    assert [(p.question, p.answer) for p in problems] == [("p", "B"), ("q", "A")]
    assert "row 3, 4: field 'answer' is NoneType" in "".join(report)


def test_choices_by_path_and_a_field_whose_name_has_a_dot(tmp_path):
    rows = [{"q.text": "Which is even?", "options": {"right": ["4"], "wrong": ["3", "5"]}}]
    problems, _ = load(
        write_file(tmp_path / "r.jsonl", rows), question="q.text", choices=("options.right.0", "options.wrong.1")
    )
    (problem,) = problems
    assert (
        problem.question.startswith("Which is even?\n") and ") 5" in problem.question and ") 3" not in problem.question
    )
    assert f"{problem.answer}) 4" in problem.question


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("prompt.2.content", "no field 'prompt.2.content' (prompt has 2 items)"),
        ("prompt.first.content", "no field 'prompt.first.content' (prompt has 2 items)"),
        ("prompt.0.text", "no field 'prompt.0.text' (prompt.0 has content, role)"),
        ("reward_model.style.name", "no field 'reward_model.style.name' (reward_model.style is str)"),
        ("promt.0.content", "no field 'promt.0.content' (it has prompt, reward_model, extra_info)"),
        ("prompt.-1.content", "no field 'prompt.-1.content' (prompt has 2 items)"),
    ],
)
def test_a_path_that_leads_nowhere_says_where_it_ends(path, reason, tmp_path):
    with pytest.raises(UserError) as error:
        load(write_file(tmp_path / "r.jsonl", NESTED), **(PATHS | {"question": path}))
    assert f"line 1, 2, 3: {reason}" in str(error.value)


def test_a_level_by_path_may_be_missing(tmp_path):
    rows = [NESTED[0], {key: value for key, value in NESTED[1].items() if key != "extra_info"}]
    problems, _ = load(write_file(tmp_path / "r.jsonl", rows), **PATHS)
    assert [p.level for p in problems] == [1, None]


# ---- bad rows and bad files ----


@pytest.mark.parametrize("name", ["r.jsonl", "r.ndjson", "lines.json", "r.jsonl.gz"])
def test_bad_lines_are_reported_with_their_line(name, tmp_path):
    content = lines(ROWS[:2]) + b'{"problem": \n\n' + lines(ROWS[2:]) + b"\xff\n"
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    problems, report = load(path, max_bad_fraction=0.5)
    assert len(problems) == 3 and "2 bad rows dropped" in report[0]
    assert f"{name} line 3: not JSON" in report[1] and report[2].endswith("line 6: not UTF-8")


@pytest.mark.parametrize(("name", "place"), [("r.json", "row 2"), ("r.parquet", "row 2"), ("r.csv", "line 3")])
def test_bad_rows_of_other_files_are_reported_with_their_place(name, place, tmp_path):
    rows = [{"problem": "a", "answer": "1"}, {"problem": "b", "answer": ""}, {"problem": "c", "answer": "3"}]
    problems, report = load(write_file(tmp_path / name, rows), max_bad_fraction=0.5)
    assert [p.question for p in problems] == ["a", "c"] and report[1].endswith(
        f"{name} {place}: field 'answer' is empty"
    )


def test_csv_rows_that_are_cut_or_shifted_never_become_answers(tmp_path):
    """A comma without quotes would move a part of the question into the answer."""
    path = tmp_path / "r.csv"
    path.write_bytes(b'\xef\xbb\xbfproblem,answer\r\n"two\r\nlines",1\r\n\r\nFind x, y,2\r\nshort\r\nok,3\r\n')
    problems, report = load(path, max_bad_fraction=0.5)
    assert [(p.question, p.answer) for p in problems] == [("two\r\nlines", "1"), ("ok", "3")]
    assert report[1].endswith("line 5: 3 cells under 2 names") and report[2].endswith("line 6: 1 cells under 2 names")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("r.csv", b"problem,answer,answer\na,1,2\n", "r.csv has two columns 'answer'; rename one of them"),
        ("r.csv", b'problem,answer\n"never closed,1\nx,2\n', r"r.csv is not CSV \(line 3: unexpected end of data\)"),
        ("r.csv", b"problem,answer\na,1\n\xfc,2\n", r"r.csv is not UTF-8 \(line 3\)"),
        ("r.csv", b"", "has no rows"),
        ("r.json", b'[{"problem": "a"\n, oops]', r"r.json is not JSON \(.*line 2 column 3"),
        ("r.json", b"[", "r.json is not JSON"),
        ("r.json", b"[" * 100_000, "r.json is not JSON"),
        ("r.json", b'{"data": [\n1\n]}', r"no field 'problem' \(it has data\)"),
        ("r.jsonl.gz", gzip.compress(lines(ROWS))[:-12], "cannot read .*r.jsonl.gz"),
        ("r.jsonl.gz", lines(ROWS), "cannot read .*r.jsonl.gz"),
        ("r.parquet", b"PAR1xxxx", "cannot read .*r.parquet"),
        ("r.parquet", b"", "cannot read .*r.parquet"),
        ("r.txt", lines(ROWS), "r.txt is none of .*jsonl, .ndjson, .json or .csv.*parquet"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_one_line(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        load(tmp_path / name)
    assert "\n" not in str(error.value) and name in str(error.value)


@pytest.mark.parametrize("name", ["absent.parquet", "absent.csv", "absent.json", "absent.jsonl.gz"])
def test_a_missing_local_file_is_not_looked_for_on_the_hub(name, tmp_path):
    with pytest.raises(UserError, match=rf"data.sources\[set\].path: cannot read .*{name}"):
        load(tmp_path / name)


# ---- the same question with other answers ----


def rows_of(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"problem": question, "answer": answer} for question, answer in pairs]


def test_other_answers_to_the_same_question_are_counted_and_listed(tmp_path):
    rows = rows_of(("a", "1"), ("b", "2"), ("a", "1"), (" a ", "7"), ("b", "3"), ("b", "4"))
    problems, report = load(write_file(tmp_path / "r.jsonl", rows))
    assert [(p.question, p.answer) for p in problems] == [("a", "1"), ("b", "2")]
    assert "4 repeated questions left out, 3 of them with another answer" in report[0]
    path = tmp_path / "r.jsonl"
    assert report[1:] == [
        f"  {path} line 4: answer '7', but line 1 has the same question with '1', which is kept",
        f"  {path} line 5: answer '3', but line 2 has the same question with '2', which is kept",
        f"  {path} line 6: answer '4', but line 2 has the same question with '2', which is kept",
    ]


def test_equal_answers_are_no_contradiction(tmp_path):
    """As the grader compares, where that takes no algebra; between sources as well. A torn answer equals itself."""
    rows = rows_of(
        ("a", "0.5"), ("a", "\\frac12"), ("a", "1/2"), ("b", "097"), ("b", "97"), ("c", "1, 2"), ("c", "2 and 1")
    )
    rows += rows_of(("d", "\\frac{1"), ("d", "\\frac{1"))
    one = write_file(tmp_path / "one.jsonl", rows)
    _, report = load(one)
    assert len(report) == 1 and report[0].endswith(", 5 repeated questions left out")
    two = write_file(tmp_path / "two.jsonl", rows_of(("a", "50%"), ("b", "97.0"), ("c", "(1, 2)")))
    _, report = load_problems([SourceConfig(name=path.stem, path=str(path)) for path in (one, two)])
    assert report[2:] == [
        "  two: other answers than in an earlier source: 1, such as '50%' to 'a', where one has '0.5'"
    ]


def test_the_list_of_contradictions_ends_after_ten(tmp_path):
    rows = rows_of(*[("a", str(i)) for i in range(15)])
    _, report = load(write_file(tmp_path / "r.parquet", rows))
    assert "14 of them with another answer" in report[0] and len(report) == 12 and report[-1].endswith("parquet ...")
    assert "row 2: answer '1', but row 1 has" in report[1]


def test_two_sources_that_contradict_each_other_are_named(tmp_path):
    one = write_file(tmp_path / "one.jsonl", rows_of(("a", "1"), ("b", "2"), ("c", "3")))
    two = write_file(tmp_path / "two.jsonl", rows_of(("a", "1"), ("b", "9"), ("d", "4")))
    sources = [SourceConfig(name=path.stem, path=str(path)) for path in (one, two)]
    problems, report = load_problems(sources)
    assert len(problems) == 6  # as before: each source has its own ids
    assert report[2:] == ["  two: other answers than in an earlier source: 1, such as '9' to 'b', where one has '2'"]
    same_name = [SourceConfig(name="s", path=str(path)) for path in (one, two)]
    problems, report = load_problems(same_name)
    assert [p.answer for p in problems] == ["1", "2", "3", "4"]
    assert report[2:] == ["  s: other answers than in an earlier source: 1, such as '9' to 'b', where s has '2'"]


def test_the_same_answers_in_two_sources_are_no_contradiction(tmp_path):
    path = write_file(tmp_path / "r.jsonl", rows_of(("a", "1")))
    _, report = load_problems([SourceConfig(name="one", path=str(path)), SourceConfig(name="two", path=str(path))])
    assert len(report) == 2
