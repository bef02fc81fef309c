"""Attention of a whole micro-batch in one call of torch's varlen_attn: the index and the layout that it is given.

The kernel needs a GPU. Here a plain function with its signature takes its place, and the call for each piece is the oracle.
Run: python -m pytest tests/model/test_attention.py
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from test_update import ADVANTAGES, LENGTHS, assert_close, gradients
from tiny import CPU, make_config, make_rows
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from nanolapo.microbatches import make_microbatch
from nanolapo.model import attention
from nanolapo.model.attention import attend_by_piece, has_varlen_kernel, pack, shared_prompt_attention
from nanolapo.policy import Policy

# Two responses that share a prompt, a prompt alone (an empty answer), one with one response, and one token each.
SIZES, PROMPT_OF = [5, 7, 2, 3, 4, 9, 1, 1], [0, 0, 0, 3, 4, 4, 6, 6]


def emulated(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    scale: float, window_size: tuple[int, int], enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """varlen_attn written out: packed pieces, the queries at the last positions of their keys, a window on both sides."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and len(cu_seq_q) == len(cu_seq_k)
    assert cu_seq_q[-1] == len(query) and cu_seq_k[-1] == len(key) == len(value)  # longer ones give NaN on a GPU
    outputs = []
    for (q0, q1), (k0, k1) in zip(pairwise(cu_seq_q.tolist()), pairwise(cu_seq_k.tolist()), strict=True):
        assert q1 - q0 <= max_q and k1 - k0 <= max_k
        groups = query.shape[1] // key.shape[1]
        k, v = (x[k0:k1].repeat_interleave(groups, dim=1) for x in (key, value))
        scores_HTS = scale * torch.einsum("thd,shd->hts", query[q0:q1], k)
        behind_TS = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0) - torch.arange(k1 - k0)[None]
        left, right = window_size
        hidden_TS = (behind_TS < -right if right >= 0 else behind_TS > k1) | (behind_TS > (left if left >= 0 else k1))
        outputs.append(torch.einsum("hts,shd->thd", scores_HTS.masked_fill(hidden_TS, -torch.inf).softmax(-1), v))
    return torch.cat(outputs)


