"""What happens to the processes of a run when one of them ends: no rank outlives its launcher, the first error comes last.

Run: python -m pytest tests/test_ranks.py (two real ranks are broken by tests/faults/, see docs/RELIABILITY.md)
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from nanolapo import cli
from nanolapo.config import RunStopped, UserError

RANK = """
from nanolapo.ranks import end_with_launcher
end_with_launcher()
print("ready", flush=True)
import time
time.sleep(600)
"""
LAUNCHER = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', sys.argv[1]]))"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_D7_a_rank_does_not_outlive_a_killed_launcher() -> None:
    environment = os.environ | {"TORCHELASTIC_RUN_ID": "none"}
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, RANK], stdout=subprocess.PIPE, env=environment)
    assert launcher.stdout is not None and launcher.stdout.readline() == b"ready\n"
    launcher.send_signal(signal.SIGKILL)
    start = time.monotonic()
    assert launcher.stdout.read() == b""  # the end of the pipe: the rank that held it is gone
    assert time.monotonic() - start < 10


def fail_in_a_collective() -> None:
    dist.all_reduce(None)


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UserError("no such key"), 2, "error: no such key"),
        (RunStopped("drifted apart"), 3, "stopped: drifted apart"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), 2, "error: x: No space left on device; mend that"),
        (KeyboardInterrupt(), 130, "interrupted; the same command"),
    ],
)
def test_one_line_goes_to_the_terminal_and_to_torchrun(error, code, text, tmp_path, monkeypatch, capsys) -> None:
    def main() -> None:
        raise error

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    assert ended.value.code == code
    assert capsys.readouterr().err.startswith(text)
    assert json.loads((tmp_path / "error.json").read_text())["message"].startswith(text)


def test_D5_the_first_error_is_the_root_cause(tmp_path, monkeypatch) -> None:
    """torchrun shows the earliest error last. A rank whose collective call fails because another rank has died within the
    same second must not look like the cause."""

    def crash() -> None:
        raise ValueError("the cause")

    dates = {}
    for name, main in (("echo", fail_in_a_collective), ("cause", crash)):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / name))
        with pytest.raises(Exception):  # noqa: B017 (its traceback is kept)
            cli.run(main)
        data = json.loads((tmp_path / name).read_text())
        dates[name] = data["timestamp"]
        assert data["message"].startswith("Traceback")
    assert dates["cause"] < dates["echo"]


def test_a_disk_too_full_to_tell_torchrun(tmp_path, monkeypatch, capsys) -> None:
    def main() -> None:
        raise UserError("disk full")

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "missing" / "error.json"))
    with pytest.raises(SystemExit):
        cli.run(main)
    assert capsys.readouterr().err == "error: disk full\n"
    assert not list(Path(tmp_path).iterdir())
