"""Memory that grows with the vocabulary: weights, gradients and moments do, nothing else in an update may.

Run: python -m pytest tests/model/test_vocabulary.py
tests/benchmarks/growth.py measures the same as memory of a process.
"""

from __future__ import annotations

import pytest
import torch
from test_update import slow_gradients
from tiny import CPU, make_config, make_rows, tiny_llama, tiny_qwen
from torch.profiler import ProfilerActivity, profile

import nanolapo.model.logprobs as logprobs_module
from nanolapo.microbatches import make_microbatch
from nanolapo.model.logprobs import LogprobHead, block_width
from nanolapo.policy import Policy

WORDS, HIDDEN, TOKENS = 5000, 32, 160


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_an_update_makes_nothing_of_the_vocabularys_size_but_the_gradients(tmp_path, monkeypatch, tied, dtype):
    """Two micro-batches of 80 tokens: [tokens, vocabulary] would be 400,000 elements, [vocabulary, hidden] is 160,000."""
    monkeypatch.setattr(logprobs_module, "CPU_LOGITS", 20_000)
    tiny_qwen(vocab=WORDS, tied=tied).save_pretrained(tmp_path)
    policy = Policy(make_config(tmp_path, model={"dtype": dtype}), CPU)
    rollouts = make_rows([TOKENS // 4] * 4)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        for rows in ([0, 1], [2, 3]):
            logprobs_BT, _ = policy.logprobs(make_microbatch(rollouts, rows, CPU))
            logprobs_BT.sum().backward()
    allocated = [event.self_cpu_memory_usage for event in watched.events() or []]
    least = WORDS * HIDDEN * (4 if dtype == "float32" else 2)
    large = [size for size in allocated if size >= least]
    assert large == [WORDS * HIDDEN * 4] * (1 if tied else 2)  # the masters' gradients, once
    assert all(p.grad is not None and p.grad.layout == torch.strided for p in policy.trained.values())


@pytest.mark.parametrize("tokens", [1, 77, 1000, 20_000, 32_768, 300_000, 2**20])
def test_blocks_on_a_gpu_fill_its_tiles(tokens):
    """Their width is a multiple of 256, the largest whose logits fit; 256 where none does. A CPU's are not rounded."""
    width = block_width(tokens, torch.device("cuda"))
    assert width % 256 == 0 and (tokens * width <= 2**26 < tokens * (width + 256) or width == 256)
    assert block_width(tokens, CPU) == 2**21 // tokens


def test_a_gpus_blocks_give_the_same_numbers(monkeypatch):
    """700 words in blocks of 256, 256 and 188: values and gradients of log_softmax in float64."""
    monkeypatch.setattr(logprobs_module, "GPU_LOGITS", 300 * 9)
    monkeypatch.setattr(logprobs_module, "block_width", lambda tokens, _: block_width(tokens, torch.device("cuda")))
    torch.manual_seed(0)
    head, hidden_ND, targets_N = torch.nn.Linear(8, 700), torch.randn(9, 8, requires_grad=True), torch.arange(9) * 86
    got = LogprobHead(head)(hidden_ND, targets_N, 0.7, with_entropy=True)
    logits_NV = hidden_ND.double() @ head.weight.double().T + head.bias.double()
    logp_NV = (logits_NV / 0.7).log_softmax(-1)
    want = logp_NV.gather(-1, targets_N[:, None])[:, 0], -(logp_NV.exp() * logp_NV).sum(-1)
    weights_N = torch.randn(9)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)
    mine, theirs = (torch.autograd.grad((logprobs * weights_N).sum(), hidden_ND)[0] for logprobs, _ in (got, want))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_paddings_row_gets_what_torch_gives_it(tmp_path, dtype):
    """nn.Embedding leaves its padding_idx without a gradient, also where only rows that were read have one."""
    tiny_llama(pad_token_id=5).save_pretrained(tmp_path)
    rollouts, advantages = make_rows([9, 4, 30, 2]), [1.0, -1.0, 0.5, -0.5]
    rollouts.response_ids[0][3] = rollouts.response_ids[2][7] = 5
    policy = Policy(make_config(tmp_path, model={"dtype": dtype}, train={"microbatch_tokens": 40}), CPU)
    for rows in ([0, 1], [2, 3]):
        logprobs_BT, _ = policy.logprobs(make_microbatch(rollouts, rows, CPU))
        weights_B = torch.tensor([-advantages[row] for row in rows]) / rollouts.lengths_B.sum()
        (logprobs_BT.sum(dim=1) * weights_B).sum().backward()
    got = policy.model.get_input_embeddings().weight.grad
    want = slow_gradients(tmp_path, rollouts, advantages, "token_mean", [0, 1, 2, 3])["model.embed_tokens.weight"]
    assert got is not None and (got[5] == 0).all() and (want[5] == 0).all()
    error = float((got - want).norm() / want.norm())
    assert error < (1e-5 if dtype == "float32" else 0.05)
