"""The GRPO loop: sample -> grade -> reward -> advantage -> statistics -> update -> sync -> record.

There is no critic, no reward model, no trainer class and no callback. A method changes the step only through the hooks of
methods/base.py. A rank samples its share of the prompts and trains on its share of the tokens. In between, every rank holds
all rollouts and computes the same numbers.
"""

from __future__ import annotations

from pathlib import Path

import torch

from nanolapo.advantages import check_advantages
from nanolapo.checkpoint import prune, save_checkpoint
from nanolapo.config import Config
from nanolapo.methods.base import Method
from nanolapo.metrics import Stopwatch, memory_gb, rollout_metrics
from nanolapo.model.folder import save_model
from nanolapo.provenance import what_next
from nanolapo.rollouts import Rollouts, join
from nanolapo.sampling import grader_errors, monitor_pass, next_draw, regrade, sample_and_grade
from nanolapo.session import Session, StopRequest, export_folder, final_model, open_session, progress
from nanolapo.update import update_policy


def run_step(session: Session) -> None:
    """One step of GRPO, with the method's hooks in the order in which they act."""
    method, policy, watch, tokens_before = session.method, session.policy, Stopwatch(), session.sampled_tokens
    method.progress = policy.progress = session.progress
    plan = method.sampling(session.step)
    monitored = monitor_pass(session, watch)  # an extra sampling, for the few methods that watch other prompts
    rounds, num_drawn = list[Rollouts](), 0
    while draw := next_draw(session, plan, rounds):  # one round; dynamic sampling: until enough groups are kept
        num_drawn += len(draw)
        rollouts = sample_and_grade(session, plan, draw, watch)  # sample, grade; now every rank holds all usable rows
        regrade(session, method.edit_rollouts(rollouts))
        rollouts.set_rewards(method.reward(rollouts))  # reward: named parts, [B] each, whose sum counts
        rollouts.set_keep(method.keep_groups(rollouts, rollouts.rewards_PG))
        rounds.append(rollouts)
    sampled = join(rounds)
    batch = sampled.kept(plan.num_prompts)  # only the groups to train on
    advantages = method.advantage(batch, torch.from_numpy(batch.rewards_PG))  # advantage: [B], or [B, T] by token
    check_advantages(advantages, batch.lengths_B, batch.keep_B)
    statistics = method.after_step(sampled)  # M(q) and other state change only after the step's rewards

    session.sampler.sleep()  # frees its cache and weights for the trainer
    with watch("update"):  # loss, backward, optimizer step; if no group was kept, batch has all rows and none counts
        trained = update_policy(policy, method, batch, advantages)
    with watch("sync"):  # weight sync
        session.sampler.wake()
        session.sampler.load_weights(policy.sampler_weights())

    metrics = rollout_metrics(sampled) | monitored | trained | statistics
    metrics |= {"rounds": float(len(rounds)), "kept_groups": float(batch.keep_B.sum() / plan.group_size)}
    metrics |= {"broken": 1 - len(sampled) / (num_drawn * plan.group_size)}
    record(session, sampled, metrics, watch, session.sampled_tokens - tokens_before)
    session.step += 1


def record(session: Session, sampled: Rollouts, metrics: dict[str, float], watch: Stopwatch, tokens: int) -> None:
    """Write the step to the logs and print warnings. `tokens`: how many the step sampled."""
    step, config = session.step, session.config
    metrics |= {"grader_errors": grader_errors(session)}
    warnings = session.alarms.check_learning(step, metrics, sampled.texts)
    if session.log is not None:
        metrics |= {
            "sampled_tokens": session.sampled_tokens,
            "memory_gb": memory_gb(),
            "tokens_per_second": tokens / watch.total(),
            **{f"seconds/{phase}": seconds for phase, seconds in watch.seconds.items()},
        }
        session.log.step(step, metrics, progress(config, step + 1, session.sampled_tokens))
        session.log.rollouts(step, sampled)
        if config.run.print_every and step % config.run.print_every == 0:
            session.log.show_examples(step, sampled)
        for warning in warnings:
            print(warning, flush=True)
    if metrics["compared_tokens"]:  # 0 if no row that could be compared was trained on
        session.alarms.check_mismatch(step, metrics["mismatch"])


def train(config: Config, method: Method) -> None:
    """Run the method to the end, resuming where an earlier run of the same name stopped. Fills config.run_dir."""
    stop = StopRequest()
    with open_session(config, method) as session:
        was_whole = session.progress >= 1 and final_model(config).exists()  # before this process
        while session.progress < 1:
            run_step(session)
            stopping = session.ranks.any(stop.wanted)
            save(session, stopping)
            if stopping and session.progress < 1:
                return session.say(f"stopped after step {session.step}; the same command resumes there")
        finish(session, was_whole)


def save(session: Session, stopping: bool) -> None:
    """Save what is due after this step: the current model (run.export_every) and a checkpoint."""
    config, ranks, step = session.config, session.ranks, session.step
    if config.run.export_every and step % config.run.export_every == 0:
        # Before the checkpoint: a kill in between repeats the steps, and with them the export.
        save_model_to(session, export_folder(config, step))
        ranks.wait()
    if stopping or session.progress >= 1 or step % config.run.checkpoint_every == 0:
        checkpoint(session)


def checkpoint(session: Session) -> None:
    """Write everything that the next step depends on, and what outlives the run."""
    config, ranks = session.config, session.ranks
    state = {
        "sampled_tokens": session.sampled_tokens,
        "method": session.method.state_dict(),
        "loss": session.method.loss.state,
        "alarms": session.alarms.state_dict(),
        "wandb_id": session.log.wandb_id if session.log else None,
        "fingerprint": session.fingerprint,
    }
    folder, keep = config.run_dir / "checkpoints", config.run.keep_checkpoints
    save_checkpoint(folder, session.step, session.policy, state, keep)
    if ranks.is_main:
        session.method.export(config.run_dir)
    ranks.wait()


def finish(session: Session, was_whole: bool) -> None:
    """Write the final model and say where it is. `was_whole`: True if it was complete before this process."""
    config = session.config
    # Also if there is one: it may be that of fewer train.steps, or have lost a file.
    save_model_to(session, final_model(config))
    if session.ranks.is_main:
        session.method.export(config.run_dir)
        # A kill may have come between the last save and its pruning.
        prune(config.run_dir / "checkpoints", config.run.keep_checkpoints)
    end = f"; {final_model(config)} is a plain Hugging Face folder"
    if was_whole:
        end = f": trained to step {session.step} already, nothing left to do; {what_next(config.run_dir)}"
    session.say(f"{config.run_dir}: complete{end}")
    session.ranks.wait()


def save_model_to(session: Session, folder: Path) -> None:
    policy = session.policy
    save_model(policy.model, policy.dtype, session.data.tokenizer, folder, session.ranks.is_main)
