"""From a plan to graded rollouts: draw problems, sample this rank's share of them, grade, bring all ranks together.

The step's rounds and a method's monitor pass use the same code. Every rank samples whole groups; at the end of a round each
holds the rows of all ranks. Every seed is a pure function of its place in the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future

import numpy as np
from tqdm import tqdm

from nanolapo.config import RunStopped
from nanolapo.data.load import Data
from nanolapo.data.order import round_indices
from nanolapo.data.problems import Problem
from nanolapo.data.prompts import GivenTokens, Guidance
from nanolapo.grader import Grader, check_errors
from nanolapo.methods.base import MonitorPlan, SamplingPlan
from nanolapo.metrics import Stopwatch
from nanolapo.rollouts import Measured, Rollout, Rollouts, join, make_rollouts, row_seed
from nanolapo.samplers.sampler import Decoding, Request, Sample, Sampler, generate_all
from nanolapo.session import Session

MONITOR_PLACE = 2**30  # the first place of a monitor pass: beyond the places of all rounds, so its seeds differ


def next_draw(session: Session, plan: SamplingPlan, rounds: Sequence[Rollouts]) -> dict[int, Problem]:
    """Choose the problems of the step's next round, by their places in the step. Empty if enough groups are kept, or if
    no round or no problem is left."""
    config, number = session.config, len(rounds)
    kept = sum(int(done.keep_B.sum()) for done in rounds) // plan.group_size
    if number and (number >= plan.max_rounds or kept >= plan.num_prompts):
        return {}
    if plan.temperature != config.rollout.temperature:
        raise ValueError(
            f"the plan samples at temperature {plan.temperature}, but the trainer scores at rollout.temperature="
            f"{config.rollout.temperature}; only a MonitorPlan may have another one"
        )
    problems = session.data.problems
    chosen = round_indices(len(problems), session.step, number, plan.num_prompts, config.run.seed, plan.weights)
    return dict(enumerate((problems[i] for i in chosen), start=number * plan.num_prompts))


def monitor_pass(session: Session, watch: Stopwatch) -> dict[str, float]:
    """Sample and grade what a method asks for before the step's own rollouts (mostly nothing); returns what it logs."""
    plan = session.method.monitor(session.step)
    if plan is None:
        return {}
    chosen = (session.data.problems[i] for i in plan.problem_indices)
    draw = dict(enumerate(chosen, start=MONITOR_PLACE))
    if not plan.whole_rows:
        return session.method.on_monitor(sample_and_measure(session, plan, draw, watch))
    rollouts = sample_and_grade(session, plan, draw, watch)
    for row in rollouts.rows:
        row.unmatched = plan.temperature != session.config.rollout.temperature
    return session.method.on_monitor(rollouts)


def sample_and_grade(
    session: Session, plan: SamplingPlan | MonitorPlan, draw: Mapping[int, Problem], watch: Stopwatch
) -> Rollouts:
    """Sample a group for each of these problems and grade them. From here on every rank holds all usable groups."""
    mine = graded_share(session, plan, draw, watch)
    with watch("grade"):
        parts = session.ranks.gather(mine)
    return join(parts[:: session.config.rollout.tensor_parallel])  # ranks of one engine sampled the same


def sample_and_measure(session: Session, plan: MonitorPlan, draw: Mapping[int, Problem], watch: Stopwatch) -> Measured:
    """Sample and grade as `sample_and_grade` does, but bring only lengths and verdicts together: 24 bytes an answer."""
    mine = graded_share(session, plan, draw, watch)
    columns = np.array([(row.place, len(row.response_ids), row.correct) for row in mine.rows], dtype=np.int64)
    with watch("grade"):
        parts = session.ranks.gather(columns.reshape(-1, 3))
    all_B3 = np.concatenate(parts[:: session.config.rollout.tensor_parallel])
    places_B, lengths_B, correct_B = all_B3[np.argsort(all_B3[:, 0], kind="stable")].T
    problems = tuple(draw[place] for place in places_B[:: plan.group_size].tolist())
    return Measured(problems, plan.group_size, lengths_B, correct_B.astype(bool))


def graded_share(
    session: Session, plan: SamplingPlan | MonitorPlan, draw: Mapping[int, Problem], watch: Stopwatch
) -> Rollouts:
    """Sample and grade the groups of this rank; returns the usable ones. Every token that was sampled counts."""
    with watch("sample"):
        requests = make_requests(session, plan, draw)
        samples, texts, verdicts = sample(session, requests, plan.temperature)
        mine = make_rollouts(requests, samples, plan.group_size)
    with watch("grade"):  # wait for the answers still being graded
        for row, text in zip(mine.rows, texts, strict=True):
            row.text = text
        mark(session, mine.rows, (verdict.result() for verdict in verdicts))
        grader_errors(session)
        usable = mine.usable(session.policy.vocab_size)
        whole = {row.place for row in usable.rows}
        unusable = [row.problem.id for row in mine.rows[:: plan.group_size] if row.place not in whole]
        drawn = sum(len(row.response_ids) - row.num_given for row in mine.rows)  # a method may shorten answers later
        shares = session.ranks.gather((drawn, unusable))[:: session.config.rollout.tensor_parallel]
    session.sampled_tokens += sum(tokens for tokens, _ in shares)
    tell_unusable(session, [problem_id for _, ids in shares for problem_id in ids], len(draw))
    return usable


