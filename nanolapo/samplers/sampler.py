"""What the trainer asks of a sampler, and what it gets back. There are two: torch_sampler.py, vllm_sampler.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from torch import Tensor

from nanolapo.data.problems import Problem
from nanolapo.data.prompts import FirstToken


@dataclass(frozen=True)
class Request:
    """One completion to sample. Its random numbers depend on `seed` alone, not on its batch."""

    prompt_ids: list[int]
    seed: int
    max_new_tokens: int
    # The sampler ignores the rest. The request's Rollout takes them over.
    problem: Problem | None = None
    place: int = 0  # of the prompt among the prompts of the step
    budget: float | None = None  # the target length that the prompt carries
    first: FirstToken | None = None  # how the answer begins; see `generate_all`


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
    """What the loop asks of an engine; torch_sampler.py and vllm_sampler.py both are one. After `sleep` must come
    `wake` and `load_weights`, in this order, before the next `generate`."""

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


def generate_all(
    sampler: Sampler,
    requests: Sequence[Request],
    decoding: Decoding,
    progress: Callable[[int], None] | None,
    finished: Callable[[int, Sample], None],
) -> list[Sample]:
    """Call sampler.generate, and see to the answers whose first token is given.

    For the engine that token is the last one of the prompt, so no engine has to know of it. Afterwards it is put in front
    of the answer, with the log-prob of its choice: it counts in the length and in max_new_tokens, and it is trained.
    """
    samples: dict[int, Sample] = {}

    def complete(number: int, sample: Sample) -> None:
        samples[number] = with_first(requests[number].first, sample)
        finished(number, samples[number])

    sampler.generate([for_engine(request) for request in requests], decoding, progress, complete)
    return [samples[number] for number in range(len(requests))]


def for_engine(request: Request) -> Request:
    """Return the request as an engine gets it. Raises ValueError if nothing is left to sample."""
    if request.first is None:
        return request
    if request.max_new_tokens < 2:
        raise ValueError(f"max_new_tokens={request.max_new_tokens}: a given first token leaves nothing to sample")
    prompt_ids = [*request.prompt_ids, request.first.token]
    return replace(request, prompt_ids=prompt_ids, max_new_tokens=request.max_new_tokens - 1, first=None)


def with_first(first: FirstToken | None, sample: Sample) -> Sample:
    """Put the given first token in front of what the engine sampled."""
    if first is None:
        return sample
    ids = np.concatenate([np.array([first.token], dtype=np.int64), sample.ids])
    logprobs = np.concatenate([np.array([first.logprob], dtype=np.float32), sample.logprobs])
    return Sample(ids, logprobs, sample.finished)
