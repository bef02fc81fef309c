"""Which differences between methods are real: intervals over seeds and problems, paired tests, an uncertain Pareto front.

S seeds, Q problems, R bootstrap draws, M methods, K numbers of a method: accuracy, mean tokens, AES, adaptivity.

All seeds of all methods answer the same problems. So a draw takes problems once for all, and two methods are compared on
the same problems and the same seeds. A draw has as many problems of each level as the set, whose levels are no accident.
The squared standard error has two parts: between seeds, s^2 / S, and between problems, the variance over the draws. (What
belongs neither to the seed nor to the problem is in both parts: the sum is a little too large.)

Percentiles of draws of three or five seeds are too narrow: 73 % and 84 % of them hold the truth (tests/reproduce). So the
first part is the sample variance, and intervals take the t distribution, with the degrees of freedom that Welch and
Satterthwaite give to a sum of two variances. Differences take S - 1. For Holm asks for p-values of 1e-4 and less, and
Satterthwaite's number is estimated from the same seeds: where they lie together by chance it is large, and such a p-value
comes up to thirty times too often. Both suppose normal noise: where a seed now and then ends in quite another place, an
interval of few seeds is too narrow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

NUMBERS = ("accuracy", "tokens", "aes", "adaptivity")
DRAWS = 2000
LEVEL = 0.05  # of the intervals, and of all tests of a table together
ANGLES = np.linspace(0, np.pi / 2, 2_001)
Estimate = tuple[float, float, float]  # a value, its standard error, its degrees of freedom


@dataclass(frozen=True)
class Scores:
    """What the seeds of one method scored on every problem, and what each seed's base did."""

    seeds: tuple[int, ...]
    accuracy_SQ: np.ndarray
    tokens_SQ: np.ndarray
    base_accuracy_SQ: np.ndarray
    base_tokens_SQ: np.ndarray
    levels_Q: np.ndarray  # all equal where there are no levels

    @cached_property
    def above_Q(self) -> np.ndarray:
        """The problem is above the lowest level."""
        above_Q: np.ndarray = self.levels_Q > self.levels_Q.min()
        return above_Q

    @cached_property
    def values_SK(self) -> np.ndarray:
        """The numbers of every seed."""
        count = self.accuracy_SQ.shape[1]
        return self.values(np.full((1, count), 1 / count))[0]

    @cached_property
    def drawn_RSK(self) -> np.ndarray:
        """The numbers of every seed on drawn problems."""
        return self.values(drawn_weights(tuple(self.levels_Q.tolist())))

    def only(self, problems: list[int]) -> Scores:
        """The scores of the problems at these places."""
        return Scores(
            self.seeds, self.accuracy_SQ[:, problems], self.tokens_SQ[:, problems], self.base_accuracy_SQ[:, problems],
            self.base_tokens_SQ[:, problems], self.levels_Q[problems],
        )  # fmt: skip

    def values(self, weights_RQ: np.ndarray) -> np.ndarray:
        """float64 [R, S, K] of problems with these weights, which add up to 1."""
        accuracy_RS, tokens_RS = weights_RQ @ self.accuracy_SQ.T, weights_RQ @ self.tokens_SQ.T
        base_accuracy_RS, base_tokens_RS = weights_RQ @ self.base_accuracy_SQ.T, weights_RQ @ self.base_tokens_SQ.T
        with np.errstate(divide="ignore", invalid="ignore"):  # a base that is never right, a set of one level: nan
            gain_RS = np.where(base_accuracy_RS > 0, accuracy_RS / base_accuracy_RS - 1, np.nan)
            aes_RS = 1 - tokens_RS / base_tokens_RS + np.where(gain_RS >= 0, 3 * gain_RS, 5 * gain_RS)
            share_R1 = (weights_RQ @ self.above_Q)[:, None]
            above_RS = (weights_RQ * self.above_Q) @ self.tokens_SQ.T / share_R1
            lowest_RS = (weights_RQ * ~self.above_Q) @ self.tokens_SQ.T / (1 - share_R1)
        return np.stack([accuracy_RS, tokens_RS, aes_RS, above_RS - lowest_RS], axis=-1)


