"""Faults that are not a kill at a random moment: a full disk, damaged files, a sync that breaks off, a rank that fails.

Each is a function of its folder (its config is there) that breaks a run, checks what the run says, gives the same command
again, and compares with the unbroken run. A check that fails raises AssertionError, which becomes the line in the report.
"""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from one_run import TRAIN, TRAIN_2, Ended, Setup, command, differences, execute, reference
from plan import Kill

Report = tuple[float, str]  # seconds until all processes had ended, what was seen
IN_STEP_6 = Kill("update", 6, "during update").arguments()  # checkpoints 2 and 4 are there, and the log of step 5


class NotTried(Exception):
    """This machine lacks what the fault needs."""


def run(place: Path, setup: Setup, killer: tuple[str, ...] = ()) -> Ended:
    ended = execute(place, command(place, setup, killer))
    assert not ended.orphans, f"did not end: {ended.orphans}"
    return ended


def resumes_and_is_equal(place: Path, says: str = "", setup: Setup = TRAIN) -> None:
    again = run(place, setup)
    assert again.code == 0, f"the same command fails: {again.last_line}"
    assert says in again.output, f"does not say {says!r}"
    different = differences(reference(place.parent, setup), place)
    assert not different, f"differs: {different}"


def fails(ended: Ended, code: int, says: str) -> None:
    """The run ended with this exit code, and the cause is on its last line."""
    assert ended.code == code, f"exit code {ended.code}, not {code}: {ended.last_line}"
    assert says in ended.last_line, f"last line: {ended.last_line}"


# ------------------------------------------------------------------------------------------------------ full disk


def disk_full_during_a_checkpoint(place: Path) -> Report:
    ended = run(place, TRAIN, ("--phase", "update", "--nth", "4", "--action", "full"))
    fails(ended, 2, "step-000004: could not be written")
    resumes_and_is_equal(place, "at step 2")
    return ended.seconds, "one line, exit code 2; resumed at step 2; equal"


def disk_full_during_a_checkpoint_of_two_ranks(place: Path) -> Report:
    ended = run(place, TRAIN_2, ("--phase", "update", "--nth", "4", "--action", "full"))
    fails(ended, 1, "step-000004: could not be written")
    resumes_and_is_equal(place, "at step 2", setup=TRAIN_2)
    return ended.seconds, "the line comes last, exit code 1 (torchrun's); resumed at step 2; equal"


def disk_full_during_the_final_model(place: Path) -> Report:
    ended = run(place, TRAIN, ("--phase", "final model", "--action", "full"))
    fails(ended, 2, "run/model: could not be written")
    assert not (place / "run/model").exists()
    resumes_and_is_equal(place)
    return ended.seconds, "one line, exit code 2; no model folder; written by the same command; equal"


