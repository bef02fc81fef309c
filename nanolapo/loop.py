"""The GRPO loop: sample -> grade -> reward -> advantage -> statistics -> update -> sync -> record.

What is not here, compared with the usual: no critic, no reward model, no trainer class, no callbacks. A method changes the
step only through the hooks of methods/base.py. Rollouts are global on every rank; a rank samples its share of the prompts
and trains its share of the tokens, and everything in between is computed alike on all.
"""

from __future__ import annotations

import torch

from nanolapo.alarms import Alarms
from nanolapo.checkpoint import load_checkpoint, prune, save_checkpoint
from nanolapo.config import Config
from nanolapo.data.load import load_data
from nanolapo.grader import Grader
from nanolapo.locks import alone_in
from nanolapo.methods.base import Method
from nanolapo.metrics import RunLog, Stopwatch, memory_gb, rollout_metrics
from nanolapo.model.folder import save_model
from nanolapo.policy import Policy
from nanolapo.provenance import what_next
from nanolapo.ranks import Ranks
from nanolapo.rollouts import Rollouts, join
from nanolapo.samplers.choose import make_sampler
from nanolapo.sampling import monitor_pass, next_draw, regrade, sample_and_grade
from nanolapo.session import (
    Session,
    StopRequest,
    export_folder,
    final_model,
    fingerprint_of,
    progress,
    set_up_process,
    token_limit,
)
from nanolapo.update import update_policy


def run_step(session: Session) -> None:
    """One step of GRPO, with the method's hooks in the order in which they act."""
    method, policy, watch, tokens_before = session.method, session.policy, Stopwatch(), session.sampled_tokens
    method.progress = policy.progress = session.progress
    plan = method.sampling(session.step)
    monitored = monitor_pass(session, watch)  # a second sampling, for the few methods that watch other prompts
    rounds: list[Rollouts] = []
    while draw := next_draw(
        session, plan, rounds
    ):  # one round; with dynamic sampling more, until enough groups are kept
        rollouts = sample_and_grade(session, plan, draw, watch)  # from here on every rank holds all rows
        regrade(session, method.edit_rollouts(rollouts))
        rollouts.set_rewards(method.reward(rollouts))  # named parts, [B] each; the reward is their sum
        rollouts.set_keep(method.keep_groups(rollouts, rollouts.rewards_PG))
        rounds.append(rollouts)
    sampled = join(rounds)
    batch = sampled.kept(plan.num_prompts)  # only the groups to train on

    advantages = method.advantage(batch, torch.from_numpy(batch.rewards_PG))  # [B], or [B, T] to weigh single tokens
    statistics = method.after_step(sampled)  # M(q) and its like change only after the rewards of the step

    session.sampler.sleep()  # its memory belongs to the trainer now
    with watch("update"):  # loss, backward, optimizer step
        trained = update_policy(policy, method, batch, advantages, batch.keep_B & ~batch.broken_B, session.ranks)
    with watch("sync"):
        session.sampler.wake()
        session.sampler.load_weights(policy.named_weights())

    metrics = rollout_metrics(sampled) | monitored | trained | statistics
    metrics |= {"rounds": float(len(rounds)), "kept_groups": float(batch.keep_B.sum() / plan.group_size)}
    record(session, sampled, metrics, watch, session.sampled_tokens - tokens_before)
    session.step += 1


def record(session: Session, sampled: Rollouts, metrics: dict[str, float], watch: Stopwatch, tokens: int) -> None:
    """Write the step to the logs, and say in words what looks wrong. `tokens` is what the step sampled."""
    step, config = session.step, session.config
    warnings = session.alarms.check_learning(step, metrics, sampled.texts)
    if session.log is not None:
        metrics |= {
            "sampled_tokens": session.sampled_tokens,
            "grader_errors": session.grader.error_rate,
            "memory_gb": memory_gb(),
            "tokens_per_second": tokens / watch.total(),
            **{f"seconds/{phase}": seconds for phase, seconds in watch.seconds.items()},
        }
        session.log.step(step, metrics, progress(config, session.token_limit, step + 1, session.sampled_tokens))
        session.log.rollouts(step, sampled)
        if config.run.print_every and step % config.run.print_every == 0:
            session.log.show_examples(step, sampled)
        for warning in warnings:
            print(warning, flush=True)
    if metrics["compared_tokens"]:  # none when only rows of a monitor pass were trained on
        session.alarms.check_mismatch(step, metrics["mismatch"])


