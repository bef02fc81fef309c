"""The GRPO loop: sample -> grade -> reward -> advantage -> update -> sync -> statistics -> record.

What is not here, compared with the usual: no critic, no reward model, no trainer class, no callbacks. A method changes the
step only through the hooks of methods/base.py. Rollouts are global on every rank; a rank samples its share of the prompts
and trains its share of the tokens, and everything in between is computed alike on all.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from nanolapo.alarms import Alarms
from nanolapo.checkpoint import load_checkpoint, prune, save_checkpoint, save_model
from nanolapo.config import Config
from nanolapo.grader import Grader
from nanolapo.methods.base import Method
from nanolapo.metrics import RunLog, Stopwatch, memory_gb, rollout_metrics
from nanolapo.policy import Policy
from nanolapo.problems import batch_indices
from nanolapo.ranks import Ranks
from nanolapo.rollouts import Decoding, Request, Rollouts, join_ranks, make_rollouts, row_seed
from nanolapo.session import (
    Data,
    Sampler,
    StopRequest,
    final_model,
    load_data,
    make_sampler,
    set_up_process,
    token_limit,
)
from nanolapo.update import update_policy


@dataclass
class Session:
    """What one step works with. `step` is the next step to do; it and `sampled_tokens` are part of a checkpoint."""

    config: Config
    method: Method
    ranks: Ranks
    data: Data
    grader: Grader
    policy: Policy
    sampler: Sampler
    alarms: Alarms
    log: RunLog | None  # rank 0 only
    step: int = 0
    sampled_tokens: int = 0


def run_step(s: Session) -> None:
    """One step of GRPO, with the method's hooks in the order in which they act."""
    method, policy, watch = s.method, s.policy, Stopwatch()
    with watch("sample"):
        rollouts = sample(s)
    with watch("grade"):
        grade(s, rollouts, range(len(rollouts)))
        everyone = s.ranks.gather(rollouts)
        # The ranks that share an engine sampled the same rows. From here on every rank holds all rows.
        rollouts = join_ranks(everyone[:: s.config.rollout.tensor_parallel])
        rollouts.regrade = lambda edited, rows: regrade(s, edited, rows)

    method.edit_rollouts(rollouts)
    parts = method.reward(rollouts)  # named parts, [B] each; the reward is their sum
    rewards_PG = rollouts.by_group(sum(parts.values(), np.zeros(len(rollouts))))
    advantages = method.advantage(rollouts, torch.from_numpy(rewards_PG))  # [B], or [B, T] per token
    keep_P = method.keep_groups(rollouts, rewards_PG)
    keep_B = np.repeat(keep_P, rollouts.group_size) & ~rollouts.broken_B

    s.sampler.sleep()  # its memory belongs to the trainer now
    with watch("update"):
        trained = update_policy(policy, method, rollouts, advantages, keep_B, s.ranks)
    with watch("sync"):
        s.sampler.wake()
        s.sampler.load_weights(policy.named_weights())
    statistics = method.after_step(rollouts)  # M(q) and its like change only after the rewards of the step

    s.sampled_tokens += int(rollouts.lengths_B.sum())
    metrics = rollout_metrics(rollouts, parts) | trained | statistics
    record(s, rollouts, parts, metrics, watch)
    s.alarms.check_mismatch(s.step, metrics["mismatch"])
    s.step += 1


def sample(s: Session) -> Rollouts:
    """Sample this engine's prompts of the step: whole groups, every seed a pure function of its place in the step."""
    plan, seed = s.method.sampling(s.step), s.config.run.seed
    chosen = batch_indices(len(s.data.problems), s.step, plan.num_prompts, seed)
    engine, engines = s.ranks.engine(s.config.rollout.tensor_parallel)
    places = range(engine, len(chosen), engines)  # engine e of N takes prompts e, e + N, e + 2N, ...
    problems = [s.data.problems[chosen[place]] for place in places]
    guidances = [s.method.guidance(p, g, s.step) for p in problems for g in range(plan.group_size)]
    prompts: dict[tuple[str, str, str], list[int]] = {}  # a group mostly shares one prompt: encode it once
    requests = []
    for row, guidance in enumerate(guidances):
        p, g = divmod(row, plan.group_size)
        key = (problems[p].question, guidance.outside, guidance.inside)
        if key not in prompts:
            prompts[key] = s.data.prompter.ids(problems[p].question, guidance)
        requests.append(Request(prompts[key], row_seed(seed, s.step, places[p], g), plan.max_new_tokens))
    total = len(requests) * plan.max_new_tokens

    def advance(tokens: int) -> None:
        bar.update(tokens)

    with tqdm(total=total, unit="tok", desc="sampling", leave=False, disable=None if s.log else True) as bar:
        samples = s.sampler.generate(requests, Decoding(plan.temperature), advance)
    budgets = [guidance.budget for guidance in guidances]
    rollouts = make_rollouts(problems, plan.group_size, requests, budgets, samples, s.policy.vocab_size)
    rollouts.texts = [s.data.decode(ids) for ids in rollouts.response_ids]
    return rollouts


