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
from nanolapo.ranks import check_launcher, on_one_machine

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


@pytest.mark.slow
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("lines", [1, 100_000])  # what fits into the buffer is written at the end only
def test_a_reader_that_is_gone_ends_the_script_without_a_word(lines, unbuffered) -> None:
    program = f"from nanolapo import cli\ncli.run(lambda: [print('step', i) for i in range({lines})])"
    command = [sys.executable, "-c", program]
    environ = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ) as writer:
        assert writer.stdout is not None and writer.stderr is not None
        writer.stdout.close()
        assert (writer.stderr.read(), writer.wait(timeout=60)) == (b"", 141)


@pytest.mark.slow
def test_another_broken_pipe_keeps_its_traceback() -> None:
    program = "from nanolapo import cli\ndef main():\n    raise BrokenPipeError('of a worker')\ncli.run(main)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.endswith("BrokenPipeError: of a worker\n")


# ---- what a launcher sets ----

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


def without(*names: str) -> dict[str, str]:
    return {name: value for name, value in TORCHRUN.items() if name not in names}


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE=2 .* MASTER_ADDR"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE=2 .* MASTER_ADDR"),
        ({"PMI_SIZE": "4", "PMI_RANK": "1"}, "PMI_SIZE=4 .* MASTER_ADDR"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0 .* MASTER_ADDR"),
        (without("MASTER_ADDR"), "MASTER_ADDR is not set"),
        (without("MASTER_PORT"), "MASTER_PORT is not set"),
        (without("RANK"), "RANK is not set"),
        (TORCHRUN | {"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        (TORCHRUN | {"RANK": "2"}, "RANK=2 .* 0 to 1"),
        (TORCHRUN | {"RANK": "-1"}, "RANK=-1 .* 0 to 1"),
        (TORCHRUN | {"WORLD_SIZE": "two"}, "WORLD_SIZE='two' is not a number"),
        (TORCHRUN | {"LOCAL_RANK": "x"}, "LOCAL_RANK='x' is not a number"),
        (TORCHRUN | {"MASTER_PORT": "http"}, "MASTER_PORT='http' is not a number"),
        (without("MASTER_ADDR", "MASTER_PORT"), "MASTER_ADDR and MASTER_PORT are not set"),
    ],
)
def test_half_of_a_launchers_variables_are_one_line_and_no_waiting(environ, words) -> None:
    """Without an address a process would wait for the others for ten minutes, or take itself for the only one."""
    for has_gpu in (False, True):
        with pytest.raises(UserError, match=f"{words}.*torchrun") as error:
            check_launcher(environ, has_gpu)
        assert "\n" not in str(error.value)


def test_on_gpus_each_process_needs_its_local_rank() -> None:
    """accelerate reads LOCAL_RANK there and nothing else: each of the two would train alone."""
    with pytest.raises(UserError, match="LOCAL_RANK is not set.*torchrun"):
        check_launcher(without("LOCAL_RANK"), has_gpu=True)
    check_launcher(without("LOCAL_RANK"), has_gpu=False)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"WORLD_SIZE": "1", "RANK": "0"},
        {"PMI_SIZE": "1", "SLURM_NTASKS": "8", "MASTER_ADDR": "x"},
        TORCHRUN,
        TORCHRUN | {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"},  # torchrun within a job of mpirun
        {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "a",
         "MASTER_PORT": "1"},
        {"LOCAL_RANK": "-1"},
        TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
    ],
)  # fmt: skip
def test_a_whole_set_or_none_is_let_through(environ) -> None:
    for has_gpu in (False, True):
        check_launcher(environ, has_gpu)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, True),
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}, True),
        ({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "16", "OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, False),  # mpirun over two nodes
        ({"PMI_SIZE": "2", "MPI_LOCALNRANKS": "1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, False),  # how many are here is not said
    ],
)
def test_only_processes_of_one_machine_may_stay_on_loopback(environ, expected) -> None:
    assert on_one_machine(environ) is expected


@pytest.mark.slow
def test_a_script_with_half_of_the_variables_ends_at_once() -> None:
    program = "from nanolapo import cli\nfrom nanolapo.ranks import Ranks\ncli.run(Ranks)"
    given = {"RANK": "0", "WORLD_SIZE": "2"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=os.environ | given
    )
    assert done.returncode == 2 and done.stderr.startswith("error: WORLD_SIZE=2") and done.stderr.count("\n") == 1
