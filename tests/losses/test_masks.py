"""The masks that act on any loss: sequence-masked importance weights, and DMMPT's mask of mastered tokens.

Run: python -m pytest tests/losses/test_masks.py
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from test_policy_losses import ADVANTAGES, gradients, stale_rollouts
from test_update import assert_close
from tiny import CPU, copied, fill, make_config, make_rows, score_rows, update
from transformers import AutoModelForCausalLM

from nanolapo.config import UserError
from nanolapo.config_file import validate
from nanolapo.losses import LOSSES, Loss, LossInputs, load_loss
from nanolapo.losses.grpo import sequence_weights
from nanolapo.methods import load_method
from nanolapo.policy import Policy
from nanolapo.rollouts import Rollouts

# Clips so wide that every token has a gradient
WIDE: list[dict[str, Any]] = [
    {"kind": kind, "clip_low": 0.99, "clip_high": 99.0}
    | ({"aggregation": "sequence_mean"} if kind in ("gspo", "luspo") else {})
    | ({"options": {"sequence_clip_low": 0.99, "sequence_clip_high": 99.0}} if kind == "dhpo" else {})
    for kind in LOSSES
]
LENGTHS = [2, 3, 2, 1]


def log(*rows: list[float]) -> torch.Tensor:
    """Log of these probabilities in float64, padded to the right with log 1 = 0."""
    width = max(map(len, rows))
    return torch.tensor([row + [1.0] * (width - len(row)) for row in rows], dtype=torch.float64).log()


# ---------------------------------------------------------------------------------------------------- sequence_mask


def test_a_row_is_weighed_by_the_product_of_its_tokens_or_not_at_all():
    """By hand. Trainer / sampler: .6/.5 * .5/.4 = 1.5; .9/.3 * .8/.8 = 3, the bound itself; .2/.5 = 0.4, the other one;
    .9/.3 * .5/.4 = 3.75 and .1/.5 = 0.2, outside. Padding, here with other numbers on both sides, does not count."""
    old = log([0.6, 0.5], [0.9, 0.8], [0.2, 0.7], [0.9, 0.5], [0.1, 0.7])
    sampler = log([0.5, 0.4], [0.3, 0.8], [0.5, 0.1], [0.3, 0.4], [0.5, 0.1])
    mask = torch.tensor([[1.0, 1], [1, 1], [1, 0], [1, 1], [1, 0]])
    got = sequence_weights(old, sampler, mask, low=0.4 - 1e-12, high=3.0 + 1e-12)
    np.testing.assert_allclose(got, [[1.5] * 2, [3.0] * 2, [0.4] * 2, [0.0] * 2, [0.0] * 2])
    assert not got.requires_grad


def test_the_bounds_belong_to_what_is_kept():
    """Equal log-probs: w is exactly 1."""
    same, mask = log([0.6, 0.5]), torch.ones(1, 2)
    for low, high in ((1.0, 2.0), (0.0, 1.0)):
        assert sequence_weights(same, same, mask, low, high).tolist() == [[1, 1]]
    assert sequence_weights(same, same, mask, 1.0 + 1e-9, 2.0).tolist() == [[0, 0]]


def test_what_is_not_a_number_is_masked_and_what_overflows_as_well():
    old = torch.tensor([[800.0, 1.0], [math.nan, 1.0], [-800.0, 1.0]], dtype=torch.float64)
    got = sequence_weights(old, torch.zeros_like(old), torch.ones(3, 2), low=0.0, high=3.0)
    assert got.tolist() == [[0, 0], [0, 0], [0, 0]]  # e^-799 is a 0 of its own


def inputs(lengths: list[int], seed: int = 0, correct: list[bool] | None = None) -> tuple[LossInputs, torch.Tensor]:
    """Rows in float64 whose ratios are not 1, and the log-probs that the gradient goes to."""
    rng = np.random.default_rng(seed)
    mask = torch.tensor([[float(t < n) for t in range(max(lengths))] for n in lengths], dtype=torch.float64)

    def draw(scale: float, mean: float = 0.0) -> torch.Tensor:
        return torch.tensor(rng.normal(mean, scale, mask.shape)) * mask

    old = draw(0.4, -1.0)
    new = (old + draw(0.2)).requires_grad_()
    rollouts = make_rows(lengths, correct=correct)
    sampler = old + draw(0.8)
    fill(rollouts, sampler_logprobs=[row[:n].numpy() for row, n in zip(sampler, lengths, strict=True)])
    advantages = torch.tensor([1.0, -1.0, 0.5, -2.0], dtype=torch.float64)[:, None] * mask
    return LossInputs(new, old, sampler, None, None, advantages, mask, list(range(len(lengths))), rollouts), new


def run(
    case: dict[str, Any], x: LossInputs, new: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Loss by token, gradient by token, what is logged."""
    loss = load_loss(make_config(loss=case))
    loss.prepare(x.rollouts, x.advantages_BT)
    new.grad = None
    loss_BT, logged = loss(x)
    (loss_BT * x.mask_BT).sum().backward()
    assert new.grad is not None
    return (loss_BT * x.mask_BT).detach(), new.grad.clone(), logged


