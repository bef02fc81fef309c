"""Every published policy loss, value and gradient, against slow loops over tokens in plain Python floats (float64).

Run: python -m pytest tests/losses/test_policy_losses.py
Clip, KL, aggregation and TIS on their own are in test_losses.py.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_update import assert_close
from tiny import CPU, copied, fill, make_config, make_rows, score_rows
from transformers import AutoModelForCausalLM

from nanolapo.config import Config, LossConfig, UserError
from nanolapo.config_file import load_config, validate
from nanolapo.losses import LOSSES, BatchTotals, LossInputs, load_loss, policy_loss, row_weights
from nanolapo.losses.kl_cov import high_covariance
from nanolapo.losses.r2vpo import next_lam
from nanolapo.methods.base import Method
from nanolapo.policy import Policy
from nanolapo.rollouts import Rollouts
from nanolapo.update import update_policy

LENGTHS = [3, 20, 1, 9, 5, 14, 40, 8]
ADVANTAGES = [1.0, -1.0, 0.5, -0.5, 2.0, -2.0, 0.0, 0.0]  # the last group has no signal
SPREAD = {"gspo": 0.02, "luspo": 0.02}  # of log-ratios, so that clips act on some sequences and tokens but not on all

# Every loss with every divisor it allows; clips narrow enough to act.
CASES: list[dict] = [
    {"kind": "grpo"},
    {"kind": "grpo", "clip_low": 0.1, "clip_high": 0.3, "dual_clip": 1.5, "aggregation": "sequence_mean"},
    {"kind": "grpo", "aggregation": "constant"},
    {"kind": "gspo", "clip_low": 3e-3, "clip_high": 4e-3, "aggregation": "sequence_mean"},
    {"kind": "luspo", "clip_low": 2e-3, "clip_high": 2.5e-3, "aggregation": "sequence_mean"},
    {"kind": "cispo", "options": {"cap": 1.2}},
    {"kind": "kl_cov", "options": {"share": 0.1, "coef": 0.7}},
    {"kind": "kl_cov", "options": {"share": 0.3, "coef": 2.0}, "aggregation": "sequence_mean"},
    {"kind": "r2vpo", "options": {"lam": 0.8}},
    {"kind": "dhpo", "options": {"token_weight": 0.3, "sequence_clip_low": 0.02, "sequence_clip_high": 0.03}},
    {"kind": "dhpo", "aggregation": "sequence_mean"},
    {"kind": "minpro", "clip_low": 0.35},
]
NAMES = ["-".join(str(value) for key, value in case.items() if key in ("kind", "aggregation")) for case in CASES]
EACH_KIND = [case for i, case in enumerate(CASES) if case["kind"] not in [c["kind"] for c in CASES[:i]]]

ROOT = Path(__file__).parents[2]


# ------------------------------------------------------------------------------------------------------ slow reference


def clipped_term(ratio: float, a: float, low: float, high: float, dual: float = 0.0) -> tuple[float, float, bool]:
    """(value, d value / d log ratio, touched) of -min(r A, clip(r) A), case by case."""
    if a > 0 and ratio > 1 + high:
        return -(1 + high) * a, 0.0, True
    if a < 0 and ratio < 1 - low:
        return -(1 - low) * a, 0.0, True
    if a < 0 and dual and ratio > dual:
        return -dual * a, 0.0, True
    return -ratio * a, -ratio * a, False


def slow_chosen(old: list[list[float]], advantages: list[list[float]], share: float) -> set[tuple[int, int]]:
    """KL-Cov's tokens: sort all of them by covariance, the earlier first among equals."""
    tokens = [(b, t) for b, row in enumerate(old) for t in range(len(row))]
    mean_a = sum(advantages[b][t] for b, t in tokens) / len(tokens)
    mean_p = sum(old[b][t] for b, t in tokens) / len(tokens)
    ranked = sorted(tokens, key=lambda bt: -(advantages[bt[0]][bt[1]] - mean_a) * (old[bt[0]][bt[1]] - mean_p))
    return set(ranked[: max(1, int(len(tokens) * share))])


