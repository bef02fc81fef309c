"""Is an exercise of docs/EXERCISES.md done? `make exercise N=3` runs this; several: python tests/exercises/run.py 1 2 3

Prints a line for each: "exercise 3: right", or what is not right yet. Exit code 0: all right, 1: not yet, 2: no such one.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def check_files() -> dict[int, Path]:
    """The check of each exercise, by its number: check_3_guidance.py is that of exercise 3."""
    found = {int(path.stem.split("_")[1]): path for path in HERE.glob("check_*_*.py")}
    return dict(sorted(found.items()))


class FirstFailure:
    """A pytest plugin that remembers what the first failure said, on one line; "" where nothing failed."""

    message = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.remember(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.remember(report)

    def remember(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if not report.failed or self.message:
            return
        crash = getattr(report.longrepr, "reprcrash", None)
        if crash is None:
            text = report.longreprtext
        elif crash.message.startswith("AssertionError: "):
            # Written for the student; pytest's own comparison follows it
            text = crash.message.removeprefix("AssertionError: ").partition("\nassert ")[0]
        else:
            text = f"{crash.message} (line {crash.lineno} of {crash.path})"
        self.message = " ".join(text.split())


def check(path: Path) -> str:
    """Run one check: "" where it passes, else what is not right yet."""
    failure, output = FirstFailure(), io.StringIO()
    # Alone, without the options and fixtures of the other tests: a check says what it needs.
    options = ["--rootdir", str(ROOT), "--noconftest", "-x", "-q", "-s", "-o", "addopts=", "-p", "no:cacheprovider"]
    with contextlib.redirect_stdout(output):
        code = pytest.main([*options, str(path)], plugins=[failure])
    if code == 0:
        return ""
    return failure.message or f"pytest ended with {code!r}: {output.getvalue()[-500:]}"


def main(arguments: list[str]) -> int:
    files = check_files()
    if not arguments or not all(text.isdecimal() and int(text) in files for text in arguments):
        print(f"give the number of an exercise of docs/EXERCISES.md, {min(files)} to {max(files)}: make exercise N=1")
        return 2
    missing = {int(text): check(files[int(text)]) for text in arguments}
    for number, message in missing.items():
        print(f"exercise {number}: not right yet: {message}" if message else f"exercise {number}: right")
    return 1 if any(missing.values()) else 0


if __name__ == "__main__":
    # The package and the helpers of this tree, whatever the environment has installed; also for processes of a check.
    sys.path[:0] = [str(ROOT), str(ROOT / "tests/helpers")]
    os.environ |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import nanolapo

    assert Path(nanolapo.__file__).parent == ROOT / "nanolapo", f"another package is in the way: {nanolapo.__file__}"
    sys.exit(main(sys.argv[1:]))