@pytest.mark.parametrize("case", WIDE, ids=list(LOSSES))
def test_any_loss_is_weighed_value_and_gradient(case):
    """Weights in plain floats; one row is above the upper bound, one below the lower one."""
    x, new = inputs(LENGTHS)
    ratios = [math.exp(sum((x.old_logprobs_BT - x.sampler_logprobs_BT)[b, :n].tolist())) for b, n in enumerate(LENGTHS)]
    low, high = (sorted(ratios)[0] + sorted(ratios)[1]) / 2, (sorted(ratios)[2] + sorted(ratios)[3]) / 2
    weights = torch.tensor([[r if low <= r <= high else 0.0] for r in ratios], dtype=torch.float64)
    assert (weights == 0).sum() == 2
    plain, plain_gradient, _ = run(case, x, new)
    masked, gradient, logged = run(case | {"sequence_mask": [low, high]}, x, new)
    np.testing.assert_allclose(masked, plain * weights, rtol=1e-12)
    np.testing.assert_allclose(gradient, plain_gradient * weights, rtol=1e-12)
    assert plain_gradient.abs().sum(dim=1).min() > 0, "a row without gradient shows nothing"
    np.testing.assert_allclose(logged["sequence_weight"], weights.expand(4, 3))
    np.testing.assert_allclose(logged["sequence_masked"], (weights == 0).double().expand(4, 3))


def rescored(folder, spread: float) -> tuple[Rollouts, np.ndarray]:
    """Rows whose sampler disagrees with the trainer, and log(product of p_trainer / p_sampler) of each."""
    exact = make_rows([3, 20, 1, 9, 5, 14, 40, 8])
    score_rows(Policy(make_config(folder), CPU), exact)
    rng = np.random.default_rng(1)
    noise = [rng.normal(0, spread, n).astype(np.float32) for n in exact.lengths_B]
    recorded = [row + d for row, d in zip(exact.sampler_logprobs, noise, strict=True)]
    return copied(exact, sampler_logprobs=recorded), np.array([-d.sum() for d in noise])


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
def test_a_masked_row_stays_in_the_denominators(tied_model, aggregation):
    """The whole update, with one forward pass and with many: it is the one of advantages A * w, with 0 for masked rows."""
    rollouts, log_ratios = rescored(tied_model, 0.2)
    high = float(np.exp(np.sort(log_ratios[:6])[3]) * 1.0001)
    weights = np.where(np.exp(log_ratios) <= high, np.exp(log_ratios), 0.0)
    assert (weights[:6] == 0).sum() == 2
    by_hand = [a * w for a, w in zip(ADVANTAGES, weights, strict=True)]
    big = {"grad_clip": 1e9}
    want = gradients(make_config(tied_model, loss={"aggregation": aggregation}, train=big), rollouts, by_hand)
    for tokens in (100_000, 60):
        loss = {"aggregation": aggregation, "sequence_mask": [0.0, high]}
        config = make_config(tied_model, loss=loss, train=big | {"microbatch_tokens": tokens})
        assert_close(gradients(config, rollouts, ADVANTAGES), want, rtol=1e-4)


def test_a_masked_row_keeps_its_kl_term():
    """w = 4 is outside: of -w r A + 0.5 k1 only the second is left, k1 = log 4."""
    x, new = inputs([1] * 4)
    x = replace(
        x, logprobs_BT=0 * new, old_logprobs_BT=0 * new.detach(), sampler_logprobs_BT=log(*[[0.25]] * 4),
        ref_logprobs_BT=log(*[[0.25]] * 4), advantages_BT=torch.full((4, 1), 3.0),
    )  # fmt: skip
    loss, _ = load_loss(make_config(loss={"sequence_mask": [0.0, 3.0], "kl_coef": 0.5, "kl_kind": "k1"}))(x)
    np.testing.assert_allclose(loss.detach(), [[0.5 * math.log(4)]] * 4)


# ---------------------------------------------------------------------------------------------------- mastered_mask


@pytest.mark.parametrize("case", WIDE, ids=list(LOSSES))
def test_mastered_tokens_of_right_and_narrow_answers_leave_any_loss(case):
    """By hand: 0.9 or more have token 0 of row 0, tokens 0 and 2 of row 1, token 1 of row 2, and row 3. Row 1 is wrong. Row
    3 has the target's own entropy. Row 2 is below it on average, though its last token is above. All else stays."""
    old = log([0.95, 0.5], [0.99, 0.3, 0.91], [0.8, 0.9 + 1e-12], [0.95])
    entropy = torch.tensor([[0.1, 0.2, 0], [0.1, 0.1, 0.1], [0.3, 0.6, 0], [0.5, 0, 0]], dtype=torch.float64)
    x, new = inputs(LENGTHS, correct=[True, False, True, True])
    x = replace(x, old_logprobs_BT=old, logprobs_BT=new, entropy_BT=entropy)
    plain, plain_gradient, _ = run(case, x, new)
    assert (plain_gradient[x.mask_BT.bool()] != 0).all(), "a token without gradient shows nothing"
    masked, gradient, logged = run(case | {"mastered_mask": [0.5, 0.9]}, x, new)
    gone = torch.zeros(4, 3, dtype=torch.bool)
    gone[0, 0] = gone[2, 1] = True
    assert torch.equal(logged["mastered"].bool() & x.mask_BT.bool(), gone)
    assert torch.equal(masked, plain.masked_fill(gone, 0.0))
    assert torch.equal(gradient, plain_gradient.masked_fill(gone, 0.0))


