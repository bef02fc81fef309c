"""Tells the second half of a step: memory, loss, update, sync, and the step's line in metrics.jsonl."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nanolapo.explain.page import Section, Table
from nanolapo.explain.sampled import View, home, num, spelled, target
from nanolapo.explain.trace import Pass
from nanolapo.methods.lapo import Discovery, Lapo
from nanolapo.microbatches import make_microbatch
from nanolapo.rollouts import Rollouts, make_rollouts
from nanolapo.samplers.sampler import Decoding
from nanolapo.session import Session
from nanolapo.update import Tally, first_tokens, loss_inputs, tally_mismatch

DRIFTED = 4  # tokens of an answer that are shown for their ratio, besides the first and the last


def the_tokens(v: View) -> Section:
    """A few tokens of the best and of the worst answer, with every number of their loss."""
    c = v.s.config.loss
    body: list[str | Table] = [
        "log p: of this token, when it was sampled and as the trainer sees it now; r: new over old probability; clipped: "
        f"r is beyond [{num(1 - c.clip_low)}, {num(1 + c.clip_high)}] on the side where A pushes; weight: 1 / denominator "
        f"(loss.aggregation = {c.aggregation}, over all answers of the optimizer step); share: loss times weight, what the "
        "token adds to the loss; pull: the derivative of the loss with respect to log p, below 0 makes it likelier"
    ]
    for i in dict.fromkeys((int(v.advantages.argmax()), int(v.advantages.argmin()))):
        found = [(p, p.x.rows.index(v.rows[i])) for p in v.trace.passes if v.rows[i] in p.x.rows]
        if not found:
            body.append(f"Answer {i + 1} has no advantage: its tokens are not trained.")
            continue
        p, b = found[-1]
        body.append(
            f"Answer {i + 1}, A = {v.advantages[i]:+.6g}, in optimizer step {p.update + 1} of this step; its tokens "
            f"together add {num(p.shares_BT()[b].sum())} to that optimizer step's loss"
        )
        body.append(token_table(v, p, b))
    return Section(
        "Token by token into the loss",
        "update.py: loss_inputs, update_policy; losses/grpo.py: Loss, policy_loss, row_weights",
        body,
    )


def token_table(v: View, p: Pass, b: int) -> Table:
    """The first token, the last, and those whose ratio is furthest from 1. Every value that the method logs is a column."""
    assert p.weight_BT is not None and p.pull_BT is not None
    length = int(p.x.mask_BT[b].sum())
    shown = {0, length - 1}
    columns = {"log p sampled": p.x.sampler_logprobs_BT}
    if v.s.config.loss.old_logprobs == "trainer":
        columns["log p old"] = p.x.old_logprobs_BT
    columns["log p now"] = p.x.logprobs_BT
    if "ratio" in p.logged:
        columns["r"] = p.logged["ratio"]
        shown |= set((columns["r"][b, :length] - 1).abs().argsort(descending=True, stable=True)[:DRIFTED].tolist())
    if "clip_fraction" in p.logged:
        columns["clipped"] = p.logged["clip_fraction"]
    columns |= {name: values for name, values in p.logged.items() if name not in ("ratio", "clip_fraction")}
    columns |= {"loss": p.loss_BT, "weight": p.weight_BT, "share": p.shares_BT(), "pull": p.pull_BT}
    ids = p.x.rollouts.response_ids[p.x.rows[b]].tolist()
    rows = []
    for t in sorted(shown):
        rows.append([str(t + 1), str(ids[t]), spelled(v.s, [ids[t]])[0], *(num(x[b, t]) for x in columns.values())])
    return Table(["token", "id", "text", *columns], rows, words=["text"])


def the_update(v: View) -> Section:
    trace, rows = v.trace, []
    for update, norm in enumerate(trace.norms):
        passes = [p for p in trace.passes if p.update == update]
        tokens = sum(float(p.x.mask_BT.sum()) for p in passes)
        loss = sum(float(p.shares_BT().sum()) for p in passes)
        rows.append([str(update + 1), str(len(passes)), num(tokens), repr(loss), repr(norm)])
    moved = [weight - trace.weights_before[name] for name, weight in v.s.policy.named_weights()]
    changed, size = sum(int(change.count_nonzero()) for change in moved), sum(change.numel() for change in moved)
    return Section(
        "The weights move",
        "update.py: update_policy; policy.py: Policy.step",
        [
            Table(["optimizer step", "micro-batches", "tokens trained", "loss", "gradient norm"], rows),
            f"A gradient longer than train.grad_clip = {num(v.s.config.train.grad_clip)} is shortened to it. Learning rate "
            f"{num(trace.metrics['learning_rate'])}. {changed} of {size} weights have changed, none by more than "
            f"{num(max(float(change.abs().max()) for change in moved))}",
        ],
    )


def the_sync(v: View) -> Section:
    (stale, logprobs_B), (fresh, _) = compare(v.s, v.rollouts), compare(v.s, sample_again(v))
    before = v.trace.metrics["mismatch"]
    pairs = zip(v.rollouts.rows, logprobs_B, strict=True)
    rows = [
        [str(i + 1), f"{v.advantages[i]:+.6g}", num(row.sampler_logprobs[row.num_given :].sum()), num(after)]
        for i, (row, after) in enumerate(pairs)
    ]
    return Section(
        "The sampler gets the new weights",
        "policy.py: sampler_weights; the sampler's load_weights; update.py: tally_mismatch",
        [
            "log p of each whole answer (without given tokens), as sampled and under the new weights:",
            Table(["answer", "A", "before", "after"], rows),
            f"Mismatch, the mean of |log p trainer - log p sampler|: {num(before)} before the update, over all answers of "
            f"the step; {num(stale)} between the new weights and the old ones that sampled these answers; {num(fresh)} "
            f"after the sync, on {len(rows)} new answers to this problem",
        ],
    )


@torch.no_grad()
def compare(s: Session, rollouts: Rollouts) -> tuple[float, Tensor]:
    """(mismatch as the trainer measures it, log-prob of the drawn part of each answer [B]), under the current weights."""
    tally = Tally()
    micro = make_microbatch(rollouts, range(len(rollouts)), s.policy.device)
    inputs = loss_inputs(s.policy, rollouts, torch.zeros(len(rollouts)), micro, None)
    tally_mismatch(tally, inputs)
    drawn_BT = ~first_tokens([row.num_given for row in rollouts.rows], inputs.mask_BT)
    return float(tally.sums["mismatch"] / tally.counts["mismatch"]), (inputs.logprobs_BT * drawn_BT).sum(dim=1)


def sample_again(v: View) -> Rollouts:
    """The same requests once more, from the weights that the sampler holds now. Not part of the step."""
    requests = [v.trace.requests[v.problem.id, i] for i in range(len(v.rows))]
    samples = v.s.sampler.generate(requests, Decoding(v.s.config.rollout.temperature))
    return make_rollouts(requests, samples, len(requests))


def the_memory(v: View) -> Section:
    method = v.s.method
    if not isinstance(method, Lapo):
        return Section("What the method remembers is updated, after the rewards", f"{home(v)}.after_step", [])
    equation = "Eq. 3" if isinstance(method, Discovery) else "Eq. 8"
    before, after = target(v.trace.targets, v.problem), target(method.length_map.entries, v.problem)
    return Section(
        "M(q) is written down, after the rewards",
        f"{home(v)}.after_step; lengths.py: LengthMap",
        [f"{equation}, {v.s.config.lapo.statistic} of the right lengths; before: {before}; after: {after}"],
    )


def the_checks(v: View) -> Section:
    checked = v.s.preflight
    return Section(
        "What was checked before the first rollout",
        "preflight.py: one function for each check",
        [
            f"{len(checked.rows)} checks in {checked.seconds:.1f} s, most of them before the weights were loaded.",
            Table(["check", "proves", "found"], checked.rows, words=["check", "proves", "found"]),
        ],
    )


def the_line(v: View) -> Section:
    # A mean over nothing is nan to us, and null in the file.
    rows = [[name, repr(float(x)) if math.isfinite(x) else "null"] for name, x in v.trace.metrics.items()]
    return Section(
        "The step in metrics.jsonl",
        "metrics.py: rollout_metrics; update.py: summarize; docs/METRICS.md explains every name",
        [
            "Means over all answers of the step; loss and grad_norm are the means of the optimizer steps above.",
            Table(["name", "value"], rows, words=["name"]),
        ],
    )
