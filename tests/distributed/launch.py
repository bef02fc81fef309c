"""Start a script of this folder on several ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def torchrun(script: str, ranks: int, *arguments: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """torchrun --standalone on this many ranks, one thread each; the output is kept."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment["PYTHONPATH"] = str(HERE.parents[1])  # this checkout, not one that the environment has installed
    return subprocess.run(
        [*command, str(HERE / script), *map(str, arguments)],
        capture_output=True, text=True, timeout=timeout, env=environment,
    )  # fmt: skip
