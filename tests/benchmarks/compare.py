"""One table of all step_*.json and trl_*.json files of a folder:  python tests/benchmarks/compare.py FOLDER"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from common import table


def main() -> None:
    rows: list[list[Any]] = [
        ["run", "seconds a step", "tokens/s", "peak GB", "times TRL's tokens/s", "share of its peak"]
    ]
    results = {path.stem: json.loads(path.read_text()) for path in sorted(Path(sys.argv[1]).glob("*_*.json"))}
    for name, result in results.items():
        row = [name, result["seconds"]["step"]["median"], result["tokens_per_second"], result["memory_gb"]["peak"]]
        other = results.get(f"trl_{result['args']['dtype']}")
        if other and not name.startswith("trl"):
            row += [row[2] / other["tokens_per_second"], row[3] / other["memory_gb"]["peak"]]
        rows.append([*row, *[""] * (6 - len(row))])
    print(table(rows))


if __name__ == "__main__":
    main()