def slow_row(
    c: LossConfig, o: Any, new: list[float], old: list[float], a: list[float], chosen: set[int]
) -> list[tuple[float, float, bool]]:
    """(value, gradient with respect to its log-prob, touched) of every token of one answer, before aggregation. o is what
    loss.options says, with its defaults."""
    length = len(new)
    ratios = [math.exp(n - o) for n, o in zip(new, old, strict=True)]
    s = math.exp(sum(n - o for n, o in zip(new, old, strict=True)) / length)
    out = []
    for t, r in enumerate(ratios):
        if c.kind == "grpo":
            out.append(clipped_term(r, a[t], c.clip_low, c.clip_high, c.dual_clip))
        elif c.kind in ("gspo", "luspo"):
            # The sequence's own term, spread evenly: value/L and gradient/L at every token come from the 1/L outside.
            times = length if c.kind == "luspo" else 1
            value, slope, touched = clipped_term(s, a[t], c.clip_low, c.clip_high)
            out.append((value * times, slope * times, touched))
        elif c.kind == "cispo":
            weight = r if r < o.cap else o.cap
            out.append((-weight * a[t] * new[t], -weight * a[t], r > o.cap))
        elif c.kind == "kl_cov":
            d = new[t] - old[t]
            extra = (o.coef * abs(d), o.coef * (1 if d > 0 else -1)) if t in chosen else (0.0, 0.0)
            out.append((-r * a[t] + extra[0], -r * a[t] + extra[1], t in chosen))
        elif c.kind == "r2vpo":
            out.append((-(r * a[t] - o.lam * (r - 1) ** 2), -r * (a[t] - 2 * o.lam * (r - 1)), False))
        elif c.kind == "dhpo":
            w = o.token_weight
            r_in, s_in = (
                1 - c.clip_low <= r <= 1 + c.clip_high,
                1 - o.sequence_clip_low <= s <= 1 + o.sequence_clip_high,
            )
            r_cut = r if r_in else (1 + c.clip_high if r > 1 else 1 - c.clip_low)
            s_cut = s if s_in else (1 + o.sequence_clip_high if s > 1 else 1 - o.sequence_clip_low)
            free, cut = w * r + (1 - w) * s, w * r_cut + (1 - w) * s_cut
            if cut * a[t] < free * a[t]:
                out.append((-cut * a[t], -a[t] * (w * r * r_in + (1 - w) * s * s_in), True))
            else:
                out.append((-free * a[t], -a[t] * free, False))
        elif c.kind == "minpro":
            free = r * min(ratios[:t]) if t else r
            weight = 1 - c.clip_low if free < 1 - c.clip_low else 1 + c.clip_high if free > 1 + c.clip_high else free
            out.append((-weight * a[t] * new[t], -weight * a[t], weight != free))
    return out


def slow_loss(
    config: Config, new: list[list[float]], old: list[list[float]], advantages: list[list[float]]
) -> tuple[float, list[list[float]], float]:
    """(loss, d loss / d log-prob of every token, number of touched tokens) of a whole optimizer batch."""
    c, o, rows, tokens = config.loss, load_loss(config).options, len(new), sum(map(len, new))
    chosen = slow_chosen(old, advantages, o.share) if c.kind == "kl_cov" else set()
    total, gradients, touched = 0.0, [], 0.0
    for b in range(rows):
        terms = slow_row(c, o, new[b], old[b], advantages[b], {t for row, t in chosen if row == b})
        divisor = {
            "token_mean": tokens,
            "sequence_mean": len(new[b]) * rows,
            "constant": config.rollout.max_new_tokens * rows,
        }[c.aggregation]
        total += sum(value for value, _, _ in terms) / divisor
        gradients.append([slope / divisor for _, slope, _ in terms])
        touched += sum(flag for _, _, flag in terms)
    return total, gradients, touched


# ------------------------------------------------------------------------------------------------------ value and gradient


def pad(rows: list[torch.Tensor], width: int) -> torch.Tensor:
    return torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in rows])


