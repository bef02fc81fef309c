"""Chooses which problems a step samples. Pure functions of (seed, step), so that ranks agree and resuming
needs no saved position.
"""

from __future__ import annotations

import math
import random

import numpy as np


def batch_indices(num_problems: int, step: int, prompts_per_step: int, seed: int) -> list[int]:
    """Return the problems of one step, as indices. It is a pure function, so any rank or resumed run finds the same.

    Every epoch is a seeded permutation of all problems and may end inside a batch. Problems that the open batch already
    holds are moved behind its end in the next permutation, so no batch has a problem twice, unless there are fewer problems
    than prompts in a step.

    >>> [batch_indices(5, step, prompts_per_step=2, seed=0) for step in range(5)]
    [[0, 1], [4, 3], [2, 0], [1, 2], [3, 4]]
    """
    if num_problems < 1 or prompts_per_step < 1:
        raise ValueError(f"{num_problems=} and {prompts_per_step=} must be positive")
    start = step * prompts_per_step
    # Every few epochs an epoch starts together with a batch: unroll from the last such epoch.
    cycle = prompts_per_step // math.gcd(num_problems, prompts_per_step)
    epoch = start // num_problems // cycle * cycle
    start -= epoch * num_problems
    stream: list[int] = []
    while len(stream) < start + prompts_per_step:
        order = list(range(num_problems))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        num_open = len(stream) % prompts_per_step  # problems already in the batch in which this epoch begins
        if num_open:
            held = set(stream[-num_open:])
            head = [index for index in order if index not in held][: prompts_per_step - num_open]
            taken = set(head)
            order = head + [index for index in order if index not in taken]
        stream += order
        epoch += 1
    return stream[start : start + prompts_per_step]


def round_indices(
    num_problems: int, step: int, round_number: int, prompts: int, seed: int, weights: np.ndarray | None = None
) -> list[int]:
    """Return the problems of one round. Round 0 is the step's batch; dynamic sampling goes on with rounds 1, 2, ...

    Without weights, round 0 follows batch_indices, however many rounds earlier steps needed; further rounds take the
    problems outside the batch in a shuffled order. With weights [problems], all rounds draw by them. In both cases a step
    has no problem twice, and rounds get short, then empty, when the problems run out.

    >>> [round_indices(5, step, round_number, prompts=2, seed=0) for step in (0, 1) for round_number in range(4)]
    [[0, 1], [4, 3], [2], [], [4, 3], [1, 0], [2], []]
    """
    if weights is not None:
        order = weighted_order(weights, f"{seed}/{step}")
        assert len(weights) == num_problems, f"{len(weights)} weights for {num_problems} problems"
        return order[round_number * prompts : (round_number + 1) * prompts]
    batch = batch_indices(num_problems, step, prompts, seed)
    if round_number == 0:
        return batch
    rest = sorted(set(range(num_problems)) - set(batch))
    random.Random(f"{seed}/{step}/further rounds").shuffle(rest)
    return rest[(round_number - 1) * prompts : round_number * prompts]


def weighted_order(weights: np.ndarray, seed: str) -> list[int]:
    """Draw all problems of positive weight one after the other, each time by the weights of those left; return the order.

    Each waits an exponential time of rate w: it comes first with probability w / sum(w), and so on with the rest.
    """
    weights = np.asarray(weights, dtype=np.float64)
    if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.any()):
        raise ValueError("weights must be finite, not negative, and not all zero")
    chance = random.Random(seed)
    waits = [chance.expovariate(1.0) / weight if weight else math.inf for weight in weights.tolist()]
    return [i for i in sorted(range(len(waits)), key=waits.__getitem__) if waits[i] < math.inf]
