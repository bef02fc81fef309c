"""The policy update of one step: old log-probs, optimizer batches, micro-batches, loss, backward, optimizer step.

One denominator per optimizer batch: token and row counts are taken over all ranks and micro-batches before the first
backward pass, every token's loss is multiplied by its weight, and gradients are summed. So splitting the same rows over
micro-batches or ranks in any way gives the same gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanolapo.config import RunStopped
from nanolapo.losses import BatchTotals, acts_without_advantage, row_weights
from nanolapo.methods.base import LossInputs, Method
from nanolapo.microbatches import MicroBatch, make_microbatch, plan_microbatches
from nanolapo.policy import Policy
from nanolapo.ranks import Ranks
from nanolapo.rollouts import Rollouts


class BadStepsError(RunStopped):
    """Too many optimizer steps in a row had a gradient that is not finite."""


@dataclass(frozen=True)
class OptimizerBatch:
    """The rows of one optimizer step: counts over all of them, and this rank's share cut into micro-batches."""

    totals: BatchTotals
    microbatches: list[list[int]]  # the ranks of a sharded model all have equally many, some of them without rows
    has_signal: bool  # some token has an advantage; without one, KL alone would move the weights, so it is skipped
    # Tokens, prompts included: of the fullest rank if each trained what it sampled, of the fullest rank as the rows are
    # shared out, and the mean over ranks.
    loads: tuple[float, int, float]