def fast_loss(
    config: Config, new: list, old: list, advantages: torch.Tensor, split: list[list[int]]
) -> tuple[float, list[np.ndarray], float]:
    """The code under test, micro-batch by micro-batch: the loss and row_weights with the totals of the whole batch."""
    loss_of_kind = load_loss(config)
    lengths = [len(row) for row in new]
    rollouts = make_rows(lengths)
    fill(rollouts, sampler_logprobs=[np.array(row) for row in old])
    loss_of_kind.prepare(rollouts, advantages)
    leaves = [torch.tensor(row, dtype=torch.float64, requires_grad=True) for row in new]
    totals = BatchTotals(sum(lengths), len(lengths), config.rollout.max_new_tokens)
    total, touched = 0.0, 0.0
    for rows in split:
        width = max(lengths[b] for b in rows)
        mask_BT = pad([torch.ones(lengths[b], dtype=torch.float64) for b in rows], width)
        mine = advantages[rows]
        x = LossInputs(
            logprobs_BT=pad([leaves[b] for b in rows], width),
            old_logprobs_BT=pad([torch.tensor(old[b], dtype=torch.float64) for b in rows], width),
            sampler_logprobs_BT=torch.zeros_like(mask_BT),
            ref_logprobs_BT=None,
            entropy_BT=None,
            advantages_BT=(mine[:, None] if mine.ndim == 1 else mine[:, :width]) * mask_BT,
            mask_BT=mask_BT,
            rows=rows,
            rollouts=rollouts,
        )
        loss_BT, logged = loss_of_kind(x)
        assert loss_BT.shape == mask_BT.shape and all(values.shape == mask_BT.shape for values in logged.values())
        weights_B = row_weights(torch.tensor([lengths[b] for b in rows]), config.loss.aggregation, totals)
        loss = (loss_BT * mask_BT * weights_B[:, None]).sum()
        loss.backward()
        total += loss.item()
        touched += float((logged["clip_fraction"] * mask_BT).sum())
    return total, [leaf.grad.numpy() for leaf in leaves if leaf.grad is not None], touched


SPLITS = [[list(range(8))], [[0, 3], [6, 1, 4], [2, 5, 7]], [[7, 2], [1], [6, 0, 5, 3], [4]], [[b] for b in range(8)]]


@pytest.mark.parametrize("case", CASES, ids=NAMES)
@pytest.mark.parametrize("per_token", [False, True], ids=["row", "token"])
@pytest.mark.parametrize("seed", range(3))
def test_value_and_gradient_for_any_split(case, per_token, seed):
    """Random ragged batches, advantages per row and per token, four ways to split them into padded micro-batches."""
    rng = np.random.default_rng(seed)
    config = make_config(loss=case)
    lengths = rng.permutation(LENGTHS).tolist()
    old = [rng.normal(-2, 1, length).tolist() for length in lengths]
    spread = SPREAD.get(case["kind"], 0.3)
    new = [[o + d for o, d in zip(row, rng.normal(0, spread, len(row)), strict=True)] for row in old]
    if per_token:
        tokens = rng.normal(0, 1, (8, max(lengths)))
        tokens[6:] = 0
        slow_advantages = [tokens[b, :length].tolist() for b, length in enumerate(lengths)]
        advantages = torch.tensor(tokens)
    else:
        slow_advantages = [[ADVANTAGES[b]] * length for b, length in enumerate(lengths)]
        advantages = torch.tensor(ADVANTAGES, dtype=torch.float64)
    want, want_gradient, want_touched = slow_loss(config, new, old, slow_advantages)
    assert case["kind"] == "r2vpo" or 0 < want_touched < sum(lengths), "the case is not what it claims to be"
    for split in SPLITS:
        got, gradient, touched = fast_loss(config, new, old, advantages, split)
        # The terms nearly cancel, and row_weights are float32: 1e-7 of their sum without signs.
        assert got == pytest.approx(want, rel=1e-6, abs=1e-7) and touched == want_touched
        for b in range(8):
            np.testing.assert_allclose(gradient[b], want_gradient[b], rtol=1e-6, atol=1e-12)


def test_every_kind_is_covered():
    assert {case["kind"] for case in CASES} == set(LOSSES)


