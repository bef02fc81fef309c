"""Locks on files, so that one process at a time works in a folder. The kernel frees a lock however its holder ends.

Lock files are never deleted: if one were deleted while another process waits for it, both would get a lock.
"""

from __future__ import annotations

import fcntl
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from nanolapo.config import UserError

PATIENCE_S = 3  # a process that was just killed may hold its lock for a moment


def tell(line: str) -> None:
    print(line, flush=True)  # at once, also into a file, so that the user sees that we wait


@contextmanager
def locked(path: Path, busy: str, wait: bool = False, say: Callable[[str], None] = tell) -> Iterator[int]:
    """Hold the lock on a file. A child process that inherits the yielded descriptor holds it as well.

    If another process still holds it after PATIENCE_S, raise `busy` as a UserError. With `wait`, say `busy` and wait on.
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
    """The lock file of a folder. It lies beside the folder, which may itself be replaced or deleted.

    >>> lock_of(Path("/runs/demo/base")).as_posix()
    '/runs/demo/.base.lock'
    """
    folder = folder.resolve()
    return folder.with_name(f".{folder.name}.lock")


def alone_in(run_dir: Path, is_main: bool = True) -> AbstractContextManager[object]:
    """Lock a run directory: a second process that wants it gets a UserError. The main rank holds the lock for all ranks."""
    if not is_main:
        return nullcontext()
    return locked(lock_of(run_dir), f"{run_dir}: another process is at work on this run; wait for it or end it, or take "
                  "another run.name")  # fmt: skip


def make_once(folder: Path, make: Callable[[], None]) -> None:
    """Let `make` write a model folder, unless it is there. If another process is making it, wait for that one."""
    done = folder / "config.json"
    if not done.exists():
        with locked(lock_of(folder), f"another process is making {folder} already: waiting for it", wait=True):
            if not done.exists():
                return make()
    tell(f"{folder} exists already and is used as it is; delete the folder to make it again")