class Tally:
    """Sums over tokens (maxima for names that end in _max), brought together over ranks once per step."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def add(self, name: str, amount: float) -> None:
        old = self.values.get(name, 0.0)
        self.values[name] = max(old, amount) if name.endswith("_max") else old + amount

    def over_ranks(self, ranks: Ranks) -> dict[str, float]:
        total = Tally()
        for values in ranks.gather(self.values):
            for name, amount in values.items():
                total.add(name, amount)
        return total.values


def update_policy(
    policy: Policy, method: Method, rollouts: Rollouts, advantages: Tensor, keep_B: np.ndarray, ranks: Ranks
) -> dict[str, float]:
    """Train on the kept rows of one step and return what to log.

    advantages: [B], or [B, T] per token; keep_B: rows that count, the others leave loss and denominators alike. Raises
    BadStepsError after train.max_bad_steps gradients in a row that were not finite (their steps are not taken).
    """
    config = policy.config
    batches = plan_batches(policy, rollouts, advantages, keep_B, ranks)
    tally, norms, learning_rate = Tally(), [], policy.learning_rate()
    first_update = policy.num_steps
    old: dict[int, np.ndarray] | None = None  # None: one update per step, its own forward pass gives the old log-probs
    several = len(batches) * config.train.inner_epochs > 1
    if method.needs_entropy or (several and config.loss.old_logprobs == "trainer"):
        mine = [rows for batch in batches if batch.has_signal for rows in batch.microbatches]
        scored, entropies = score(policy, rollouts, mine, method.needs_entropy)
        old = dict(enumerate(rollouts.sampler_logprobs)) | scored
        rollouts.old_entropies = {row: values for part in ranks.gather(entropies) for row, values in part.items()}
    if config.loss.old_logprobs == "sampler":
        old = dict(enumerate(rollouts.sampler_logprobs))
    method.prepare_loss(rollouts, advantages, keep_B)

    for _ in range(config.train.inner_epochs):
        for batch in batches:
            if not batch.has_signal:
                continue
            weights_are_the_samplers = policy.num_steps == first_update
            for rows in batch.microbatches:
                micro = make_microbatch(rollouts, rows, policy.device)
                inputs = loss_inputs(policy, method, rollouts, advantages, micro, old)
                if weights_are_the_samplers:
                    tally_mismatch(tally, inputs)
                loss_BT, logged = method.loss(inputs)
                weights_B = row_weights(micro.lengths_B, config.loss.aggregation, batch.totals)
                loss = (loss_BT * inputs.mask_BT * weights_B[:, None]).sum()
                loss.backward()
                tally.add("loss", float(loss.detach()))
                tally.add("trained_tokens", float(inputs.mask_BT.sum()))
                for name, values_BT in logged.items():
                    tally.add(f"mean/{name}", float((values_BT * inputs.mask_BT).sum()))
            norms.append(policy.step())  # gradients are summed over ranks here, so a NaN on one is seen by all
            policy.bad_steps = 0 if math.isfinite(norms[-1]) else policy.bad_steps + 1
            if policy.bad_steps >= config.train.max_bad_steps:
                raise BadStepsError(
                    f"the gradient was not finite {policy.bad_steps} times in a row; the weights are unchanged since. "
                    "Lower train.learning_rate, or look for broken rollouts in rollouts.jsonl"
                )
    if not norms:  # nothing to learn from, but sampler and trainer are compared at every step
        micro = make_microbatch(rollouts, range(rollouts.group_size), policy.device)
        with torch.no_grad():
            inputs = loss_inputs(policy, method, rollouts, advantages, micro, None)
        if ranks.is_main:  # the same rows on all
            tally_mismatch(tally, inputs)
    trained = summarize(tally.over_ranks(ranks), norms, len(batches) * config.train.inner_epochs, learning_rate)
    return trained | method.after_update(trained) | rank_imbalance(batches)


def plan_batches(
    policy: Policy, rollouts: Rollouts, advantages: Tensor, keep_B: np.ndarray, ranks: Ranks
) -> list[OptimizerBatch]:
    """Cut the step's rows into optimizer batches, and each into this rank's micro-batches.

    A row whose advantage is zero gets no gradient unless the loss has a term without the advantage, so without one its
    forward pass is skipped; it still counts in the denominators.
    """
    config = policy.config
    lengths_B = rollouts.lengths_B
    sizes_B = lengths_B + np.array([len(ids) for ids in rollouts.prompt_ids])
    signal_B = (advantages.reshape(len(rollouts), -1) != 0).any(dim=1).numpy()
    _, engines = ranks.engine(config.rollout.tensor_parallel)
    batches, size = [], config.train.batch_size or len(rollouts)
    for first in range(0, len(rollouts), size):
        rows = np.arange(first, min(first + size, len(rollouts)))
        kept = rows[keep_B[rows]]
        totals = BatchTotals(int(lengths_B[kept].sum()), len(kept), config.rollout.max_new_tokens)
        active = kept if acts_without_advantage(config.loss) else kept[signal_B[kept]]
        active = active[lengths_B[active] > 0]
        plan = plan_microbatches(rollouts, active.tolist(), ranks.count, config.train.microbatch_tokens)
        mine = [rows_of_micro for rows_of_micro in plan[ranks.index] if rows_of_micro or policy.sharded]
        sampled = np.bincount(rollouts.group_B[active] % engines, sizes_B[active], minlength=engines)  # see sampling.py
        shared = [int(sizes_B[[row for micro in share for row in micro]].sum()) if any(share) else 0 for share in plan]
        loads = (float(sampled.max()) * engines / ranks.count, max(shared), sum(shared) / ranks.count)
        batches.append(OptimizerBatch(totals, mine, bool(signal_B[active].any()), loads))
    return batches


def rank_imbalance(batches: list[OptimizerBatch]) -> dict[str, float]:
    """Tokens of the fullest rank over the mean, 1 being perfect: the rest is time in which the other ranks wait."""
    as_sampled, as_shared, mean = np.array([batch.loads for batch in batches]).sum(axis=0)
    if not mean:
        return {"rank_imbalance_sampled": 1.0, "rank_imbalance": 1.0}
    return {"rank_imbalance_sampled": float(as_sampled / mean), "rank_imbalance": float(as_shared / mean)}


def loss_inputs(
    policy: Policy,
    method: Method,
    rollouts: Rollouts,
    advantages: Tensor,
    micro: MicroBatch,
    old: dict[int, np.ndarray] | None,
) -> LossInputs:
    """Run the forward passes of one micro-batch and put everything the loss may want into [B, T]."""
    logprobs_BT, _ = policy.logprobs(micro)
    ref_logprobs_BT = None
    if policy.reference is not None:
        with torch.no_grad():
            ref_logprobs_BT, _ = policy.logprobs(micro, reference=True)
    width, entropies = micro.mask_BT.shape[1], rollouts.old_entropies
    mine = advantages[micro.rows].to(policy.device, torch.float32)
    advantages_BT = (mine[:, None] if mine.ndim == 1 else mine[:, :width]) * micro.mask_BT
    sampler_BT = micro.pad([rollouts.rows[row].sampler_logprobs for row in micro.rows])
    return LossInputs(
        logprobs_BT=logprobs_BT,
        old_logprobs_BT=logprobs_BT.detach() if old is None else micro.pad([old[row] for row in micro.rows]),
        sampler_logprobs_BT=sampler_BT,
        ref_logprobs_BT=ref_logprobs_BT,
        entropy_BT=micro.pad([entropies[row] for row in micro.rows]) if entropies else None,
        advantages_BT=advantages_BT,
        mask_BT=micro.mask_BT,
        rows=micro.rows,
        rollouts=rollouts,
    )


@torch.no_grad()
def score(
    policy: Policy, rollouts: Rollouts, microbatches: list[list[int]], with_entropy: bool = False
) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """Log-probs, and entropies if wanted, of these rows under the policy as it is now: row -> float32 [T]."""
    scored: dict[int, np.ndarray] = {}
    entropies: dict[int, np.ndarray] = {}
    for rows in microbatches:
        micro = make_microbatch(rollouts, rows, policy.device)
        logprobs_BT, entropy_BT = policy.logprobs(micro, with_entropy)
        for b, row in enumerate(rows):
            length = int(micro.lengths_B[b])
            scored[row] = logprobs_BT[b, :length].cpu().numpy()
            if entropy_BT is not None:
                entropies[row] = entropy_BT[b, :length].cpu().numpy()
    return scored, entropies


def tally_mismatch(tally: Tally, x: LossInputs) -> None:
    """d = |logp_trainer - logp_sampler| on the sampled tokens: the same weights must give the same numbers. Rows sampled at
    another temperature say nothing about that and are left out."""
    matched_B = torch.from_numpy(~x.rollouts.unmatched_B[x.rows]).to(x.mask_BT.device)
    mask_BT = x.mask_BT * matched_B[:, None]
    difference_BT = (x.logprobs_BT.detach() - x.sampler_logprobs_BT).abs() * mask_BT
    tally.add("mismatch_sum", float(difference_BT.sum()))
    tally.add("mismatch_tokens", float(mask_BT.sum()))
    tally.add("mismatch_max", float(difference_BT.max()))


def summarize(sums: dict[str, float], norms: list[float], planned: int, learning_rate: float) -> dict[str, float]:
    """Means from sums. `loss` is the mean over the optimizer steps taken; near zero is normal in GRPO."""
    tokens, compared = sums.get("trained_tokens", 0.0), sums["mismatch_tokens"]
    finite = [norm for norm in norms if math.isfinite(norm)]
    means = {name.removeprefix("mean/"): v / tokens for name, v in sums.items() if name.startswith("mean/") and tokens}
    return means | {
        "loss": sums.get("loss", 0.0) / max(1, len(norms)),
        "grad_norm": sum(finite) / max(1, len(finite)),
        "learning_rate": learning_rate,
        "mismatch": sums["mismatch_sum"] / compared if compared else math.nan,
        "mismatch_max": sums["mismatch_max"] if compared else math.nan,
        "compared_tokens": compared,
        "trained_tokens": tokens,
        "updates": float(len(finite)),
        "updates_skipped": float(planned - len(norms)),
        "updates_bad": float(len(norms) - len(finite)),
    }
