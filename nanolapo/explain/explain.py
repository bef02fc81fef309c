"""One real step, told with its numbers: `python train_stage1.py CONFIG.yaml --explain` (`make explain`).

The step is loop.run_step on an ordinary session whose parts are listened to (trace.py). So the prompts, rewards,
advantages, ratios and losses of the story are values that the trainer computed and used, or what its own functions say of
them; nothing is computed a second way. Not here, compared with a run: no checkpoint is read or
written, and no model; everything goes to the directory explain-NAME beside the run's.
"""

from __future__ import annotations

import dataclasses
import os

from nanolapo.config import Config, UserError
from nanolapo.explain.page import Section, console, page
from nanolapo.explain.sampled import (
    View,
    most_telling,
    the_advantages,
    the_answers,
    the_length,
    the_problem,
    the_prompt,
    the_rewards,
    the_verdicts,
)
from nanolapo.explain.trace import Trace
from nanolapo.explain.trained import the_checks, the_line, the_memory, the_sync, the_tokens, the_update
from nanolapo.loop import run_step
from nanolapo.methods.base import Method
from nanolapo.session import Session, open_session


def explain(config: Config, method: Method) -> None:
    """Do the first step of a run, print what happened to one problem in it, and write the same to explain.html."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("--explain watches one process: start the script with python, not with torchrun")
    config = beside(config)
    with open_session(config, method) as session:
        sections = story(session, watched_step(session))
    print(console(sections))
    path = config.run_dir / "explain.html"
    path.write_text(page(f"{config.run.name}: one step", sections), encoding="utf-8")
    print(f"\nwrote {path}")


def beside(config: Config) -> Config:
    """Change the config to a separate directory, no tracker and no printed examples."""
    run = dataclasses.replace(config.run, name=f"explain-{config.run.name}", print_every=0)
    return dataclasses.replace(config, run=run, wandb=dataclasses.replace(config.wandb, mode="disabled"))


def watched_step(session: Session) -> Trace:
    """Do one step, and return the records of it."""
    trace = Trace(weights_before={name: tensor.clone() for name, tensor in session.policy.named_weights()})
    with trace.observed(session):
        run_step(session)
    return trace


def story(session: Session, trace: Trace) -> list[Section]:
    """Everything that happened to the most telling problem of the step, in order, and the step's own numbers."""
    v = View(session, trace, most_telling(trace))
    return [
        the_problem(v), the_prompt(v), the_answers(v), the_verdicts(v), the_length(v), the_rewards(v), the_advantages(v),
        the_memory(v), the_tokens(v), the_update(v), the_sync(v), the_checks(v), the_line(v),
    ]  # fmt: skip
