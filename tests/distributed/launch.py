"""Run a script's main(*arguments) on several ranks. They are forked from one process that has imported everything already:
torchrun would import torch once more for each rank. (Runs under torchrun itself: test_scripts.py, test_locks.py.)

    python tests/distributed/launch.py RANKS SCRIPT.py ARGUMENTS
"""

from __future__ import annotations

import importlib
import multiprocessing
import multiprocessing.connection
import os
import socket
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def on_ranks(ranks: int, script: str, *arguments: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """This many ranks of a script of this folder or tests/helpers, one thread each; the output is kept."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (HERE.parents[1], HERE.parent / "helpers")))
    command = [sys.executable, __file__, str(ranks), script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)


def run_rank(rank: int, ranks: int, port: int, module: str, arguments: list[str]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    os.environ["TORCHELASTIC_RUN_ID"] = "none"  # a rank ends when this launcher is killed
    importlib.import_module(module).main(*arguments)
    # No destroy_process_group: torch 2.13 now and then corrupted the heap in it, when all results were on disk ("malloc():
    # unaligned fastbin chunk detected", three ranks). A forked rank ends by os._exit, which frees nothing.


def launch(ranks: int, module: str, arguments: list[str]) -> int:
    """1 where a rank has failed (the others are then ended), else 0."""
    importlib.import_module(module)  # before the fork
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=run_rank, args=(r, ranks, port, module, arguments)) for r in range(ranks)]
    for child in children:
        child.start()
    running = {child.sentinel: child for child in children}
    while running:
        for sentinel in multiprocessing.connection.wait(list(running)):
            ended = running.pop(sentinel)
            ended.join()
            if ended.exitcode:
                for child in children:
                    child.kill()
    return int(any(child.exitcode for child in children))


if __name__ == "__main__":
    sys.exit(launch(int(sys.argv[1]), Path(sys.argv[2]).stem, sys.argv[3:]))
