r"""Is this answer right? Boxed answers, compared exactly or by math-verify inside worker processes with deadlines.

What counts. Only the text after the last `</think>` when there is one (without one the whole completion, or nothing with
`require_think_close`). In it the last \boxed{...}; an empty or unterminated last box scores 0, and so does prose. Boxes
joined by "or", "and", commas or nothing at all are one list, and a list is right only where the gold is that list.
Conventions. Percent and degree signs and units are dropped, never rescaled (50% is 50, not 0.5); integers, decimals and
fractions are exact (0.333 is not 1/3); set order does not matter, tuple order and bracket type do; x is not X.

Most answers are settled here, as text and exact numbers (answers.py). The rest go to `python -m nanolapo.grader.worker`
processes over pipes, one JSON line each: that works from any thread, cannot hang the trainer or fill its memory, and a
worker that dies is replaced and its question asked again. A time-out or a third crash is an error, counted apart from
wrong answers. Model text is never executed (worker.py says how that is made sure).
"""

from __future__ import annotations

import atexit
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from nanolapo.config import RunStopped
from nanolapo.grader.answers import equal, hostile, normalise, number
from nanolapo.grader.boxes import boxed_answer, exact_first_boxed, first_boxed

Question = tuple[str, str]  # normalised answer, normalised gold: what a worker is asked
MAX_ERROR_RATE = 0.05  # more errors than this, over at least MIN_ANSWERS, and the verdicts cannot be trusted
MIN_ANSWERS = 200
ATTEMPTS = 3  # for a question whose worker died; one that was late gets no second try
STARTUP_S = 120.0  # importing sympy takes a second, on a crowded machine many
CANARY = r"\boxed{-7919.0625}"  # no gold may accept this


class _Undecided(Exception):
    """The trainer's process cannot settle this comparison without algebra."""


def _undecided(answer: str, gold: str) -> bool:
    raise _Undecided


def _decide(completion: str, gold: str, require_think_close: bool = False) -> bool | Question:
    """The verdict where it needs no algebra, otherwise the question for a worker."""
    answer = boxed_answer(completion, require_think_close)
    if answer is None or not gold.strip():
        return False
    if answer == gold.strip():
        return True
    left, right = number(answer), number(gold.strip())
    if left is not None and right is not None:
        return left == right
    if len(answer) > max(1000, 4 * len(gold)):
        return False
    question = normalise(answer), normalise(gold)
    if not all(question):
        return False
    try:
        return question[0] == question[1] or (not hostile(*question) and equal(*question, _undecided))
    except _Undecided:
        return question


