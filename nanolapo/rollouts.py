"""One step's samples as flat arrays, and the one place where length is defined.

Legend of shape suffixes, used everywhere: P prompts of the step, G rollouts per prompt, B = P * G rows (row b belongs to
group b // G), T tokens of a response, V vocabulary.

A row keeps what the sampler really produced: token ids and the log-prob of each sampled token. Text is only ever decoded
for the grader and for people; nothing is encoded again, so ids, masks and lengths cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from nanolapo.data.problems import Problem
from nanolapo.samplers.sampler import Request, Sample

ROW_FIELDS = (  # of Rollouts: one entry per row
    "prompt_ids", "response_ids", "sampler_logprobs", "finished_B", "budgets_B", "correct_B", "broken_B", "unmatched_B",
    "texts",
)  # fmt: skip


@dataclass
class Rollouts:
    """All rollouts of one step, over every rank, groups in prompt order.

    `correct_B` is the grader's verdict, never a shaped reward. `budgets_B` is the target length a prompt carried, nan
    where it carried none (so that a missing budget can never be read as 0). `broken_B` marks rows whose samples cannot be
    trained on (a token id beyond the vocabulary, a log-prob that is not finite): they are masked out and counted.
    `unmatched_B` marks rows sampled at another temperature than the trainer scores at (a monitor pass): they may be trained
    on, but say nothing about the mismatch between sampler and trainer.
    """

    problems: list[Problem]  # P
    group_size: int
    prompt_ids: list[np.ndarray]  # B of int64
    response_ids: list[np.ndarray]  # B of int64 [T]
    sampler_logprobs: list[np.ndarray]  # B of float32 [T]
    finished_B: np.ndarray  # bool: ended with an end token, not cut by the limit
    budgets_B: np.ndarray  # float64, nan = none
    correct_B: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))
    broken_B: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))
    unmatched_B: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))
    old_entropies: dict[int, np.ndarray] = field(default_factory=dict)  # row -> [T], see Method.needs_entropy
    texts: list[str] = field(default_factory=list)  # B, decoded responses, for the grader and for people
    regrade: Callable[[Rollouts, Sequence[int]], None] | None = None  # set by the loop: grade these rows again

    def __post_init__(self) -> None:
        if len(self.unmatched_B) != len(self):
            self.unmatched_B = np.zeros(len(self), dtype=bool)

    def __len__(self) -> int:
        return len(self.response_ids)

    @property
    def lengths_B(self) -> np.ndarray:
        """Length of each response = number of sampled tokens, the end token included. Nothing else is called length.

        No prompt, no guidance, no padding, no re-encoding of text enters it.
        """
        return np.array([len(ids) for ids in self.response_ids], dtype=np.int64)

    @property
    def truncated_B(self) -> np.ndarray:
        return ~self.finished_B

    @property
    def group_B(self) -> np.ndarray:
        return np.arange(len(self)) // self.group_size

    @property
    def mean_entropy(self) -> float:
        """E[-log p] over the sampled tokens of usable rows, nats per token: an unbiased estimate; nan without any."""
        used = [p for p, broken in zip(self.sampler_logprobs, self.broken_B, strict=True) if not broken and len(p)]
        return -float(np.concatenate(used).mean()) if used else float("nan")

    def by_group(self, values_B: np.ndarray) -> np.ndarray:
        """View a row array [B, ...] as [P, G, ...]."""
        return values_B.reshape(len(self.problems), self.group_size, *values_B.shape[1:])

    def put_row(self, row: int, source: Rollouts, source_row: int) -> None:
        """Replace a row by one of another batch, with all that belongs to it. The problem of its group stays as it is."""
        for name in ROW_FIELDS:
            getattr(self, name)[row] = getattr(source, name)[source_row]


def make_rollouts(
    problems: list[Problem],
    group_size: int,
    requests: Sequence[Request],
    budgets: Sequence[float | None],
    samples: Sequence[Sample],
    vocab_size: int,
) -> Rollouts:
    """Bring the sampler's answers into row order and mark the rows that cannot be trained on.

    Raises AssertionError when the counts do not agree: a completion must never be attached to another's prompt.
    """
    num_rows = len(problems) * group_size
    assert len(requests) == len(samples) == len(budgets) == num_rows, (
        f"{len(problems)} prompts x {group_size} != {len(requests)} requests, {len(samples)} samples"
    )
    broken = [
        bool((s.ids < 0).any() or (s.ids >= vocab_size).any() or not np.isfinite(s.logprobs).all()) for s in samples
    ]
    return Rollouts(
        problems=list(problems),
        group_size=group_size,
        prompt_ids=[np.asarray(r.prompt_ids, dtype=np.int64) for r in requests],
        response_ids=[s.ids for s in samples],
        sampler_logprobs=[s.logprobs for s in samples],
        finished_B=np.array([s.finished for s in samples], dtype=bool),
        budgets_B=np.array([np.nan if b is None else float(b) for b in budgets]),
        correct_B=np.zeros(num_rows, dtype=bool),
        broken_B=np.array(broken, dtype=bool),
    )


def join_ranks(parts: Sequence[Rollouts]) -> Rollouts:
    """Put the ranks' rollouts together. Rank r sampled prompts r, r + N, r + 2N, ...; the result is in prompt order,
    so it is the same object whatever the number of ranks."""
    num_ranks = len(parts)
    num_groups = sum(len(part.problems) for part in parts)
    return pick_groups(parts, [(g % num_ranks, g // num_ranks) for g in range(num_groups)])


def concatenate(parts: Sequence[Rollouts]) -> Rollouts:
    """The groups of one batch after those of the other."""
    return pick_groups(parts, [(i, g) for i, part in enumerate(parts) for g in range(len(part.problems))])


def take_groups(rollouts: Rollouts, groups: Sequence[int] | np.ndarray) -> Rollouts:
    """A batch of these groups only."""
    return pick_groups([rollouts], [(0, int(g)) for g in groups])


def pick_groups(parts: Sequence[Rollouts], origin: Sequence[tuple[int, int]]) -> Rollouts:
    """A new batch whose groups come from (part, group in that part)."""
    group_size = parts[0].group_size
    rows = [(part, group * group_size + i) for part, group in origin for i in range(group_size)]

    def pick(name: str) -> list:
        columns = [getattr(part, name) for part in parts]
        return [columns[part][row] for part, row in rows]

    return Rollouts(
        problems=[parts[part].problems[group] for part, group in origin],
        group_size=group_size,
        prompt_ids=pick("prompt_ids"),
        response_ids=pick("response_ids"),
        sampler_logprobs=pick("sampler_logprobs"),
        finished_B=np.array(pick("finished_B"), dtype=bool),
        budgets_B=np.array(pick("budgets_B"), dtype=np.float64),
        correct_B=np.array(pick("correct_B"), dtype=bool),
        broken_B=np.array(pick("broken_B"), dtype=bool),
        unmatched_B=np.array(pick("unmatched_B"), dtype=bool),
        texts=pick("texts"),
        regrade=parts[0].regrade,
    )


def row_seed(run_seed: int, step: int, prompt_index: int, rollout_index: int) -> int:
    """Seed of one request, a pure function of its place, so that resuming and the number of ranks change nothing.

    >>> row_seed(0, 1, 2, 3) == row_seed(0, 1, 2, 3) != row_seed(0, 1, 2, 4)
    True
    """
    entropy = np.random.SeedSequence((run_seed, step, prompt_index, rollout_index))
    return int(entropy.generate_state(1, dtype=np.uint32)[0])
