"""Checkpoints: whole after a kill at any moment, bit-equal after resume, pruned by number, refused where they differ.

Run: python -m pytest tests/test_checkpoint.py
"""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import signal
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import CPU, make_config, make_rows, same_tensors, tiny_llama, update, weights_of
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from nanolapo.checkpoint import complete_checkpoints, load_checkpoint, optimizer_tensors, prune, save_checkpoint
from nanolapo.config import UserError
from nanolapo.model.folder import save_model
from nanolapo.policy import Policy

FINGERPRINT = {"model.path": "somewhere", "rollout.group_size": 8, "data": "abc"}
STATE = {"fingerprint": FINGERPRINT, "method": {"length_map": {"entries": {"demo:1": 1.5}}}, "sampled_tokens": 7}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def save(folder: Path, step: int, policy: Policy, keep: int = 2) -> Path:
    save_checkpoint(folder, step, policy, STATE, keep)
    return folder / f"step-{step:06d}"


@pytest.fixture
def policy(tied_model) -> Policy:
    """A tiny policy that has taken one step."""
    policy = Policy(make_config(tied_model), CPU)
    update(policy, make_rows([3, 9]), [1.0, -1.0])
    return policy


# ------------------------------------------------------------------------------------------------------ resume


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_D2_three_steps_resume_three_steps_equal_six(tmp_path, tied_model, untied_model, kind):
    """Weights, both moments, step counts and the learning rate are bit-equal to the uninterrupted run."""
    config = make_config(tied_model if kind == "tied" else untied_model, train={"steps": 6, "warmup_fraction": 0.5})

    def steps(policy: Policy, which: range) -> None:
        for seed in which:
            update(policy, make_rows([3, 20, 9, 7], seed=seed), [1.0, -1.0, 0.5, -0.5])

    whole, first = Policy(config, CPU), Policy(config, CPU)
    steps(whole, range(6))
    steps(first, range(3))
    first.bad_steps = 2
    save(tmp_path, 3, first)
    second = Policy(config, CPU)
    state = load_checkpoint(tmp_path, second, FINGERPRINT)
    assert state is not None and (state["step"], state["sampled_tokens"]) == (3, 7)
    assert state["method"] == STATE["method"] and (second.num_steps, second.bad_steps) == (3, 2)
    assert same_tensors(optimizer_tensors(second), optimizer_tensors(first))
    steps(second, range(3, 6))
    assert same_tensors(weights_of(second), weights_of(whole))
    moments = optimizer_tensors(second)
    assert same_tensors(moments, optimizer_tensors(whole)) and second.learning_rate() == whole.learning_rate()
    parameters = [name for name, _ in second.model.named_parameters()]
    assert set(moments) == {f"{key}:{name}" for key in ("exp_avg", "exp_avg_sq", "step") for name in parameters}


def test_D2_before_the_first_optimizer_step(tmp_path, tied_model):
    """A run whose first steps had no signal has no moments yet; that too resumes."""
    save(tmp_path, 1, Policy(make_config(tied_model), CPU))
    policy = Policy(make_config(tied_model), CPU)
    assert load_checkpoint(tmp_path, policy, FINGERPRINT) is not None and policy.num_steps == 0
    update(policy, make_rows([3, 9]), [1.0, -1.0])


def test_a_rank_on_a_numbered_cpu_resumes(tmp_path, tied_model, policy):
    """Under torchrun accelerate calls the CPU "cpu:0", which safetensors takes for no device at all."""
    save(tmp_path, 1, policy)
    second = Policy(make_config(tied_model), torch.device("cpu:0"))
    assert load_checkpoint(tmp_path, second, FINGERPRINT) is not None
    assert same_tensors(weights_of(second), weights_of(policy))


def test_nothing_there(tmp_path, policy):
    assert load_checkpoint(tmp_path / "checkpoints", policy, FINGERPRINT) is None


@pytest.mark.parametrize("key", list(FINGERPRINT))
def test_D13_another_run_is_refused(tmp_path, policy, key):
    save(tmp_path, 3, policy)
    before = weights_of(policy)
    with pytest.raises(UserError, match=f"step-000003 was written with {key}=.* has {key}='other'.*run.name"):
        load_checkpoint(tmp_path, policy, FINGERPRINT | {key: "other"})
    assert same_tensors(weights_of(policy), before)


