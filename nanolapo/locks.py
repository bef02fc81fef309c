"""One process at a time: a lock on a file, which the kernel gives back however its holder ends, kill -9 included.

Lock files are left lying: to delete one that another process waits for would give each of the two a lock of its own.
"""

from __future__ import annotations

import fcntl
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from nanolapo.config import UserError

PATIENCE_S = 3  # for what was killed a moment ago


def tell(line: str) -> None:
    print(line, flush=True)  # at once, also into a file: who waits must be seen to wait


@contextmanager
def locked(path: Path, busy: str, wait: bool = False, say: Callable[[str], None] = tell) -> Iterator[int]:
    """Hold the lock on a file. A child process that is given the descriptor yielded here holds it as well.

    Where another process has held it for PATIENCE_S, `busy` is a UserError or, with `wait`, a line said before waiting on.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    if not wait:
                        raise UserError(busy) from None
                    say(busy)
                    deadline = math.inf
                time.sleep(0.1)
            except OSError as error:  # some network file systems have no locks
                say(f"{path.parent} cannot be locked ({error.strerror}): start no second command in it")
                break
        yield file.fileno()


def lock_of(folder: Path) -> Path:
    """The lock of a folder lies beside it, for the folder itself may be replaced or deleted.

    >>> lock_of(Path("/runs/demo/base")).as_posix()
    '/runs/demo/.base.lock'
    """
    folder = folder.resolve()
    return folder.with_name(f".{folder.name}.lock")


def alone_in(run_dir: Path, is_main: bool = True) -> AbstractContextManager[object]:
    """No second process may write to the run directory meanwhile: it gets a UserError. The main rank holds it for all."""
    if not is_main:
        return nullcontext()
    return locked(lock_of(run_dir), f"{run_dir}: another process is at work on this run; wait for it or end it, or take "
                  "another run.name")  # fmt: skip


def make_once(folder: Path, make: Callable[[], None]) -> None:
    """Let `make` write a model folder, unless it is there. A process that wants the one that another is making waits."""
    done = folder / "config.json"
    if not done.exists():
        with locked(lock_of(folder), f"another process is making {folder} already: waiting for it", wait=True):
            if not done.exists():
                return make()
    tell(f"{folder} is there already and is used as it is; delete the folder to have it made anew")
