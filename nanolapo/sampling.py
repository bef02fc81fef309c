"""From a plan to graded rollouts: draw problems, sample this rank's share of them, grade, bring all ranks together.

The step's own rounds and a method's monitor pass go the same way. Every rank samples whole groups; ranks meet once per
round, and afterwards each holds all rows. Every seed is a pure function of its place in the step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from tqdm import tqdm

from nanolapo.data.order import round_indices
from nanolapo.data.problems import Problem
from nanolapo.grader import Grader
from nanolapo.methods.base import MonitorPlan, SamplingPlan
from nanolapo.metrics import Stopwatch
from nanolapo.rollouts import Rollouts, concatenate, join_ranks, make_rollouts, row_seed, take_groups
from nanolapo.samplers.sampler import Decoding, Request, Sample
from nanolapo.session import Draw, Session

MONITOR_PLACE = 2**30  # the first place of a monitor pass: beyond those of all rounds, for seeds of its own


@dataclass
class Round:
    """One round of a step: its rollouts on all ranks, their rewards, and which groups to train on."""

    rollouts: Rollouts
    parts: dict[str, np.ndarray]  # named parts of the reward, [B] each
    keep_P: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))

    @property
    def rewards_PG(self) -> np.ndarray:
        return self.rollouts.by_group(sum(self.parts.values(), np.zeros(len(self.rollouts))))

    def kept(self) -> Round:
        """Only the groups to train on. None at all: everything as it is, for the update to skip and count."""
        groups = np.flatnonzero(self.keep_P)
        if len(groups) in (0, len(self.keep_P)):
            return self
        parts = {name: self.rollouts.by_group(values)[groups].ravel() for name, values in self.parts.items()}
        return Round(take_groups(self.rollouts, groups), parts, self.keep_P[groups])


def next_draw(s: Session, plan: SamplingPlan, rounds: Sequence[Round]) -> Draw:
    """The problems of the next round; none when groups enough are kept, or no rounds or no problems are left."""
    kept, number = sum(int(done.keep_P.sum()) for done in rounds), len(rounds)
    if number and (number >= plan.max_rounds or kept >= plan.num_prompts):
        return {}
    return draw_round(s, plan, s.step, number)


def draw_round(s: Session, plan: SamplingPlan, step: int, number: int) -> Draw:
    """The problems of one round of a step; none when all have been drawn in earlier rounds."""
    if plan.temperature != s.config.rollout.temperature:
        raise ValueError(
            f"the plan samples at temperature {plan.temperature}, but the trainer scores at rollout.temperature="
            f"{s.config.rollout.temperature}; only a MonitorPlan may have another one"
        )
    problems = round_indices(len(s.data.problems), step, number, plan.num_prompts, s.config.run.seed, plan.weights)
    return dict(enumerate(problems, start=number * plan.num_prompts))


def join_rounds(rounds: Sequence[Round], num_prompts: int) -> Round:
    """All rounds of a step as one. Of the kept groups the first num_prompts stay; the surplus is not trained on."""
    if len(rounds) == 1:
        return rounds[0]
    parts = {name: np.concatenate([done.parts[name] for done in rounds]) for name in rounds[0].parts}
    keep_P = np.concatenate([done.keep_P for done in rounds])
    return Round(concatenate([done.rollouts for done in rounds]), parts, keep_P & (np.cumsum(keep_P) <= num_prompts))


def monitor_pass(s: Session, watch: Stopwatch) -> dict[str, float]:
    """What a method wants sampled and graded before the step's own rollouts; returns what it logs. Mostly nothing."""
    plan = s.method.monitor(s.step)
    if plan is None:
        return {}
    rollouts = sample_and_grade(s, plan, dict(enumerate(plan.problem_indices, start=MONITOR_PLACE)), watch)
    rollouts.unmatched_B[:] = plan.temperature != s.config.rollout.temperature
    return s.method.on_monitor(rollouts)


def sample_and_grade(s: Session, plan: SamplingPlan | MonitorPlan, draw: Draw, watch: Stopwatch) -> Rollouts:
    """Sample a group for each of these problems and grade them. From here on every rank holds all rows."""
    with watch("sample"):
        share = ask(s, plan, draw, s.step)
    mine = answer(s, share, watch)
    with watch("grade"):
        everyone = s.ranks.gather(mine)
        rollouts = join_ranks(everyone[:: s.config.rollout.tensor_parallel])  # an engine's ranks sampled the same
    rollouts.regrade = lambda edited, rows: regrade(s, edited, rows)
    s.sampled_tokens += int(rollouts.lengths_B.sum())  # as sampled: a method may shorten answers later
    return rollouts


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


