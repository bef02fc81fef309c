"""Host memory while a run's model is loaded, one line for each rank.

torchrun --standalone --nproc_per_node=2 tests/benchmarks/loading.py CONFIG.yaml [key=value ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

from nanolapo.config_file import load_config
from nanolapo.policy import Policy
from nanolapo.ranks import Ranks


def peak_mib() -> int:
    """Return the most memory that this process has held so far, in MiB (Linux only)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024


def main(path: str, *overrides: str) -> None:
    ranks = Ranks()
    before = peak_mib()
    Policy(load_config(path, list(overrides)), ranks.device, ranks)
    line = f"rank {ranks.index}: peak {before} MiB before, {peak_mib()} MiB with the model\n"
    print(line, end="", flush=True)  # in one piece: the ranks share a pipe
    ranks.wait()  # a rank that ends early breaks off what another one still sends


if __name__ == "__main__":
    main(*sys.argv[1:])