def train(config: Config, method: Method) -> None:
    """Run the method to the end, resuming where an earlier run of the same name stopped. Fills config.run_dir."""
    ranks, stop, limit = set_up_process(config), StopRequest(), token_limit(config)
    with alone_in(config.run_dir, ranks.is_main), Grader(rule=method.grader_rule) as grader:
        data = load_data(config, grader)
        method.start(data.problems)
        say(ranks, *data.report, f"{len(data.problems)} problems; {config.arithmetic(ranks.count)}")
        policy, alarms = Policy(config, ranks.device), Alarms(config)
        fingerprint = fingerprint_of(config, method, data)
        saved = load_checkpoint(config.run_dir / "checkpoints", policy, fingerprint, ranks) or {}
        step, sampled_tokens = saved.get("step", 0), saved.get("sampled_tokens", 0)
        if saved:
            method.load_state_dict(saved["method"])
            method.loss_state |= saved.get("loss", {})
            alarms.load_state_dict(saved["alarms"])
        share = progress(config, limit, step, sampled_tokens)
        if share < 1:
            if saved:
                say(ranks, f"resuming {config.run_dir} at step {step}")
            sampler = make_sampler(config, config.model.path, config.rollout.max_new_tokens, ranks)
            # Before the first rollout too: a resumed run must sample from the model it trains.
            sampler.load_weights(policy.named_weights())
            log = RunLog(config, step, saved.get("wandb_id"), share) if ranks.is_main else None
            s = Session(config, method, ranks, data, grader, policy, sampler, alarms, log, limit, step, sampled_tokens)
            while s.progress < 1:
                run_step(s)
                stopping = ranks.any(stop.wanted)
                if config.run.export_every and s.step % config.run.export_every == 0:
                    # Before the checkpoint: a kill in between repeats the steps, and with them the export.
                    save_model(policy.model, policy.dtype, data.tokenizer, export_folder(config, s.step), ranks.is_main)
                    ranks.wait()
                if stopping or s.progress >= 1 or s.step % config.run.checkpoint_every == 0:
                    checkpoint(s, fingerprint)
                if stopping:
                    break
            if log:
                log.close()
            if stopping and s.progress < 1:
                return say(ranks, f"stopped after step {s.step}; the same command resumes there")
        was_whole = share >= 1 and final_model(config).exists()  # before this process
        save_model(policy.model, policy.dtype, data.tokenizer, final_model(config), ranks.is_main)
        if ranks.is_main:
            method.export(config.run_dir)
            # A kill may have come between the last save and its pruning.
            prune(config.run_dir / "checkpoints", config.run.keep_checkpoints)
            end = f"; {final_model(config)} is a plain Hugging Face folder"
            if was_whole:
                end = f": trained to step {step} already, nothing left to do; {what_next(config.run_dir)}"
            print(f"{config.run_dir}: complete{end}", flush=True)
        ranks.wait()


def checkpoint(s: Session, fingerprint: dict[str, object]) -> None:
    state = {
        "sampled_tokens": s.sampled_tokens,
        "method": s.method.state_dict(),
        "loss": s.method.loss_state,
        "alarms": s.alarms.state_dict(),
        "wandb_id": s.log.wandb_id if s.log else None,
        "fingerprint": fingerprint,
    }
    folder, keep = s.config.run_dir / "checkpoints", s.config.run.keep_checkpoints
    save_checkpoint(folder, s.step, s.policy, state, keep, s.ranks.is_main)
    if s.ranks.is_main:
        s.method.export(s.config.run_dir)
    s.ranks.wait()


def say(ranks: Ranks, *lines: str) -> None:
    if ranks.is_main:
        print("\n".join(lines), flush=True)
