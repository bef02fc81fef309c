"""Reads the scripts' arguments, and ends a script with one clear line and exit code 2 after a user's mistake.

A script imports torch only after `parse` has found the config good, so that --help and a misspelt key take no time."""

from __future__ import annotations

import argparse
import errno
import json
import os
import select
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from nanolapo.config import Config, RunStopped, UserError
from nanolapo.config_file import load_config


def parse(description: str, can_explain: bool = False) -> tuple[Config, str]:
    """Read `CONFIG.yaml [section.key=value ...] [--dry-run | --explain]`; returns the config and "run", "dry-run" or
    "explain"."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value",
                        help="overrides one value; method=FILE.yaml lays a method's file over the config")  # fmt: skip
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--dry-run", dest="action", action="store_const", const="dry-run", default="run",
                        help="check everything; print config, arithmetic, one prompt, cost; touch no weights")  # fmt: skip
    if can_explain:
        action.add_argument("--explain", dest="action", action="store_const", const="explain",
                            help="do the first step only and show everything that happens to one problem in it, on the "
                            "console and in explain.html; the run itself does not change")  # fmt: skip
    arguments = parser.parse_intermixed_args()  # overrides may also come after --dry-run
    return load_config(arguments.config, arguments.overrides), arguments.action


# the disk is full, over quota or over the file size limit, we may not write to it, or a file is where a folder should be
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR}
ECHO_DELAY_S = 60


def run(main: Callable[[], None], keeps_progress: bool = True) -> None:
    """Call a script's main. A UserError or an unwritable disk ends it with one line and exit code 2, RunStopped with one
    line and 3, Ctrl-C with one line and 130. Where nobody reads the output any more, as after `| head`, it ends without a
    word and with 141, as other programs do. Any other error keeps its traceback.

    keeps_progress: True if the script resumes after an interruption, False if it starts again."""
    try:
        main()
        sys.stdout.flush()  # now, while a reader that is gone can still be told from another error
    except UserError as error:
        end(f"error: {error}", 2)
    except RunStopped as error:
        end(f"stopped: {error}", 3)
    except KeyboardInterrupt:
        left = "goes on from what was saved" if keeps_progress else "starts again: nothing was saved"
        end(f"interrupted; the same command {left}", 130)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and output_is_unread():
            sys.exit(141)
        if isinstance(error, OSError) and error.errno in DISK:
            where = f"{error.filename}: " if error.filename else ""
            end(f"error: {where}{error.strerror}; mend that and run the same command again", 2)
        last = traceback.extract_tb(error.__traceback__)[-1].filename
        tell_torchrun(traceback.format_exc(), is_echo="torch/distributed" in last)
        raise


def output_is_unread() -> bool:
    """Return whether the reader of stdout is gone. The rest then goes nowhere, or Python would complain once more."""
    gone = select.poll()
    gone.register(sys.stdout.fileno(), 0)  # asks for no event, and is told of a closed pipe all the same
    if gone.poll(0):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def end(line: str, code: int) -> NoReturn:
    line = " ".join(line.splitlines())  # the message of a library may have several
    print(line, file=sys.stderr, flush=True)
    tell_torchrun(line)
    sys.exit(code)


def tell_torchrun(text: str, is_echo: bool = False) -> None:
    """Hand an error to the launcher. It shows the earliest of all ranks' last errors as the root cause. A collective call
    that fails is mostly the echo of another rank's end, so it gets a later date and the real cause comes first."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        message = json.dumps({"message": text, "timestamp": int(time.time()) + ECHO_DELAY_S * is_echo})
        with suppress(OSError):  # the full disk to report may be this one
            Path(path).write_text(message, encoding="utf-8")