def drifted(logprobs_BT: torch.Tensor, advantage: float) -> LossInputs:
    """Whole rows whose old log-probs are 0."""
    zeros, ones = torch.zeros_like(logprobs_BT), torch.ones_like(logprobs_BT)
    rows = list(range(len(zeros)))
    return LossInputs(
        logprobs_BT, zeros, zeros, None, None, advantage * ones, ones, rows, make_rows([1] * len(rows), 1)
    )


def test_gspo_is_one_ratio_per_sequence():
    """Token ratios 1.1 and 0.9: s = sqrt(0.99). The gradient of -s A, averaged over 2 tokens, is -s A / 2 at each."""
    new = torch.tensor([[math.log(1.1), math.log(0.9)]], dtype=torch.float64, requires_grad=True)
    config = make_config(loss={"kind": "gspo", "clip_low": 0.1, "clip_high": 0.1, "aggregation": "sequence_mean"})
    loss, _ = load_loss(config)(drifted(new, 2.0))
    loss.mean().backward()
    s = math.sqrt(0.99)
    np.testing.assert_allclose(loss.detach(), [[-2 * s, -2 * s]])
    assert new.grad is not None
    np.testing.assert_allclose(new.grad, [[-s, -s]])


def test_minpro_weighs_by_the_smallest_ratio_before_the_token_as_well():
    """Ratios 0.9, 1.5, 0.5, 1 have prefix minima 1, 0.9, 0.9, 0.5, so weights 0.9, 1.35, 0.45, 0.5. The second row begins
    above 1, which counts: 1.2, 1.2, 2.4 and 1.8. With a clip to 0.48 and 2 one weight of each row changes."""
    ratios = torch.tensor([[0.9, 1.5, 0.5, 1.0], [1.2, 1.0, 2.4, 1.8]], dtype=torch.float64)
    x = replace(drifted(ratios.log(), 1.0), old_logprobs_BT=torch.full((2, 4), -1.0, dtype=torch.float64))
    new = (x.old_logprobs_BT + ratios.log()).requires_grad_()
    loss, logged = load_loss(make_config(loss={"kind": "minpro", "clip_low": 0.52, "clip_high": 1.0}))(
        replace(x, logprobs_BT=new)
    )
    loss.sum().backward()
    assert new.grad is not None
    np.testing.assert_allclose(-new.grad, [[0.9, 1.35, 0.48, 0.5], [1.2, 1.2, 2.0, 1.8]])
    np.testing.assert_allclose(loss.detach(), new.detach() * new.grad)
    assert logged["clip_fraction"].tolist() == [[0, 0, 1, 0], [0, 0, 1, 0]]


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope"),
    [
        (3.5, -1.0, 3.0, 0.0),  # capped at c = 3: no gradient left
        (2.5, -1.0, 2.5, 2.5),  # below c: flows, as without the dual clip
        (0.5, -1.0, 0.8, 0.0),  # the lower clip, as ever
        (3.5, 1.0, -1.2, 0.0),  # A > 0: the upper clip, the dual clip has no say
    ],
)
def test_dual_clip_side(ratio, advantage, value, slope):
    x = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, 1, dtype=torch.float64)
    loss, touched = policy_loss(x, 0 * one, advantage * one, 0.2, 0.2, dual_clip=3.0)
    loss.backward()
    assert x.grad is not None
    assert (loss.item(), x.grad.item()) == pytest.approx((value, slope)) and touched.item() is (slope == 0)


def test_kl_cov_chooses_among_kept_rows_only():
    """Covariances by hand: kept tokens have A = 1, 1, -1 and log p = -1, -3, -2, so means 1/3 and -2; the products are
    2/3, -2/3 and 0. The dropped row would win by far. Half of three tokens, rounded down, is one."""
    logprobs = [np.array([-1.0, -3.0]), np.array([-2.0]), np.array([100.0])]
    advantages, keep = torch.tensor([1.0, -1.0, 50.0]), np.array([True, True, False])
    chosen = high_covariance(logprobs, advantages, keep, 0.5)
    assert chosen.tolist() == [[True, False], [False, False], [False, False]]
    assert high_covariance(logprobs, advantages, keep, 1.0).tolist() == [[True, True], [True, False], [False, False]]
    assert high_covariance(logprobs, advantages, keep, 0.001).sum() == 1  # at least one
    assert high_covariance(logprobs, advantages, keep, 0.0).sum() == 0
    assert high_covariance(logprobs, advantages, ~keep & False, 0.5).sum() == 0
    padded = advantages[:, None].repeat(1, 5)  # advantages per token may be wider than the longest answer
    assert torch.equal(high_covariance(logprobs, padded, keep, 0.5), chosen)


