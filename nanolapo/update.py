"""The policy update of one step: old log-probs, optimizer batches, micro-batches, loss, backward, optimizer step.

One denominator per optimizer batch: token and row counts are taken over all ranks and micro-batches before the first
backward pass, every token's loss is multiplied by its weight, and gradients are summed. So splitting the same rows over
micro-batches or ranks in any way gives the same gradient. A loss that must know how far the policy has moved on the whole
batch (needs_drift) is told before its first backward pass.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanolapo.losses import BatchTotals, Loss, LossInputs, row_weights
from nanolapo.methods.base import Method
from nanolapo.microbatches import MicroBatch, make_microbatch, plan_microbatches
from nanolapo.policy import Policy
from nanolapo.ranks import Ranks, to_device
from nanolapo.rollouts import Rollouts


@dataclass(frozen=True)
class OptimizerBatch:
    """The rows of one optimizer step: counts over all of them, and which rank trains which rows."""

    totals: BatchTotals
    rows_by_rank: list[list[list[int]]]  # rows_by_rank[rank] is that rank's micro-batches, each a list of rows
    microbatches: list[list[int]]  # this rank's; with a sharded model all ranks have equally many, some empty
    has_signal: bool  # some advantage is not 0; else the batch is skipped: KL alone would move the weights


class Tally:
    """Sums of per-token values, the number of tokens in each sum, and maxima. They stay on the device, in float64, until
    `over_ranks` reads them once a step."""

    def __init__(self) -> None:
        self.sums: defaultdict[str, Any] = defaultdict(float)
        self.counts: defaultdict[str, Any] = defaultdict(float)
        self.maxima: dict[str, Any] = {}

    def add(self, name: str, values_BT: Tensor, mask_BT: Tensor) -> None:
        self.sums[name] += (values_BT * mask_BT).sum().double()
        self.counts[name] += mask_BT.sum().double()

    def over_ranks(self, ranks: Ranks) -> Tally:
        """Return the tally of all ranks together, as plain numbers."""
        total = Tally()
        parts = (self.sums, self.counts, self.maxima)
        on_device = [x.double() for part in parts for x in part.values()]
        values = iter(torch.stack(on_device).tolist() if on_device else [])  # the step's one transfer
        mine = [{name: next(values) for name in part} for part in parts]
        for sums, counts, maxima in ranks.gather(mine):
            for name in sums:
                total.sums[name] += sums[name]
                total.counts[name] += counts[name]
            for name, x in maxima.items():
                total.maxima[name] = max(total.maxima.get(name, x), x)
        return total


def update_policy(policy: Policy, method: Method, rollouts: Rollouts, advantages: Tensor) -> dict[str, float]:
    """Train on the kept rows of one step and return what to log. Loss and denominators leave out the others.

    advantages: [B], or [B, T] per token.
    """
    config = policy.config
    batches = plan_batches(policy, method.loss, rollouts, advantages)
    old = old_logprobs(policy, method.loss, rollouts, batches)
    method.loss.prepare(rollouts, advantages)
    tally, norms, learning_rate, first_update = Tally(), [], policy.learning_rate(), policy.num_steps

    for batch in batches * config.train.inner_epochs:
        if not batch.has_signal:
            continue
        weights_are_the_samplers = policy.num_steps == first_update
        exact = weights_are_the_samplers and config.loss.old_logprobs == "trainer"  # no rounding between two passes
        if method.loss.needs_drift:
            method.loss.drift = 0.0 if exact else mean_drift(policy, rollouts, batch, old)
        for rows in batch.microbatches:
            micro = make_microbatch(rollouts, rows, policy.device)
            if not rows:
                keep_in_step(policy, micro)
                continue
            inputs = loss_inputs(policy, rollouts, advantages, micro, None if exact else old)
            if weights_are_the_samplers:
                tally_mismatch(tally, inputs)
            loss_BT, logged = method.loss(inputs)
            weights_B = row_weights(micro.lengths_B, config.loss.aggregation, batch.totals)
            loss = (loss_BT * inputs.mask_BT * weights_B[:, None]).sum()
            loss.backward()
            for name, values_BT in (logged | {"loss": loss_BT.detach() * weights_B[:, None]}).items():
                tally.add(name, values_BT, inputs.mask_BT)
        norms.append(policy.step())  # gradients are summed over ranks here, so a NaN on one is seen by all

    if not norms:  # nothing to learn from, but sampler and trainer are compared at every step
        drawn = [b for b, row in enumerate(rollouts.rows) if not row.unmatched]
        micro = make_microbatch(rollouts, drawn[: rollouts.group_size] or range(rollouts.group_size), policy.device)
        with torch.no_grad():
            inputs = loss_inputs(policy, rollouts, advantages, micro, None)
        if policy.ranks.is_main:  # all ranks compare the same rows
            tally_mismatch(tally, inputs)
    trained = summarize(tally.over_ranks(policy.ranks), norms, len(batches) * config.train.inner_epochs, learning_rate)
    return trained | method.loss.after_update(trained) | {"rank_imbalance": rank_imbalance(batches, rollouts)}


def plan_batches(policy: Policy, loss: Loss, rollouts: Rollouts, advantages: Tensor) -> list[OptimizerBatch]:
    """Cut the step's rows into optimizer batches, and each into micro-batches.

    A row whose advantage is zero has no gradient, so its forward pass is skipped, unless the loss acts without advantage.
    The row still counts in the denominators.
    """
    config, ranks, lengths_B, keep_B = policy.config, policy.ranks, rollouts.lengths_B, rollouts.keep_B
    signal_B = (advantages.reshape(len(rollouts), -1) != 0).any(dim=1).numpy()
    batches, size = [], config.train.batch_size or len(rollouts)
    for first in range(0, len(rollouts), size):
        rows = np.arange(first, min(first + size, len(rollouts)))
        kept = rows[keep_B[rows]]
        totals = BatchTotals(int(lengths_B[kept].sum()), len(kept), config.rollout.max_new_tokens)
        active = kept if loss.acts_without_advantage else kept[signal_B[kept]]
        active = active[lengths_B[active] > 0]
        rows_by_rank = plan_microbatches(rollouts, active.tolist(), ranks.count, config.train.microbatch_tokens)
        mine = [rows_of_micro for rows_of_micro in rows_by_rank[ranks.index] if rows_of_micro or policy.sharded]
        batches.append(OptimizerBatch(totals, rows_by_rank, mine, bool(signal_B[active].any())))
    return batches


def rank_imbalance(batches: list[OptimizerBatch], rollouts: Rollouts) -> float:
    """Return tokens of the fullest rank / mean tokens per rank. 1 is perfect; above 1 the other ranks wait."""
    sizes = [len(prompt) + int(length) for prompt, length in zip(rollouts.prompt_ids, rollouts.lengths_B, strict=True)]
    fullest, mean = 0.0, 0.0
    for batch in batches:
        tokens = [sum(sizes[row] for rows in of_rank for row in rows) for of_rank in batch.rows_by_rank]
        fullest, mean = fullest + max(tokens), mean + sum(tokens) / len(tokens)
    return fullest / mean if mean else 1.0


def old_logprobs(
    policy: Policy, loss: Loss, rollouts: Rollouts, batches: list[OptimizerBatch]
) -> Sequence[np.ndarray] | None:
    """Return log-probs [T] of every row under the policy before the updates of this step.

    The sampler has recorded them (loss.old_logprobs=sampler), or the trainer scores its rows now. The first update does not
    need them, for its own forward pass gives them, and every ratio is 1. Returns None if no update of this step needs them.
    This also fills rollouts.old_entropies if the loss needs them.
    """
    from_sampler = policy.config.loss.old_logprobs == "sampler"
    several = len(batches) * policy.config.train.inner_epochs > 1
    old = rollouts.sampler_logprobs if from_sampler else None
    if loss.needs_entropy or (several and not from_sampler):
        to_score = [batch for batch in batches if batch.has_signal]
        if policy.config.train.inner_epochs == 1 and not loss.needs_entropy:
            to_score = to_score[1:]
        mine = [rows for batch in to_score for rows in batch.microbatches]
        scored, entropies = score(policy, rollouts, mine, loss.needs_entropy)
        rollouts.old_entropies = {
            row: values for part in policy.ranks.gather(entropies) for row, values in part.items()
        }
        if not from_sampler:
            old = [scored.get(row, sampled) for row, sampled in enumerate(rollouts.sampler_logprobs)]
    return old


def mean_drift(policy: Policy, rollouts: Rollouts, batch: OptimizerBatch, old: Sequence[np.ndarray] | None) -> float:
    """Return the mean of log p_old - log p over all tokens of an optimizer batch, whichever ranks train them."""
    assert old is not None
    scored, _ = score(policy, rollouts, batch.microbatches)
    drifts = [old[row] - logprobs for row, logprobs in scored.items()]
    sums = policy.ranks.gather((sum(float(drift.sum(dtype=np.float64)) for drift in drifts), sum(map(len, drifts))))
    total, count = map(sum, zip(*sums, strict=True))
    return total / max(1, count)


def loss_inputs(
    policy: Policy, rollouts: Rollouts, advantages: Tensor, micro: MicroBatch, old: Sequence[np.ndarray] | None
) -> LossInputs:
    """Run the forward passes of one micro-batch and put everything the loss may want into [B, T]."""
    logprobs_BT, _ = policy.logprobs(micro)
    ref_logprobs_BT = None
    if policy.reference is not None:
        with torch.no_grad():
            ref_logprobs_BT, _ = policy.logprobs(micro, reference=True)
    width, entropies = micro.mask_BT.shape[1], rollouts.old_entropies
    old_BT = logprobs_BT.detach() if old is None else micro.pad([old[row] for row in micro.rows])
    sampler_BT = micro.pad([rollouts.rows[row].sampler_logprobs for row in micro.rows])
    # Given tokens were not sampled. If chosen at random, that probability is their old one, else the old is the sampler's
    given_BT = first_tokens([rollouts.rows[row].num_given for row in micro.rows], micro.mask_BT)
    by_lot_BT = first_tokens([rollouts.rows[row].num_by_lot for row in micro.rows], micro.mask_BT)
    mine = to_device(advantages[micro.rows].float(), policy.device)
    advantages_BT = (mine[:, None] if mine.ndim == 1 else mine[:, :width]) * micro.mask_BT
    return LossInputs(
        logprobs_BT=logprobs_BT,
        old_logprobs_BT=torch.where(by_lot_BT, sampler_BT, old_BT),
        sampler_logprobs_BT=torch.where(given_BT & ~by_lot_BT, old_BT, sampler_BT),
        ref_logprobs_BT=ref_logprobs_BT,
        entropy_BT=micro.pad([entropies[row] for row in micro.rows]) if entropies else None,
        advantages_BT=advantages_BT,
        mask_BT=micro.mask_BT,
        rows=micro.rows,
        rollouts=rollouts,
    )


def first_tokens(counts: Sequence[int], mask_BT: Tensor) -> Tensor:
    """Return the first tokens of each row, so many as `counts` says: bool [B, T]."""
    places_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    return places_T[None, :] < to_device(np.array(counts, dtype=np.int64), mask_BT.device)[:, None]


def keep_in_step(policy: Policy, micro: MicroBatch) -> None:
    """Take part in the passes of the other ranks, in their order, with a micro-batch that has no row. It adds 0 to every
    gradient. No loss sees it, because nothing can be looked up for it."""
    logprobs_BT, _ = policy.logprobs(micro)
    if policy.reference is not None:
        with torch.no_grad():
            policy.logprobs(micro, reference=True)
    logprobs_BT.sum().backward()


@torch.no_grad()
def score(
    policy: Policy, rollouts: Rollouts, microbatches: list[list[int]], with_entropy: bool = False
) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """Log-probs, and entropies if wanted, of these rows under the policy as it is now: row -> float32 [T]."""
    micros = [make_microbatch(rollouts, rows, policy.device) for rows in microbatches]
    outputs = [policy.logprobs(micro, with_entropy) for micro in micros]  # all of them, before the first is read
    scored: dict[int, np.ndarray] = {}
    entropies: dict[int, np.ndarray] = {}
    for micro, (logprobs_BT, entropy_BT) in zip(micros, outputs, strict=True):
        for found, values_BT in ((scored, logprobs_BT), (entropies, entropy_BT)):
            if values_BT is not None:
                values = values_BT.cpu().numpy()
                found |= {row: values[b, : micro.lengths[b]] for b, row in enumerate(micro.rows)}
    return scored, entropies


def tally_mismatch(tally: Tally, x: LossInputs) -> None:
    """d = |logp_trainer - logp_sampler| on the sampled tokens: the same weights must give the same numbers. Rows sampled at
    another temperature are left out, and tokens that were given."""
    matched_B = to_device(np.array([not x.rollouts.rows[row].unmatched for row in x.rows]), x.mask_BT.device)
    drawn_BT = ~first_tokens([x.rollouts.rows[row].num_given for row in x.rows], x.mask_BT)
    mask_BT = x.mask_BT * matched_B[:, None] * drawn_BT
    difference_BT = (x.logprobs_BT.detach() - x.sampler_logprobs_BT).abs() * mask_BT
    tally.add("mismatch", difference_BT, mask_BT)
    largest = difference_BT.max()
    tally.maxima["mismatch_max"] = torch.maximum(tally.maxima.get("mismatch_max", largest), largest)


def summarize(tally: Tally, norms: list[float], planned: int, learning_rate: float) -> dict[str, float]:
    """Means from sums. `loss` is the mean over the optimizer steps taken; near zero is normal in GRPO."""
    compared = tally.counts["mismatch"]
    means = {name: tally.sums[name] / count if count else math.nan for name, count in tally.counts.items()}
    finite = [norm for norm in norms if math.isfinite(norm)]
    return means | {
        "loss": tally.sums["loss"] / max(1, len(norms)),
        "grad_norm": sum(finite) / max(1, len(finite)),
        "learning_rate": learning_rate,
        "mismatch_max": tally.maxima["mismatch_max"] if compared else math.nan,
        "compared_tokens": compared,
        "trained_tokens": tally.counts["loss"],
        "updates": float(len(finite)),
        "updates_skipped": float(planned - len(norms)),
        "updates_bad": float(len(norms) - len(finite)),
    }
