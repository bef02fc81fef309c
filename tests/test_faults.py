"""One of the kills of `make faults` (tests/faults/run.py; docs/RELIABILITY.md): one rank, while it samples.

Run: python -m pytest tests/test_faults.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parent / "faults/run.py"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_run_is_taken_up_by_the_same_command_and_ends_equal(tmp_path: Path) -> None:
    arguments = ["--count", "1", "--only", "random", "--folder", str(tmp_path / "faults")]
    result = subprocess.run([sys.executable, str(RUN), *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 of 1 random kills survived" in result.stdout
