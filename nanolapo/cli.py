"""What the three scripts share: arguments, --dry-run, and one clear line with exit code 2 for a user's mistake."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from nanolapo.config import Config, RunStopped, UserError
from nanolapo.config_checks import validate
from nanolapo.config_file import load_config, to_yaml

if TYPE_CHECKING:  # torch is only imported once the config is known to be good
    from nanolapo.methods.base import Method


def parse(description: str, default_method: str = "", can_explain: bool = False) -> tuple[Config, str]:
    """Read `CONFIG.yaml [section.key=value ...] [--dry-run | --explain]`; returns the config and "run", "dry-run" or
    "explain"."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value",
                        help="overrides one value; method=FILE.yaml lays a method's file over the config")  # fmt: skip
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--dry-run", dest="action", action="store_const", const="dry-run", default="run",
                        help="check everything; print config, arithmetic, one prompt, cost; touch no weights")  # fmt: skip
    if can_explain:
        action.add_argument("--explain", dest="action", action="store_const", const="explain",
                            help="do the first step only, and tell everything that happens to one problem in it, on the "
                            "console and in explain.html; the run itself is left alone")  # fmt: skip
    arguments = parser.parse_intermixed_args()  # overrides may also come after --dry-run
    config = load_config(arguments.config, arguments.overrides)
    if default_method and not config.method.name:
        config = dataclasses.replace(config, method=dataclasses.replace(config.method, name=default_method))
    return config, arguments.action


# full, over quota or over the file size limit, or not ours to write
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
ECHO_DELAY_S = 60


def run(main: Callable[[], None], keeps_progress: bool = True) -> None:
    """Call a script's main. A UserError or a disk that cannot be written is one line and exit code 2; a run that must not
    go on one line and exit code 3; Ctrl-C one line and 130; any other error keeps its traceback.

    keeps_progress: does the script take up what it had done before it was interrupted, or start again?"""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        main()
    except UserError as error:
        end(f"error: {error}", 2)
    except RunStopped as error:
        end(f"stopped: {error}", 3)
    except KeyboardInterrupt:
        left = "goes on from what was saved" if keeps_progress else "starts again: nothing was saved"
        end(f"interrupted; the same command {left}", 130)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK:
            where = f"{error.filename}: " if error.filename else ""
            end(f"error: {where}{error.strerror}; mend that and run the same command again", 2)
        last = traceback.extract_tb(error.__traceback__)[-1].filename
        tell_torchrun(traceback.format_exc(), is_echo="torch/distributed" in last)
        raise


def end(line: str, code: int) -> NoReturn:
    print(line, file=sys.stderr, flush=True)
    tell_torchrun(line)
    sys.exit(code)


def tell_torchrun(text: str, is_echo: bool = False) -> None:
    """Hand an error to the launcher, which shows the earliest of all ranks' last, as the root cause. A collective call that
    fails is mostly the echo of another rank's end: it is dated later, so that the real cause comes first."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        message = json.dumps({"message": text, "timestamp": int(time.time()) + ECHO_DELAY_S * is_echo})
        with suppress(OSError):  # the full disk that is to be reported may be this one, too
            Path(path).write_text(message, encoding="utf-8")


def act(config: Config, action: str) -> None:
    """Train; or print everything that can be known without weights (dry-run), or what happens in one step (explain)."""
    from nanolapo.explain.explain import explain
    from nanolapo.loop import train
    from nanolapo.methods import load_method

    {"run": train, "dry-run": describe, "explain": explain}[action](config, load_method(config))


def describe(config: Config, method: Method) -> None:
    """Resolve and check config and data; print the config, the batch arithmetic, one prompt and the cost."""
    from nanolapo.data.load import load_data
    from nanolapo.grader import Grader
    from nanolapo.plan.cost import forecast
    from nanolapo.plan.machines import this_machine
    from nanolapo.session import token_limit

    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    validate(config, ranks)
    limit = token_limit(config)
    with Grader(rule=method.grader_rule) as grader:
        data = load_data(config, grader)
    method.start(data.problems)
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
    if limit:
        print(f"stops after the step that reaches {limit:,} sampled tokens")
    prompts = [len(data.prompter.ids(p.question, method.guidance(p, 0, 0))) for p in data.problems[:200]]
    expected = forecast(config, this_machine(config), None, sum(prompts) / len(prompts), monitored / config.train.steps)
    print("\n".join(expected.lines()))
    print(f"one prompt, as the model sees it:\n---\n{data.prompter.render(data.problems[0].question, guidance)}\n---")


def most_tokens(method: Method, step: int) -> int:
    """Upper bound of what a step samples: every round of dynamic sampling and a monitor pass, every answer at the limit."""
    plan, monitor = method.sampling(step), method.possible_monitor(step)
    tokens = plan.num_prompts * plan.max_rounds * plan.group_size * plan.max_new_tokens
    if monitor:
        tokens += len(monitor.problem_indices) * monitor.group_size * monitor.max_new_tokens
    return tokens
