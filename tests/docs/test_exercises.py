"""The exercises of docs/EXERCISES.md: the tree as it is fails every check, and with its solution passes it.

Run: python -m pytest tests/docs/test_exercises.py        tests/exercises/run.py is what `make exercise N=3` runs.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHECKS = {int(path.stem.split("_")[1]): path.stem for path in (ROOT / "tests/exercises").glob("check_*.py")}
SOLUTIONS = {int(path.stem.split("_")[0]): path for path in (ROOT / "tests/exercises/solutions").glob("*.patch")}
PAGE = (ROOT / "docs/EXERCISES.md").read_text(encoding="utf-8")
ENTRIES = {
    int(number): (stars, text)
    for number, stars, text in re.findall(
        r"^## (\d+)\. [^\n]* \((\*+)\)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL
    )
}


def run(tree: Path, *numbers: int) -> tuple[int, list[str]]:
    """run.py of this tree: exit code, and a line for each number."""
    command = [sys.executable, str(tree / "tests/exercises/run.py"), *map(str, numbers)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=tree)
    lines = result.stdout.splitlines()
    assert len(lines) == len(numbers), result.stdout + result.stderr
    return result.returncode, lines


def copy_of_the_tree(folder: Path) -> Path:
    """What the checks need; without .git, so that nothing here depends on history."""
    for name in ("nanolapo", "configs", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def apply(solution: Path, tree: Path) -> None:
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(tree.parent)}  # not as a part of another repository
    command = ["git", "apply", "--whitespace=nowarn", str(solution)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tree, env=environment)
    name = solution.relative_to(ROOT)
    assert result.returncode == 0, (
        f"solution {name} no longer applies: the code around it has changed. Refresh it: git apply --reject {name}, do by "
        f"hand what is left in the *.rej files and remove them, git add -N nanolapo configs, git diff -- nanolapo configs "
        f"> {name}, git restore nanolapo configs. git says: {result.stderr}"
    )


def test_every_exercise_has_a_check_a_solution_and_an_entry():
    assert sorted(CHECKS) == list(range(1, len(CHECKS) + 1)) and len(CHECKS) >= 8
    assert sorted(ENTRIES) == sorted(SOLUTIONS) == sorted(CHECKS)
    assert list(ENTRIES) == sorted(ENTRIES), "the page's order"
    for number, stem in CHECKS.items():
        assert SOLUTIONS[number].stem == stem.removeprefix("check_")


@pytest.mark.parametrize("number", sorted(CHECKS))
def test_an_entry_says_what_a_student_needs(number):
    stars, text = ENTRIES[number]
    parts = re.findall(r"^\*\*([\w ]+?)\.\*\*", text, re.MULTILINE)
    assert parts[:4] == ["Goal", "Read", "Change", "Check"] and "Hints" in text and "minutes" in text
    assert re.findall(r"make exercise N=(\d+)", text) == [str(number)] and 1 <= len(stars) <= 3
    assert f"solutions/{SOLUTIONS[number].name}" in text


@pytest.mark.slow
def test_the_tree_as_it_is_fails_every_check():
    """With words for a student, not with an error of Python's."""
    code, lines = run(ROOT, *sorted(CHECKS))
    assert code == 1
    for number, line in zip(sorted(CHECKS), lines, strict=True):
        assert line.startswith(f"exercise {number}: not right yet: "), line
        assert not re.search(r"\w(Error|Exception)\b|Traceback|\(line \d+ of ", line.replace("UserError", "")), line


@pytest.mark.slow
@pytest.mark.parametrize("number", sorted(CHECKS))
def test_the_solution_passes(number, tmp_path):
    tree = copy_of_the_tree(tmp_path / "tree")
    apply(SOLUTIONS[number], tree)
    assert run(tree, number) == (0, [f"exercise {number}: right"])


@pytest.mark.slow
def test_make_says_that_its_own_error_line_is_no_crash(tmp_path):
    """And hands the exit code on: make's is 2 for any failure, and names run.py's."""
    tree = copy_of_the_tree(tmp_path / "tree")
    for name in ("Makefile", "constraints.txt"):  # the target `install` depends on the second
        shutil.copy(ROOT / name, tree)
    (tree / ".venv").mkdir()
    (tree / ".venv/.core").touch()  # installed, as far as make can see

    def make(number: int) -> subprocess.CompletedProcess[str]:
        command = ["make", "exercise", f"N={number}", f"PY={sys.executable}"]
        outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # as if typed
        environment = outside | {"LC_ALL": "C"}
        return subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=tree, env=environment)

    wrong = make(1)
    first, second = wrong.stdout.splitlines()
    assert first.startswith("exercise 1: not right yet: ") and "nothing has crashed" in second
    assert wrong.returncode == 2 and "Error 1" in wrong.stderr
    missing = make(99)
    assert "give the number" in missing.stdout and "crashed" not in missing.stdout and "Error 2" in missing.stderr
    apply(SOLUTIONS[1], tree)
    right = make(1)
    assert (right.returncode, right.stdout, right.stderr) == (0, "exercise 1: right\n", "")


@pytest.mark.slow
def test_run_says_which_exercises_there_are():
    for numbers in ([], [str(len(CHECKS) + 1)], ["one"]):
        command = [sys.executable, str(ROOT / "tests/exercises/run.py"), *numbers]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert result.returncode == 2 and f"1 to {len(CHECKS)}: make exercise N=1" in result.stdout


def test_a_solution_that_no_longer_applies_says_what_to_do(tmp_path):
    tree = copy_of_the_tree(tmp_path / "tree")
    (tree / "nanolapo/lengths.py").write_text("")
    with pytest.raises(AssertionError, match="1_statistic.patch no longer applies.* Refresh it: git apply"):
        apply(SOLUTIONS[1], tree)
