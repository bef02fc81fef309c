"""Tells the first half of a step: what one problem was asked, and how its answers were sampled, graded and rewarded.

Each function makes one section of the page from the trace. Equation numbers are the paper's (README, "The algorithm").
Methods other than LAPO's two stages have the same sections without equation numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from nanolapo.advantages import group_statistics
from nanolapo.data.problems import Problem
from nanolapo.explain.page import Section, Table
from nanolapo.explain.trace import Trace
from nanolapo.lengths import typical_range
from nanolapo.methods.base import Method
from nanolapo.methods.lapo import Discovery, Internalization, Lapo, tokens_outside
from nanolapo.metrics import shorten
from nanolapo.rollouts import Rollouts
from nanolapo.session import Session

MOST_TEXT = 2000  # characters of a prompt or an answer; the middle of a longer one is left out
MOST_IDS = 200  # of a prompt
BLANK = "\N{OPEN BOX}"
OTHER_RULE = ". THE CODE HAS ANOTHER RULE BY NOW: the column shows what it gave, not this formula"


@dataclass(frozen=True)
class View:
    """A step, seen from one of its problems."""

    s: Session
    trace: Trace
    group: int

    @property
    def rows(self) -> list[int]:
        size = self.trace.rollouts.group_size
        return list(range(self.group * size, (self.group + 1) * size))

    @property
    def rollouts(self) -> Rollouts:
        """Of this problem only."""
        return self.trace.rollouts.take([self.group])

    @property
    def problem(self) -> Problem:
        return self.trace.rollouts.problems[self.group]

    @property
    def advantages(self) -> np.ndarray:
        """[G]; where a method weighs single tokens, the largest of each answer."""
        return self.trace.advantages[self.rows].reshape(len(self.rows), -1).amax(dim=1).numpy()


def most_telling(trace: Trace) -> int:
    """The group that lost most tokens to the clip, among those with right and wrong answers if there are any."""
    verdicts_PG = trace.rollouts.by_group(trace.rollouts.correct_B)
    clipped = [0.0] * len(verdicts_PG)
    for p in trace.passes:
        if "clip_fraction" in p.logged:
            for row, tokens in zip(p.x.rows, (p.logged["clip_fraction"] * p.x.mask_BT).sum(dim=1), strict=True):
                clipped[row // trace.rollouts.group_size] += float(tokens)
    return max(range(len(clipped)), key=lambda g: (len(set(verdicts_PG[g])), clipped[g], -g))


def num(value: float | Tensor | None) -> str:
    """A number with six digits, enough to check a calculation by hand. The last section prints all digits.

    >>> num(0.123456789), num(7.0), num(None)
    ('0.123457', '7', '-')
    """
    return "-" if value is None else f"{float(value):.6g}"


def spelled(s: Session, ids: list[int]) -> list[str]:
    """The text of each token, with blanks made visible."""
    known = len(s.data.tokenizer)
    return [str(s.data.tokenizer.decode([i])).replace(" ", BLANK) if 0 <= i < known else "(unknown)" for i in ids]


def target(entries: dict[str, float | None], problem: Problem) -> str:
    value = entries.get(problem.id)
    return "not visited yet" if problem.id not in entries else "unsolved" if value is None else f"{num(value)} tokens"


def home(v: View) -> str:
    """Where the method is defined."""
    method = type(v.s.method)
    return f"methods/{method.__module__.rpartition('.')[2]}.py: {method.__name__}"


def the_problem(v: View) -> Section:
    c = v.s.config
    return Section(
        "A problem is drawn",
        "data/order.py: round_indices, a pure function of run.seed and the step",
        [
            f"Step 1 of {c.train.steps} of {type(v.s.method).__name__}, run.seed={c.run.seed}, model.path={c.model.path}: "
            f"{c.arithmetic(1)}. This page follows number {v.group + 1} of the {len(v.trace.rollouts.problems)} problems.",
            f"{v.problem.id}, level {v.problem.level}: {shorten(v.problem.question, MOST_TEXT)}",
            f"Right answer: {v.problem.answer}",
        ],
    )


def the_prompt(v: View) -> Section:
    ids, guidance = v.rollouts.prompt_ids[0].tolist(), v.trace.guidance[v.problem.id, 0]
    pairs = [f"{i} {token}" for i, token in zip(ids, spelled(v.s, ids), strict=True)]
    shown = ", ".join(pairs[:MOST_IDS]) + ", ..." * (len(ids) > MOST_IDS)
    return Section(
        "It becomes a prompt",
        "data/prompts.py: Prompter.render for eyes, Prompter.ids for the model",
        [
            shorten(v.s.data.prompter.render(v.problem.question, guidance), MOST_TEXT),
            f"{len(ids)} token ids with their text: {shown}",
            *(["The words in the thought are given tokens of the answer."] if guidance.inside_is_answer else []),
        ],
    )


def the_answers(v: View) -> Section:
    rows = []
    columns = v.rollouts.budgets_B, v.rollouts.lengths_B, v.rollouts.finished_B, v.rollouts.texts
    for i, (budget, length, finished, text) in enumerate(zip(*columns, strict=True)):
        seed, asked = v.trace.requests[v.problem.id, i].seed, "-" if np.isnan(budget) else num(budget)
        rows.append([str(i + 1), str(seed), asked, str(length), "yes" if finished else "cut", shorten(text, MOST_TEXT)])
    given = v.rollouts.rows[0].num_given
    limit = v.trace.requests[v.problem.id, 0].max_new_tokens + given
    return Section(
        f"{len(rows)} answers are sampled",
        "sampling.py: sample; rollouts.py: row_seed, lengths_B",
        [
            f"Temperature {num(v.s.config.rollout.temperature)}, at most {limit} tokens. L counts the sampled tokens, the "
            f"end token included{f', and {given} given ones before them' if given else ''}.",
            Table(["answer", "seed", "length asked for", "L", "ended", "text"], rows, words=["ended", "text"]),
        ],
    )


def the_verdicts(v: View) -> Section:
    rows = []
    for i, (text, right) in enumerate(zip(v.rollouts.texts, v.rollouts.correct_B, strict=True)):
        taken = v.s.grader.reads(text)
        rows.append([str(i + 1), "(none)" if taken is None else taken, v.problem.answer, str(int(right))])
    head = ["answer", "taken as its answer", "right answer", "c"]
    counts = "" if v.s.method.cut_answers_count else " and the answer ended by itself"
    return Section(
        "Each is graded",
        "grader/__init__.py: Grader.reads, Grader.submit; sampling.py: mark",
        [f"c is 1 where the two agree{counts}, otherwise 0.", Table(head, rows, words=head[1:3])],
    )


def the_length(v: View) -> Section:
    lengths, right, method = v.rollouts.lengths_B, v.rollouts.correct_B, v.s.method
    equation = "Eq. 1, " if isinstance(method, Lapo) else ""
    body = [
        f"{equation}the lengths of the right ones: {', '.join(map(str, sorted(lengths[right].tolist()))) or 'none'}"
    ]
    where = "rollouts.py: lengths_B"
    if isinstance(method, Discovery) and right.any():
        where = "lengths.py: typical_range"
        low, high = v.s.config.lapo.percentiles
        bottom, top = typical_range(lengths[right], (low, high))
        body.append(f"Eq. 2, what is typical of them: [P{low:g}, P{high:g}] = [{num(bottom)}, {num(top)}]")
    if isinstance(method, Internalization):
        where = "methods/lapo.py: Internalization.guidance, Internalization.center"
        body.append(f"M(q) before the step: {target(v.trace.targets, v.problem)}")
        body.append(f"n of Eq. 7, the length to keep to: {num(v.trace.centers[v.problem.id])}")
    return Section("How long should it have been?", where, body)


def the_rewards(v: View) -> Section:
    parts, method, c = v.trace.parts[v.problem.id], v.s.method, v.s.config.lapo
    lengths, right = v.rollouts.lengths_B, v.rollouts.correct_B
    formula, total, names = "The reward is the sum of its parts.", "reward", {}
    columns = {"answer": [str(i + 1) for i in range(len(lengths))], "L": [str(length) for length in lengths]}
    if isinstance(method, Discovery):
        formula = (
            f"R_D = c + alpha R1, alpha = {num(c.alpha)}; R1 = max(0, 1 - d / {num(method.decay)}) for a right answer"
        )
        formula += " that lies d tokens outside the range, 0 for a wrong one"
        names, total = {"correct": "c", "length": "alpha R1 (Eq. 5)"}, "R_D (Eq. 4)"
        if right.any():
            low, high = typical_range(lengths[right], (c.percentiles[0], c.percentiles[1]))
            d = tokens_outside(lengths, low, high)
            columns["d"] = [num(x) for x in d]
            r1 = right * np.maximum(0.0, 1.0 - d / method.decay)
            if method.readings.strict_range and not low < high:
                r1, formula = 0.0 * r1, f"{formula}; 0 for all here: lapo.fidelity leaves out a range of a single point"
            if not np.allclose(parts["length"], c.alpha * r1):
                formula += OTHER_RULE
    if isinstance(method, Internalization):
        formula = (
            f"R_I = c + beta R2, beta = {num(method.beta)}; R2 = exp(-(L - n)^2 / (2 sigma^2)) for a right answer, "
        )
        formula += f"sigma = {num(method.sigma)}, 0 for a wrong one"
        names, total = {"correct": "c", "length": "beta R2 (Eq. 7)"}, "R_I (Eq. 6)"
        n = v.trace.centers[v.problem.id]
        columns["n"] = [num(n)] * len(lengths)
        r2 = right * np.exp(-((lengths - n) ** 2) / (2 * method.sigma**2))
        if not np.allclose(parts["length"], method.beta * np.nan_to_num(r2)):  # without an n there is no length reward
            formula += OTHER_RULE
    for name, values in parts.items():
        columns[names.get(name, name)] = [num(value) for value in values]
    columns[total] = [num(value) for value in v.trace.rewards_PG[v.group]]
    table = Table(list(columns), list(zip(*columns.values(), strict=True)))
    return Section("Each gets its reward", f"{home(v)}.reward", [formula, table])


def the_advantages(v: View) -> Section:
    mean_P1, std_P1 = group_statistics(v.trace.rewards_PG)
    formula = f"mean of the rewards {num(mean_P1[v.group])}, their spread (standard deviation) {num(std_P1[v.group])}"
    where = "advantages.py: group_statistics, group_advantages"
    if type(v.s.method).advantage is Method.advantage:
        divided = " / spread" if v.s.config.loss.normalize_std else ""
        formula += f"; the advantage A is (reward - mean){divided}"
    else:
        where = f"{home(v)}.advantage"
    pairs = zip(v.trace.rewards_PG[v.group], v.advantages, strict=True)
    rows = [[str(i + 1), num(reward), f"{advantage:+.6g}"] for i, (reward, advantage) in enumerate(pairs)]
    return Section(
        "Compared with the other answers to the same problem",
        where,
        [formula, Table(["answer", "reward", "A"], rows)],
    )
