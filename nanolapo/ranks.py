"""The processes of one run, and how they exchange data. There is one process, or several under torchrun.

Data of a step crosses ranks only through `gather`; afterwards every rank holds the same global batch and computes the same
numbers from it. accelerate reads the launcher's variables and starts the process group.

Ranks talk in two groups. The default one moves tensors of ranks that are in step; it gives up after TENSOR_PATIENCE, so
that a real hang ends. Waiting for a rank that samples, grades or writes longer than the others is not a hang: `gather`
and `wait` use a second, gloo group that waits for PATIENCE. (A rank that has died is noticed at once in both.)
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

from nanolapo.config import RunStopped, UserError

T = TypeVar("T")
# What launchers set, in the order in which accelerate looks.
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
VARIABLES = {*SIZES, *RANKS, "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
START = "start several processes with torchrun, which sets all of them, or unset these variables for a single one"
PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>
TENSOR_PATIENCE = timedelta(minutes=10)
PATIENCE = timedelta(hours=24)  # 32k-token answers, a slow disk


def on_one_machine(environ: Mapping[str, str]) -> bool:
    """Return whether all processes run on this machine, by what their launcher has set."""
    size, local = (next((environ[name] for name in names if name in environ), "1") for names in (SIZES, LOCAL_SIZES))
    return size == local


def stay_on_loopback() -> None:
    """Let this process's groups listen on loopback only; what the user has set wins. For runs on a single machine."""
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(variable, loopback)


def to_device(values: Tensor | np.ndarray, device: torch.device) -> Tensor:
    """Copy from host memory without waiting. A GPU fetches from pinned memory while it still computes what it was given
    before, so the host may prepare the next micro-batch. Only pinned memory allows that."""
    tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class Ranks:
    """The index of this process, the number of processes, and the device of this one."""

    def __init__(self) -> None:
        end_with_launcher()
        check_launcher(os.environ, torch.cuda.is_available())
        if on_one_machine(os.environ):
            stay_on_loopback()
        self.state = PartialState(cpu=not torch.cuda.is_available(), timeout=TENSOR_PATIENCE)
        self.index: int = self.state.process_index
        self.count: int = self.state.num_processes
        device = self.state.device  # accelerate says cpu:0 under torchrun, which not every library takes for the CPU
        self.device = torch.device("cpu") if device.type == "cpu" else device
        self.is_main: bool = self.index == 0
        self.patient = dist.new_group(backend="gloo", timeout=PATIENCE) if self.count > 1 else None

    def engine(self, tensor_parallel: int) -> tuple[int, int]:
        """Return (the engine of this rank, the number of engines). Neighbouring ranks share an engine."""
        return self.index // tensor_parallel, self.count // tensor_parallel

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in rank order, on every rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self.patient)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """If one rank ends this block with a UserError or RunStopped, all ranks do. Inside it, ranks must not wait for each
        other."""
        error: Exception | None = None
        try:
            yield
        except (UserError, RunStopped) as mine:
            error = mine
        for of_rank in self.gather(error):
            if of_rank is not None:
                raise of_rank

    def from_main(self, make: Callable[[], T]) -> T:
        """Let the main rank call `make`, and return its result on every rank. This is for whatever depends on a clock or on
        files, about which ranks could disagree. An error of the user on the main rank is raised on all ranks."""
        made: Any = None
        with self.together():
            if self.is_main:
                made = make()
        return self.gather(made)[0]

    def agree(self, mine: Mapping[str, Any], remedy: str) -> None:
        """Raise UserError on all ranks if a rank holds another value than the main rank. Its line names key and values."""
        of_ranks = [{key: repr(value) for key, value in of_rank.items()} for of_rank in self.gather(mine)]
        for rank, theirs in enumerate(of_ranks):
            for key, value in of_ranks[0].items():
                if theirs.get(key) != value:
                    raise UserError(f"rank {rank} has {key}={theirs.get(key)}, rank 0 has {value}: {remedy}")

    def any(self, flag: bool) -> bool:
        """True on all ranks when it is true on one."""
        return any(self.gather(flag))

    def wait(self) -> None:
        """Return once every rank has come here."""
        if self.count > 1:
            dist.barrier(group=self.patient)


def check_launcher(environ: Mapping[str, str], has_gpu: bool) -> None:
    """Raise UserError if a launcher's variables say that there are other processes, but not all that it takes to find them.

    Without an address this process would wait for the others; without LOCAL_RANK on a GPU it would run alone.
    """
    given = {name: value for name, value in environ.items() if name in VARIABLES and value}
    for name, value in given.items():
        if not value.removeprefix("-").isdecimal() and name != "MASTER_ADDR":
            raise UserError(f"{name}={value!r} is not a number; {START}")
    size = next((name for name in SIZES if name in given), "")
    count = int(given.get(size, "1"))
    if count < 2 and int(given.get("LOCAL_RANK", "-1")) < 0:
        return
    cause = f"{size}={count}" if size else f"LOCAL_RANK={given['LOCAL_RANK']}"
    rank = next((name for name in RANKS if name in given), "RANK")
    needed = [rank, "MASTER_ADDR", "MASTER_PORT", *(["LOCAL_RANK"] if has_gpu else [])]
    missing = [name for name in needed if name not in given]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise UserError(f"{cause} asks for a process group, but {' and '.join(missing)} {verb} not set; {START}")
    if not 0 <= int(given[rank]) < count:
        raise UserError(f"{rank}={given[rank]} must be 0 to {count - 1}; {START}")


def end_with_launcher() -> None:
    """Let the kernel kill this rank when torchrun is killed. Otherwise ranks would train on unseen and write to the
    files of the run that is started again. (Linux only; elsewhere look for such ranks before you start again.)"""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