def test_a_key_that_an_older_version_did_not_write_is_no_difference(tmp_path, policy):
    save(tmp_path, 3, policy)
    assert load_checkpoint(tmp_path, policy, FINGERPRINT | {"model.new_key": 1}) is not None


def test_D13_another_architecture_is_refused(tmp_path, policy, untied_model):
    save(tmp_path, 3, policy)
    with pytest.raises(UserError, match="weights belong to another model"):
        load_checkpoint(tmp_path, Policy(make_config(untied_model), CPU), FINGERPRINT)
    tiny_llama(vocab=80).save_pretrained(tmp_path / "larger")
    save(tmp_path / "saved", 3, Policy(make_config(untied_model), CPU))
    with pytest.raises(UserError, match="weights belong to another model"):
        load_checkpoint(tmp_path / "saved", Policy(make_config(tmp_path / "larger"), CPU), FINGERPRINT)


# ------------------------------------------------------------------------------------------------------ kept and lost


def test_D10_retention_goes_by_number(tmp_path, policy):
    for step in (900, 1000, 1100):
        save(tmp_path, step, policy)
    assert names(tmp_path) == ["step-001000", "step-001100"]
    for step in (999_999, 1_000_000):
        save(tmp_path, step, policy)
    assert names(tmp_path) == ["step-1000000", "step-999999"]
    save(tmp_path, 1_000_001, policy, keep=1)
    assert names(tmp_path) == ["step-1000001"]


def fill(policy: Policy, value: float) -> None:
    with torch.no_grad():
        for _, tensor in policy.named_weights():
            tensor.fill_(value)


def test_D1_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path, policy):
    """SIGKILL at 20 random moments of a process that only saves: whatever carries the final name is whole, the newest
    loads, its weights are all of one save, and the next save clears the leftovers away."""
    rng, newest = random.Random(0), 1
    fill(policy, 1.0)
    start = time.perf_counter()
    save(tmp_path, 1, policy)
    seconds = time.perf_counter() - start
    for _ in range(20):
        at_work, tell = os.pipe()
        child = os.fork()
        if child == 0:  # no pytest, no cleanup: only saves until it is shot
            try:
                for step in range(newest + 1, newest + 1000):
                    fill(policy, float(step))
                    save(tmp_path, step, policy)
                    os.write(tell, b".")
            finally:
                os._exit(1)
        os.close(tell)
        assert os.read(at_work, 1) == b"."  # its first save is done: a busy machine may take long to start it
        os.close(at_work)
        time.sleep(rng.uniform(0.0, 3 * seconds))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a damaged one would be passed over with a warning: there is none
            state = load_checkpoint(tmp_path, policy, FINGERPRINT)
        assert state is not None and state["step"] > newest
        newest = state["step"]
        assert all((tensor == newest).all() for _, tensor in policy.named_weights())
    save(tmp_path, newest + 1, policy)
    assert names(tmp_path) == [f"step-{newest:06d}", f"step-{newest + 1:06d}"]


