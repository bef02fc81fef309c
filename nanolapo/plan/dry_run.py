"""`python train_stage1.py CONFIG.yaml --dry-run`: shows what can be known about a run without weights."""

from __future__ import annotations

import os

from nanolapo.config import Config
from nanolapo.config_file import to_yaml, validate
from nanolapo.data.load import load_data
from nanolapo.grader import Grader
from nanolapo.methods.base import Method
from nanolapo.plan.cost import forecast
from nanolapo.plan.machines import this_machine
from nanolapo.preflight import before_training


def dry_run(config: Config, method: Method) -> None:
    """Check config, data and the model's folder; print the config, the batch arithmetic, what the run will cost, what the
    checks found, and one prompt."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    validate(config, ranks)
    with Grader(rule=method.grader_rule) as grader:
        data = load_data(config, grader)
        method.start(data.problems)
        checked = before_training(config, data, method, fetch=False)
    guidance = method.guidance(data.problems[0], 0, 0)
    most = monitored = 0
    for step in range(config.train.steps):
        method.progress = step / config.train.steps
        most += most_tokens(method, step)
        if extra := method.possible_monitor(step):
            monitored += len(extra.problem_indices) * extra.group_size
    print(to_yaml(config))
    print("\n".join([*data.report, f"{len(data.problems)} problems", config.arithmetic(ranks)]))
    print(f"at most {most:,} sampled tokens in {config.train.steps} steps (upper bound: every answer at the limit)")
    if limit := config.train.sampled_tokens:
        print(f"stops after the step that reaches {limit:,} sampled tokens")
    prompts = [len(data.prompter.ids(p.question, method.guidance(p, 0, 0))) for p in data.problems[:200]]
    expected = forecast(config, this_machine(config), None, sum(prompts) / len(prompts), monitored / config.train.steps)
    print("\n".join(expected.lines()))
    print("\n".join([*checked.lines(), *checked.table()]))
    print(data.prompter.shown(data.problems[0].question, guidance, "the model"))


def most_tokens(method: Method, step: int) -> int:
    """Return the most tokens of a step: every round of dynamic sampling and a monitor pass, every answer at the limit."""
    rounds, monitor = method.sampling(step), method.possible_monitor(step)
    tokens = rounds.num_prompts * rounds.max_rounds * rounds.group_size * rounds.max_new_tokens
    if monitor:
        tokens += len(monitor.problem_indices) * monitor.group_size * monitor.max_new_tokens
    return tokens
