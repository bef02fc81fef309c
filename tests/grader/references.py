r"""Checks that all reference answers of problem files are taken from their rows and score 1 against themselves.

    python tests/grader/references.py FILE.jsonl [FILE.jsonl ...]

It lists every row without a usable answer, and every answer that its own text, in a box or with "The answer is" and dollar
signs around it, does not reach. The exit code is 1 if it lists anything.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from nanolapo.config import SourceConfig
from nanolapo.data.problems import load_problems
from nanolapo.grader import Grader


def exceptions(path: Path, grader: Grader) -> tuple[int, list[str]]:
    """The number of problems in a file, and one line for each row or reference answer that fails."""
    fields = json.loads(path.read_text(encoding="utf-8").split("\n", 1)[0])
    question = "problem" if "problem" in fields else "question"
    answer = "final_answer" if "final_answer" in fields else "answer"
    source = SourceConfig(name=path.stem, path=str(path), question=question, answer=answer, max_bad_fraction=1)
    problems, (_, *bad_rows) = load_problems([source])
    references = [problem.answer for problem in problems]
    failing = {*grader.references_that_fail(references)}
    wrapped = grader.grade_all([rf"The answer is $\boxed{{ {r} }}$." for r in references], references)
    failing |= {i for i, right in enumerate(wrapped) if not right}
    return len(problems), bad_rows + [f"{problems[i].id}: {references[i]!r}" for i in sorted(failing)]


if __name__ == "__main__":
    with Grader(workers=1) as shared:
        listed = 0
        for name in sys.argv[1:]:
            count, found = exceptions(Path(name), shared)
            listed += len(found)
            print(f"{name}: {count} reference answers, {len(found)} exceptions", *found, sep="\n  ")
    raise SystemExit(min(listed, 1))
