"""The rollouts of one step, one row each. Length is defined here and nowhere else.

Legend of shape suffixes, used everywhere: P prompts of the step, G rollouts per prompt, B = P * G rows (row b belongs to
group b // G), T tokens of a response, V vocabulary.

A row keeps what the sampler really produced: token ids and the log-prob of each sampled token. Text is only ever decoded
for the grader and for people; nothing is encoded again, so ids, masks and lengths cannot drift apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from nanolapo.config import UserError
from nanolapo.data.problems import Problem
from nanolapo.data.prompts import GivenTokens
from nanolapo.samplers.sampler import Request, Sample


@dataclass(slots=True)
class Rollout:
    """One sampled answer, and everything that is known about it."""

    problem: Problem
    prompt_ids: np.ndarray  # int64
    response_ids: np.ndarray  # int64 [T]
    sampler_logprobs: np.ndarray  # float32 [T]
    finished: bool  # it ended with an end token; False: the limit cut it off
    budget: float = math.nan  # the target length given with the prompt; nan, not 0, if there was none
    place: int = 0  # the place of its prompt among the prompts of the step
    given: GivenTokens | None = None  # its first tokens if they were given; their log-probs: of a random choice, or 0
    unmatched: bool = False  # of another temperature than the trainer scores at: left out of mismatch and entropy
    text: str = ""  # the decoded response, for the grader and for people
    correct: bool = False  # the grader's verdict, never a shaped reward
    reward: dict[str, float] = field(default_factory=dict)  # named parts; the reward is their sum
    keep: bool = True  # its group is trained on

    @property
    def num_given(self) -> int:
        return len(self.given.ids) if self.given else 0

    @property
    def num_by_lot(self) -> int:
        """The given tokens if they were chosen at random with a known probability, else 0."""
        return self.num_given if self.given and self.given.logprob is not None else 0


def column(read: Callable[[Rollout], Any], dtype: type) -> property:
    """Return a property of Rollouts: `read` of every row, as a read-only array [B]."""

    def of_rows(rollouts: Rollouts) -> np.ndarray:
        values_B: np.ndarray = np.array([read(row) for row in rollouts.rows], dtype=dtype)
        values_B.flags.writeable = False
        return values_B

    return property(of_rows)


@dataclass
class Measured:
    """Lengths and verdicts of groups of answers, without the answers. It reads like Rollouts."""

    problems: tuple[Problem, ...]  # P
    group_size: int
    lengths_B: np.ndarray  # int64, sampled tokens
    correct_B: np.ndarray  # bool

    def __len__(self) -> int:
        return len(self.lengths_B)

    def by_group(self, values_B: np.ndarray) -> np.ndarray:
        """View a row array [B, ...] as [P, G, ...]."""
        return values_B.reshape(len(self.problems), self.group_size, *values_B.shape[1:])


@dataclass
class Rollouts:
    """Rollouts in groups, in prompt order: of a whole step over all ranks, of one round, or of one rank.

    The columns (`correct_B` and so on) are read from the rows each time, so ask for one before a loop, not in it. To
    change a value, change it in its row.
    """

    rows: list[Rollout]  # B
    group_size: int
    old_entropies: dict[int, np.ndarray] = field(default_factory=dict)  # row -> [T], see Loss.needs_entropy

    def __len__(self) -> int:
        return len(self.rows)

    def by_group(self, values_B: np.ndarray) -> np.ndarray:
        """View a row array [B, ...] as [P, G, ...]."""
        return values_B.reshape(len(self) // self.group_size, self.group_size, *values_B.shape[1:])

    problems = property(lambda self: tuple(row.problem for row in self.rows[:: self.group_size]))  # P
    prompt_ids = property(lambda self: tuple(row.prompt_ids for row in self.rows))
    response_ids = property(lambda self: tuple(row.response_ids for row in self.rows))
    sampler_logprobs = property(lambda self: tuple(row.sampler_logprobs for row in self.rows))
    texts = property(lambda self: tuple(row.text for row in self.rows))
    finished_B = column(lambda row: row.finished, bool)
    budgets_B = column(lambda row: row.budget, float)
    unmatched_B = column(lambda row: row.unmatched, bool)
    correct_B = column(lambda row: row.correct, bool)
    keep_B = column(lambda row: row.keep, bool)

    @property
    def lengths_B(self) -> np.ndarray:
        """Length of each response = number of sampled tokens, the end token included. Nothing else is called length.

        Given tokens, with which an answer is made to begin, count as well. Prompt, the guidance in it and padding do not,
        and text is never encoded again.
        """
        return np.array([len(row.response_ids) for row in self.rows], dtype=np.int64)

    @property
    def mean_entropy(self) -> float:
        """E[-log p] over the drawn tokens, nats per token: an unbiased estimate; nan without any. Rows of another
        temperature would bias it, so they are left out."""
        drawn = (row.sampler_logprobs[row.num_given :] for row in self.rows if not row.unmatched)
        used = [logprobs for logprobs in drawn if len(logprobs)]
        return -float(np.concatenate(used).mean()) if used else math.nan

    @property
    def reward_parts(self) -> dict[str, np.ndarray]:
        """Named parts of the reward, [B] each."""
        return {name: np.array([row.reward[name] for row in self.rows]) for name in self.rows[0].reward}

    @property
    def rewards_PG(self) -> np.ndarray:
        return self.by_group(sum(self.reward_parts.values(), np.zeros(len(self))))

    def set_rewards(self, parts: Mapping[str, np.ndarray]) -> None:
        """Write the parts of the reward, [B] each, to the rows. Raises UserError for a part that cannot be a reward."""
        for name, values_B in parts.items():
            if np.shape(values_B) != (len(self),) or not np.isfinite(values_B).all():
                raise UserError(
                    f"reward part {name!r}: the method must give {len(self)} finite numbers, one a rollout; it gave shape "
                    f"{np.shape(values_B)}, {int((~np.isfinite(values_B)).sum())} of them not finite"
                )
        for b, row in enumerate(self.rows):
            row.reward = {name: float(values_B[b]) for name, values_B in parts.items()}

    def put(self, b: int, other: Rollout) -> None:
        """Replace row b by a row of another batch. Its problem and its place stay."""
        self.rows[b] = replace(other, problem=self.rows[b].problem, place=self.rows[b].place)

    def take(self, groups: Iterable[int]) -> Rollouts:
        """Return a batch of these groups only. The rows are the same objects."""
        size = self.group_size
        return Rollouts([row for g in groups for row in self.rows[g * size : (g + 1) * size]], size)

    def usable(self, vocab_size: int) -> Rollouts:
        """Return the groups that can be trained on: no answer has a token id beyond the vocabulary, or a log-prob that is
        not finite. If that answer alone were left out, the others would be compared within a smaller group."""
        usable_B = np.array([
            bool(((row.response_ids >= 0) & (row.response_ids < vocab_size)).all())
            and bool(np.isfinite(row.sampler_logprobs).all())
            for row in self.rows
        ])  # fmt: skip
        return self.take(np.flatnonzero(self.by_group(usable_B).all(axis=1)).tolist())

    def set_keep(self, keep_P: np.ndarray) -> None:
        """Mark the groups that are trained on."""
        for row, keep in zip(self.rows, np.repeat(keep_P, self.group_size), strict=True):
            row.keep = bool(keep)

    def kept(self, most: int) -> Rollouts:
        """Return the groups to train on, at most `most`. If none is kept, return all: the update skips and counts them."""
        groups = np.flatnonzero(self.keep_B[:: self.group_size])[:most].tolist()
        return self.take(groups) if groups else self


def make_rollouts(requests: Sequence[Request], samples: Sequence[Sample], group_size: int) -> Rollouts:
    """Put requests and the sampler's answers together.

    Raises AssertionError when the counts do not agree: a completion must never be attached to another's prompt.
    """
    assert len(requests) == len(samples) and len(requests) % group_size == 0, (
        f"{len(requests)} requests, {len(samples)} samples, groups of {group_size}"
    )
    rows = []
    for asked, sample in zip(requests, samples, strict=True):
        assert asked.problem is not None, "a rollout belongs to a problem"
        rows.append(Rollout(
            problem=asked.problem,
            prompt_ids=np.asarray(asked.prompt_ids, dtype=np.int64),
            response_ids=sample.ids,
            sampler_logprobs=sample.logprobs,
            finished=bool(sample.finished),
            budget=math.nan if asked.budget is None else float(asked.budget),
            place=asked.place,
            given=asked.given,
        ))  # fmt: skip
    return Rollouts(rows, group_size)


def join(parts: Sequence[Rollouts]) -> Rollouts:
    """Join batches: all their groups, sorted by their places in the step, whichever rank sampled them."""
    rows = [row for part in parts for row in part.rows]
    return Rollouts(sorted(rows, key=lambda row: row.place), parts[0].group_size)


def row_seed(run_seed: int, step: int, prompt_index: int, rollout_index: int) -> int:
    """Seed of one request, a pure function of its place, so that resuming and the number of ranks change nothing.

    >>> row_seed(0, 1, 2, 3) == row_seed(0, 1, 2, 3) != row_seed(0, 1, 2, 4)
    True
    """
    entropy = np.random.SeedSequence((run_seed, step, prompt_index, rollout_index))
    return int(entropy.generate_state(1, dtype=np.uint32)[0])