def tell_unusable(session: Session, problem_ids: Sequence[str], num_groups: int) -> None:
    """Warn of the groups, of these problems, that are dropped. Raises RunStopped if no group is left."""
    if not problem_ids:
        return
    found = (
        f"step {session.step}: {len(problem_ids)} of {num_groups} groups (first: problem {problem_ids[0]}) had an answer "
        "with a log-prob that is not finite, or a token beyond the vocabulary: the sampler's weights are damaged, or it "
        "overflows"
    )
    if len(problem_ids) == num_groups:
        raise RunStopped(f"{found}; no group is left, so start the run again from its checkpoint")
    session.say(f"WARNING {found}; these groups were dropped, and all numbers are of the others")


def make_requests(session: Session, plan: SamplingPlan | MonitorPlan, draw: Mapping[int, Problem]) -> list[Request]:
    """Make a group of requests for each problem of this engine, with the method's guidance. Engine e of N takes the prompts
    e, e + N, e + 2N, ..."""
    engine, engines = session.ranks.engine(session.config.rollout.tensor_parallel)
    requests = []
    for place, problem in list(draw.items())[engine::engines]:
        prompts: dict[Guidance, tuple[list[int], GivenTokens | None]] = {}  # a group mostly shares one: encode it once
        for g in range(plan.group_size):
            guidance = session.method.guidance(problem, g, session.step)
            if guidance not in prompts:
                prompts[guidance] = session.data.prompter.ids_and_given(problem.question, guidance)
            ids, given = prompts[guidance]
            seed = row_seed(session.config.run.seed, session.step, place, g)
            requests.append(Request(ids, seed, plan.max_new_tokens, problem, place, guidance.budget, given))
    return requests


def sample(
    session: Session, requests: Sequence[Request], temperature: float
) -> tuple[list[Sample], list[str], list[Future[bool]]]:
    """Sample every request with a progress bar; returns samples, texts and verdicts, see `sample_beside_grading`."""
    total, hidden = sum(request.max_new_tokens for request in requests), None if session.ranks.is_main else True
    with tqdm(total=total, unit="tok", desc="sampling", leave=False, disable=hidden) as bar:
        return sample_beside_grading(
            session.sampler, session.data, session.grader, requests, Decoding(temperature), bar.update
        )


def sample_beside_grading(
    sampler: Sampler, data: Data, grader: Grader, requests: Sequence[Request], decoding: Decoding,
    progress: Callable[[int], object] | None = None,
) -> tuple[list[Sample], list[str], list[Future[bool]]]:  # fmt: skip
    """Sample every request; returns samples, texts and verdicts. An answer is graded as soon as it is finished, in the
    background, while others are still being sampled."""
    answers: dict[int, tuple[str, Future[bool]]] = {}

    def finished(row: int, sample: Sample) -> None:
        text, problem = data.decode(sample.ids), requests[row].problem
        assert problem is not None
        answers[row] = text, grader.submit(text, problem.answer)

    samples = generate_all(sampler, requests, decoding, progress, finished) if requests else []
    in_order = [answers[row] for row in range(len(requests))]
    return samples, [text for text, _ in in_order], [verdict for _, verdict in in_order]


def mark(session: Session, rows: Sequence[Rollout], verdicts: Iterable[bool]) -> None:
    """Fill in `correct`. An answer that was cut off counts as wrong unless the method says otherwise."""
    for row, verdict in zip(rows, verdicts, strict=True):
        row.correct = verdict and (row.finished or session.method.cut_answers_count)


def grader_errors(session: Session) -> float:
    """Return the share of the answers of all ranks that could not be graded, since these processes started. All ranks must
    call it together. Raises RunStopped on all of them if it is too large, so that their number does not matter."""
    counts = session.ranks.gather((session.grader.errors, session.grader.total))
    return check_errors(*map(sum, zip(*counts, strict=True)))


def regrade(session: Session, edited: Sequence[Rollout]) -> None:
    """Grade these rows again, because their ids may have been cut. One rank grades for all, so that a grader's time-out
    cannot make ranks disagree."""
    if not edited:
        return
    for row in edited:
        row.text = session.data.decode(row.response_ids)
    if session.ranks.is_main:
        texts, answers = [row.text for row in edited], [row.problem.answer for row in edited]
        mark(session, edited, session.grader.grade_all(texts, answers))
    grader_errors(session)
    for row, correct in zip(edited, session.ranks.gather([row.correct for row in edited])[0], strict=True):
        row.correct = correct
