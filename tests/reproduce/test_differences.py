"""Which differences are real: coverage of intervals, false alarms, Holm, the front; by hand and against theory.

Run: python -m pytest tests/reproduce/test_differences.py
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from nanolapo.evaluation.scores import aes
from nanolapo.reproduce.comparison import compare_pairs
from nanolapo.reproduce.differences import (
    DRAWS,
    Scores,
    difference,
    drawn_points,
    drawn_weights,
    estimates,
    front,
    front_band,
    front_shares,
    holm,
    interval,
    p_value,
    t_tail,
)

T_95 = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645, 9: 2.26216, 30: 2.04227}  # of any printed table


def scores(
    tokens_SQ: np.ndarray,
    accuracy_SQ: np.ndarray | None = None,
    seeds: tuple[int, ...] = (),
    levels_Q: np.ndarray | None = None,
) -> Scores:
    """The base has 80 % and 100 tokens everywhere. Every second problem is above the lowest level."""
    one = np.ones_like(tokens_SQ)
    accuracy_SQ = 0.9 * one if accuracy_SQ is None else accuracy_SQ
    count, problems = tokens_SQ.shape
    return Scores(
        seeds or tuple(range(count)),
        accuracy_SQ,
        tokens_SQ,
        0.8 * one,
        100 * one,
        np.arange(problems) % 2 if levels_Q is None else levels_Q,
    )


def noisy(
    rng: np.random.Generator, seeds: int, problems: int, of_seed: float, of_problem: float, rest: float
) -> Scores:
    """Tokens whose mean is 50, with normal noise of each kind."""
    tokens_SQ = 50 + rng.normal(0, of_seed, (seeds, 1)) + rng.normal(0, of_problem, (1, problems))
    return scores(tokens_SQ + rng.normal(0, rest, (seeds, problems)))


@pytest.mark.parametrize("freedom", T_95)
def test_the_t_distribution_is_that_of_the_tables(freedom: int) -> None:
    assert t_tail(T_95[freedom], freedom) == pytest.approx(0.05, abs=2e-5)
    assert interval((0.0, 1.0, freedom))[1] == pytest.approx(T_95[freedom], rel=2e-4)
    assert t_tail(0, freedom) == pytest.approx(1)


def test_far_tails_are_right() -> None:
    """Holm asks for p-values of 1e-5. One degree: Cauchy; two: closed form."""
    for t in (1.0, 30.0, 1000.0):
        assert t_tail(t, 1) == pytest.approx(1 - 2 * math.atan(t) / math.pi, rel=1e-3)
        assert t_tail(t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-3)


def test_where_only_seeds_differ_the_interval_is_the_t_interval() -> None:
    means = np.array([40.0, 44.0, 47.0, 41.0, 58.0])
    found = estimates(scores(np.repeat(means[:, None], 20, axis=1)))[1]
    half = T_95[4] * means.std(ddof=1) / math.sqrt(5)
    assert found[0] == pytest.approx(46) and found[2] == pytest.approx(4)
    assert interval(found) == pytest.approx((46 - half, 46 + half), rel=1e-3)


def test_where_only_problems_differ_the_error_is_that_of_their_mean() -> None:
    tokens_Q = np.random.default_rng(3).normal(50, 10, 31)
    value, error, freedom = estimates(scores(np.repeat(tokens_Q[None], 3, axis=0), levels_Q=np.zeros(31, dtype=int)))[1]
    assert value == pytest.approx(tokens_Q.mean())
    assert error == pytest.approx(tokens_Q.std(ddof=1) / math.sqrt(31), rel=0.06)  # 2000 draws: 1.6 % of noise
    assert freedom == pytest.approx(30, rel=1e-6)


def test_the_error_of_the_problems_is_that_within_their_levels() -> None:
    """The formula of a stratified sample: sum of (n_h / n)^2 * s_h^2 / n_h. Levels far apart add nothing to it."""
    rng, levels_Q = np.random.default_rng(4), np.repeat([0, 1, 5], [16, 9, 4])
    tokens_Q = 100 * levels_Q + rng.normal(0, 1 + levels_Q)
    by_hand = sum(
        (levels_Q == h).mean() ** 2 * tokens_Q[levels_Q == h].var(ddof=1) / (levels_Q == h).sum() for h in (0, 1, 5)
    )
    value, error, freedom = estimates(scores(tokens_Q[None], levels_Q=levels_Q))[1]
    assert value == pytest.approx(tokens_Q.mean()) and freedom == pytest.approx(26)
    assert error == pytest.approx(math.sqrt(by_hand), rel=0.06)
    assert tokens_Q.std() / math.sqrt(29) > 10 * error  # what a draw without levels would give


def test_a_problem_that_is_alone_in_its_level_still_counts_as_uncertain() -> None:
    """Two of four problems are alone, so all four are drawn together: the error is that of a plain mean."""
    tokens_Q = np.array([1.0, 2.0, 5.0, 9.0])
    error = estimates(scores(tokens_Q[None], levels_Q=np.array([0, 0, 1, 2])))[1][1]
    assert error == pytest.approx(tokens_Q.std(ddof=1) / 2, rel=0.06)
    weights_RQ = drawn_weights((3, 1, 3, 1, 3, 7))
    assert weights_RQ.sum(axis=1) == pytest.approx(np.ones(DRAWS)) and weights_RQ.mean(axis=0) == pytest.approx(
        1 / 6, abs=0.01
    )
    assert weights_RQ[:, [1, 3]].sum(axis=1) == pytest.approx(2 / 6)


@pytest.mark.parametrize(("seeds", "kinds"), [(5, (1, 0, 0)), (3, (1, 0, 0.1)), (5, (1, 10, 5)), (5, (0, 10, 0))])
def test_nineteen_of_twenty_intervals_hold_the_truth(seeds: int, kinds: tuple[float, float, float]) -> None:
    """Percentiles of the plain hierarchical bootstrap hold it in 84 % with five seeds, in 73 % with three."""
    hit = plain = 0
    for i in range(300):
        one = noisy(np.random.default_rng(i), seeds, 40, *kinds)
        low, high = interval(estimates(one)[1])
        hit += low < 50 < high
        if kinds[1:] == (0, 0):
            low, high = np.percentile(drawn_points([one])[1], [2.5, 97.5])
            plain += low < 50 < high
    assert 0.91 <= hit / 300 <= 0.98  # 95 % with a standard error of 1.3
    if kinds[1:] == (0, 0):
        assert plain / 300 < 0.89


def test_differences_are_paired_by_seed_and_problem() -> None:
    """What both share falls out: seeds 20 tokens apart, problems 30 apart, and one token between the methods."""
    rng = np.random.default_rng(0)
    shared = 100 + rng.normal(0, 20, (5, 1)) + rng.normal(0, 30, (1, 40))
    mine, theirs = scores(shared + rng.normal(0, 0.1, (5, 40))), scores(shared - 1)
    found = difference(mine, theirs)[1]
    assert found[0] == pytest.approx(1, abs=0.05) and found[1] < 0.05 and p_value(found) < 1e-6
    assert estimates(mine)[1][1] > 5
    swapped = difference(theirs, mine)[1]
    assert swapped[0] == -found[0] and p_value(swapped) == p_value(found)


def test_without_a_difference_one_test_of_twenty_says_there_is_one() -> None:
    false = 0
    for i in range(400):
        rng = np.random.default_rng(i)
        one, other = (noisy(rng, 5, 30, 1, 0, 0.5) for _ in range(2))
        false += p_value(difference(one, other)[1]) <= 0.05
    assert 0.02 <= false / 400 <= 0.08


@pytest.mark.parametrize(("seeds", "ratio"), [(5, 3), (5, 30), (3, 10)])
def test_a_table_of_equal_methods_has_a_false_difference_once_in_twenty(seeds: int, ratio: float) -> None:
    """ratio: the variance between seeds over that between problems. With the degrees of freedom of Welch and Satterthwaite
    it would be a third of the tables and more. A method that is as good as the best loses its mark as rarely."""
    wrong, bold, tables, problems = 0, 0, 60, 12
    for i in range(tables):
        rng = np.random.default_rng(i)
        of_seed = math.sqrt(ratio / problems)
        found = [noisy(rng, seeds, problems, of_seed, 0, 1) for _ in range(16)]
        found.sort(key=lambda one: -one.values_SK[:, 2].mean())
        rows = [{"model": str(m), "aes": one.values_SK[:, 2].mean()} for m, one in enumerate(found)]
        pairs = compare_pairs(rows, found)
        wrong += pairs["aes"] + pairs["tokens"] > 0
        bold += not all(row["like_best"] for row in rows)
    assert wrong / tables <= 0.1 and bold / tables <= 0.1


def test_methods_of_three_and_of_five_seeds_meet_on_the_three() -> None:
    five = scores(np.arange(5.0)[:, None] + np.zeros((5, 4)))
    three = scores(np.array([[0.0], [1.0], [5.0]]) + np.zeros((3, 4)), seeds=(2, 4, 7))
    value, _, freedom = difference(five, three)[1]  # seeds 2 and 4: 2 - 0, 4 - 1
    assert value == pytest.approx(2.5) and freedom == pytest.approx(1)
    assert difference(three, five)[1][0] == pytest.approx(-2.5)
    with pytest.raises(ValueError, match="no seed in both"):
        difference(five, scores(np.ones((1, 4)), seeds=(9,)))


def test_one_seed_knows_nothing_of_another_training() -> None:
    tokens_Q = np.random.default_rng(1).normal(50, 10, 40)
    _, error, _ = estimates(scores(tokens_Q[None]))[1]
    assert error == pytest.approx(tokens_Q.std(ddof=1) / math.sqrt(40), rel=0.06)


def test_aes_and_adaptivity_are_those_of_the_evaluation() -> None:
    rng = np.random.default_rng(2)
    one = scores(rng.uniform(20, 90, (3, 8)), rng.uniform(0.4, 1, (3, 8)))
    for s in range(3):
        accuracy, tokens = one.accuracy_SQ[s].mean(), one.tokens_SQ[s].mean()
        adaptivity = one.tokens_SQ[s, 1::2].mean() - one.tokens_SQ[s, ::2].mean()
        assert one.values_SK[s] == pytest.approx([accuracy, tokens, aes(accuracy, tokens, 0.8, 100), adaptivity])
    assert [value for value, _, _ in estimates(one)] == pytest.approx(one.values_SK.mean(axis=0).tolist())


def test_a_base_that_is_never_right_has_no_aes_and_no_difference() -> None:
    one = scores(np.full((2, 4), 50.0))
    never = Scores((0, 1), one.accuracy_SQ, one.tokens_SQ, 0 * one.accuracy_SQ, one.base_tokens_SQ, one.levels_Q)
    assert math.isnan(estimates(never)[2][0]) and p_value(difference(never, never)[2]) == 1
    assert not math.isnan(estimates(never)[1][0])


def test_holm_by_hand() -> None:
    """Four p-values at 5 %: 0.0125, 0.0167, 0.025, 0.05 in their order; the first that is too large ends it."""
    assert holm([0.012, 0.016, 0.024, 0.05]) == [True] * 4
    assert holm([0.05, 0.012, 0.026, 0.016]) == [
        False,
        True,
        False,
        True,
    ]  # 0.05 would pass alone, but comes after 0.026
    assert holm([0.013, 0.013]) == [True, True] and holm([0.03, 0.03]) == [False, False] and holm([]) == []


def test_holm_lets_one_family_in_twenty_err() -> None:
    rng = np.random.default_rng(0)
    families = [any(holm(rng.uniform(size=50).tolist())) for _ in range(2000)]
    assert 0.035 < np.mean(families) < 0.065


# ------------------------------------------------------------------------------------------------------ the Pareto front


def test_the_front_by_brute_force() -> None:
    accuracy_M, tokens_M = np.random.default_rng(0).integers(0, 6, (2, 40)).astype(float)
    found = front(accuracy_M, tokens_M)
    for a, t, on in zip(accuracy_M, tokens_M, found, strict=True):
        better = ((accuracy_M > a) & (tokens_M <= t)) | ((accuracy_M == a) & (tokens_M < t))
        assert on == (not better.any())
    assert 0 < found.sum() < 40


def test_shares_of_the_front_by_hand() -> None:
    """Three draws of three methods: the third is on the front where it is not both longer and worse than the second."""
    accuracy_RM = np.array([[0.9, 0.8, 0.7], [0.9, 0.8, 0.85], [0.9, 0.8, 0.8]])
    tokens_RM = np.array([[60, 50, 55], [60, 50, 55], [60, 50, 50]])
    assert front_shares(accuracy_RM, tokens_RM) == pytest.approx([1, 1, 2 / 3])


def test_a_method_whose_seeds_disagree_is_on_the_front_in_some_draws() -> None:
    """The rival has 50 tokens. Two seeds of 40 and 58: the mean of two drawn ones is 40, 49 or 58, with 1/4, 1/2, 1/4."""
    rival, split = scores(np.full((2, 4), 50.0)), scores(np.array([[40.0], [58.0]]) + np.zeros((2, 4)))
    accuracy_RM, tokens_RM = drawn_points([rival, split])
    shares = front_shares(accuracy_RM, tokens_RM)
    assert tokens_RM.shape == (DRAWS, 2) and shares == pytest.approx([0.25, 0.75], abs=0.03)


def test_the_band_is_what_some_method_reaches_within_so_many_tokens() -> None:
    sure = scores(np.full((2, 4), 60.0), np.full((2, 4), 0.9))
    split = scores(np.full((2, 4), 40.0), np.array([[0.5], [0.7]]) + np.zeros((2, 4)))
    band = front_band(*drawn_points([sure, split]))
    assert band["tokens"][0] == 40 and band["tokens"][-1] == pytest.approx(60)
    assert (band["low"][0], band["high"][0]) == pytest.approx((0.5, 0.7))
    assert band["low"][-1] == band["high"][-1] == pytest.approx(0.9)