@cache
def drawn_weights(levels: tuple[int, ...]) -> np.ndarray:
    """float64 [R, Q]: the share of each problem in each draw. Every method gets the same draws.

    Of the n problems of a level, n - 1 are drawn and have the weight of n (Rao and Wu, 1988): so the variance of a mean
    over the draws is s^2 / n. A problem that is alone in its level is drawn with the largest level.
    """
    rng, counts = np.random.default_rng(0), Counter(levels)
    strata_Q = np.array([level if counts[level] > 1 else counts.most_common(1)[0][0] for level in levels])
    weights_RQ = np.full((DRAWS, len(levels)), 1 / len(levels))
    for level in np.unique(strata_Q):
        at = np.flatnonzero(strata_Q == level)
        if len(at) > 1:
            weights_RQ[:, at] *= (
                rng.multinomial(len(at) - 1, np.full(len(at), 1 / len(at)), DRAWS) * len(at) / (len(at) - 1)
            )
    return weights_RQ


def estimates(scores: Scores) -> list[Estimate]:
    """Mean over the seeds, standard error and degrees of freedom of each of the K numbers."""
    seeds_K, problems_K = variances(scores.values_SK, scores.drawn_RSK)
    variance_K, num_seeds = seeds_K + problems_K, len(scores.seeds)
    of_problems = max(1, len(scores.levels_Q) - len(np.unique(scores.levels_Q)))
    with np.errstate(divide="ignore", invalid="ignore"):
        freedom_K = variance_K**2 / (seeds_K**2 / max(1, num_seeds - 1) + problems_K**2 / of_problems)
    return together(scores.values_SK, variance_K, np.where(variance_K > 0, freedom_K, 1.0))


def difference(one: Scores, other: Scores) -> list[Estimate]:
    """The same for one minus other, on the S seeds that both have, with S - 1 degrees of freedom (see above). Raises
    ValueError where there are none."""
    common = sorted(set(one.seeds) & set(other.seeds))
    if not common:
        raise ValueError(f"no seed in both: {one.seeds} and {other.seeds}")
    mine, theirs = ([scores.seeds.index(seed) for seed in common] for scores in (one, other))
    values_SK = one.values_SK[mine] - other.values_SK[theirs]
    seeds_K, problems_K = variances(values_SK, one.drawn_RSK[:, mine] - other.drawn_RSK[:, theirs])
    return together(values_SK, seeds_K + problems_K, np.full(len(seeds_K), len(common) - 1.0))