@pytest.mark.parametrize("file", ["state.json", "model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_D1_a_damaged_newest_checkpoint_is_passed_over(tmp_path, policy, file, damage):
    fill(policy, 1.0)
    save(tmp_path, 1, policy)
    fill(policy, 2.0)
    damaged = save(tmp_path, 2, policy) / file
    if damage == "cut":
        damaged.write_bytes(damaged.read_bytes()[:-10])
    else:
        damaged.unlink()
    with pytest.warns(UserWarning, match="step-000002 is damaged"):
        state = load_checkpoint(tmp_path, policy, FINGERPRINT)
    assert state is not None and state["step"] == 1
    assert all((tensor == 1).all() for _, tensor in policy.named_weights())


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_again_silently(tmp_path, policy):
    for step in (1, 2):
        (save(tmp_path, step, policy) / "state.json").write_text("garbage")
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(UserError, match="every checkpoint .* delete"):
        load_checkpoint(tmp_path, policy, FINGERPRINT)


def test_a_kill_between_rename_and_pruning_is_made_up_for(tmp_path, policy, monkeypatch):
    """After the last save of a run no other save follows that would clear away what it has left."""
    save(tmp_path, 1, policy)
    with monkeypatch.context() as patch:
        patch.setattr("nanolapo.checkpoint.prune", lambda folder, keep: None)
        save(tmp_path, 2, policy)
        save(tmp_path, 3, policy)
    (tmp_path / "step-000001").rename(tmp_path / "step-000001.tmp")
    prune(tmp_path, keep=1)
    assert names(tmp_path) == ["step-000003"]


def test_D1_a_full_disk_is_one_line_and_leaves_the_older_ones(tmp_path, policy):
    """A real write error, from the kernel: the file size limit of this process is set to 20 kB while saving."""
    save(tmp_path, 1, policy)
    save(tmp_path, 2, policy)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # or the kernel kills the process
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        with pytest.raises(UserError, match="step-000003: could not be written .*free some disk") as error:
            save(tmp_path, 3, policy)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(error.value)
    assert names(tmp_path) == ["step-000001", "step-000002"] and len(complete_checkpoints(tmp_path)) == 2


class Payload:
    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_F2_pickle_in_a_checkpoint_is_refused_and_not_run(tmp_path, policy, file, form):
    """Renamed to the right name and with the right recorded size: refused by its content, and never unpickled."""
    path = save(tmp_path, 1, policy)
    payload = Payload(str(tmp_path / "ran"))
    if form == "pickle":
        (path / file).write_bytes(pickle.dumps(payload))
    else:
        torch.save(payload, path / file)
    if file != "state.json":
        state = json.loads((path / "state.json").read_text())
        state["sizes"][file] = (path / file).stat().st_size
        (path / "state.json").write_text(json.dumps(state))
        with pytest.raises(UserError, match=f"{file}.*damaged"):
            load_checkpoint(tmp_path, policy, FINGERPRINT)
    else:
        with pytest.warns(UserWarning, match="damaged"), pytest.raises(UserError, match="every checkpoint is damaged"):
            load_checkpoint(tmp_path, policy, FINGERPRINT)
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------------------------ final model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_final_model_is_a_plain_transformers_folder(tmp_path, tied_model, untied_model, kind, dtype):
    from tokenizers import Tokenizer, models

    folder = tied_model if kind == "tied" else untied_model
    policy = Policy(make_config(folder, model={"dtype": dtype}), CPU)
    update(policy, make_rows([3, 9]), [1.0, -1.0])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    for _ in range(2):  # a second time replaces the first
        save_model(policy.model, policy.dtype, tokenizer, tmp_path / "model")
    assert names(tmp_path) == ["model"]
    files = load_file(tmp_path / "model" / "model.safetensors")
    assert files.keys() == load_file(folder / "model.safetensors").keys()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert model.dtype == getattr(torch, dtype)
    loaded = model.state_dict()
    for name, tensor in policy.named_weights():
        assert torch.equal(loaded[name], tensor.to(model.dtype))
    assert next(policy.model.parameters()).dtype == torch.float32


# ------------------------------------------------------------------------------------------------------ file modes


@pytest.mark.parametrize(("mask", "file_mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664), (0o077, 0o600)])
def test_checkpoints_and_models_can_be_read_by_whom_the_umask_says(tmp_path, policy, mask, file_mode):
    """safetensors alone would write 0600: a colleague could read config.json, and not the weights beside it."""
    from nanolapo.demo.pretrain import make_tokenizer

    tokenizer, before = make_tokenizer(), os.umask(mask)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ messages }}{{ tools }}"}  # writes a folder
    try:
        save(tmp_path / "checkpoints", 1, policy)
        for _ in range(3):  # each save removes the folder before it
            save_model(policy.model, policy.dtype, tokenizer, tmp_path / "model")
    finally:
        os.umask(before)
    written = {path: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert {path.name for path in written} >= {
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
        "config.json",
        "additional_chat_templates",
        "tool_use.jinja",
    }
    assert names(tmp_path) == ["checkpoints", "model"]
    for path, mode in written.items():
        assert mode == (0o777 & ~mask if path.is_dir() else file_mode), path
    assert not [path for path in written if path.name.startswith(".")]
