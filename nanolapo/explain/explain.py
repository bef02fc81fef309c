"""One real step, told with its numbers: `python train_stage1.py CONFIG.yaml --explain` (`make explain`).

The step is loop.run_step on an ordinary session whose parts are listened to (trace.py). So the prompts, rewards,
advantages, ratios and losses of the story are values that the trainer computed and used, or what its own functions say of
them; nothing is computed a second way. Not here, compared with a run: no checkpoint is read or
written, and no model; everything goes to a directory of its own, explain-NAME beside the run's.
"""

from __future__ import annotations

import dataclasses
import os

from nanolapo.alarms import Alarms
from nanolapo.config import Config, UserError
from nanolapo.data.load import load_data
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
from nanolapo.explain.trained import the_line, the_memory, the_sync, the_tokens, the_update
from nanolapo.grader import Grader
from nanolapo.locks import alone_in
from nanolapo.loop import run_step
from nanolapo.methods.base import Method
from nanolapo.metrics import RunLog
from nanolapo.policy import Policy
from nanolapo.samplers.choose import make_sampler
from nanolapo.session import Session, set_up_process


def explain(config: Config, method: Method) -> None:
    """Do the first step of a run, print what happened to one problem in it, and write the same to explain.html."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("--explain watches one process: start the script with python, not with torchrun")
    config = beside(config)
    with alone_in(config.run_dir), Grader(rule=method.grader_rule) as grader:
        s, trace = first_step(config, method, grader)
        sections = story(s, trace)
    print(console(sections))
    path = config.run_dir / "explain.html"
    path.write_text(page(f"{config.run.name}: one step", sections), encoding="utf-8")
    print(f"\nwrote {path}")


def beside(config: Config) -> Config:
    """The same run in a directory of its own, without a tracker and without examples between the lines."""
    run = dataclasses.replace(config.run, name=f"explain-{config.run.name}", print_every=0)
    return dataclasses.replace(config, run=run, wandb=dataclasses.replace(config.wandb, mode="disabled"))


def first_step(config: Config, method: Method, grader: Grader) -> tuple[Session, Trace]:
    """Set up a session as loop.train does for a run without a checkpoint, and watch its first step."""
    ranks = set_up_process(config)
    data = load_data(config, grader)
    method.start(data.problems)
    policy = Policy(config, ranks.device)
    sampler = make_sampler(config, config.model.path, config.rollout.max_new_tokens, ranks)
    sampler.load_weights(policy.named_weights())
    s = Session(config, method, ranks, data, grader, policy, sampler, Alarms(config), RunLog(config, 0, None))
    trace = Trace(weights_before={name: tensor.clone() for name, tensor in policy.named_weights()})
    with trace.observed(s):
        run_step(s)
    return s, trace


def story(s: Session, trace: Trace) -> list[Section]:
    """Everything that happened to the most telling problem of the step, in order, and the step's own numbers."""
    v = View(s, trace, most_telling(trace))
    return [
        the_problem(v), the_prompt(v), the_answers(v), the_verdicts(v), the_length(v), the_rewards(v), the_advantages(v),
        the_memory(v), the_tokens(v), the_update(v), the_sync(v), the_line(v),
    ]  # fmt: skip
