r"""Grades answers: boxed answers are compared exactly, or by math-verify in worker processes with deadlines.

What counts. Only the text after the last tag that closes a thought counts (`</think>`, or another one that THOUGHT_TAG in
boxes.py matches). Without one the whole completion does. The answer is the last \boxed{...} in it. An empty or unterminated
last box scores 0, and so does prose. Boxes with only LaTeX, signs or words such as "or", "and" between them are one list. A
list is right only if the reference answer has the same values. Conventions: percent signs, degree signs and units are
dropped and never rescaled (50% is 50, not 0.5), but a word that changes the value is no unit (4:30 pm, 5 million).
Integers, decimals and fractions are exact (0.333 is not 1/3). The order matters in tuples, and between values with labels
and values without (x=2, y=1 is 2, 1), but not in lists and sets. The type of brackets matters. A comma between digits is
one of thousands only if no blank follows it and no bracket makes it a separator. An equation without a label (0 = x-1) asks
for an equation. x is not X, yes is Yes. For the letter of a choice, "B) 3.5" is B, but "B) 3.5 or C" is not.

Most answers are settled here, as text and exact numbers (spelling.py, answers.py). The others are asked in worker processes
(pool.py, worker.py). That works from any thread, and no answer can hang the trainer or fill its memory. An answer that
misses its deadline or crashes three workers is an error, which is counted apart from wrong answers. Model text is never
executed (worker.py says how this is made sure).
"""

from __future__ import annotations

import atexit
import re
import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from functools import cache, partial

from nanolapo.config import RunStopped, UserError
from nanolapo.grader.answers import equal, hostile, is_list, number
from nanolapo.grader.boxes import boxed_answer, first_boxed
from nanolapo.grader.pool import Pool, Question
from nanolapo.grader.spelling import chosen_letter, is_reachable, normalise

MAX_ERROR_RATE = 0.05  # with more errors than this, over at least MIN_ANSWERS, the verdicts cannot be trusted
MIN_ANSWERS = 200
PATIENCE_S = 60.0  # for a comparison that came too late, when it is asked once more and alone
CHOICE_LETTER = re.compile(r"(?:\\text\{)?\(?[A-J]\)?\}?")
CANARY = r"\boxed{-7919.0625}"  # no reference answer may accept this


class _Undecided(Exception):
    """This comparison needs algebra."""


def _undecided(answer: str, reference: str) -> bool:
    raise _Undecided


def _decide(completion: str, reference: str) -> bool | Question:
    """The verdict if it needs no algebra, otherwise the question for a worker."""
    answer = boxed_answer(completion)
    if answer is None or not reference.strip():
        return False
    if answer == reference.strip():
        return True
    left, right = number(answer), number(reference.strip())
    if left is not None and right is not None:
        return left == right
    if len(answer) > max(1000, 4 * len(reference)):
        return False
    normal = normalise(reference)
    if CHOICE_LETTER.fullmatch(normal):
        answer = chosen_letter(answer) or answer
    question = normalise(answer, is_list(normal)), normal
    if not all(question):
        return False
    try:
        return question[0] == question[1] or (not hostile(*question) and equal(*question, _undecided))
    except _Undecided:
        return question


