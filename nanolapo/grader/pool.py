"""Worker processes for the comparisons that need algebra: a question goes in, a future of the verdict comes out.

Each worker process has a thread that waits for its replies. So any thread may ask, and asking takes no time. The thread
kills a worker that misses its deadline, and the next question gets a new one. Workers are new programs, not forks of the
trainer, which may hold CUDA, torch and vLLM threads.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path

Question = tuple[str, str]  # normalised answer, normalised reference answer
ATTEMPTS = 3  # for a question whose worker died, and for starting a worker
MEMORY_GB = 2.0  # of a worker
STARTUP_S = 120.0  # importing sympy takes a second, and many on a crowded machine
REMEMBERED = 1000  # questions, about as many as one step asks
PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])
# A worker gets nothing else from the environment: Python needs these to find its packages, and none of them is a secret.
KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "PYTHONHOME", "PYTHONPATH")


class Worker:
    """The trainer's side of one `python -m nanolapo.grader.worker` process."""

    def __init__(self, deadline_s: float) -> None:
        env = {key: os.environ[key] for key in KEPT if key in os.environ}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [PACKAGE_ROOT, env.get("PYTHONPATH")]))
        env["OMP_NUM_THREADS"] = "1"
        program = [sys.executable, "-B", "-P", "-m", "nanolapo.grader.worker", str(deadline_s), str(MEMORY_GB)]
        self.process = subprocess.Popen(  # in its own session: Ctrl-C is for the trainer
            program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, start_new_session=True, bufsize=0
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.questions, self.replies = self.process.stdin, self.process.stdout.fileno()
        self.deadline_s = deadline_s

    def ask(self, question: Question) -> bytes | None:
        """The reply: a line, b"" from a process that has died, or None when the deadline has passed."""
        try:
            self.questions.write(json.dumps(question).encode() + b"\n")
        except BrokenPipeError:
            return b""
        return self.hear(self.deadline_s)

    def hear(self, patience_s: float) -> bytes | None:
        poll = select.poll()
        poll.register(self.replies, select.POLLIN)
        return os.read(self.replies, 64) if poll.poll(patience_s * 1000) else None

    def stop(self) -> None:
        with self.process:  # closes the pipes and waits for the end
            self.process.kill()


def failed(reply: Future[bool | None]) -> bool:
    """True if the answer could not be graded. It is asked again, since the machine may have been at fault."""
    return reply.done() and (reply.cancelled() or reply.exception() is not None or reply.result() is None)


class Pool:
    """Up to `workers` processes. They start when they are first needed."""

    def __init__(self, workers: int, deadline_s: float) -> None:
        self.deadline_s = deadline_s
        self.workers: dict[int, Worker] = {}  # by the id of the thread that uses it
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="grader")
        self._asked: dict[Question, Future[bool | None]] = {}  # the newest last
        self._lock = threading.Lock()
        self._closed = False
        self._failed_starts = 0  # since the last start that succeeded

    def ask(self, question: Question) -> Future[bool | None]:
        """True, False, or None for an error. A question that was asked not long ago gets the same future again."""
        with self._lock:
            if self._closed:
                raise RuntimeError("this grader is closed")
            reply = self._asked.pop(question, None)
            if reply is None or failed(reply):
                reply = self._threads.submit(self._answer, question)
            self._asked[question] = reply
            if len(self._asked) > REMEMBERED:
                del self._asked[next(iter(self._asked))]
        return reply

    def close(self) -> None:
        """Cancel the questions that are pending and kill the workers, for good. This does not wait for slow answers."""
        with self._lock:
            self._closed = True
            for worker in self.workers.values():
                worker.process.kill()
        self._threads.shutdown(cancel_futures=True)  # every thread notices at once that its worker has ended
        for worker in self.workers.values():
            worker.stop()

    def _answer(self, question: Question) -> bool | None:
        """Runs in a thread. If the worker dies, which may be no fault of the question, a new worker is asked."""
        for _ in range(ATTEMPTS):
            worker = self._worker()
            reply = worker.ask(question)
            if reply:
                return {b"right\n": True, b"wrong\n": False}.get(reply)
            worker.stop()
            if reply is None:  # late, and it would be late again
                break
        return None

    def _worker(self) -> Worker:
        """The worker of this thread. A new one if it has none yet, or if that has ended."""
        worker = self.workers.get(threading.get_ident())
        while worker is None or worker.process.poll() is not None:
            if self._failed_starts >= ATTEMPTS:
                raise RuntimeError("no grader worker starts: see its message above (is math-verify installed?)")
            if worker is not None:
                worker.stop()
            with self._lock:
                if self._closed:
                    raise CancelledError
                worker = self.workers[threading.get_ident()] = Worker(self.deadline_s)
            if worker.hear(STARTUP_S) == b"ready\n":
                self._failed_starts = 0
            else:
                self._failed_starts += 1
                worker.stop()
        return worker