@dataclass(frozen=True)
class Share:
    """What one engine is to answer: whole groups, a request and a budget for each row."""

    problems: list[Problem]
    group_size: int
    requests: list[Request]
    budgets: list[float | None]
    temperature: float


def ask(s: Session, plan: SamplingPlan | MonitorPlan, draw: Draw, step: int) -> Share:
    """This engine's share of the problems, with the method's guidance; every seed a pure function of its place in the
    step."""
    engine, engines = s.ranks.engine(s.config.rollout.tensor_parallel)
    places = list(draw)[engine::engines]  # engine e of N takes prompts e, e + N, e + 2N, ...
    problems = [s.data.problems[draw[place]] for place in places]
    guidances = [s.method.guidance(p, g, step) for p in problems for g in range(plan.group_size)]
    prompts: dict[tuple[str, str, str], list[int]] = {}  # a group mostly shares one prompt: encode it once
    requests = []
    for row, guidance in enumerate(guidances):
        p, g = divmod(row, plan.group_size)
        key = (problems[p].question, guidance.outside, guidance.inside)
        if key not in prompts:
            prompts[key] = s.data.prompter.ids(problems[p].question, guidance)
        seed = row_seed(s.config.run.seed, step, places[p], g)
        requests.append(Request(prompts[key], seed, plan.max_new_tokens))
    budgets = [guidance.budget for guidance in guidances]
    return Share(problems, plan.group_size, requests, budgets, plan.temperature)


def answer(s: Session, share: Share, watch: Stopwatch) -> Rollouts:
    """Sample a share, and grade every group of it while others are still being sampled. No other rank takes part."""
    with GradeBeside(s.grader) as beside:
        with watch("sample"):
            rollouts = sample(s, share, beside)
        with watch("grade"):  # what is left of it
            mark(s, rollouts, range(len(rollouts)), beside.verdicts())
    return rollouts


def sample(s: Session, share: Share, beside: GradeBeside) -> Rollouts:
    """Sample every request of a share. As soon as a group is complete it is handed to `beside`."""
    requests, size = share.requests, share.group_size
    texts, missing = [""] * len(requests), [size] * len(share.problems)

    def advance(tokens: int) -> None:
        bar.update(tokens)

    def finished(row: int, sample: Sample) -> None:
        p = row // size
        texts[row], missing[p] = s.data.decode(sample.ids), missing[p] - 1
        if not missing[p]:
            beside.add(p, texts[p * size : (p + 1) * size], share.problems[p].answer)

    total = sum(request.max_new_tokens for request in requests)
    with tqdm(total=total, unit="tok", desc="sampling", leave=False, disable=None if s.log else True) as bar:
        samples = s.sampler.generate(requests, Decoding(share.temperature), advance, finished) if requests else []
    rollouts = make_rollouts(share.problems, size, requests, share.budgets, samples, s.policy.vocab_size)
    rollouts.texts = texts
    return rollouts


def mark(s: Session, rollouts: Rollouts, rows: Sequence[int], verdicts: Sequence[bool]) -> None:
    """Fill in correct_B. An answer that was cut off counts as wrong unless the method says otherwise."""
    s.grader.stop_if_untrustworthy()
    for row, verdict in zip(rows, verdicts, strict=True):
        rollouts.correct_B[row] = verdict and (rollouts.finished_B[row] or s.method.cut_answers_count)


def regrade(s: Session, rollouts: Rollouts, rows: Sequence[int]) -> None:
    """Grade what these rows say now: their ids may have been cut. One rank grades for all, since a grader's time-out must
    not make ranks disagree."""
    for row in rows:
        rollouts.texts[row] = s.data.decode(rollouts.response_ids[row])
    if s.log:
        golds = [rollouts.problems[row // rollouts.group_size].answer for row in rows]
        mark(s, rollouts, rows, s.grader.grade_all([rollouts.texts[row] for row in rows], golds))
    rollouts.correct_B = s.ranks.gather(rollouts.correct_B)[0]
