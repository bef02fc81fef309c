"""From a plan to graded rollouts: draw problems, sample this rank's share of them, grade, bring all ranks together.

The step's own rounds and a method's monitor pass go the same way. Every rank samples whole groups; ranks meet once per
round, and afterwards each holds all rows. Every seed is a pure function of its place in the step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

from tqdm import tqdm

from nanolapo.data.order import round_indices
from nanolapo.data.problems import Problem
from nanolapo.grader import Grader
from nanolapo.methods.base import MonitorPlan, SamplingPlan
from nanolapo.metrics import Stopwatch
from nanolapo.rollouts import Rollout, Rollouts, join, make_rollouts, row_seed
from nanolapo.samplers.sampler import Decoding, Request, Sample
from nanolapo.session import Session

MONITOR_PLACE = 2**30  # the first place of a monitor pass: beyond those of all rounds, so that its seeds are others


def next_draw(session: Session, plan: SamplingPlan, rounds: Sequence[Rollouts]) -> dict[int, Problem]:
    """The problems of the step's next round, by their places in the step. Empty when enough groups are kept, or when no
    round or no problem is left."""
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
    """What a method wants sampled and graded before the step's own rollouts; returns what it logs. Mostly nothing."""
    plan = session.method.monitor(session.step)
    if plan is None:
        return {}
    chosen = (session.data.problems[i] for i in plan.problem_indices)
    rollouts = sample_and_grade(session, plan, dict(enumerate(chosen, start=MONITOR_PLACE)), watch)
    for row in rollouts.rows:
        row.unmatched = plan.temperature != session.config.rollout.temperature
    return session.method.on_monitor(rollouts)


def sample_and_grade(
    session: Session, plan: SamplingPlan | MonitorPlan, draw: Mapping[int, Problem], watch: Stopwatch
) -> Rollouts:
    """Sample a group for each of these problems and grade them. From here on every rank holds all rows."""
    with GradeBeside(session.grader) as beside:
        with watch("sample"):
            requests = make_requests(session, plan, draw)
            samples = sample(session, requests, plan, beside)
            mine = make_rollouts(requests, samples, plan.group_size, session.policy.vocab_size)
        with watch("grade"):  # what is left of it
            for row in mine.rows:
                row.text = session.data.decode(row.response_ids)
            mark(session, mine.rows, beside.verdicts())
    with watch("grade"):
        parts = session.ranks.gather(mine)
    rollouts = join(parts[:: session.config.rollout.tensor_parallel])  # an engine's ranks sampled the same
    session.sampled_tokens += int(rollouts.lengths_B.sum())  # as sampled: a method may shorten answers later
    return rollouts


def make_requests(session: Session, plan: SamplingPlan | MonitorPlan, draw: Mapping[int, Problem]) -> list[Request]:
    """This engine's share of the problems, a group for each, with the method's guidance. Engine e of N takes the prompts e,
    e + N, e + 2N, ..."""
    engine, engines = session.ranks.engine(session.config.rollout.tensor_parallel)
    requests = []
    for place, problem in list(draw.items())[engine::engines]:
        prompts: dict[tuple[str, str], list[int]] = {}  # a group mostly shares one prompt: encode it once
        for g in range(plan.group_size):
            guidance = session.method.guidance(problem, g, session.step)
            key = guidance.outside, guidance.inside
            if key not in prompts:
                prompts[key] = session.data.prompter.ids(problem.question, guidance)
            seed = row_seed(session.config.run.seed, session.step, place, g)
            requests.append(Request(prompts[key], seed, plan.max_new_tokens, problem, place, guidance.budget))
    return requests


def sample(
    session: Session, requests: Sequence[Request], plan: SamplingPlan | MonitorPlan, beside: GradeBeside
) -> list[Sample]:
    """Sample every request. As soon as a group is complete it is handed to `beside`."""
    size = plan.group_size
    texts, missing = [""] * len(requests), [size] * (len(requests) // size)

    def finished(row: int, sample: Sample) -> None:
        p, problem = row // size, requests[row].problem
        texts[row], missing[p] = session.data.decode(sample.ids), missing[p] - 1
        if not missing[p] and problem is not None:
            beside.add(p, texts[p * size : (p + 1) * size], problem.answer)

    def advance(tokens: int) -> None:
        bar.update(tokens)

    if not requests:
        return []
    total, hidden = sum(request.max_new_tokens for request in requests), None if session.ranks.is_main else True
    with tqdm(total=total, unit="tok", desc="sampling", leave=False, disable=hidden) as bar:
        return session.sampler.generate(requests, Decoding(plan.temperature), advance, finished)


class GradeBeside:
    """Grades complete groups in a thread of its own, all that wait at a time, while others are still being sampled."""

    def __init__(self, grader: Grader) -> None:
        self.grader, self.thread = grader, ThreadPoolExecutor(1)
        self.waiting: deque[tuple[int, list[str], str]] = deque()  # number of the group, texts, right answer
        self.found: dict[int, list[bool]] = {}
        self.jobs: list[Future[None]] = []

    def __enter__(self) -> GradeBeside:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:  # an error or a Ctrl-C shall not wait for answers that take long
            self.grader.close()
        self.thread.shutdown(cancel_futures=kind is not None)

    def add(self, number: int, texts: list[str], gold: str) -> None:
        self.waiting.append((number, texts, gold))
        self.jobs.append(self.thread.submit(self.work))

    def work(self) -> None:
        groups = [self.waiting.popleft() for _ in range(len(self.waiting))]  # only this thread takes any out
        texts = [text for _, group, _ in groups for text in group]
        golds = [gold for _, group, gold in groups for _ in group]
        verdicts = iter(self.grader.grade_all(texts, golds))
        self.found |= {number: list(islice(verdicts, len(group))) for number, group, _ in groups}

    def verdicts(self) -> list[bool]:
        """Of all rows of all groups, in order, when the last has been graded. Raises what grading raised."""
        for job in self.jobs:
            job.result()
        return [verdict for number in sorted(self.found) for verdict in self.found[number]]


def mark(session: Session, rows: Sequence[Rollout], verdicts: Sequence[bool]) -> None:
    """Fill in `correct`. An answer that was cut off counts as wrong unless the method says otherwise."""
    session.grader.stop_if_untrustworthy()
    for row, verdict in zip(rows, verdicts, strict=True):
        row.correct = verdict and (row.finished or session.method.cut_answers_count)


def regrade(session: Session, edited: Sequence[Rollout]) -> None:
    """Grade what these rows say now: their ids may have been cut. One rank grades for all, since a grader's time-out must
    not make ranks disagree."""
    if not edited:
        return
    for row in edited:
        row.text = session.data.decode(row.response_ids)
    if session.ranks.is_main:
        texts, answers = [row.text for row in edited], [row.problem.answer for row in edited]
        mark(session, edited, session.grader.grade_all(texts, answers))
    for row, correct in zip(edited, session.ranks.gather([row.correct for row in edited])[0], strict=True):
        row.correct = correct