def test_tis_weighs_the_policy_term_and_not_the_kl():
    """The sampler found a token half as likely: w = 2. Ratio 1, A = 3 and k1 = log 4 with coefficient 0.5."""
    zero = torch.zeros(1, 1)
    x = replace(drifted(zero, 3.0), sampler_logprobs_BT=zero - math.log(2), ref_logprobs_BT=zero - math.log(4))
    loss, _ = load_loss(make_config(loss={"tis_cap": 9.0, "kl_coef": 0.5, "kl_kind": "k1"}))(x)
    assert loss.item() == pytest.approx(-2 * 3 + 0.5 * math.log(4))


# ------------------------------------------------------------------------------------------------------ the whole update


def gradients(
    config: Config, rollouts: Rollouts, advantages: list[float], ranks: object = None
) -> dict[str, torch.Tensor]:
    """Gradients as the optimizer sees them in the last update of a step."""
    policy, seen = Policy(config, CPU), {}
    policy.ranks = ranks or policy.ranks  # type: ignore[assignment]
    policy.optimizer.register_step_pre_hook(
        lambda *_: seen.update({n: p.grad.clone() for n, p in policy.model.named_parameters()})
    )
    values = torch.tensor(advantages, dtype=torch.float64)
    update_policy(policy, Method(config), rollouts, values)
    return seen


def stale_rollouts(folder, spread: float) -> Rollouts:
    """Rows whose recorded log-probs differ at random from the policy's, so that ratios are not 1."""
    rollouts = make_rows(LENGTHS)
    score_rows(Policy(make_config(folder), CPU), rollouts)
    rng = np.random.default_rng(0)
    fill(
        rollouts,
        sampler_logprobs=[
            (row + rng.normal(0, spread, len(row))).astype(np.float32) for row in rollouts.sampler_logprobs
        ],
    )
    return rollouts


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_B1_micro_batches_and_ranks_do_not_change_the_gradient(tied_model, case):
    """One forward pass, about three, one per row, and two ranks whose gradients are summed: all equal to the slow loss on
    log-probs from plain transformers in float64. The group without signal counts wherever a term acts on it."""
    rollouts = stale_rollouts(tied_model, SPREAD.get(case["kind"], 0.3))
    sections = {"loss": case | {"old_logprobs": "sampler"}, "train": {"grad_clip": 1e9}}
    model = AutoModelForCausalLM.from_pretrained(tied_model, dtype=torch.float64).eval()
    scored = []
    for prompt, response in zip(rollouts.prompt_ids, rollouts.response_ids, strict=True):
        logp = model(torch.from_numpy(np.concatenate([prompt, response]))[None]).logits[0].log_softmax(-1)
        scored.append(logp[len(prompt) - 1 : -1].gather(-1, torch.from_numpy(response)[:, None])[:, 0])
    new, old = [row.tolist() for row in scored], [row.astype(np.float64).tolist() for row in rollouts.sampler_logprobs]
    spread_out = [[a] * length for a, length in zip(ADVANTAGES, LENGTHS, strict=True)]
    _, slopes, _ = slow_loss(make_config(tied_model, **sections), new, old, spread_out)
    torch.autograd.backward(scored, [torch.tensor(row, dtype=torch.float64) for row in slopes])
    want = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for budget in (100_000, 60, 1):
        config = make_config(tied_model, **sections | {"train": {"grad_clip": 1e9, "microbatch_tokens": budget}})
        assert_close(gradients(config, rollouts, ADVANTAGES), want)
    halves = [
        gradients(
            config,
            rollouts,
            ADVANTAGES,
            SimpleNamespace(index=i, count=2, gather=lambda value: [value], engine=lambda _, i=i: (i, 2)),
        )
        for i in range(2)
    ]
    assert_close({name: halves[0][name] + halves[1][name] for name in halves[0]}, want)