@pytest.fixture
def one_call(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every attention goes to the emulation; the list gets the number of queries of each call."""
    calls: list[int] = []

    def count(query: Tensor, *rest, **options) -> Tensor:
        calls.append(len(query))
        return emulated(query, *rest, **options)

    monkeypatch.setattr(attention, "has_varlen_kernel", lambda query, value: True)
    monkeypatch.setattr(attention, "varlen_attn", count)
    return calls


@pytest.mark.parametrize("window", [None, 1, 4, 6, 100])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_one_call_equals_a_call_for_each_piece(one_call: list[int], monkeypatch, window: int | None, key_heads: int):
    """Outputs and the gradients of queries, keys and values in float64."""
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x)  # attend computes in float32 on a CPU; here in float64
    torch.manual_seed(0)
    S, packing = sum(SIZES), pack(SIZES, PROMPT_OF, CPU)
    inputs = [
        torch.randn(1, heads, S, 8, dtype=torch.float64, requires_grad=True) for heads in (4, key_heads, key_heads)
    ]
    weights = torch.randn(1, S, 4, 8, dtype=torch.float64)
    got, _ = shared_prompt_attention(nn.Module(), *inputs, None, scaling=0.3, packing=packing, sliding_window=window)
    want = attend_by_piece(*inputs, packing, 0.3, window)
    assert one_call == [S] and got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(*(torch.autograd.grad((x * weights).sum(), inputs) for x in (got, want)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_one_call_in_a_whole_update(one_call: list[int], tied_model, monkeypatch: pytest.MonkeyPatch):
    """The same gradients of all weights, in one micro-batch and in several; with checkpointing a layer computes twice."""
    rollouts = make_rows(LENGTHS, group_size=4)
    for budget in (100_000, 300):
        config = make_config(
            tied_model, model={"gradient_checkpointing": True}, train={"microbatch_tokens": budget, "grad_clip": 1e9}
        )
        one_call.clear()
        got = gradients(Policy(config, CPU), rollouts, ADVANTAGES)
        assert one_call
        with monkeypatch.context() as patch:
            patch.setattr(attention, "has_varlen_kernel", has_varlen_kernel)
            assert_close(got, gradients(Policy(config, CPU), rollouts, ADVANTAGES))


def test_a_micro_batch_without_rows(one_call: list[int], tied_model):
    """It is two tokens (a rank without rows takes part in the passes of the others), and its gradient is 0."""
    policy = Policy(make_config(tied_model), CPU)
    micro = make_microbatch(make_rows([5, 9]), [], CPU)
    assert (micro.packing.sizes, micro.packing.key_ends.tolist(), micro.packing.longest) == ([2], [0, 2], (2, 2))
    one_call.clear()
    policy.logprobs(micro)[0].sum().backward()
    assert one_call and all(int(p.grad.count_nonzero()) == 0 for p in policy.model.parameters() if p.grad is not None)


@pytest.mark.parametrize("window", [None, 6])
def test_torch_takes_the_call(monkeypatch: pytest.MonkeyPatch, window: int | None):
    """torch's own function, on tensors without values: keywords, shapes and gradients fit the installed version."""
    monkeypatch.setattr(attention, "has_varlen_kernel", lambda query, value: True)
    meta = torch.device("meta")
    inputs = [
        torch.empty(1, h, sum(SIZES), 64, dtype=torch.bfloat16, device=meta, requires_grad=True) for h in (4, 2, 2)
    ]
    assert attention.varlen_attn is varlen_attn
    out, _ = shared_prompt_attention(
        nn.Module(), *inputs, None, scaling=0.1, packing=pack(SIZES, PROMPT_OF, meta), sliding_window=window
    )
    assert out.shape == (1, sum(SIZES), 4, 64)
    assert [x.shape for x in torch.autograd.grad(out.sum(), inputs)] == [x.shape for x in inputs]


class OnCuda:
    """What has_varlen_kernel looks at, of a tensor on a GPU."""

    def __init__(self, D: int, dtype: torch.dtype) -> None:
        self.shape, self.dtype, self.is_cuda, self.device = (1, 2, 3, D), dtype, True, "cuda:0"


def test_what_the_kernel_does_not_take_goes_piece_by_piece(monkeypatch: pytest.MonkeyPatch):
    """float32, heads that are too large, odd, or differ between keys and values, a GPU before Ampere, a CPU."""
    capability = [(9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])

    def taken(D: int = 64, dtype: torch.dtype = torch.bfloat16, value_D: int | None = None) -> bool:
        return has_varlen_kernel(OnCuda(D, dtype), OnCuda(value_D or D, dtype))  # type: ignore[arg-type]

    assert taken() and taken(256) and taken(dtype=torch.float16)
    assert not any([taken(dtype=torch.float32), taken(264), taken(60), taken(192, value_D=128)])
    capability[0] = (7, 5)
    assert not taken()
    cpu = torch.zeros(1, 2, 3, 64, dtype=torch.bfloat16)
    assert not has_varlen_kernel(cpu, cpu)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: the kernel itself")
@pytest.mark.parametrize("window", [None, 6])
def test_the_kernel_equals_a_call_for_each_piece(window: int | None):
    """bf16, so up to its rounding; measured on an H100: 1.7e-3."""
    torch.manual_seed(0)
    device = torch.device("cuda")
    S, packing = sum(SIZES), pack(SIZES, PROMPT_OF, device)
    inputs = [torch.randn(1, h, S, 64, dtype=torch.bfloat16, device=device, requires_grad=True) for h in (4, 2, 2)]
    got, _ = shared_prompt_attention(nn.Module(), *inputs, None, scaling=0.1, packing=packing, sliding_window=window)
    want = attend_by_piece(*inputs, packing, 0.1, window)
    results = [(x, *torch.autograd.grad(x.square().sum(), inputs)) for x in (got, want)]
    for mine, theirs in zip(*results, strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 0.01
        assert np.isfinite(float(mine.norm()))
