"""The update of one step: the same gradient however rows are split, ratios, per-token advantages, KL.

Run: python -m pytest tests/test_update.py        Steps that must not be taken are in test_update_edges.py.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny import CPU, copied, fill, make_config, make_rows, score_rows, update
from transformers import AutoModelForCausalLM

from nanolapo.losses import BatchTotals, Loss, LossInputs
from nanolapo.methods.base import Method
from nanolapo.policy import Policy
from nanolapo.rollouts import Rollouts
from nanolapo.update import OptimizerBatch, rank_imbalance, score, update_policy

LENGTHS = [3, 200, 17, 90, 5, 150, 40, 8]
ADVANTAGES = [1.0, -1.0, 0.5, -0.5, 2.0, -2.0, 0.3, -0.3]
AGGREGATIONS = ["token_mean", "sequence_mean", "constant"]


def gradients(policy: Policy, rollouts: Rollouts, advantages, **options) -> dict[str, torch.Tensor]:
    """Gradients as the optimizer sees them in its (single) step."""
    seen: dict[str, torch.Tensor] = {}
    hook = policy.optimizer.register_step_pre_hook(
        lambda *_: seen.update({n: p.grad.clone() for n, p in policy.model.named_parameters()})
    )
    update(policy, rollouts, advantages, **options)
    hook.remove()
    return seen


def slow_gradients(
    folder, rollouts: Rollouts, advantages: list[float], aggregation: str, rows: list[int], dtype=torch.float64
):
    """REINFORCE with these advantages, row by row through plain transformers, in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    tokens = sum(len(rollouts.response_ids[row]) for row in rows)
    for row in rows:
        prompt, response = rollouts.prompt_ids[row], rollouts.response_ids[row]
        if not len(response):
            continue
        logp = model(torch.from_numpy(np.concatenate([prompt, response]))[None]).logits[0].log_softmax(-1)
        chosen = logp[len(prompt) - 1 : -1].gather(-1, torch.from_numpy(response)[:, None])
        divisor = {"token_mean": tokens, "sequence_mean": len(response) * len(rows), "constant": 64 * len(rows)}
        (-advantages[row] * chosen.sum() / divisor[aggregation]).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def assert_close(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], rtol: float = 1e-5) -> None:
    assert left.keys() == right.keys()
    for name in left:
        scale = float(right[name].abs().max())
        torch.testing.assert_close(left[name].double(), right[name].double(), rtol=rtol, atol=rtol * scale)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_B1_micro_batches_do_not_change_the_gradient(tied_model, aggregation):
    """8 rows of 3..200 tokens in one forward pass, in about four, one by one; all equal to plain transformers."""
    rollouts = make_rows(LENGTHS)
    want = slow_gradients(tied_model, rollouts, ADVANTAGES, aggregation, list(range(8)))
    losses = []
    for budget in (100_000, 420, 1):
        config = make_config(
            tied_model, loss={"aggregation": aggregation}, train={"microbatch_tokens": budget, "grad_clip": 1e9}
        )
        policy = Policy(config, CPU)
        assert_close(gradients(policy, rollouts, ADVANTAGES), want)
        losses.append(update(Policy(config, CPU), rollouts, ADVANTAGES)["loss"])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5, abs=1e-7)


def test_B6_one_update_is_reinforce_with_baseline_whatever_the_clip(tied_model):
    rollouts = make_rows(LENGTHS)
    want = slow_gradients(tied_model, rollouts, ADVANTAGES, "token_mean", list(range(8)))
    config = make_config(tied_model, loss={"clip_low": 0.0, "clip_high": 0.0}, train={"grad_clip": 1e9})
    assert_close(gradients(Policy(config, CPU), rollouts, ADVANTAGES), want)


