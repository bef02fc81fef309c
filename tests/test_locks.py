"""Two processes that want the same folder: one model is made once, one run is written by one process.

Run: python -m pytest tests/test_locks.py

Every process here is a real one: a lock is given back by the kernel when its holder has been killed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_scripts import ROOT, environment, metrics, script, write_config

from nanolapo.config import UserError
from nanolapo.locks import alone_in, lock_of, locked, make_once

MAKER = """
import sys, time
from pathlib import Path
from nanolapo.locks import make_once
folder, go = Path(sys.argv[1]), Path(sys.argv[2])
def make():
    print("making", flush=True)
    while not go.exists():
        time.sleep(0.02)
    folder.mkdir()
    (folder / "config.json").write_text("{}")
make_once(folder, make)
"""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def start(*command: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )


def wait_for(process: subprocess.Popen[str], words: str) -> None:
    """Read the process's output up to a line that holds these words."""
    assert process.stdout is not None
    assert any(words in line for line in process.stdout), process.communicate()


@pytest.fixture
def two_makers(tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Two processes that want the model tmp_path / "base"; the second has just said that it waits."""
    command = [sys.executable, "-c", MAKER, tmp_path / "base", tmp_path / "go"]
    first = start(*command)
    wait_for(first, "making")
    second = start(*command)
    wait_for(second, f"another process is making {tmp_path / 'base'} already: waiting for it")
    yield [first, second]
    for process in (first, second):
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_the_second_waits_and_uses_what_the_first_has_made(two_makers, tmp_path):
    first, second = two_makers
    (tmp_path / "go").touch()
    assert first.communicate(timeout=30)[0] == "" and first.returncode == 0
    out, _ = second.communicate(timeout=30)
    assert out == f"{tmp_path / 'base'} exists already and is used as it is; delete the folder to make it again\n"


@pytest.mark.slow
def test_the_second_makes_it_when_the_first_is_killed(two_makers, tmp_path):
    first, second = two_makers
    first.kill()
    wait_for(second, "making")
    (tmp_path / "go").touch()
    assert second.communicate(timeout=30)[0] == "" and (tmp_path / "base/config.json").exists()


def test_a_model_that_is_there_needs_no_lock(tmp_path, capsys):
    """It may lie on a disk that is not ours to write."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text("{}")
    make_once(tmp_path / "base", lambda: pytest.fail("made again"))
    assert "exists already" in capsys.readouterr().out and not lock_of(tmp_path / "base").exists()


def test_one_process_writes_to_a_run_also_by_another_path(tmp_path, monkeypatch):
    monkeypatch.setattr("nanolapo.locks.PATIENCE_S", 0.2)
    (tmp_path / "runs/a").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "runs/a")
    monkeypatch.chdir(tmp_path)
    with alone_in(tmp_path / "runs/a"), alone_in(tmp_path / "runs/b"):
        for same in (Path("runs/a"), Path("link")):
            with pytest.raises(UserError, match=f"^{same}: another process is at work on this run"), alone_in(same):
                pass
        with alone_in(Path("runs/a"), is_main=False):
            pass
    with alone_in(Path("runs/a")):
        pass


def test_without_locks_it_is_said_and_the_work_goes_on(tmp_path, monkeypatch, capsys):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path / "lock", "busy"):
        assert capsys.readouterr().out == (
            f"{tmp_path} cannot be locked ({os.strerror(errno.ENOLCK)}): start no second command in it\n"
        )


@pytest.mark.slow
def test_pre_training_waits_for_another_one_of_the_same_model(tmp_path):
    """make explain beside make demo: both begin with this command."""
    config = write_config(tmp_path / "base", tmp_path)
    with locked(lock_of(tmp_path / "base"), "busy"):
        process = start(sys.executable, "-m", "nanolapo.demo.pretrain", config)
        assert process.stdout is not None
        said = process.stdout.readline()
        if "waiting for it" not in said:  # it would go on for minutes
            process.kill()
            pytest.fail(said)
        (tmp_path / "base").mkdir()
        (tmp_path / "base/config.json").write_text("{}")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "is used as it is" in out and "pre-training" not in out, err


@pytest.mark.slow
def test_a_second_process_on_a_run_is_refused_and_resumes_it_after_a_kill(demo_base, tmp_path):
    """On two ranks the first holds the lock for both; kill -9 of torchrun leaves nothing that would hold it."""
    config, train = write_config(demo_base, tmp_path), ROOT / "train_stage1.py"
    refused = f"error: {tmp_path / 'runs/run'}: another process is at work on this run; wait for it or end it, or take "
    first = start(*TORCHRUN, train, config, "train.steps=1000")
    wait_for(first, "step 3/1000")
    plain = script("train_stage1.py", config, "train.steps=1000")
    assert plain.returncode == 2 and plain.stderr.splitlines()[-1] == f"{refused}another run.name"
    begun = time.monotonic()
    ranks = start(*TORCHRUN, train, config, "train.steps=1000")
    _, err = ranks.communicate(timeout=120)
    assert ranks.returncode == 1 and refused in err and time.monotonic() - begun < 60
    assert first.poll() is None
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=60)
    done = len(metrics(tmp_path))
    resumed = script("train_stage1.py", config, f"train.steps={done + 2}")
    assert resumed.returncode == 0 and "resuming" in resumed.stdout, resumed.stderr
    assert len(metrics(tmp_path)) == done + 2
