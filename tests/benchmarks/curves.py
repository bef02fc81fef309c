"""Learning curves of several runs side by side: of each group of runs the mean, and the least and the most, at some steps.

    python tests/benchmarks/curves.py --steps 1,5,10,20,40 on=runs/a,runs/b off=runs/c,runs/d

Names may be repeated for other columns: reward, accuracy, length and so on (docs/METRICS.md), `--of reward,length`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from common import spread, table


def metrics(folder: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def cell(values: list[float], digits: int) -> str:
    return f"{sum(values) / len(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("runs", nargs="+", metavar="NAME=FOLDER,FOLDER", help="runs that differ in their seed only")
    p.add_argument("--steps", default="1,5,10,15,20,30,40")
    p.add_argument("--of", default="reward,length")
    args = p.parse_args()
    groups = {
        name: [metrics(f) for f in folders.split(",")] for name, _, folders in (r.partition("=") for r in args.runs)
    }
    names = args.of.split(",")
    rows: list[list[Any]] = [["step", *(f"{name}, {group}" for name in names for group in groups)]]
    for step in map(int, args.steps.split(",")):
        rows.append([step, *(cell([run[step - 1][name] for run in runs], 1 if name == "length" else 3)
                             for name in names for runs in groups.values())])  # fmt: skip
    print(table(rows))
    for group, runs in groups.items():
        tokens = spread([run[-1]["sampled_tokens"] for run in runs])
        seconds = spread([sum(v for m in run for k, v in m.items() if k.startswith("seconds/")) for run in runs])
        print(f"{group}: {tokens['median']:,.0f} tokens sampled, {seconds['median']:.0f} s (medians)")


if __name__ == "__main__":
    main()
