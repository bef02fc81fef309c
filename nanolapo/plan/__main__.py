"""Forecast what a run needs: memory per GPU, seconds per step, hours and disk, without loading the run's weights.

    python -m nanolapo.plan CONFIG.yaml [section.key=value ...] --machine 4xA100-80GB|8xH100-80GB|8xH200-141GB|cpu
        [--mean-tokens N] [--prompt-tokens N] [--calibrate]

The formulas, and what they leave out, are in cost.py (time, disk) and footprint.py (memory). Rates of GPUs are estimates.
"""

from __future__ import annotations

import argparse

from nanolapo import cli
from nanolapo.config_file import load_config
from nanolapo.plan.beside_run import beside_run
from nanolapo.plan.calibrate import calibrate
from nanolapo.plan.cost import forecast
from nanolapo.plan.footprint import expect
from nanolapo.plan.machines import parse_machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value")
    parser.add_argument("--machine", required=True, help="cpu, or a number and a kind of GPU, as in 8xH100-80GB")
    parser.add_argument(
        "--mean-tokens", type=float, help="mean length of an answer; else an earlier run's, else the limit"
    )
    parser.add_argument("--prompt-tokens", type=float, help="mean length of a prompt")
    parser.add_argument("--calibrate", action="store_true", help="measure speed here, with the model of model.path")
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.config, arguments.overrides)
    machine = parse_machine(arguments.machine, config)
    if arguments.calibrate:
        machine = calibrate(config, machine, expect(config, arguments.mean_tokens, arguments.prompt_tokens))
    planned = forecast(config, machine, arguments.mean_tokens, arguments.prompt_tokens)
    print("\n".join([*planned.lines(), *beside_run(config, planned)]))


if __name__ == "__main__":
    cli.run(main)
