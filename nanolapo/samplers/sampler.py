"""What the trainer asks of a sampler, and what it gets back. There are two: torch_sampler.py, vllm_sampler.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from torch import Tensor

from nanolapo.config import UserError
from nanolapo.data.problems import Problem
from nanolapo.data.prompts import GivenTokens


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
    given: GivenTokens | None = None  # how the answer begins; see `generate_all`


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
        progress: Callable[[int], object] | None = None,
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
    progress: Callable[[int], object] | None,
    finished: Callable[[int, Sample], None],
) -> list[Sample]:
    """Call sampler.generate, and see to the answers whose first tokens are given.

    For the engine these are the end of the prompt, so no engine has to know of them. Afterwards they are put in front of
    the answer, with the log-prob of the random choice, or 0 if there was none. They count in the length and in
    max_new_tokens, and are trained.
    """
    samples: dict[int, Sample] = {}

    def complete(number: int, sample: Sample) -> None:
        samples[number] = with_given(requests[number].given, sample)
        finished(number, samples[number])

    sampler.generate([for_engine(request) for request in requests], decoding, progress, complete)
    return [samples[number] for number in range(len(requests))]


def for_engine(request: Request) -> Request:
    """Return the request as an engine gets it. Raises UserError if nothing is left to sample."""
    if request.given is None:
        return request
    left = request.max_new_tokens - len(request.given.ids)
    if left < 1:
        raise UserError(
            f"rollout.max_new_tokens: a limit of {request.max_new_tokens} leaves nothing to sample after the "
            f"{len(request.given.ids)} tokens with which the answer is made to begin; raise it"
        )
    return replace(request, prompt_ids=[*request.prompt_ids, *request.given.ids], max_new_tokens=left, given=None)


def with_given(given: GivenTokens | None, sample: Sample) -> Sample:
    """Put the given tokens in front of what the engine sampled."""
    if given is None:
        return sample
    ids = np.concatenate([np.array(given.ids, dtype=np.int64), sample.ids])
    logprobs = np.full(len(ids), given.logprob or 0.0, dtype=np.float32)
    logprobs[len(given.ids) :] = sample.logprobs
    return Sample(ids, logprobs, sample.finished)