def variances(values_SK: np.ndarray, drawn_RSK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two parts of the squared standard error, [K] each: between seeds and between problems. With one seed the first
    is 0: nothing is known about another training."""
    num_seeds, problems_K = len(values_SK), drawn_RSK.mean(axis=1).var(axis=0)
    seeds_K = values_SK.var(axis=0, ddof=1) / num_seeds if num_seeds > 1 else np.zeros_like(problems_K)
    return seeds_K, problems_K


def together(values_SK: np.ndarray, variance_K: np.ndarray, freedom_K: np.ndarray) -> list[Estimate]:
    columns = (values_SK.mean(axis=0), np.sqrt(variance_K), freedom_K)
    return [(float(value), float(error), float(freedom)) for value, error, freedom in zip(*columns, strict=True)]


def t_tail(t: float, freedom: float) -> float:
    """P(|T| > t) of Student's t. With x = sqrt(freedom) * tan(angle) its density is that of cos(angle) ** (freedom - 1).

    >>> round(t_tail(2.776445, 4), 4), round(t_tail(4.302653, 2), 4), round(t_tail(1.961152, 1999), 4)
    (0.05, 0.05, 0.05)
    """
    start = np.arctan(t / np.sqrt(freedom))
    tail = start + (np.pi / 2 - start) * ANGLES / ANGLES[-1]
    whole = np.trapezoid(np.cos(ANGLES) ** (freedom - 1), ANGLES)
    return float(np.trapezoid(np.cos(tail).clip(0) ** (freedom - 1), tail) / whole)


def p_value(found: Estimate) -> float:
    """Of no difference; 1 for one that cannot be computed.

    >>> p_value((0.0, 0.0, 1.0)), p_value((1.0, 0.0, 1.0)), round(p_value((2.776445, 1.0, 4.0)), 3)
    (1.0, 0.0, 0.05)
    >>> p_value((1.0, float("nan"), 1.0))
    1.0
    """
    value, error, freedom = found
    if np.isnan(value) or np.isnan(error) or value == 0 or freedom < 1:  # nan: some draw has a base that is never right
        return 1.0
    return t_tail(abs(value) / error, freedom) if error > 0 else 0.0


def interval(found: Estimate) -> tuple[float, float]:
    """The 95 % interval.

    >>> [round(bound, 3) for bound in interval((10.0, 1.0, 4.0))]
    [7.224, 12.776]
    """
    value, error, freedom = found
    heights = np.cos(ANGLES).clip(0) ** (freedom - 1)
    below = np.concatenate([[0.0], np.cumsum(heights[1:] + heights[:-1])])  # the trapezoids' sum up to each angle
    half = error * np.sqrt(freedom) * np.tan(np.interp((1 - LEVEL) * below[-1], below, ANGLES))
    return float(value - half), float(value + half)


def holm(p_values: Sequence[float]) -> list[bool]:
    """Which hypotheses fall when all errors together may have a chance of LEVEL: the smallest p must be at most
    LEVEL / n, the next one LEVEL / (n - 1), and so on up to the first that is not.

    >>> holm([0.01, 0.04, 0.03, 0.005])
    [True, False, False, True]
    """
    fall, order = [False] * len(p_values), sorted(range(len(p_values)), key=lambda i: p_values[i])
    for rank, i in enumerate(order):
        if p_values[i] > LEVEL / (len(p_values) - rank):
            break
        fall[i] = True
    return fall


# ------------------------------------------------------------------------------------------------------ the Pareto front


def front(accuracy_M: np.ndarray, tokens_M: np.ndarray) -> np.ndarray:
    """Boolean [M]: no other has more accuracy with no more tokens, or fewer tokens with no less accuracy.

    >>> front(np.array([0.9, 0.9, 0.8, 0.7]), np.array([60, 50, 50, 40])).tolist()
    [False, True, False, True]
    """
    no_worse_MM = (accuracy_M[:, None] >= accuracy_M) & (tokens_M[:, None] <= tokens_M)
    equal_MM = (accuracy_M[:, None] == accuracy_M) & (tokens_M[:, None] == tokens_M)
    return ~(no_worse_MM & ~equal_MM).any(axis=0)


def drawn_points(scores: Sequence[Scores]) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy and tokens, float64 [R, M], of draws of seeds and of problems. Methods of the same seeds share the draws."""
    columns = []
    for one in scores:
        count = len(one.seeds)
        chosen_RS = np.random.default_rng(one.seeds).multinomial(count, np.full(count, 1 / count), DRAWS) / count
        columns.append(np.einsum("rs,rsk->rk", chosen_RS, one.drawn_RSK[:, :, :2]))
    drawn_RMK = np.stack(columns, axis=1)
    return drawn_RMK[:, :, 0], drawn_RMK[:, :, 1]


def front_shares(accuracy_RM: np.ndarray, tokens_RM: np.ndarray) -> np.ndarray:
    """float64 [M]: the share of the draws in which each is on the front."""
    return np.mean([front(a, t) for a, t in zip(accuracy_RM, tokens_RM, strict=True)], axis=0)


def front_band(accuracy_RM: np.ndarray, tokens_RM: np.ndarray, points: int = 200) -> dict[str, list[float]]:
    """How much accuracy some method reaches within so many tokens: between `low` and `high` in 95 % of the draws. Where a
    draw has no method so short, its accuracy is 0."""
    start, end = np.median(tokens_RM.min(axis=1)), tokens_RM.max()
    tokens_T = np.geomspace(start, end, points)
    best_TR = [np.where(tokens_RM <= limit, accuracy_RM, 0).max(axis=1) for limit in tokens_T]
    low_T, high_T = np.percentile(best_TR, [50 * LEVEL, 100 - 50 * LEVEL], axis=1).tolist()
    return {"tokens": tokens_T.tolist(), "low": low_T, "high": high_T}