@pytest.mark.parametrize("train", [{"inner_epochs": 2}, {"batch_size": 4}])
def test_B6_later_updates_see_ratios_other_than_one(tied_model, train):
    """Old log-probs are those before the first update of the step, not those of the current weights."""
    policy = Policy(make_config(tied_model, train={"learning_rate": 0.03} | train), CPU)
    rollouts = make_rows(LENGTHS)
    score_rows(policy, rollouts)
    seen: list[LossInputs] = []

    class Spy(Loss):
        def __call__(self, x: LossInputs):
            seen.append(x)
            return super().__call__(x)

    advantages, method = torch.tensor(ADVANTAGES), Method(policy.config)
    method.loss = Spy(policy.config)
    logged = update_policy(policy, method, rollouts, advantages)
    assert logged["updates"] == 2 and logged["clip_fraction"] > 0
    first, second = seen
    for x in seen:  # an exact sampler's log-probs are the old ones, in both updates
        torch.testing.assert_close(x.old_logprobs_BT, x.sampler_logprobs_BT, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(first.logprobs_BT, first.old_logprobs_BT, rtol=1e-4, atol=1e-4)
    assert (second.logprobs_BT - second.old_logprobs_BT).abs().mean() > 0.01
    assert logged["mismatch_max"] < 1e-4  # the sampler is compared before the weights move


def test_the_first_of_several_updates_has_ratios_of_exactly_one(tied_model, monkeypatch):
    """The policy's own pass gives its old log-probs. Those that were scored before differ by rounding on a GPU, and here
    by 0.1; the second update is measured against them."""

    def shifted(*arguments):
        scored, entropies = score(*arguments)
        assert sorted(scored) == [4, 5, 6, 7]  # those of the first update need no pass of their own
        return {row: values + np.float32(0.1) for row, values in scored.items()}, entropies

    monkeypatch.setattr("nanolapo.update.score", shifted)
    config = make_config(tied_model, train={"batch_size": 4, "learning_rate": 1e-9})
    policy, seen, method = Policy(config, CPU), [], Method(config)

    class Spy(Loss):
        def policy_term(self, x):
            seen.append(torch.exp(x.logprobs_BT - x.old_logprobs_BT)[x.mask_BT.bool()].detach())
            return super().policy_term(x)

    method.loss = Spy(config)
    rollouts = make_rows([5, 2, 7, 3] * 2)
    update_policy(policy, method, rollouts, torch.tensor([1.0, -1.0] * 4))
    first, second = seen
    assert (first == 1).all()
    torch.testing.assert_close(second, torch.full_like(second, np.exp(-0.1)), rtol=1e-4, atol=0)


def test_B8_good_answers_become_likelier(tied_model):
    """Through the whole update: what is rewarded gains probability, what is not loses it."""
    policy = Policy(make_config(tied_model), CPU)
    rollouts = make_rows([6, 6])
    score_rows(policy, rollouts)
    before = [row.sum() for row in rollouts.sampler_logprobs]
    for _ in range(5):
        update(policy, rollouts, [1.0, -1.0])
    score_rows(policy, rollouts)
    after = [row.sum() for row in rollouts.sampler_logprobs]
    assert after[0] > before[0] + 1 and after[1] < before[1] - 1


def test_old_logprobs_from_the_sampler(tied_model):
    """loss.old_logprobs=sampler takes the ratio against what the sampler recorded, even in a single update."""
    rollouts = make_rows([5, 9])
    results = {}
    for source in ("trainer", "sampler"):
        policy = Policy(make_config(tied_model, loss={"old_logprobs": source}), CPU)
        score_rows(policy, rollouts)
        fill(rollouts, sampler_logprobs=[row - math.log(1.5) for row in rollouts.sampler_logprobs])
        results[source] = update(policy, rollouts, [1.0, -1.0])
    assert results["trainer"]["ratio"] == pytest.approx(1.0) and results["trainer"]["clip_fraction"] == 0
    assert results["sampler"]["ratio"] == pytest.approx(1.5, rel=1e-4)
    assert results["sampler"]["clip_fraction"] == pytest.approx(5 / 14)  # the 5 tokens with A > 0
    for logged in results.values():
        assert logged["mismatch"] == pytest.approx(math.log(1.5), rel=1e-3)
        assert logged["mismatch_max"] == pytest.approx(math.log(1.5), rel=1e-3)


def test_tis_weights_scale_the_loss(tied_model):
    """A sampler that thought every token 1.5 times (4 times) as unlikely: gradient times 1.5 (capped at 2)."""
    rollouts = make_rows([5, 9])
    plain = gradients(Policy(make_config(tied_model, train={"grad_clip": 1e9}), CPU), rollouts, [1.0, -1.0])
    for factor, weight in [(1.5, 1.5), (4.0, 2.0)]:
        policy = Policy(make_config(tied_model, loss={"tis_cap": 2.0}, train={"grad_clip": 1e9}), CPU)
        score_rows(policy, rollouts)
        fill(rollouts, sampler_logprobs=[row - math.log(factor) for row in rollouts.sampler_logprobs])
        got = gradients(policy, rollouts, [1.0, -1.0])
        assert_close(got, {name: weight * value for name, value in plain.items()}, rtol=1e-4)


def test_advantages_per_token(tied_model):
    """[B, T]: constant rows equal [B]; a token with advantage 0 adds nothing, wherever its row is padded."""
    rollouts = make_rows([4, 9, 2, 6])
    config = make_config(tied_model, train={"microbatch_tokens": 24, "grad_clip": 1e9})
    per_row = [1.0, -1.0, 0.5, -0.5]
    spread = torch.tensor(per_row)[:, None].expand(4, 9).clone()
    whole = gradients(Policy(config, CPU), rollouts, per_row)
    assert_close(gradients(Policy(config, CPU), rollouts, spread), whole)
    first_tokens = spread.clone()
    first_tokens[:, 2:] = 0
    shorter = copied(rollouts, response_ids=[ids[:2] for ids in rollouts.response_ids])
    fill(shorter, sampler_logprobs=[row[:2] for row in rollouts.sampler_logprobs])
    got = gradients(Policy(config, CPU), rollouts, first_tokens)
    want = gradients(Policy(config, CPU), shorter, per_row)
    assert_close(got, {name: value * 8 / 21 for name, value in want.items()}, rtol=1e-4)  # 8 of 21 tokens


def test_rank_imbalance_is_the_fullest_rank_over_the_mean():
    """Prompts count; of every optimizer batch the fullest rank; ranks without a row pull the mean down."""
    rollouts = make_rows([10, 20, 5, 5])
    fill(rollouts, prompt_ids=[ids[:2] for ids in rollouts.prompt_ids])  # 12, 22, 7 and 7 tokens
    one, two = ([[[0]], [[1]]], [[[2], [3]], [[]]])  # fullest 22 of 34, then 14 of 14
    batches = [OptimizerBatch(BatchTotals(40, 4, 64), plan, plan[0], True) for plan in (one, two)]
    assert rank_imbalance(batches, rollouts) == pytest.approx((22 + 14) / (34 / 2 + 14 / 2))
    assert rank_imbalance([OptimizerBatch(BatchTotals(0, 0, 64), [[], []], [], False)], rollouts) == 1.0


# ------------------------------------------------------------------------------------------------------ KL


def test_kl_to_the_reference_pulls_back(tied_model):
    """At the first model the KL is 0; away from it it is positive, and its pull is part of the gradient."""
    rollouts = make_rows([30, 30, 20, 20])
    config = make_config(tied_model, loss={"kl_coef": 0.5, "kl_kind": "k3"})
    policy = Policy(config, CPU)
    score_rows(policy, rollouts)
    first = update(policy, rollouts, [1.0, -1.0, 0.0, 0.0])
    assert first["kl"] == pytest.approx(0, abs=1e-6) and first["trained_tokens"] == 100  # rows without advantage, too
    for _ in range(3):
        moved = update(policy, rollouts, [1.0, -1.0, 0.0, 0.0])["kl"]
    assert moved > 1e-4
    for _ in range(5):  # next to no reward: KL dominates and brings it down
        pulled = update(policy, rollouts, [1e-6, -1e-6, 0.0, 0.0])["kl"]
    assert pulled < moved


def test_B10_without_kl_there_is_no_reference_and_the_same_gradient(tied_model):
    rollouts = make_rows([30, 30])
    without, tiny_kl = (
        Policy(make_config(tied_model, loss={"kl_coef": coefficient}, train={"grad_clip": 1e9}), CPU)
        for coefficient in (0.0, 1e-12)
    )
    assert without.reference is None and tiny_kl.reference is not None
    assert_close(gradients(without, rollouts, [1.0, -1.0]), gradients(tiny_kl, rollouts, [1.0, -1.0]))
    assert not any(p.requires_grad or p.grad is not None for p in tiny_kl.reference.parameters())
