"""The training problems of a run: loaded, with reference answers that can be graded and prompts that fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from transformers import PreTrainedTokenizerBase

from nanolapo.config import Config, UserError
from nanolapo.data.problems import Problem, load_problems
from nanolapo.data.prompts import Prompter
from nanolapo.grader import Grader, plainly_equal
from nanolapo.grader.boxes import THOUGHT_TAG
from nanolapo.model.folder import load_tokenizer
from nanolapo.ranks import Ranks


@dataclass
class Data:
    """Checked training problems, their prompter, and a report of what was left out."""

    problems: list[Problem]
    prompter: Prompter
    report: list[str] = field(default_factory=list)
    longest_prompt: int = 0  # tokens, without guidance

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.prompter.tokenizer

    @cached_property
    def readable(self) -> np.ndarray:
        """Which ids are text, bool [largest id + 1]. Ids may have gaps. Special tokens are no text, but for the tags of a
        thought: a box counts only behind the thought."""
        vocabulary, added = list(self.tokenizer.get_vocab().values()), self.tokenizer.added_tokens_decoder
        readable = np.zeros(1 + max(vocabulary), dtype=bool)
        readable[vocabulary] = True
        readable[[i for i, token in added.items() if token.special and not THOUGHT_TAG.search(token.content)]] = False
        return readable

    def decode(self, ids: np.ndarray) -> str:
        """A response as text, without ids that the tokenizer does not know (a padded vocabulary can yield them)."""
        inside = ids[(ids >= 0) & (ids < len(self.readable))]
        return str(self.tokenizer.decode(inside[self.readable[inside]].tolist(), skip_special_tokens=False))


def load_data(config: Config, grader: Grader, ranks: Ranks | None = None) -> Data:
    """Load the problems of a training run: each question once, its reference answer can be graded and its prompt fits; the
    report counts the rest."""
    prompter = Prompter(load_tokenizer(config.model.path), config.prompt)
    problems, report = gradable_problems(config, grader, ranks)
    first: dict[str, Problem] = {}  # key of a question -> its first problem, of whatever source
    for problem in problems:
        first.setdefault(problem.key, problem)
    if len(first) < len(problems):
        others = sum(not plainly_equal(p.answer, first[p.key].answer) for p in problems)
        report.append(
            f"{len(problems) - len(first)} problems left out because an earlier one has their question, {others} of "
            "them with another answer"
        )
    return fit_prompts(config, prompter, list(first.values()), report)


def gradable_problems(config: Config, grader: Grader, ranks: Ranks | None = None) -> tuple[list[Problem], list[str]]:
    """Load the problems whose reference answer can be graded, with a report of what came and what was left out.

    With several ranks the main one reads and decides for all of them. Raises UserError for sources that cannot be used.
    """
    if ranks is not None:
        return ranks.from_main(lambda: gradable_problems(config, grader))
    if not config.data.sources:
        raise UserError("data.sources is empty: name at least one source of problems in the YAML file")
    problems, report = load_problems(config.data.sources)
    if config.data.exclude:
        banned = {p.key for p in load_problems(config.data.exclude, only_questions=True)[0]}
        kept = [p for p in problems if p.key not in banned]
        report.append(f"{len(problems) - len(kept)} problems left out because they are in data.exclude")
        problems = kept
    failing = set(grader.references_that_fail([p.answer for p in problems]))
    report += [
        f"dropped {problems[i].id}: reference answer {problems[i].answer!r} cannot be graded" for i in sorted(failing)
    ]
    return [p for i, p in enumerate(problems) if i not in failing], report


def fit_prompts(config: Config, prompter: Prompter, problems: Sequence[Problem], report: Sequence[str]) -> Data:
    """Keep the problems whose prompt is short enough, and add a line about the others to `report`."""
    limit, report = config.rollout.max_prompt_tokens, list(report)
    prompts = [prompter.ids(p.question) for p in problems]
    short = [i for i, ids in enumerate(prompts) if len(ids) <= limit]
    if skipped := len(prompts) - len(short):
        report.append(f"skipped {skipped} prompts longer than rollout.max_prompt_tokens={limit}: never cut")
    if not short:
        raise UserError(f"data.sources: no problem is left to work on ({'; '.join(report[-3:])})")
    longest = max(len(prompts[i]) for i in short)
    return Data([problems[i] for i in short], prompter, report, longest)
