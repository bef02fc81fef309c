"""A run directory tells which code it was made with: code.diff, from a real git repository or from none.

Run: python -m pytest tests/test_provenance.py
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from small_run import write_config
from tiny import make_config

import nanolapo.provenance
from nanolapo.loop import train
from nanolapo.methods import load_method
from nanolapo.metrics import RunLog
from nanolapo.provenance import MOST_BYTES, code_state, git, provenance, save_code, what_next


def run_git(root: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", *arguments]
    return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout with one file of code in it."""
    (tmp_path / "root/nanolapo").mkdir(parents=True)
    (tmp_path / "root/nanolapo/reward.py").write_text("reward = 1\n")
    (tmp_path / "root/plot.png").write_bytes(b"\0 a figure")
    run_git(tmp_path / "root", "init", "--quiet")
    run_git(tmp_path / "root", "add", ".")
    run_git(tmp_path / "root", "commit", "--quiet", "-m", "first")
    return tmp_path / "root"


def edit(root: Path, text: str) -> None:
    (root / "nanolapo/reward.py").write_text(text)


def test_code_diff_brings_the_code_of_a_run_back(root, tmp_path):
    commit = run_git(root, "rev-parse", "HEAD").strip()
    save_code(tmp_path, root)
    assert (tmp_path / "code.diff").read_text() == f"# commit {commit}\n"
    changed = b"reward = 2  # caf\xe9\n"  # no UTF-8
    (root / "plot.png").write_bytes(b"\0 another")
    (root / "nanolapo/reward.py").write_bytes(changed)
    run_git(root, "add", ".")  # staged or not
    run_git(root, "config", "diff.noprefix", "true")
    save_code(tmp_path, root)
    run_git(root, "reset", "--quiet", "--hard")
    assert (root / "nanolapo/reward.py").read_text() == "reward = 1\n"
    run_git(root, "config", "--unset", "diff.noprefix")
    run_git(root, "apply", str(tmp_path / "code.diff"))
    assert (root / "nanolapo/reward.py").read_bytes() == changed
    assert [path.name for path in tmp_path.glob("code*")] == ["code.diff"]


def test_code_diff_is_that_of_the_last_start(root, tmp_path):
    save_code(tmp_path, root)
    first = (tmp_path / "code.diff").read_bytes()
    edit(root, "reward = 2\n")
    save_code(tmp_path, root)
    assert b"+reward = 2" in (tmp_path / "code.diff").read_bytes() != first
    save_code(tmp_path, tmp_path / "no checkout")  # nothing is known of the code from here on
    assert not list(tmp_path.glob("code*"))


def test_a_huge_diff_is_cut(root, tmp_path):
    edit(root, "x = 1\n" * 500_000)
    save_code(tmp_path, root)
    size = (tmp_path / "code.diff").stat().st_size
    assert MOST_BYTES < size < MOST_BYTES + 200
    assert (tmp_path / "code.diff").read_bytes().endswith(b" bytes\n")


def test_no_program_for_diffs_and_no_watcher_is_started(root, tmp_path):
    """A repository's config may name them. (Its clean filters do run, or the diff of an LFS file would be wrong.)"""
    spy = tmp_path / "spy"
    spy.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    spy.chmod(0o755)
    for key in ("diff.external", "diff.spy.textconv", "core.fsmonitor"):
        run_git(root, "config", key, str(spy))
    (root / ".git/info/attributes").write_text("*.py diff=spy\n")
    edit(root, "reward = 2\n")
    assert b"+reward = 2" in code_state(root) and not (tmp_path / "ran").exists()
    subprocess.run(["git", "diff", "HEAD"], cwd=root, check=False, capture_output=True)
    assert (tmp_path / "ran").exists(), "the spy sees nothing"


def test_no_git_no_repository_no_commit_no_permission(root, tmp_path, monkeypatch):
    """Installed inside another project, too: its commits say nothing about our code."""
    (root / "lib/nanolapo").mkdir(parents=True)
    (tmp_path / "none/nanolapo").mkdir(parents=True)
    (tmp_path / "empty/nanolapo").mkdir(parents=True)
    run_git(tmp_path / "empty", "init", "--quiet")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    for place in (root / "lib", tmp_path / "none", tmp_path / "empty", tmp_path / "missing"):
        assert code_state(place) == b"", place
    assert code_state(root)
    with monkeypatch.context() as patch:
        patch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # git's own switch: as if the folder were another user's
        assert git(root, "status") is None and code_state(root) == b""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert code_state(root) == b"" and provenance()["git"] == "not a git checkout"
    save_code(tmp_path, root)
    assert not list(tmp_path.glob("code*"))


def test_git_that_hangs_is_left_behind(root, tmp_path, monkeypatch):
    (tmp_path / "git").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(nanolapo.provenance, "GIT_PATIENCE_S", 0.1)
    assert code_state(root) == b""


def test_every_run_log_has_it(root, tmp_path, monkeypatch):
    monkeypatch.setattr(nanolapo.provenance.save_code, "__defaults__", (root,))
    edit(root, "reward = 2\n")
    RunLog(make_config(run={"dir": str(tmp_path), "name": "r"}), 0, None)
    assert b"+reward = 2" in (tmp_path / "r/code.diff").read_bytes()


def test_a_finished_run_says_what_to_do_after_a_change(root, tmp_path):
    end = f"take another run.name, or delete {tmp_path}"
    assert what_next(tmp_path, root) == f"after a change of code or config {end}"  # a run of an earlier version
    save_code(tmp_path, root)
    assert what_next(tmp_path, root) == f"after a change of code or config {end}"
    edit(root, "reward = 2\n")
    assert what_next(tmp_path, root) == f"this checkout has changed since (see its code.diff): {end}"


def test_a_finished_run_started_again_is_one_line_of_advice(demo_base, root, tmp_path, monkeypatch, capsys):
    for function in (save_code, what_next):
        monkeypatch.setattr(function, "__defaults__", (root,))
    config = write_config(demo_base, tmp_path, "train.steps=1")
    ends = []
    for _ in range(2):
        train(config, load_method(config))
        ends.append(capsys.readouterr().out.splitlines())
        edit(root, "reward = 2\n")
    run = tmp_path / "run"
    assert ends[0][-1] == f"{run}: complete; {run / 'model'} is a plain Hugging Face folder"
    assert ends[1][-1] == (
        f"{run}: complete: trained to step 1 already, nothing left to do; this checkout has changed since (see its "
        f"code.diff): take another run.name, or delete {run}"
    )
    assert not any("resuming" in line for line in ends[1])
