"""Exercise 4: long_share, the part of the loss's weight that lies on long answers. Run: make exercise N=4"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import CPU, make_config, make_rows, tiny_qwen, update

from nanolapo.policy import Policy

LENGTHS = [3, 60, 17, 40, 5, 50, 33, 8]  # mean 27
ADVANTAGES = [1.0, -1.0, 0.5, -0.5, 2.0, -2.0, 0.3, -0.3]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_qwen().save_pretrained(folder)
    return folder


def logged(model: Path, advantages, keep: list[bool] | None = None, budget: int = 4096, **loss: object) -> float:
    config = make_config(model, loss=loss, train={"microbatch_tokens": budget})
    trained = update(Policy(config, CPU), make_rows(LENGTHS), advantages, keep)
    assert "long_share" in trained, "update_policy (nanolapo/update.py) logs no long_share yet"
    return trained["long_share"]


def by_hand(advantages_BT: np.ndarray, aggregation: str, kept: list[int]) -> float:
    """Token by token: |A| times what the loss of that token is multiplied by."""
    mean = sum(LENGTHS[b] for b in kept) / len(kept)
    long = total = 0.0
    for b in kept:
        for t in range(LENGTHS[b]):
            weight = abs(float(advantages_BT[b, t])) / (LENGTHS[b] if aggregation == "sequence_mean" else 1)
            total += weight
            long += weight * (LENGTHS[b] > mean)
    return long / total


ROWS = np.repeat(np.array(ADVANTAGES)[:, None], max(LENGTHS), axis=1)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
def test_its_value_under_every_denominator(model, aggregation):
    got, want = logged(model, ADVANTAGES, aggregation=aggregation), by_hand(ROWS, aggregation, list(range(8)))
    assert got == pytest.approx(want, rel=1e-4), (
        f"loss.aggregation={aggregation}: answers longer than the mean of 27 tokens hold {want:.4f} of sum |A| w, "
        f"long_share is {got:.4f}"
    )


def test_micro_batches_do_not_change_it(model):
    got, want = logged(model, ADVANTAGES, budget=1), by_hand(ROWS, "token_mean", list(range(8)))
    assert got == pytest.approx(want, rel=1e-4), (
        f"with a row in each micro-batch long_share is {got:.4f} instead of {want:.4f}: sum over the micro-batches first, "
        "divide once (Tally, summarize), and compare with the mean of the whole optimizer batch (batch.totals)"
    )


def test_rows_left_out_do_not_count(model):
    """Without the first two groups the mean is 24, and 33 is long."""
    keep = [False] * 4 + [True] * 4
    got, want = logged(model, ADVANTAGES, keep), by_hand(ROWS, "token_mean", [4, 5, 6, 7])
    assert got == pytest.approx(want, rel=1e-4), (
        f"with four rows masked out long_share is {got:.4f} instead of {want:.4f}"
    )


def test_advantages_per_token(model):
    advantages = torch.linspace(-1, 1, 8 * max(LENGTHS)).reshape(8, -1)
    got, want = logged(model, advantages), by_hand(advantages.numpy(), "token_mean", list(range(8)))
    assert got == pytest.approx(want, rel=1e-4), (
        f"a method may weigh single tokens (advantages [B, T]): long_share is {got:.4f} instead of {want:.4f}"
    )


def test_the_update_is_as_it_was(model):
    """A number to log must not touch the gradient: token_mean's loss at ratio 1 is minus the mean advantage of a token."""
    config = make_config(model)
    loss = update(Policy(config, CPU), make_rows(LENGTHS), ADVANTAGES)["loss"]
    want = -sum(a * n for a, n in zip(ADVANTAGES, LENGTHS, strict=True)) / sum(LENGTHS)
    assert loss == pytest.approx(want, rel=1e-4), f"the loss was {want:.4f} and is now {loss:.4f}"