@pytest.mark.parametrize("train", [{}, {"batch_size": 4}, {"inner_epochs": 2}])
def test_masked_tokens_stay_in_the_denominators(tied_model, train):
    """The whole update equals the one with advantage 0 for these tokens, however the rows are split. The answers'
    entropies, over the whole vocabulary, are those of plain transformers in float64."""
    rollouts = stale_rollouts(tied_model, 0.3)
    fill(rollouts, correct=[True, False] * 4)
    model = AutoModelForCausalLM.from_pretrained(tied_model, dtype=torch.float64).eval()
    entropies = []
    for row in rollouts.rows:
        ids = torch.from_numpy(np.concatenate([row.prompt_ids, row.response_ids]))[None]
        logp = model(ids).logits[0, len(row.prompt_ids) - 1 : -1].log_softmax(-1)
        entropies.append(-float((logp.exp() * logp).sum(-1).mean().detach()))
    right = sorted(entropies[b] for b, row in enumerate(rollouts.rows) if row.correct and b < 6)
    below = (right[-1] + right[-2]) / 2
    above = float(np.quantile(np.exp(np.concatenate(rollouts.sampler_logprobs)), 0.6))
    by_hand, found = torch.zeros(8, 40, dtype=torch.float64), 0
    for b, row in enumerate(rollouts.rows):
        mastered = (np.exp(row.sampler_logprobs) >= above) & (row.correct and entropies[b] < below)
        by_hand[b, : len(mastered)] = torch.from_numpy(ADVANTAGES[b] * ~mastered)
        found += mastered.sum() * (ADVANTAGES[b] != 0)
    assert found > 3
    sections = {"train": {"grad_clip": 1e9} | train, "loss": {"old_logprobs": "sampler"}}
    want = gradients(make_config(tied_model, **sections), rollouts, by_hand.tolist())  # type: ignore[arg-type]
    sections["loss"]["mastered_mask"] = [below, above]
    for tokens in (100_000, 60):
        sections["train"]["microbatch_tokens"] = tokens
        assert_close(gradients(make_config(tied_model, **sections), rollouts, ADVANTAGES), want, rtol=1e-4)
    logged = update(Policy(make_config(tied_model, **sections), CPU), rollouts, ADVANTAGES)
    assert 0 < logged["mastered"] < 1


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        ({"sequence_mask": [3.0, 0.5]}, "loss.sequence_mask=.*must satisfy 0 <= low < high"),
        ({"sequence_mask": [-1.0, 3.0]}, "loss.sequence_mask=.*must satisfy"),
        ({"sequence_mask": [1.0]}, "loss.sequence_mask=.*exactly two numbers"),
        ({"sequence_mask": [0, 3], "tis_cap": 2.0}, "loss.sequence_mask=.*loss.tis_cap=2.0: both correct"),
        ({"sequence_mask": [0, 3], "old_logprobs": "sampler"}, "loss.sequence_mask=.*set loss.old_logprobs=trainer"),
        ({"mastered_mask": [0.0, 0.99]}, "loss.mastered_mask=.*must be an entropy above 0"),
        ({"mastered_mask": [0.2, 1.0]}, "loss.mastered_mask=.*a probability below 1"),
        ({"mastered_mask": 0.2}, "loss.mastered_mask=.*exactly two numbers"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(loss, words):
    with pytest.raises(UserError, match=words) as error:
        validate(make_config(loss=loss))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["drpo:Drpo", "hapo_tokens:TokenHapo"])
@pytest.mark.parametrize("mask", [{"sequence_mask": [0.0, 3.0]}, {"mastered_mask": [0.2, 0.99]}, {"tis_cap": 2.0}])
def test_a_method_with_a_loss_of_its_own_refuses_what_it_would_not_apply(name, mask):
    aggregation = "sequence_mean" if name == "drpo:Drpo" else "token_mean"
    load_method(make_config(loss={"aggregation": aggregation}, method={"name": name}))
    with pytest.raises(UserError, match="loss.sequence_mask or loss.mastered_mask"):
        load_method(make_config(loss={"aggregation": aggregation} | mask, method={"name": name}))


def test_two_temperatures_have_no_weight_against_the_sampler():
    for loss in ({"sequence_mask": [0.0, 3.0]}, {"tis_cap": 2.0}):
        with pytest.raises(UserError, match="aepo: two temperatures need .*no tis_cap and no sequence_mask"):
            load_method(make_config(loss=loss, method={"name": "aepo:Aepo"}))
    assert isinstance(load_method(make_config(method={"name": "aepo:Aepo"})).loss, Loss)
