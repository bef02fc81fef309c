"""The planner against runs that were made: seconds a step as plan.cost predicts them, and as metrics.jsonl has them.

    python tests/benchmarks/plan_check.py RUN_DIR [RUN_DIR ...]

Lengths, and the share of answers that was trained on, are the run's own (as for `--dry-run` of a run that has begun), so
that what is checked is the arithmetic and the machine's constants. Run it from where the runs were started.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

from common import table

from nanolapo.config_file import load_config
from nanolapo.plan.cost import forecast
from nanolapo.plan.machines import this_machine
from nanolapo.report.files import read_metrics


def compare(run_dir: Path) -> list[Any]:
    """One row: name, predicted and measured seconds of sampling and of training, and the ratio of their sums."""
    config = load_config(run_dir / "config.yaml", [])
    steps = read_metrics(run_dir)
    found = forecast(config, this_machine(config))
    sample, train = (statistics.mean(step[f"seconds/{phase}"] for step in steps) for phase in ("sample", "update"))
    ratio = (found.sample_seconds + found.train_seconds) / (sample + train)
    return [str(run_dir), found.sample_seconds, sample, found.train_seconds, train, ratio]


def main() -> None:
    rows = [compare(Path(name)) for name in sys.argv[1:]]
    print(table([["run", "sample: plan", "measured", "train: plan", "measured", "plan / measured"], *rows]))
    ratios = [row[-1] for row in rows]
    near = sum(1 / 1.3 <= ratio <= 1.3 for ratio in ratios)
    print(f"\nmedian {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")
    print(f"within 30 %: {near} of {len(rows)}")


if __name__ == "__main__":
    main()
