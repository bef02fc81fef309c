"""Freed memory stays with the process: the same tensors a second time cost no page faults, and no more memory.

Run: python -m pytest tests/test_allocator.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROBE = """
import resource, sys, torch
from nanolapo.allocator import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit("no such setting")
for _ in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF)
    tensors = [torch.ones(2**18 * k) for k in range(1, 32)]  # 1 to 31 MiB, together 496 MiB or 127,000 pages of 4 kB
    del tensors
    after = resource.getrusage(resource.RUSAGE_SELF)
    print(after.ru_minflt - before.ru_minflt, after.ru_maxrss)
"""


def faults_and_peaks(mode: str) -> list[list[int]]:
    """Page faults of each of 20 equal rounds, and the peak memory after it in kB."""
    command = [sys.executable, "-c", PROBE, mode]
    out = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1]).stdout
    return [[int(word) for word in line.split()] for line in out.splitlines()]


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_tensors_come_from_memory_that_was_freed_before():
    as_it_comes, kept = faults_and_peaks("as it comes"), faults_and_peaks("keep")
    faults = [sum(faults for faults, _ in rounds[1:]) for rounds in (as_it_comes, kept)]
    assert faults[1] < faults[0] / 10
    assert kept[-1][1] < 1.3 * as_it_comes[-1][1]