def a_file_system_without_space(place: Path) -> Report:
    """A real one: tmpfs with room for two checkpoints but not for a third, in a mount namespace of its own."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        raise NotTried("this machine allows no mount namespace")
    train, inside = shlex.join(command(place, TRAIN)), place / "run"
    whole = reference(place.parent, TRAIN)
    saved = sum(file.stat().st_size for file in (whole / "run/checkpoints/step-000006").iterdir()) // 1024
    script = (
        f"mkdir {inside} && mount -t tmpfs -o size={saved * 5 // 2}k none {inside} && {train}; echo exit code $?; "
        f"mount -o remount,size={saved * 10}k {inside} && {train} && cp -r {inside} {place}/kept"
    )
    ended = execute(place, ["unshare", "-rm", "sh", "-c", script])
    assert "could not be written" in ended.output and "No space left on device" in ended.output, ended.last_line
    assert "exit code 2" in ended.output and ended.code == 0, ended.last_line
    inside.rmdir()
    (place / "kept").rename(inside)
    different = differences(whole, place)
    assert not different, f"differs: {different}"
    return 0.0, "ENOSPC: one line, exit code 2; with more space the same command resumed; equal"


# ------------------------------------------------------------------------------------------------------ damaged files


def damaged(place: Path, name: str, garbage: bytes | None = None) -> Report:
    """Kill a run in its sixth step, damage a file (by default: cut it in half), run again."""
    ended = run(place, TRAIN, IN_STEP_6)
    path = place / "run" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if garbage is None else garbage)
    newest = name.startswith("checkpoints/step-000004")
    resumes_and_is_equal(place, "at step 2" if newest else "at step 4")
    if newest:
        assert "step-000004 is damaged" in (place / "output.txt").read_text(), "says nothing of the damage"
    result = "says so, resumed at step 2; equal" if newest else "resumed at step 4; equal"
    return ended.seconds, result


def checkpoint_weights_cut_in_half(place: Path) -> Report:
    return damaged(place, "checkpoints/step-000004/model.safetensors")


def checkpoint_optimizer_cut_in_half(place: Path) -> Report:
    return damaged(place, "checkpoints/step-000004/optimizer.safetensors")


def state_of_the_newest_checkpoint_is_garbage(place: Path) -> Report:
    return damaged(place, "checkpoints/step-000004/state.json", b"\x00\xffgarbage{")


def state_of_the_newest_checkpoint_is_empty(place: Path) -> Report:
    return damaged(place, "checkpoints/step-000004/state.json", b"")


def length_map_cut_in_half(place: Path) -> Report:
    return damaged(place, "length_map.json")


def rollouts_log_cut_in_half(place: Path) -> Report:
    """The lines of steps before the checkpoint are whole, the rest is cut within a line: what a kill leaves."""
    ended = run(place, TRAIN, IN_STEP_6)
    path = place / "run/rollouts.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] < 4]
    path.write_bytes(b"".join(kept) + lines[len(kept)][:100])
    resumes_and_is_equal(place, "at step 4")
    return ended.seconds, "resumed at step 4; equal"


def last_line_of_the_metrics_is_half_there(place: Path) -> Report:
    ended = run(place, TRAIN, IN_STEP_6)
    path = place / "run/metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-100])
    resumes_and_is_equal(place, "at step 4")
    return ended.seconds, "resumed at step 4; equal"


def all_checkpoints_damaged(place: Path) -> Report:
    run(place, TRAIN, IN_STEP_6)
    shutil.copytree(place / "run", place / "before")
    states = list((place / "run/checkpoints").glob("*/state.json"))
    for path in states:
        path.write_text("garbage")
    ended = run(place, TRAIN)
    fails(ended, 2, "every checkpoint is damaged")
    for name in ("metrics.jsonl", "rollouts.jsonl", "length_map.json"):
        assert (place / "run" / name).read_bytes() == (place / "before" / name).read_bytes(), f"{name} was touched"
    for path in states:
        shutil.copy(place / "before" / path.relative_to(place / "run"), path)
    resumes_and_is_equal(place, "at step 4")
    return ended.seconds, "one line, exit code 2, logs untouched; with one put back resumed at step 4; equal"


def stage_2_from_half_a_length_map(place: Path) -> Report:
    whole = (reference(place.parent, TRAIN) / "run/length_map.json").read_bytes()
    (place / "half.json").write_bytes(whole[: len(whole) // 2])
    ended = execute(place, [*command(place, Setup("train_stage2.py")), f"lapo.length_map={place / 'half.json'}"])
    fails(ended, 2, "not a length map")
    return ended.seconds, "refused in one line, exit code 2"


# ------------------------------------------------------------------------------------------------------ processes


def weight_sync_breaks_off(place: Path) -> Report:
    ended = run(place, TRAIN, ("--phase", "sync", "--nth", "95", "--action", "raise"))
    fails(ended, 1, "injected fault at take")
    resumes_and_is_equal(place, "at step 2")
    return ended.seconds, "the cause comes last, exit code 1; resumed at step 2; equal"


def weight_sync_of_vllm_breaks_off_then_is_killed(place: Path) -> Report:
    """Real engines: an exception while vLLM takes the weights, then a SIGKILL there, then the plain command."""
    if not importlib.util.find_spec("vllm"):
        raise NotTried("vLLM is not installed")
    vllm = Setup("train_stage1.py", 1, ("rollout.engine=vllm", "train.steps=4"))
    whole = place.parent / "reference-vllm"
    shutil.copytree(place, whole, dirs_exist_ok=True)
    config = (whole / "config.yaml").read_text().replace(str(place), str(whole))
    (whole / "config.yaml").write_text(config)
    assert run(whole, vllm).code == 0
    broken = run(place, vllm, ("--phase", "sync", "--nth", "70", "--action", "raise"))
    fails(broken, 1, "injected fault at take")
    killed = run(place, vllm, Kill("sync", 30, "").arguments())
    assert killed.code == -9, f"exit code {killed.code}"
    again = run(place, vllm)
    assert again.code == 0 and "at step 2" in again.output, again.last_line
    different = differences(whole, place)
    assert not different, f"differs: {different}"
    return max(broken.seconds, killed.seconds), "the cause comes last, exit code 1; resumed at step 2; equal"


def an_exception_on_rank_1(place: Path, rank: int = 1) -> Report:
    ended = run(place, TRAIN_2, ("--phase", "update", "--nth", "4", "--rank", str(rank), "--action", "raise"))
    fails(ended, 1, "injected fault at during update")
    assert f"rank      : {rank}" in ended.output.rpartition("Root Cause")[2], "another rank is named as the root cause"
    resumes_and_is_equal(place, "at step 2", setup=TRAIN_2)
    return ended.seconds, "both ended, its traceback last, exit code 1; resumed at step 2; equal"


def an_exception_on_rank_0(place: Path) -> Report:
    return an_exception_on_rank_1(place, rank=0)


def rank_1_killed(place: Path) -> Report:
    kill = Kill("sampling", 4, "", rank=1, victims="rank1", delay=0.01)
    ended = run(place, TRAIN_2, kill.arguments())
    fails(ended, 1, "Signal 9 (SIGKILL)")
    workers = sum("nanolapo.grader.worker" in line for line in ended.seen)
    assert workers, "no grader worker was ever there: its not being an orphan says nothing"
    resumes_and_is_equal(place, "at step 2", setup=TRAIN_2)
    return ended.seconds, "the other rank, the launcher and the grader workers ended; resumed at step 2; equal"


def launcher_killed(place: Path) -> Report:
    ended = run(place, TRAIN_2, Kill("sampling", 4, "", victims="launcher").arguments())
    assert ended.code == -9
    resumes_and_is_equal(place, "at step 2", setup=TRAIN_2)
    return ended.seconds, "both ranks and the grader workers ended; resumed at step 2; equal"


FAULTS: dict[Callable[[Path], Report], Setup] = {
    disk_full_during_a_checkpoint: TRAIN,
    disk_full_during_a_checkpoint_of_two_ranks: TRAIN_2,
    disk_full_during_the_final_model: TRAIN,
    a_file_system_without_space: TRAIN,
    checkpoint_weights_cut_in_half: TRAIN,
    checkpoint_optimizer_cut_in_half: TRAIN,
    state_of_the_newest_checkpoint_is_garbage: TRAIN,
    state_of_the_newest_checkpoint_is_empty: TRAIN,
    all_checkpoints_damaged: TRAIN,
    length_map_cut_in_half: TRAIN,
    stage_2_from_half_a_length_map: TRAIN,
    rollouts_log_cut_in_half: TRAIN,
    last_line_of_the_metrics_is_half_there: TRAIN,
    weight_sync_breaks_off: TRAIN,
    weight_sync_of_vllm_breaks_off_then_is_killed: TRAIN,
    an_exception_on_rank_0: TRAIN_2,
    an_exception_on_rank_1: TRAIN_2,
    rank_1_killed: TRAIN_2,
    launcher_killed: TRAIN_2,
}
