"""The host never waits for the device inside an update: on a GPU the next micro-batch is prepared while this one computes.

A model on torch's device "meta" has shapes but no values, so everything that reads one (float(), tolist(), a mask as an
index, ...) is an error there. Run: python -m pytest tests/test_update_waiting.py
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tiny import CPU, make_config, make_rows, score_rows, tiny_llama, update
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nanolapo.losses import LOSSES
from nanolapo.microbatches import make_microbatch
from nanolapo.model import attention
from nanolapo.model.precision import add_rows
from nanolapo.policy import Policy
from nanolapo.ranks import Ranks, to_device
from nanolapo.update import Tally, keep_in_step, score

META = torch.device("meta")
LENGTHS, ADVANTAGES = [9, 4, 20, 0, 7, 3], [1.0, -1.0, 0.5, -0.5, 1.0, -1.0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(path)
    return path


def on_meta(folder: Path, **sections) -> Policy:
    """A bf16 policy without values. The norm of its gradient, which every optimizer step reads, is infinite."""
    policy = Policy(make_config(folder, **({"model": {"dtype": "bfloat16"}} | sections)), META)
    policy.gradients.sum_and_clip = lambda max_norm: math.inf  # type: ignore[method-assign]
    return policy


@pytest.fixture
def read_once(monkeypatch: pytest.MonkeyPatch) -> list[Tally]:
    """The one place where the step reads the device; the list gets what it would have read."""
    tallies: list[Tally] = []

    def over_ranks(self: Tally, ranks: Ranks) -> Tally:
        tallies.append(self)
        return Tally()

    monkeypatch.setattr(Tally, "over_ranks", over_ranks)
    return tallies


class OnlyToDevice(TorchFunctionMode):
    """Inside, `to_device` is the only way from the host to the device: any other copy is from memory that is not pinned.
    It also refuses what reads on a GPU, yet goes unseen on meta."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func.__name__ not in ("masked_scatter", "masked_scatter_", "coalesce"), f"{func} reads, or its gradient"
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.device == META:
            from_host = any(isinstance(x, torch.Tensor) and x.device == CPU and x.ndim for x in args)
            from_host |= func in (torch.tensor, torch.as_tensor)
            inside = sys._getframe(1).f_code is to_device.__code__
            assert inside or not from_host, f"{func} copies from the host"
        return out


def assert_nothing_was_read(policy: Policy, tallies: list[Tally]) -> None:
    with OnlyToDevice():
        update(policy, make_rows(LENGTHS), ADVANTAGES, keep=[True] * 5 + [False])
    (tally,) = tallies
    assert tally.counts.keys() >= {"loss", "mismatch", "ratio"}
    assert all(x.device == META for part in (tally.sums, tally.counts, tally.maxima) for x in part.values())


@pytest.mark.parametrize("kind", LOSSES)
def test_no_value_is_read_in_any_loss(folder: Path, read_once: list[Tally], kind: str) -> None:
    """Two micro-batches, a reference model where the loss may have one, corrected for the sampler."""
    aggregation = "sequence_mean" if kind in ("gspo", "luspo") else "token_mean"
    loss = {"kind": kind, "aggregation": aggregation, "kl_coef": 0.1, "tis_cap": 2.0, "old_logprobs": "sampler"}
    policy = on_meta(folder, loss=loss, train={"microbatch_tokens": 40})
    assert_nothing_was_read(policy, read_once)


@pytest.mark.parametrize("model", [{"gradient_checkpointing": True}, {"lora_rank": 2, "lora_alpha": 4}])
def test_no_value_is_read_with_other_settings(folder: Path, read_once: list[Tally], model: dict) -> None:
    assert_nothing_was_read(on_meta(folder, model={"dtype": "bfloat16"} | model), read_once)


def test_no_value_is_read_where_the_padding_has_a_row(tmp_path: Path, read_once: list[Tally]) -> None:
    tiny_llama(pad_token_id=5).save_pretrained(tmp_path)
    assert_nothing_was_read(on_meta(tmp_path), read_once)


def test_no_value_is_read_by_one_attention_call_a_layer(folder: Path, read_once: list[Tally], monkeypatch) -> None:
    monkeypatch.setattr(attention, "has_varlen_kernel", lambda query, value: True)
    assert_nothing_was_read(on_meta(folder), read_once)