def grade(s: Session, rollouts: Rollouts, rows: Iterable[int]) -> None:
    """Fill in correct_B. An answer that was cut off counts as wrong unless the method says otherwise."""
    rows = list(rows)
    golds = [rollouts.problems[row // rollouts.group_size].answer for row in rows]
    verdicts = s.grader.grade_all([rollouts.texts[row] for row in rows], golds)
    s.grader.stop_if_untrustworthy()
    for row, verdict in zip(rows, verdicts, strict=True):
        rollouts.correct_B[row] = verdict and (rollouts.finished_B[row] or s.method.cut_answers_count)


def regrade(s: Session, rollouts: Rollouts, rows: Iterable[int]) -> None:
    """One rank grades for all: a grader's time-out must not make ranks disagree."""
    if s.log:
        grade(s, rollouts, rows)
    rollouts.correct_B = s.ranks.gather(rollouts.correct_B)[0]


def record(
    s: Session, rollouts: Rollouts, parts: dict[str, np.ndarray], metrics: dict[str, float], watch: Stopwatch
) -> None:
    """Write the step to the logs, and say in words what looks wrong."""
    warnings = s.alarms.check_learning(s.step, metrics, rollouts.texts)
    if s.log is None:
        return
    metrics |= {
        "sampled_tokens": s.sampled_tokens,
        "grader_errors": s.grader.error_rate,
        "memory_gb": memory_gb(),
        "tokens_per_second": float(rollouts.lengths_B.sum()) / watch.total(),
        **{f"seconds/{phase}": seconds for phase, seconds in watch.seconds.items()},
    }
    s.log.step(s.step, metrics)
    s.log.rollouts(s.step, rollouts, parts)
    every = s.config.run.print_every
    if every and s.step % every == 0:
        s.log.show_examples(s.step, rollouts, parts)
    for warning in warnings:
        print(warning, flush=True)


def train(config: Config, method: Method) -> None:
    """Run the method to the end, resuming where an earlier run of the same name stopped. Fills config.run_dir."""
    ranks, stop, limit = set_up_process(config), StopRequest(), token_limit(config)
    with Grader(rule=method.grader_rule) as grader:
        data = load_data(config, grader)
        method.start(data.problems)
        say(ranks, *data.report, f"{len(data.problems)} problems; {config.arithmetic(ranks.count)}")
        policy, alarms = Policy(config, ranks.device), Alarms(config)
        fingerprint = data.fingerprint(config, method)
        saved = load_checkpoint(config.run_dir / "checkpoints", policy, fingerprint, ranks) or {}
        step, sampled_tokens = saved.get("step", 0), saved.get("sampled_tokens", 0)
        if saved:
            method.load_state_dict(saved["method"])
            alarms.load_state_dict(saved["alarms"])
            say(ranks, f"resuming {config.run_dir} at step {step}")
        if not is_finished(config, limit, step, sampled_tokens):
            sampler = make_sampler(config, config.model.path, config.rollout.max_new_tokens, ranks)
            # Before the first rollout too: a resumed run must sample from the model it trains.
            sampler.load_weights(policy.named_weights())
            log = RunLog(config, step, saved.get("wandb_id")) if ranks.is_main else None
            s = Session(config, method, ranks, data, grader, policy, sampler, alarms, log, step, sampled_tokens)
            while not is_finished(config, limit, s.step, s.sampled_tokens):
                run_step(s)
                stopping = ranks.any(stop.wanted)
                done = stopping or is_finished(config, limit, s.step, s.sampled_tokens)
                if done or s.step % config.run.checkpoint_every == 0:
                    checkpoint(s, fingerprint)
                if stopping:
                    break
            if log:
                log.close()
            if stopping and not is_finished(config, limit, s.step, s.sampled_tokens):
                return say(ranks, f"stopped after step {s.step}; the same command resumes there")
        save_model(policy.model, policy.dtype, data.tokenizer, final_model(config), ranks.is_main)
        if ranks.is_main:
            method.export(config.run_dir)
            # A kill may have come between the last save and its pruning.
            prune(config.run_dir / "checkpoints", config.run.keep_checkpoints)
        say(ranks, f"{config.run_dir}: complete; {final_model(config)} is a plain Hugging Face folder")
        ranks.wait()


def checkpoint(s: Session, fingerprint: dict[str, object]) -> None:
    state = {
        "sampled_tokens": s.sampled_tokens,
        "method": s.method.state_dict(),
        "alarms": s.alarms.state_dict(),
        "wandb_id": s.log.wandb_id if s.log else None,
        "fingerprint": fingerprint,
    }
    folder, keep = s.config.run_dir / "checkpoints", s.config.run.keep_checkpoints
    save_checkpoint(folder, s.step, s.policy, state, keep, s.ranks.is_main)
    if s.ranks.is_main:
        s.method.export(s.config.run_dir)
    s.ranks.wait()


def is_finished(config: Config, token_limit: int, steps_done: int, sampled_tokens: int) -> bool:
    return steps_done >= config.train.steps or 0 < token_limit <= sampled_tokens


def say(ranks: Ranks, *lines: str) -> None:
    if ranks.is_main:
        print("\n".join(lines), flush=True)