@pytest.mark.parametrize("case", EACH_KIND, ids=[case["kind"] for case in EACH_KIND])
def test_one_update_per_rollout_is_the_plain_policy_gradient(tied_model, case):
    """All ratios are 1: GSPO is GRPO with sequence_mean, LUSPO the sum over tokens per sequence averaged over sequences,
    every other loss GRPO with its own divisor (METHODS 20.2). So it is against the log-probs of an exact sampler, which
    differ by rounding."""
    rollouts = stale_rollouts(tied_model, 2e-6)
    grpo = {"aggregation": case.get("aggregation", "token_mean")}
    scale = 1.0
    if case["kind"] == "luspo":  # constant divides by max_new_tokens x rows
        grpo, scale = {"aggregation": "constant"}, 64.0
    want = gradients(make_config(tied_model, loss=grpo, train={"grad_clip": 1e9}), rollouts, ADVANTAGES)
    for source in ("trainer", "sampler"):
        loss = case | {"old_logprobs": source}
        config = make_config(tied_model, loss=loss, train={"grad_clip": 1e9, "microbatch_tokens": 60})
        assert_close(gradients(config, rollouts, ADVANTAGES), {name: scale * g for name, g in want.items()}, rtol=2e-5)


@pytest.mark.parametrize("case", EACH_KIND, ids=[case["kind"] for case in EACH_KIND])
@pytest.mark.parametrize("train", [{"batch_size": 4}, {"inner_epochs": 2}])
def test_later_updates_see_other_ratios(tied_model, case, train):
    """Two updates: finite, ratios move, and every kind but GRPO itself ends elsewhere than GRPO."""
    ends = []
    for loss in (case, {"aggregation": case.get("aggregation", "token_mean")}):
        policy = Policy(make_config(tied_model, loss=loss, train=train | {"learning_rate": 0.03}), CPU)
        rollouts = make_rows(LENGTHS)
        score_rows(policy, rollouts)
        values = torch.tensor(ADVANTAGES, dtype=torch.float64)
        logged = update_policy(policy, Method(policy.config), rollouts, values)
        assert np.isfinite(list(logged.values())).all() and logged["updates"] == 2 and logged["ratio"] != 1
        ends.append(torch.cat([p.detach().flatten() for p in policy.model.parameters()]))
    assert torch.equal(*ends) is (case["kind"] == "grpo")


def test_luspo_leaves_the_kl_term_alone(tied_model):
    """The length multiplies the policy term only: with next to no advantage GSPO and LUSPO are the same KL pull."""
    rollouts = make_rows(LENGTHS)
    found = []
    for kind in ("gspo", "luspo"):
        config = make_config(tied_model, loss={"kind": kind, "aggregation": "sequence_mean", "kl_coef": 0.5})
        policy = Policy(config, CPU)
        with torch.no_grad():  # away from the reference
            for p in policy.model.parameters():
                p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
        values = torch.tensor([1e-12, -1e-12] * 4, dtype=torch.float64)
        found.append(update_policy(policy, Method(config), rollouts, values))
    assert found[0]["kl"] > 1e-3 and found[0]["grad_norm"] > 1e-3
    assert found[0]["grad_norm"] == pytest.approx(found[1]["grad_norm"], rel=1e-5)


# ------------------------------------------------------------------------------------------------------ R2VPO's lam