def test_a_micro_batch_without_rows_reads_nothing(folder: Path) -> None:
    policy = on_meta(folder)
    keep_in_step(policy, make_microbatch(make_rows(LENGTHS), [], META))
    assert all(p.grad is not None and p.grad.device == META for p in policy.model.parameters())


def test_scoring_reads_after_the_last_pass(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, passes = on_meta(folder), []
    plain = policy.logprobs
    monkeypatch.setattr(policy, "logprobs", lambda *given: passes.append(given) or plain(*given))
    with pytest.raises(NotImplementedError, match="no data"):
        score(policy, make_rows(LENGTHS), [[0, 1], [2, 3], [4, 5]], True)
    assert len(passes) == 3


def test_scores_are_those_of_the_rows(folder: Path) -> None:
    """In three micro-batches, one without rows, as all in one."""
    policy, rollouts = Policy(make_config(folder), CPU), make_rows(LENGTHS)
    score_rows(policy, rollouts)
    scored, entropies = score(policy, rollouts, [[4, 1], [], [0, 3, 5, 2]], True)
    assert sorted(scored) == sorted(entropies) == list(range(6))
    for row, want in enumerate(rollouts.sampler_logprobs):
        np.testing.assert_allclose(scored[row], want, atol=1e-5)
        assert entropies[row].shape == want.shape and (entropies[row] > 0).all()


def test_one_transfer_reads_the_whole_tally() -> None:
    """Sums, counts and maxima keep their names; a rank without rows has nothing to tell."""
    tally, mask = Tally(), torch.tensor([[1.0, 1.0, 0.0]])
    tally.add("a", torch.tensor([[1.0, 2.0, 9.0]]), mask)
    tally.add("b", torch.tensor([[0.1, 0.2, 9.0]]), mask)
    tally.add("a", torch.tensor([[4.0, 0.0, 9.0]]), mask)
    tally.maxima["c"] = torch.tensor(7.0)
    total = tally.over_ranks(Ranks())
    assert total.sums == pytest.approx({"a": 7.0, "b": 0.3}) and total.counts == {"a": 4.0, "b": 2.0}
    assert total.maxima == {"c": 7.0} and not Tally().over_ranks(Ranks()).sums


def test_the_way_to_a_gpu_is_pinned_and_does_not_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no GPU here, so only the calls are seen, in this order."""
    calls: list[str] = []

    def pin(self: torch.Tensor) -> torch.Tensor:
        calls.append("pin")
        return self

    def to(self: torch.Tensor, device: torch.device, non_blocking: bool = False) -> torch.Tensor:
        calls.append(f"to {device.type}, {non_blocking}")
        return self

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", to)
    assert to_device(np.array([1, 2]), torch.device("cuda")).tolist() == [1, 2]
    assert to_device(torch.tensor([3.0]), CPU).tolist() == [3.0]
    assert calls == ["pin", "to cuda, True", "to cpu, False"]


@pytest.mark.parametrize("repeats", [1, 3])
def test_rows_of_the_embedding_are_added_without_counting_them(repeats: int) -> None:
    """Rows that were read twice, to a sum that is not zero. On a GPU without coalescing, here through the same call."""
    torch.manual_seed(0)
    ids, values = torch.tensor([3, 1, 3, 0] * repeats), torch.randn(4 * repeats, 2, dtype=torch.bfloat16)
    gradient = torch.sparse_coo_tensor(ids[None], values, (5, 2), check_invariants=True)
    start = torch.randn(5, 2)
    want = start.double()
    for row, value in zip(ids.tolist(), values.double(), strict=True):
        want[row] += value
    for on_cpu in (True, False):
        total = Elsewhere(start.clone()) if not on_cpu else start.clone()
        add_rows(total, gradient)  # type: ignore[arg-type]
        got = total if on_cpu else total.tensor
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)


class Elsewhere:
    """A CPU tensor that says it is on another device."""

    is_cpu = False

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.index_put_ = tensor, tensor.index_put_


def test_nothing_is_summed_over_a_single_rank(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM needs a process group of one, of gloo. A sum over it would send every gradient to the host and back."""
    policy = Policy(make_config(folder), CPU)
    calls: list[Tensor] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", calls.append)
    for count in (1, 2):
        monkeypatch.setattr(dist, "get_world_size", lambda count=count: count)
        policy.gradients.sum_and_clip(1.0)
        assert len(calls) == (len(policy.gradients.trained) if count > 1 else 0)
