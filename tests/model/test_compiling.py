"""Compiled layers: a few graphs serve every length, and the numbers are those of the layers as they are written.

Run: python -m pytest tests/model/test_compiling.py
The backend decides the numbers, not how often torch compiles. So what counts compilations takes one that needs no C++.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partialmethod
from itertools import product
from pathlib import Path

import pytest
import torch
from tiny import CPU, make_config, make_rows
from torch import nn
from torch._dynamo.utils import counters

import nanolapo.model.logprobs as logprobs_module
from nanolapo.config import ModelConfig
from nanolapo.microbatches import make_microbatch
from nanolapo.model.logprobs import LogprobHead
from nanolapo.policy import Policy

LENGTHS = [9, 4, 30, 2, 17, 6, 1, 33, 40, 3, 12, 8]
MICROBATCHES = [[0, 1, 2], [3], [4, 5], [6, 7, 8, 9], [1, 10, 11], list(range(12)), [2, 8], []]


@pytest.fixture(autouse=True)
def nothing_compiled_yet() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def every_pass(policy: Policy, rows: list[int]) -> None:
    """Score the rows, also by the reference, and train on them, in both modes that a caller may leave the model in."""
    micro = make_microbatch(make_rows(LENGTHS), rows, CPU)
    for training in (True, False):
        policy.scorer.train(training)
        with torch.no_grad():
            policy.logprobs(micro)
            policy.logprobs(micro, reference=True)
        policy.logprobs(micro)[0].square().sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize("more", [{"dtype": "bfloat16"}, {"lora_rank": 2}], ids=str)
def test_no_length_compiles_again(tied_model: Path, monkeypatch: pytest.MonkeyPatch, more: dict) -> None:
    """With checkpointing and a reference, which is a model of its own or the one without its adapters."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
    model = {"compile": True, "gradient_checkpointing": True} | more
    policy = Policy(make_config(tied_model, model=model, loss={"kl_coef": 0.1}), CPU)
    every_pass(policy, MICROBATCHES[0])
    compiled = counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in MICROBATCHES[1:]:
            every_pass(policy, rows)
    assert 0 < compiled == counters["stats"]["unique_graphs"] <= 24
    (interruption,) = counters["graph_break"]
    assert "shared_prompt_attention" in interruption


def trained(folder: Path, **model: object) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Scores, and all gradients in one vector, of every micro-batch. Compiled or not, what follows the first one runs as it
    is."""
    policy, rollouts = Policy(make_config(folder, model=model), CPU), make_rows(LENGTHS)
    scores = []
    for number, rows in enumerate(MICROBATCHES):
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            micro = make_microbatch(rollouts, rows, CPU)
            with torch.no_grad():
                scores.append(policy.logprobs(micro)[0])
            policy.logprobs(micro)[0].square().sum().backward()
    return scores, torch.cat([p.grad.flatten() for p in policy.trained.values() if p.grad is not None])


@pytest.mark.slow
def test_compiled_layers_compute_what_the_plain_ones_do(tied_model: Path) -> None:
    """In float32 the same numbers. In bfloat16, where fused operations round less often, they are as near to float32's."""
    exact_scores, exact = trained(tied_model, dtype="float32")
    assert not counters["stats"]
    scores, gradient = trained(tied_model, dtype="float32", compile=True)
    assert (
        counters["stats"]["unique_graphs"] == 10
    )  # four around attention, with and without gradients; two of the head
    for got, want in zip(scores, exact_scores, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert (gradient - exact).norm() < 1e-5 * exact.norm()
    plain, fused = (trained(tied_model, dtype="bfloat16", compile=flag)[1] for flag in (False, True))
    assert not torch.equal(plain, fused)
    assert (fused - exact).norm() < 1.2 * (plain - exact).norm() < 0.2 * exact.norm()


@pytest.mark.slow
@pytest.mark.parametrize("with_entropy", [False, True])
def test_the_compiled_head_computes_what_the_plain_one_does(
    monkeypatch: pytest.MonkeyPatch, with_entropy: bool
) -> None:
    """Blocks of many widths for many tokens, compiled once: against log_softmax in float64 and the plain head."""
    monkeypatch.setattr(logprobs_module, "CPU_LOGITS", 700)
    torch.manual_seed(0)
    linear = nn.Linear(8, 110)
    for number, (tokens, dtype) in enumerate(product((50, 9, 33, 64), (torch.float32, torch.bfloat16))):
        hidden_ND, targets_N = torch.randn(tokens, 8).to(dtype), torch.randint(0, 110, (tokens,))
        weights_N = torch.randn(tokens)
        results = []
        for compiled in (False, True):
            head, own_ND = LogprobHead(copy.deepcopy(linear).to(dtype), compiled), hidden_ND.clone().requires_grad_()
            with torch._dynamo.config.patch(error_on_recompile=number > 1):
                logprobs_N, entropy_N = head(own_ND, targets_N, 0.7, with_entropy)
                (logprobs_N * weights_N).sum().backward()
            total = logprobs_N if entropy_N is None else logprobs_N + 0.5 * entropy_N
            results.append([total, own_ND.grad, head.weight.grad, head.bias.grad])
        exact, own_ND = copy.deepcopy(linear).to(dtype).double(), hidden_ND.double().requires_grad_()
        logp_NV = (exact(own_ND) / 0.7).log_softmax(-1)
        chosen_N = logp_NV.gather(-1, targets_N[:, None])[:, 0]
        (chosen_N * weights_N).sum().backward()
        total = chosen_N - with_entropy * 0.5 * (logp_NV.exp() * logp_NV).sum(-1)
        for plain, fused, want in zip(*results, [total, own_ND.grad, exact.weight.grad, exact.bias.grad], strict=True):
            scale, rtol = float(want.detach().abs().max()), 1e-5 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(fused.double(), want, rtol=rtol, atol=rtol * scale)
            torch.testing.assert_close(fused, plain, rtol=rtol, atol=rtol * scale)
    assert counters["stats"]["unique_graphs"] == 4  # the two passes in two dtypes


def test_layers_are_compiled_on_a_gpu_unless_the_config_says_otherwise(tied_model: Path) -> None:
    cases = {None: [True, False], True: [True, True], False: [False, False]}
    for value, want in cases.items():
        assert [ModelConfig(compile=value).compiled_on(kind) for kind in ("cuda", "cpu")] == want
    policy = Policy(make_config(tied_model), CPU)
    layers = policy.model.get_decoder().layers
    assert not any(layer._compiled_call_impl for layer in layers)
    policy.device = torch.device("cuda")
    policy.prepare(policy.model, None)
    assert all(layer._compiled_call_impl for layer in layers)
