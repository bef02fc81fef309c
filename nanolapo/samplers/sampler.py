"""What the trainer asks of a sampler, and what it gets back. There are two: torch_sampler.py, vllm_sampler.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from nanolapo.data.problems import Problem


@dataclass(frozen=True)
class Request:
    """One completion to sample. Its random numbers depend on `seed` alone, not on its batch."""

    prompt_ids: list[int]
    seed: int
    max_new_tokens: int
    # The sampler ignores these three. The request's Rollout takes them over.
    problem: Problem | None = None
    place: int = 0  # of the prompt among the prompts of the step
    budget: float | None = None  # the target length that the prompt carries


@dataclass(frozen=True)
class Decoding:
    """How tokens are drawn. temperature 0 is greedy; top_p < 1 is for evaluation only."""

    temperature: float = 1.0
    top_p: float = 1.0


@dataclass(frozen=True)
class Sample:
    """One sampled completion: ids int64 [T] (end token included), logprobs float32 [T] after temperature ([0] if the
    sampler was told not to record them)."""

    ids: np.ndarray
    logprobs: np.ndarray
    finished: bool


class Sampler(Protocol):
    """What the loop asks of an engine; torch_sampler.py and vllm_sampler.py both are one."""

    def generate(
        self,
        requests: Sequence[Request],
        decoding: Decoding,
        progress: Callable[[int], None] | None = None,
        finished: Callable[[int, Sample], None] | None = None,
    ) -> list[Sample]: ...
    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None: ...
    def sleep(self) -> None: ...
    def wake(self) -> None: ...
    def close(self) -> None: ...
