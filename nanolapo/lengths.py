"""The length-statistics tracker: M(q), the number of tokens that sufficed for problem q, kept by stable problem id.

Stage 1 overwrites an entry at every visit (Eq. 3; an unsolved visit resets it). Stage 2 refines it with the dual update of
Eq. 8: unsolved problems take the new statistic, solved ones only move down to it. "Unsolved" is None, not the magic
number 4096, so no target can be mistaken for it. The right lengths behind every entry are kept as well. They give the range
of Eq. 2 and, without another stage 1, the other statistics of the paper's Table 3. The map is plain JSON on disk.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanolapo.config import UserError

# Paper, Table 3
STATISTICS: dict[str, Callable[[np.ndarray], np.floating]] = {
    "median": np.median,
    "mean": np.mean,
    "minimum": np.min,
}


def typical_range(
    correct_lengths: Sequence[int] | np.ndarray, percentiles: tuple[float, float] = (30.0, 70.0)
) -> tuple[float, float]:
    """[L_min, L_max] of Eq. 2 in tokens: P30 and P70 of the lengths of right answers (Eq. 1), at least one.

    >>> typical_range([1000, 1200, 1300, 1500, 2000])
    (1220.0, 1460.0)
    """
    low, high = np.percentile(np.asarray(correct_lengths, dtype=np.float64), percentiles)
    return float(low), float(high)


class LengthMap:
    """M(q) of each problem; None: unsolved.

    >>> m = LengthMap()
    >>> m.update_discovery("q", [1000, 1200, 1300, 1500, 2000]); m.target("q")
    1300.0
    >>> m.update_discovery("q", []); m.target("q") is None          # Eq. 3: an unsolved visit resets the entry
    True
    >>> m.update_internalization("q", [900]); m.target("q")         # Eq. 8, unsolved before
    900.0
    >>> m.update_internalization("q", [1100, 1300]); m.target("q")  # Eq. 8, solved before: min(900, 1200)
    900.0
    """

    def __init__(self, statistic: str = "median") -> None:
        self.statistic = statistic
        self.entries: dict[str, float | None] = {}  # None: visited but not solved (in stage 1: at the last visit)
        self.lengths: dict[str, list[int]] = {}  # lengths of the right answers behind each solved entry

    def __len__(self) -> int:
        return len(self.entries)

    def measure(self, correct_lengths: Sequence[int] | np.ndarray) -> float:
        return float(STATISTICS[self.statistic](np.asarray(correct_lengths, dtype=np.float64)))

    def update_discovery(self, problem_id: str, correct_lengths: Sequence[int] | np.ndarray) -> None:
        """Eq. 3: overwrite with the statistic of this visit's correct lengths; none correct means unsolved."""
        self.entries[problem_id] = None
        self.lengths.pop(problem_id, None)
        if len(correct_lengths):
            self._write_down(problem_id, correct_lengths)

    def update_internalization(self, problem_id: str, correct_lengths: Sequence[int] | np.ndarray) -> None:
        """Eq. 8, the dual update. Without a correct rollout the entry stays (the paper has no case for it)."""
        if not len(correct_lengths):
            self.entries.setdefault(problem_id, None)
            return
        old = self.entries.get(problem_id)
        if old is None or self.measure(correct_lengths) < old:
            self._write_down(problem_id, correct_lengths)

    def _write_down(self, problem_id: str, correct_lengths: Sequence[int] | np.ndarray) -> None:
        self.entries[problem_id] = self.measure(correct_lengths)
        self.lengths[problem_id] = [int(length) for length in correct_lengths]

    def target(self, problem_id: str) -> float | None:
        """M(q) in tokens, or None where the problem is unsolved or unknown."""
        return self.entries.get(problem_id)

    def typical_range(self, problem_id: str, percentiles: tuple[float, float]) -> tuple[float, float] | None:
        """[L_min, L_max] of Eq. 2 in tokens, over the lengths behind the entry; None where there are none.

        >>> m = LengthMap()
        >>> m.update_discovery("q", [1000, 1200, 1300, 1500, 2000]); m.typical_range("q", (30, 70))
        (1220.0, 1460.0)
        """
        return typical_range(self.lengths[problem_id], percentiles) if problem_id in self.lengths else None

    def measured_by(self, statistic: str, path: str) -> LengthMap:
        """Return the map that stage 1 would have written with another statistic (its rewards do not depend on it).

        Raises UserError when the lengths behind an entry are not known (a map of an older version).
        """
        unknown = [q for q, target in self.entries.items() if target is not None and q not in self.lengths]
        if unknown:
            raise UserError(
                f"lapo.statistic={statistic!r}, but {path} records {self.statistic!r} without the lengths behind it: run "
                "stage 1 again"
            )
        other = LengthMap(statistic)
        for problem_id in self.entries:
            other.update_discovery(problem_id, self.lengths.get(problem_id, []))
        return other

    def check_covers(self, problem_ids: Sequence[str], path: str) -> None:
        """Stage 2 may only start from a map that knows its problems. Raises UserError saying how many are missing."""
        missing = [problem_id for problem_id in problem_ids if problem_id not in self.entries]
        if missing:
            hint = "stage 1 did not visit them, or could use no group of theirs"
            if len(missing) == len(problem_ids):
                hint = "the map comes from other data"
            raise UserError(
                f"{path}: lacks {len(missing)} of the {len(problem_ids)} problems (first: {missing[0]}); {hint}: run "
                "train_stage1.py on the same data.sources for at least one pass, or point lapo.length_map to its map"
            )

    def state_dict(self) -> dict[str, Any]:
        entries, lengths = dict(sorted(self.entries.items())), dict(sorted(self.lengths.items()))
        return {"statistic": self.statistic, "entries": entries, "lengths": lengths}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.statistic, self.entries = state["statistic"], dict(state["entries"])
        self.lengths = dict(state.get("lengths", {}))  # maps and checkpoints of older versions have none

    def save(self, path: str | Path) -> None:
        """Write the JSON file in one rename, so that a kill at any moment leaves a whole file."""
        path = Path(path)
        temporary = path.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(self.state_dict(), file, indent=0)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> LengthMap:
        """Read a map. Raises UserError naming the file when it is missing or not a length map."""
        length_map = cls()
        try:
            state = json.loads(Path(path).read_text(encoding="utf-8"))
            if state["statistic"] not in STATISTICS:
                raise ValueError(f"unknown statistic {state['statistic']!r}")
            if not all(v is None or (type(v) in (int, float) and 0 < v < np.inf) for v in state["entries"].values()):
                raise ValueError("a target is not a positive number or null")
            for lengths in state.get("lengths", {}).values():
                if not lengths or not all(type(length) is int and length > 0 for length in lengths):
                    raise ValueError("a length is not a positive number of tokens")
            length_map.load_state_dict(state)
        except (FileNotFoundError, IsADirectoryError):
            raise UserError(f"lapo.length_map={path}: no such file; stage 1 writes it as length_map.json") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"lapo.length_map={path}: not a length map ({error!r}); stage 1 writes one") from None
        return length_map


def to_multiple(length: float, multiple: int) -> int:
    """Return the length that a prompt prints: the nearest multiple, at least one.

    >>> to_multiple(1330.0, 100), to_multiple(41.0, 100), to_multiple(41.4, 1)
    (1300, 100, 41)
    """
    return max(multiple, round(length / multiple) * multiple)
