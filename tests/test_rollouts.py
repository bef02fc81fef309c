"""Rollouts: rows stay with their prompts over any number of ranks, lengths, cut answers, seeds.

Run: python -m pytest tests/test_rollouts.py
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from tiny import VOCAB, fill, make_config, make_problems, make_rows

from nanolapo.config import UserError
from nanolapo.data.order import batch_indices
from nanolapo.grader import Grader
from nanolapo.methods.base import Method
from nanolapo.metrics import rollout_metrics
from nanolapo.rollouts import Rollouts, join, make_rollouts, row_seed
from nanolapo.samplers.sampler import Request, Sample
from nanolapo.sampling import mark

ORDER = [7, 4, 0, 5, 2, 11, 1]  # the step's prompts, in a shuffled order


def echo_rollouts(places: list[int], group_size: int = 3) -> Rollouts:
    """What an echo engine gives for these prompts: every completion says which prompt and which rollout it answers."""
    problems, requests, samples = make_problems(20), [], []
    for place in places:
        budget = float(place) + 1 if place % 2 else None
        for g in range(group_size):
            request = Request([place, place], row_seed(0, 0, place, g), 9, problems[place], ORDER.index(place), budget)
            requests.append(request)
            ids = np.array([place, g] + [1] * g)
            samples.append(Sample(ids, np.full(len(ids), -float(place)), finished=g != 1))
    rollouts = make_rollouts(requests, samples, group_size)
    fill(rollouts, text=[f"{ids[0]}/{ids[1]}" for ids in rollouts.response_ids])
    fill(rollouts, correct=np.array([ids[0] == 4 for ids in rollouts.response_ids]))
    return rollouts


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 6])
def test_A20_every_completion_names_its_own_prompt(num_ranks):
    """Rank r samples prompts r, r + N, ...; joined again, every field of every row belongs to the row's prompt."""
    places = ORDER
    parts = [echo_rollouts(places[rank::num_ranks]) for rank in range(num_ranks)]
    joined = join(parts)
    assert [p.id for p in joined.problems] == [f"demo:{place}" for place in places]
    assert len(joined) == 21 and [row.problem for row in joined.rows] == [p for p in joined.problems for _ in range(3)]
    for b in range(21):
        place, g = places[b // 3], b % 3
        assert joined.response_ids[b].tolist() == [place, g] + [1] * g and joined.texts[b] == f"{place}/{g}"
        assert joined.prompt_ids[b].tolist() == [place, place] and joined.lengths_B[b] == 2 + g
        assert (joined.sampler_logprobs[b] == -place).all() and joined.finished_B[b] == (g != 1)
        assert joined.correct_B[b] == (place == 4)
        assert joined.budgets_B[b] == place + 1 if place % 2 else np.isnan(joined.budgets_B[b])


@pytest.mark.parametrize(("num_requests", "num_samples"), [(3, 4), (4, 3), (3, 3)])
def test_A20_counts_that_do_not_agree_are_refused(num_requests, num_samples):
    request = Request([1], seed=0, max_new_tokens=4, problem=make_problems(1)[0])
    sample = Sample(np.array([1]), np.zeros(1), True)
    with pytest.raises(AssertionError, match=f"{num_requests} requests, {num_samples} samples, groups of 2"):
        make_rollouts([request] * num_requests, [sample] * num_samples, 2)


def test_A21_a_group_with_an_answer_that_cannot_be_trained_on_is_left_out_whole():
    """An id beyond the vocabulary or below 0, a log-prob that is not finite, in any place; an empty answer is no such."""
    rollouts = make_rows([3, 4, 5, 0, 7, 8, 9, 2, 1, 6])
    rollouts.rows[0].sampler_logprobs[2] = np.nan
    rollouts.rows[5].response_ids[0] = VOCAB
    rollouts.rows[6].response_ids[8] = -1
    rollouts.rows[9].sampler_logprobs[0] = -np.inf
    usable = rollouts.usable(VOCAB)
    assert usable.rows == rollouts.rows[2:4] and usable.group_size == 2
    assert rollouts.usable(VOCAB + 1).rows == rollouts.rows[2:6]


def test_a_column_cannot_be_written_to():
    """It would change a copy, and nothing else: a change belongs to a row."""
    rollouts = make_rows([3, 4])
    with pytest.raises(ValueError, match="read-only"):
        rollouts.correct_B[0] = True
    with pytest.raises(TypeError):
        rollouts.texts[0] = "other"  # type: ignore[index]
    with pytest.raises(AttributeError):
        rollouts.correct_B = np.ones(2, dtype=bool)
    with pytest.raises(AttributeError):
        rollouts.rows[0].correct_B = True  # type: ignore[attr-defined]


def test_A16_cut_answers_are_wrong_and_counted(tied_model):
    """Right number in a box, but cut by the limit: reward 0, in `truncated`, not in `accuracy`; by the real grader."""
    method = Method(make_config(tied_model))
    rollouts = make_rows([9, 9, 9, 9], finished=[True, False, True, False])
    fill(rollouts, text=[r"so \boxed{0}", r"so \boxed{0}", r"so \boxed{1}", "so 1"])  # reference answers: 0, 0, 1, 1
    with Grader() as grader:
        verdicts = grader.grade_all(rollouts.texts, [row.problem.answer for row in rollouts.rows])
        mark(SimpleNamespace(grader=grader, method=method), rollouts.rows, verdicts)  # type: ignore[arg-type]
    assert rollouts.correct_B.tolist() == [True, False, True, False]
    rollouts.set_rewards(method.reward(rollouts))
    assert rollouts.reward_parts["correct"].tolist() == [1, 0, 1, 0]
    metrics = rollout_metrics(rollouts)
    assert metrics["truncated"] == 0.5 and metrics["accuracy"] == 0.5


def test_missing_budget_is_nan():
    rollouts = echo_rollouts([1, 2])
    assert rollouts.budgets_B[:3].tolist() == [2, 2, 2] and np.isnan(rollouts.budgets_B[3:]).all()


def test_the_entropy_is_that_of_the_sampling_temperature():
    """A row that a monitor pass sampled at another one has other log-probs: they say nothing about this policy."""
    rollouts = make_rows([4, 4])
    fill(rollouts, sampler_logprobs=[np.full(4, -1.0), np.full(4, -3.0)], unmatched=[False, True])
    rollouts.set_rewards({"correct": np.zeros(2)})
    assert rollouts.mean_entropy == rollout_metrics(rollouts)["entropy"] == 1.0
    fill(rollouts, unmatched=True)
    assert np.isnan(rollouts.mean_entropy)


def test_by_group_views_rows_of_any_shape():
    rollouts = make_rows([1] * 6, group_size=3)
    assert rollouts.by_group(np.arange(6)).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert rollouts.by_group(np.zeros((6, 5))).shape == (2, 3, 5)


# ------------------------------------------------------------------------------------------------------ order and seeds


def test_A19_row_seeds_differ_by_every_part_of_the_place():
    """No two rows of a run share a seed by construction of neighbours; another run seed changes all."""
    seeds = {row_seed(s, t, p, g) for s in range(3) for t in range(10) for p in range(8) for g in range(8)}
    assert len(seeds) == 3 * 10 * 8 * 8
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert row_seed(3, 1, 2, 0) == row_seed(3, 1, 2, 0)
    assert len({row_seed(1, 2, 3, 4), row_seed(4, 3, 2, 1), row_seed(2, 1, 3, 4), row_seed(1, 2, 4, 3)}) == 4


def test_D3_data_order_and_seeds_are_a_function_of_the_step():
    """Resumed in mid-epoch, at the first and at the last step: the same problems and seeds as uninterrupted, for any
    number of ranks."""

    def step(number: int) -> list[tuple[int, int]]:
        chosen = batch_indices(10, number, prompts_per_step=4, seed=5)
        return [(index, row_seed(5, number, place, 0)) for place, index in enumerate(chosen)]

    whole = [step(number) for number in range(12)]
    for start in (0, 1, 7, 11):
        assert [step(number) for number in range(start, 12)] == whole[start:]
    for num_ranks in (1, 2, 4):
        parts = [[whole[7][place] for place in range(rank, 4, num_ranks)] for rank in range(num_ranks)]
        assert sorted(sum(parts, [])) == sorted(whole[7])
    epoch = [index for number in range(5) for index, _ in whole[number]]
    assert sorted(epoch) == sorted(list(range(10)) * 2)  # two whole epochs in five steps of four


@pytest.mark.parametrize("length", [np.array([0.0, np.nan, 0.0, 1.0]), np.zeros(5), np.zeros((4, 1)), 0.5])
def test_a_reward_that_is_none_is_refused(length):
    """A nan would end as three bad gradients, five values for four rows as a reward of the wrong answer."""
    with pytest.raises(UserError, match="reward part 'length': the method must give 4 finite numbers") as error:
        make_rows([3, 4, 5, 6]).set_rewards({"correct": np.zeros(4), "length": length})
    assert "\n" not in str(error.value)
