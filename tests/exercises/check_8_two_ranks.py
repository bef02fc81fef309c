"""Exercise 8: mismatch_std, the same on one rank and on two. Run: make exercise N=8

Every update runs in a child process of its own, so that two of them can be the ranks of one run.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import fill, make_config, make_rows, tiny_qwen, update
from transformers import AutoModelForCausalLM

from nanolapo.policy import Policy
from nanolapo.ranks import Ranks
from nanolapo.rollouts import Rollouts

LENGTHS = [3, 60, 5, 40, 17, 9, 50, 30]
ADVANTAGES = [1.0, -1.0, 0.5, -0.5, 2.0, -2.0, 0.3, 0.0]  # the last row has no signal: it is not trained, not compared


def answers() -> Rollouts:
    """Sampled with log-probs that are off by a different amount in every row."""
    rollouts = make_rows(LENGTHS)
    rng = np.random.default_rng(1)
    fill(
        rollouts,
        sampler_logprobs=[
            (-b * rng.random(length)).astype(np.float32) for b, length in enumerate(rollouts.lengths_B, start=1)
        ],
    )
    return rollouts


def train(rank: int, ranks: int, port: int, model: Path, budget: int) -> None:
    torch.set_num_threads(1)
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_PORT": str(port),
                       "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}  # fmt: skip
    device = Ranks().device
    policy = Policy(make_config(model, train={"microbatch_tokens": budget}), device)
    logged = update(policy, answers(), ADVANTAGES)
    (model / f"rank{rank}.json").write_text(json.dumps(logged))


def truth(rank: int, ranks: int, port: int, model: Path, budget: int) -> None:
    """The differences of all compared tokens, row by row through plain transformers."""
    torch.set_num_threads(1)
    rollouts, network = answers(), AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    off = []
    for row in range(len(LENGTHS) - 1):
        prompt, ids = rollouts.prompt_ids[row], rollouts.response_ids[row]
        with torch.no_grad():
            logp = network(torch.from_numpy(np.concatenate([prompt, ids]))[None]).logits[0].log_softmax(-1)
        chosen = logp[len(prompt) - 1 : -1].gather(-1, torch.from_numpy(ids)[:, None])[:, 0].numpy()
        off.append(abs(chosen - rollouts.sampler_logprobs[row]))
    values = np.concatenate(off).astype(np.float64)
    (model / "rank0.json").write_text(json.dumps({"mismatch": values.mean(), "mismatch_std": values.std()}))


def in_children(function, model: Path, ranks: int = 1, budget: int = 4096) -> list[dict[str, float]]:
    """What each rank logged."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")  # the imports are done already
    children = [context.Process(target=function, args=(rank, ranks, port, model, budget)) for rank in range(ranks)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        child.kill()
    assert all(child.exitcode == 0 for child in children), (
        f"{ranks} rank(s): a process ended with an error (its words are above)"
    )
    return [json.loads((model / f"rank{rank}.json").read_text()) for rank in range(ranks)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("model")
    tiny_qwen().save_pretrained(folder)
    yield folder


@pytest.fixture(scope="module")
def want(model) -> dict[str, float]:
    return in_children(truth, model)[0]


def test_it_is_logged(model):
    logged = in_children(train, model)[0]
    assert "mismatch_std" in logged, "update_policy (nanolapo/update.py) logs no mismatch_std yet"


@pytest.mark.parametrize(("ranks", "budget"), [(1, 4096), (1, 1), (2, 4096), (2, 1)])
def test_it_is_the_same_however_the_rows_are_split(model, want, ranks, budget):
    everyone = in_children(train, model, ranks, budget)
    split = f"{ranks} rank(s), " + ("a row in each micro-batch" if budget == 1 else "few micro-batches")
    for rank, logged in enumerate(everyone):
        assert logged["mismatch"] == pytest.approx(want["mismatch"], rel=1e-4), f"{split}: mismatch itself has changed"
        assert logged["mismatch_std"] == pytest.approx(want["mismatch_std"], rel=1e-3), (
            f"{split}: over all compared tokens the standard deviation of |dlogp| is {want['mismatch_std']:.4f}; rank "
            f"{rank} logged {logged['mismatch_std']:.4f}. Sums add up over micro-batches and ranks, deviations do not"
        )