class Grader:
    """Grades completions in the background. Any thread may use it. Use it as a context manager.

    `total` counts graded answers. `errors` counts those among them that were late or crashed three workers (they are
    graded False).
    """

    def __init__(self, workers: int = 2, deadline_s: float = 5.0, *, rule: str = "math") -> None:
        if rule not in ("math", "exact_first_boxed"):
            raise ValueError(f"rule is 'math' or 'exact_first_boxed', not {rule!r}")
        self.rule = rule
        self.errors = self.total = 0
        self._pool, self._lock = Pool(workers, deadline_s), threading.Lock()

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers and cancel the answers that are pending. This does not wait for slow ones."""
        self._pool.close()

    def submit(self, completion: str, reference: str) -> Future[bool]:
        """The verdict as a future. It is finished at once, unless it needs algebra."""
        verdict: Future[bool] = Future()
        verdict.set_running_or_notify_cancel()  # it cannot be cancelled alone
        if self.rule == "exact_first_boxed":
            reply = _finished(first_boxed(completion) == reference)
        else:
            reply = self._reply(completion, reference)
        reply.add_done_callback(partial(self._pass_on, verdict))
        return verdict

    def grade_all(self, completions: Sequence[str], references: Sequence[str]) -> list[bool]:
        """One verdict per completion, in order."""
        if len(completions) != len(references):
            raise ValueError(f"{len(completions)} completions but {len(references)} reference answers")
        return [verdict.result() for verdict in [*map(self.submit, completions, references)]]

    def reads(self, completion: str) -> str | None:
        """What this grader takes as the answer of a completion, before it is normalised. None if it finds none."""
        if self.rule == "exact_first_boxed":
            return first_boxed(completion)
        return boxed_answer(completion)

    def references_that_fail(self, references: Sequence[str]) -> list[int]:
        """Indices of those that no answer can reach, do not accept themselves, or accept any number.

        A comparison that is late or crashes says nothing about the reference answer, so it is asked again (see `_insist`).
        """
        own = [(rf"\boxed{{{reference}}}", reference) for reference in references]
        other = [(CANARY, reference) for reference in references]
        replies = [self._reply(*pair) for pair in own + other]
        verdicts = [reply.result() for reply in replies]
        if None in verdicts:
            verdicts = self._insist(own + other, verdicts)
        checks = enumerate(zip(references, verdicts[: len(references)], verdicts[len(references) :], strict=True))
        return [i for i, (reference, mine, canary) in checks if not is_reachable(reference) or not mine or canary]

    def _insist(self, asked: Sequence[tuple[str, str]], verdicts: Sequence[bool | None]) -> list[bool | None]:
        """Ask those without a verdict again, one after the other, with PATIENCE_S for each. Raises UserError for a
        reference answer that still cannot be compared."""
        patient, decided = Pool(1, PATIENCE_S), list(verdicts)
        try:
            for n, (completion, reference) in enumerate(asked):
                if decided[n] is None:
                    decided[n] = self._reply(completion, reference, patient).result()
                if decided[n] is None:
                    raise UserError(
                        f"the reference answer {reference!r} could not be compared within {PATIENCE_S:g} s: start again "
                        "when the machine has less to do, or leave the problem out with data.exclude"
                    )
        finally:
            patient.close()
        return decided

    def _reply(self, completion: str, reference: str, pool: Pool | None = None) -> Future[bool | None]:
        """True, False, or None for an error."""
        decided = _decide(completion, reference)
        return _finished(decided) if isinstance(decided, bool) else (pool or self._pool).ask(decided)

    def _pass_on(self, verdict: Future[bool], reply: Future[bool | None]) -> None:
        """Count a reply, then finish the verdict with it."""
        if reply.cancelled() or reply.exception():
            verdict.set_exception(CancelledError() if reply.cancelled() else reply.exception())
            return
        with self._lock:
            self.total += 1
            self.errors += reply.result() is None
        verdict.set_result(reply.result() is True)


def check_errors(errors: int, total: int, least: int = MIN_ANSWERS) -> float:
    """Return errors / total. Raises RunStopped when too many answers could not be graded (more than 5% of at least
    `least`): neither reward nor score means anything then."""
    rate = errors / max(total, 1)
    if total >= least and rate > MAX_ERROR_RATE:
        raise RunStopped(
            f"the grader failed on {rate:.0%} of {total} answers (time-outs or crashes, not wrong answers): its verdicts "
            "can no longer be trusted"
        )
    return rate


def _finished(verdict: bool) -> Future[bool | None]:
    future: Future[bool | None] = Future()
    future.set_result(verdict)
    return future


def plainly_equal(answer: str, reference: str) -> bool:
    r"""True if two reference answers are equal and it takes no algebra to see that: 0.5 and \frac12, or 097 and 97."""
    return answer == reference or _decide(rf"\boxed{{{answer}}}", reference) is True


@cache
def _shared_grader() -> Grader:
    """One worker for single questions, closed at exit."""
    grader = Grader(workers=1)
    atexit.register(grader.close)
    return grader


def grade(completion: str, reference: str) -> bool:
    r"""One verdict, as `Grader` gives it. Algebra happens in a shared worker, and an error is False.

    >>> grade(r"so \boxed{0.50}", r"\frac{1}{2}"), grade(r"\boxed{1} or \boxed{2}", "2"), grade("it is 2", "2")
    (True, False, False)
    """
    return _shared_grader()._reply(completion, reference).result() is True