class _Worker:
    """One worker process and the question it is busy with. `index` is None while it starts or idles."""

    def __init__(self, deadline_s: float, max_memory_gb: float) -> None:
        self.deadline_s = deadline_s
        # nothing secret is handed down: only what Python needs to find its packages
        keep = (
            "PATH",
            "HOME",
            "LANG",
            "LC_ALL",
            "LD_LIBRARY_PATH",
            "VIRTUAL_ENV",
            "PYTHONHOME",
            "PYTHONPATH",
        )
        env = {key: os.environ[key] for key in keep if key in os.environ}
        root = str(Path(__file__).resolve().parents[2])
        env |= {
            "PYTHONPATH": os.pathsep.join(filter(None, [root, env.get("PYTHONPATH")])),
            "OMP_NUM_THREADS": "1",
        }
        command = [
            sys.executable,
            "-B",
            "-P",
            "-m",
            "nanolapo.grader.worker",
            str(deadline_s),
            str(max_memory_gb),
        ]
        self.process = subprocess.Popen(  # its own session: Ctrl-C is for the trainer
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, start_new_session=True, bufsize=0
        )
        self.ready = False
        self.index: int | None = None
        self.give_up_at = time.monotonic() + STARTUP_S

    def ask(self, index: int, question: Question) -> None:
        assert self.process.stdin is not None
        self.index, self.give_up_at = index, time.monotonic() + self.deadline_s
        self.process.stdin.write(json.dumps(question).encode() + b"\n")

    def hear(self) -> bytes:
        """The waiting reply line; empty when the process has ended."""
        assert self.process.stdout is not None
        return os.read(self.process.stdout.fileno(), 64)

    def stop(self, kill: bool) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        if kill:
            self.process.kill()
        self.process.stdin.close()
        try:
            self.process.wait(timeout=2.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


class Grader:
    """A pool of workers, started when the first answer needs algebra. Safe from any thread; use as a context manager.

    `total` counts graded answers, `errors` those among them that timed out or crashed three workers (graded False).
    """

    def __init__(
        self,
        workers: int = 2,
        deadline_s: float = 5.0,
        max_memory_gb: float = 2.0,
        rule: str = "math",
        require_think_close: bool = False,
    ) -> None:
        if rule not in ("math", "exact_first_boxed"):
            raise ValueError(f"rule is 'math' or 'exact_first_boxed', not {rule!r}")
        self.workers, self.deadline_s, self.max_memory_gb = workers, deadline_s, max_memory_gb
        self.rule, self.require_think_close = rule, require_think_close
        self.errors = self.total = 0
        self._pool: list[_Worker] = []
        self._abandoned = False
        self._lock = threading.Lock()

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def abandon(self) -> None:
        """Let whoever waits for verdicts in another thread stop waiting; they are worth nothing then."""
        self._abandoned = True
        for worker in list(self._pool):
            worker.process.kill()  # its end is heard at once, a late answer only at its deadline

    def close(self) -> None:
        with self._lock:
            while self._pool:
                self._pool.pop().stop(kill=False)

    @property
    def error_rate(self) -> float:
        return self.errors / max(self.total, 1)

    @property
    def untrustworthy(self) -> bool:
        """More than 5% errors over at least 200 answers: the loop stops the run."""
        return self.total >= MIN_ANSWERS and self.error_rate > MAX_ERROR_RATE

    def stop_if_untrustworthy(self) -> None:
        """Raise RunStopped when too many answers failed to be graded: neither reward nor score means anything then."""
        if self.untrustworthy:
            raise RunStopped(
                f"the grader failed on {self.error_rate:.0%} of {self.total} answers (time-outs or crashes, not wrong "
                "answers): its verdicts can no longer be trusted"
            )

    def grade_all(self, completions: Sequence[str], golds: Sequence[str]) -> list[bool]:
        """One verdict per completion, in order."""
        if len(completions) != len(golds):
            raise ValueError(f"{len(completions)} completions but {len(golds)} golds")
        if self.rule == "exact_first_boxed":
            verdicts: list[bool | None] = [*map(exact_first_boxed, completions, golds)]
        else:
            verdicts = self._verdicts(completions, golds, self.require_think_close)
        self.total += len(verdicts)
        self.errors += verdicts.count(None)
        return [verdict is True for verdict in verdicts]

    def reads(self, completion: str) -> str | None:
        """What this grader takes as the answer of a completion, before it is normalised; None: it finds none."""
        if self.rule == "exact_first_boxed":
            return first_boxed(completion)
        return boxed_answer(completion, self.require_think_close)

    def golds_that_fail(self, golds: Sequence[str]) -> list[int]:
        """Indices of golds that do not accept themselves, accept a number that has nothing to do with them, or time out."""
        own = self._verdicts([rf"\boxed{{{gold}}}" for gold in golds], golds, False)
        other = self._verdicts([CANARY] * len(golds), golds, False)
        return [i for i, (mine, canary) in enumerate(zip(own, other, strict=True)) if not (mine and canary is False)]

    def _verdicts(self, completions: Sequence[str], golds: Sequence[str], think_close: bool) -> list[bool | None]:
        """True, False, or None for an error. Equal questions, common within a group, are asked once."""
        decided = [_decide(completion, gold, think_close) for completion, gold in zip(completions, golds, strict=True)]
        questions = list(dict.fromkeys(d for d in decided if not isinstance(d, bool)))
        with self._lock:
            replies = dict(zip(questions, self._ask(questions), strict=True)) if questions else {}
        return [d if isinstance(d, bool) else replies[d] for d in decided]

    def _ask(self, questions: list[Question]) -> list[bool | None]:
        """Keep every worker busy until each question has its reply; replace late and dead workers."""
        replies: list[bool | None] = [None] * len(questions)
        waiting = deque(range(len(questions)))
        crashes = [0] * len(questions)
        unanswered, failed_starts = len(questions), 0
        while unanswered:
            if self._abandoned:
                return replies
            self._fill()
            for worker in [w for w in self._pool if w.ready and w.index is None][: len(waiting)]:
                index = waiting.popleft()
                try:
                    worker.ask(index, questions[index])
                except BrokenPipeError:  # it died while idle, which says nothing about the question
                    waiting.appendleft(index)
                    self._drop(worker)
            for worker, heard in self._listen():
                if not worker.ready:
                    worker.ready = heard == b"ready\n"
                    failed_starts += not worker.ready
                    if not worker.ready:
                        self._drop(worker)
                    if failed_starts == ATTEMPTS:
                        raise RuntimeError("no grader worker starts: see its message above (is math-verify installed?)")
                    continue
                asked, worker.index = worker.index, None
                assert asked is not None
                if heard:
                    replies[asked] = {b"right\n": True, b"wrong\n": False}.get(heard)
                else:
                    self._drop(worker)
                    crashes[asked] += 1
                if heard == b"" and crashes[asked] < ATTEMPTS:  # killed from outside, perhaps
                    waiting.appendleft(asked)
                else:
                    unanswered -= 1
        self._fill()
        return replies

    def _fill(self) -> None:
        while len(self._pool) < self.workers:
            self._pool.append(_Worker(self.deadline_s, self.max_memory_gb))

    def _listen(self) -> list[tuple[_Worker, bytes | None]]:
        """Wait for the first reply or deadline. Bytes are a reply, b"" a dead worker, None a late one."""
        busy = [w for w in self._pool if not w.ready or w.index is not None]
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                assert worker.process.stdout is not None
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
            patience = max(0.0, min((w.give_up_at for w in busy), default=0.0) - time.monotonic())
            speaking = [key.data for key, _ in selector.select(patience)]
        now = time.monotonic()
        late = [w for w in busy if w not in speaking and now >= w.give_up_at]
        return [(w, w.hear()) for w in speaking] + [(w, None) for w in late]

    def _drop(self, worker: _Worker) -> None:
        self._pool.remove(worker)
        worker.stop(kill=True)


@cache
def _shared_grader() -> Grader:
    """One worker for single questions, closed at exit."""
    grader = Grader(workers=1)
    atexit.register(grader.close)
    return grader


def grade(completion: str, gold: str, require_think_close: bool = False) -> bool:
    r"""One verdict, as `Grader` gives it; algebra happens in a shared worker, an error is False.

    >>> grade(r"so \boxed{0.50}", r"\frac{1}{2}"), grade(r"\boxed{1} or \boxed{2}", "2"), grade("it is 2", "2")
    (True, False, False)
    """
    return _shared_grader()._verdicts([completion], [gold], require_think_close)[0] is True