def test_r2vpo_lam_follows_the_variance_and_survives_json(tied_model):
    """lam + rate * (variance - target), never below 0; a step without updates or with broken numbers leaves it."""
    assert next_lam(1.0, 0.05, 2.0, 0.01) == pytest.approx(1.08) and next_lam(0.1, 0.0, 20.0, 0.01) == 0.0
    loss = {"kind": "r2vpo", "options": {"lam": 0.5, "rate": 10.0, "target": 0.02}, "old_logprobs": "sampler"}
    config = make_config(tied_model, loss=loss)
    method, policy, rollouts = Method(config), Policy(config, CPU), stale_rollouts(tied_model, 0.3)
    values = torch.tensor(ADVANTAGES, dtype=torch.float64)
    micro = [math.exp(-d) - 1 for d in drift(policy, rollouts)]
    variance = sum(x * x for x in micro) / len(micro)
    logged = update_policy(policy, method, rollouts, values)
    assert logged["ratio_variance"] == pytest.approx(variance, rel=1e-4)
    assert logged["r2vpo_lam"] == pytest.approx(0.5 + 10 * (variance - 0.02), rel=1e-4)
    again = Method(config)
    again.loss.state |= json.loads(json.dumps(method.loss.state))
    assert again.loss.state == method.loss.state != Method(config).loss.state
    skipped = update_policy(policy, again, rollouts, 0 * values)
    assert skipped["updates"] == 0 and again.loss.state == method.loss.state
    assert again.loss.after_update({"ratio_variance": math.nan}) == method.loss.state
    assert Method(make_config(tied_model)).loss.state == {}


def drift(policy: Policy, rollouts: Rollouts) -> list[float]:
    """Recorded minus true log-prob of every token."""
    exact = copied(rollouts)
    score_rows(policy, exact)
    return (np.concatenate(rollouts.sampler_logprobs) - np.concatenate(exact.sampler_logprobs)).tolist()


# ------------------------------------------------------------------------------------------------------ config


@pytest.mark.parametrize(
    ("loss", "key"),
    [
        ({"kind": "gpso"}, "loss.kind='gpso'.*did you mean 'gspo'"),
        ({"kind": "gspo"}, "loss.aggregation='token_mean'.*set loss.aggregation=sequence_mean"),
        ({"kind": "luspo", "aggregation": "constant"}, "loss.aggregation='constant'.*sequence_mean"),
        ({"kind": "cispo", "aggregation": "sequence_mean"}, "loss.aggregation='sequence_mean'.*token_mean"),
        ({"kind": "kl_cov", "aggregation": "constant"}, "loss.aggregation='constant'.*token_mean or sequence_mean"),
        ({"dual_clip": 1.0}, "loss.dual_clip=1.0"),
        ({"dual_clip": -3.0}, "loss.dual_clip=-3.0"),
        ({"dual_clip": 3.0, "kind": "cispo"}, "loss.dual_clip=3.0.*'cispo'"),
        ({"tis_cap": 2.0, "old_logprobs": "sampler"}, "loss.tis_cap=2.0.*loss.old_logprobs=trainer"),
        ({"tis_cap": -1.0}, "loss.tis_cap=-1.0"),
        ({"kind": "cispo", "options": {"cap": 0.5}}, "loss.options.cap=0.5 must be at least 1"),
        ({"kind": "kl_cov", "options": {"share": 1.5}}, "loss.options.share=1.5"),
        ({"kind": "r2vpo", "options": {"lam": -1.0}}, "loss.options.lam=-1.0"),
        ({"kind": "dhpo", "options": {"token_weight": 2.0}}, "loss.options.token_weight=2.0"),
        ({"kind": "cispo", "options": {"cpa": 2.0}}, "unknown key loss.options.cpa; did you mean loss.options.cap"),
        ({"options": {"cap": 5.0}}, "unknown key loss.options.cap; loss.options takes no keys here"),
        ({"cispo_cap": 5.0}, "unknown key loss.cispo_cap.*Settings of a single loss belong in loss.options"),
    ],
)
def test_what_contradicts_the_loss_is_refused(loss, key):
    with pytest.raises(UserError, match=key) as error:
        config = make_config(loss=loss)
        validate(config)
        load_loss(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["r2vpo", "dhpo", "minpro"])
def test_unverified_losses_say_so_in_their_yaml(kind):

    path = ROOT / f"configs/methods/{kind}.yaml"
    assert "unverified" in path.read_text().splitlines()[0]
    assert load_config(ROOT / "configs/demo/stage1.yaml", [f"method={path}"]).loss.kind == kind
