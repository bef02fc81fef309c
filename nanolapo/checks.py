"""What preflight has found so far, and how a run or --dry-run says it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

NOTE = "note: "  # begins what a check has found if the user should read it


@dataclass
class Preflight:
    """The checks that were made so far: name, what it proves, what it found."""

    rows: list[tuple[str, str, str]] = field(default_factory=list)
    seconds: float = 0.0

    def run(self, checks: Sequence[partial[str]]) -> Preflight:
        """Make these checks in order. The first that fails raises its UserError."""
        started = time.monotonic()
        for check in checks:
            proves = (check.func.__doc__ or "").partition("\n")[0].rstrip(".")
            self.rows.append((check.func.__name__.replace("_", " "), proves, check()))
        self.seconds += time.monotonic() - started
        return self

    def lines(self) -> list[str]:
        """The one line of a run, and the notes that its user should read."""
        notes = [f"{name}: {found.removeprefix(NOTE)}" for name, _, found in self.rows if found.startswith(NOTE)]
        return [f"preflight: {len(self.rows)} checks, {self.seconds:.1f} s", *notes]

    def table(self) -> list[str]:
        """What each check found, for --dry-run."""
        return [f"  {name}: {found}" for name, _, found in self.rows if not found.startswith(NOTE)]
