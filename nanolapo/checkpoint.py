"""Save and load everything the next step depends on. A kill at any moment leaves the previous checkpoint intact.

A checkpoint is a folder `checkpoints/step-NNNNNN` (NNNNNN = steps done) with `model.safetensors` (the trained parameters,
float32), `optimizer.safetensors` (float32 moments and step counts) and `state.json` (counters, method state, alarms,
fingerprint, file sizes). It is filled under a temporary name, flushed to disk, and then renamed. It needs no random state,
because every random number derives from (run.seed, step, position). It stores full tensors, so a run can resume on any
number of ranks. Rank 0 writes, and all ranks read it from a disk that all nodes see. There is no pickle in it.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nanolapo.config import UserError
from nanolapo.fingerprint import refuse_changes
from nanolapo.model.folder import publish
from nanolapo.model.sharding import shard_like, to_host
from nanolapo.policy import Policy

NAME = re.compile(r"step-(\d{6,})$")


def save_checkpoint(folder: Path, step: int, policy: Policy, state: dict[str, Any], keep: int) -> None:
    """Write folder/step-NNNNNN atomically, then delete all but the newest `keep`. All ranks call it; the main rank writes.

    A full disk raises UserError and leaves older checkpoints as they were.
    """
    final, is_main = folder / f"step-{step:06d}", policy.ranks.is_main
    temporary = folder / f"{final.name}.tmp"
    try:
        if is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        for name, tensors in (("model", policy.trained.items()), ("optimizer", optimizer_tensors(policy).items())):
            on_host = to_host(tensors, keep=is_main)  # one file's worth of host memory at a time
            if is_main:
                save_file(on_host, temporary / f"{name}.safetensors")
            policy.ranks.wait()  # for the disk; the next tensors are gathered in a group that gives up after ten minutes
        if not is_main:
            return
        sizes = {file.name: file.stat().st_size for file in temporary.iterdir()}
        counters = {"optimizer_steps": policy.num_steps, "bad_steps": policy.bad_steps}
        record = {"step": step, **counters, "sizes": sizes, **state}
        (temporary / "state.json").write_text(json.dumps(record), encoding="utf-8")
        publish(temporary, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"{final}: could not be written ({error}); free some disk and run the same command") from None
    prune(folder, keep)


def prune(folder: Path, keep: int) -> None:
    """Delete all checkpoints except the newest `keep`, and the remains of killed saves."""
    for old in complete_checkpoints(folder)[keep:]:
        old.rename(old.with_name(f"{old.name}.tmp"))  # a kill must not leave half of it under its final name
    for leftover in folder.glob("step-*.tmp"):
        shutil.rmtree(leftover)


def optimizer_tensors(policy: Policy) -> dict[str, torch.Tensor]:
    """Name the tensors of AdamW's state (this rank's slices): `exp_avg:NAME`, `exp_avg_sq:NAME`, `step:NAME`."""
    tensors = {}
    for name, parameter in policy.trained.items():
        for key, value in policy.optimizer.state.get(parameter, {}).items():
            tensors[f"{key}:{name}"] = value.detach()
    return tensors


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints whose files all have their recorded size, newest first (by number, not by name)."""
    found = []
    for path in folder.glob("step-*"):
        match = NAME.match(path.name)
        if match and is_complete(path):
            found.append((int(match.group(1)), path))
    return [path for _, path in sorted(found, reverse=True)]


def is_complete(path: Path) -> bool:
    try:
        sizes = json.loads((path / "state.json").read_text(encoding="utf-8"))["sizes"]
        for name, size in sizes.items():
            if (path / name).stat().st_size != size:
                raise ValueError(f"{name} is not {size} bytes long")
        return True
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"{path} is damaged ({error!r}) and is passed over", stacklevel=2)
        return False


def load_checkpoint(folder: Path, policy: Policy, fingerprint: dict[str, Any]) -> dict[str, Any] | None:
    """Load the newest complete checkpoint and return its state, or None if there is no checkpoint.

    Raises UserError if it belongs to a run with other numbers (fingerprint.py): a resumed run must be the same run. Also
    raises if all checkpoints are damaged: starting again would delete the logs of the work already done.
    """
    path = policy.ranks.gather(next(iter(complete_checkpoints(folder)), None))[0]  # the main rank chooses for all
    if path is None:
        if any(NAME.match(entry.name) for entry in folder.glob("step-*")):
            raise UserError(
                f"{folder}: every checkpoint is damaged; put an undamaged one there, or delete the folder to start again "
                "from the first step"
            )
        return None
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    refuse_changes(path, state["fingerprint"], fingerprint)
    with tensors_in(path / "model.safetensors") as stored:
        shapes = {(name, tuple(p.shape)) for name, p in policy.trained.items()}
        stored_shapes = {(name, tuple(stored.get_slice(name).get_shape())) for name in stored.keys()}  # noqa: SIM118
        if shapes != stored_shapes:
            raise UserError(f"{path}: its weights belong to another model ({sorted(shapes ^ stored_shapes)[:3]})")
        with torch.no_grad():
            for name, parameter in policy.trained.items():
                parameter.copy_(shard_like(parameter, stored.get_tensor(name)))
        policy.weights_changed()
    with tensors_in(path / "optimizer.safetensors") as stored:
        for label in stored.keys():  # noqa: SIM118
            key, name = label.split(":", 1)
            parameter = policy.trained[name]
            policy.optimizer.state[parameter][key] = shard_like(parameter, stored.get_tensor(label))
    policy.num_steps, policy.bad_steps = state["optimizer_steps"], state["bad_steps"]
    return state


@contextmanager
def tensors_in(path: Path) -> Iterator[Any]:
    """Open the file to read it tensor by tensor."""
    try:
        with safe_open(path, framework="pt") as stored:
            yield stored
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}): delete {path.parent}, and the run resumes before it") from None
