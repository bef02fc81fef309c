"""The processes of one run. Started plainly there is one; under torchrun there are many, and this is all they say.

Data of a step crosses ranks in one place only (`gather`, once a step); afterwards every rank holds the same global batch
and computes the same numbers from it. accelerate finds out where we are and starts the process group.

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
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

T = TypeVar("T")
PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>
TENSOR_PATIENCE = timedelta(minutes=10)
PATIENCE = timedelta(hours=24)  # 32k-token answers, a slow disk


def stay_on_loopback() -> None:
    """Let this process's groups listen on loopback only; what the user has set wins. For runs on a single machine."""
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(variable, loopback)


class Ranks:
    """index of this process, count of all, the device it owns."""

    def __init__(self) -> None:
        end_with_launcher()
        if os.environ.get("WORLD_SIZE", "1") == os.environ.get("LOCAL_WORLD_SIZE", "1"):
            stay_on_loopback()
        self.state = PartialState(cpu=not torch.cuda.is_available(), timeout=TENSOR_PATIENCE)
        self.index: int = self.state.process_index
        self.count: int = self.state.num_processes
        device = self.state.device  # accelerate says cpu:0 under torchrun, which not every library takes for the CPU
        self.device = torch.device("cpu") if device.type == "cpu" else device
        self.is_main: bool = self.index == 0
        self.patient = dist.new_group(backend="gloo", timeout=PATIENCE) if self.count > 1 else None

    def engine(self, tensor_parallel: int) -> tuple[int, int]:
        """(which engine this rank belongs to, how many there are): neighbouring ranks share one."""
        return self.index // tensor_parallel, self.count // tensor_parallel

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self.patient)
        return values

    def any(self, flag: bool) -> bool:
        """True on all ranks when it is true on one."""
        return any(self.gather(flag))

    def wait(self) -> None:
        """Return once every rank has come here."""
        if self.count > 1:
            dist.barrier(group=self.patient)


def end_with_launcher() -> None:
    """Let the kernel kill this rank when torchrun is killed. Ranks that train on unseen would write to the same files as
    the run that the same command starts anew. (Linux only; elsewhere look for them before you start again.)"""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
