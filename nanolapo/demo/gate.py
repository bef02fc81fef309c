"""The gate that a base of the demo has to pass: is its terse manner really lossy, and does it stay so?

Every model of evaluate.models answers every problem once in each of two manners, forced by the first word of the thought,
and the first model, the base, also in the third. An addition is wrong if its result is not the sum of the value written
before and of the number that the question adds. Errors of earlier additions do not count again.

    python -m nanolapo.demo.gate configs/demo/gate.yaml [run.seed=1]

The command prints one table and says "passed", or what failed with exit code 1. Quick must be wrong in at least 10 % of
the additions that carry, for every model. Careful must be wrong in at most 3 % of them, and Quick in at most 3 % of the
additions of level 0, for the base; for the others 10 % is the most. Thorough, which checks itself and is learnt last, must
be right in 90 % of its answers.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from itertools import product
from typing import Any

from nanolapo import cli
from nanolapo.config import Config
from nanolapo.data.demo_task import LABELS, carries, parse_question
from nanolapo.data.load import Data
from nanolapo.data.problems import Problem
from nanolapo.evaluation.passes import decoding_at, load_sets, parse_models
from nanolapo.grader import Grader
from nanolapo.report.tables import table
from nanolapo.rollouts import row_seed
from nanolapo.samplers.choose import make_sampler
from nanolapo.samplers.sampler import Decoding, Request, Sampler
from nanolapo.session import set_up_process

FORCED = ("Quick", "Careful")
LEAST_ERROR, MOST_ERROR, LEAST_THOROUGH = 0.10, 0.03, 0.90
Errors = dict[str, list[bool]]  # kind of addition -> for each whether its result is wrong


def written_results(thought: str) -> list[int | None]:
    """The results of the additions of a thought; None where an addition is no sentence of Quick or Careful.

    >>> written_results(" Quick. A: 3+2=6 4+8=3 7+5=2. B: 6+0+0=6 carry 0 3+1+0=4 carry 0 2+6+0=8 carry 0 648. C: 6+")
    [632, 648, None]
    """
    found: list[int | None] = []
    for part in re.split(rf" [{LABELS}]:", thought)[1:]:
        quick = re.match(r" \d\+\d=(\d) \d\+\d=(\d) \d\+\d=(\d)\.", part)
        careful = re.match(r"[^.]* (\d{3})\.", part)
        found.append(int("".join(quick.groups())) if quick else int(careful[1]) if careful else None)
    return found


def errors(problem: Problem, thought: str) -> Errors:
    """Whether each addition is wrong, by kind: "carry", "no carry", and those of level 0 also as "level 0".

    >>> asked = Problem("", "Start at 347. A: add 285. B: add 111. Last 3 digits?", "743", 1, "demo")
    >>> errors(asked, " Quick. A: 3+2=5 4+8=2 7+5=2. B: 5+1=6 2+1=3 2+1=3.")   # 522 is wrong, 633 follows from it
    {'carry': [True], 'no carry': [False]}
    """
    sums, found = parse_question(problem.question), defaultdict(list)
    value, results = sums.start, written_results(thought)
    for n, result in zip(sums.added, [*results, *[None] * len(sums.added)], strict=False):
        wrong = result != (value + n) % 1000
        found["carry" if carries(value, n) else "no carry"].append(wrong)
        if problem.level == 0:
            found["level 0"].append(wrong)
        if result is None:
            break
        value = result
    return dict(found)


def measure(config: Config) -> list[dict[str, Any]]:
    """One row for each model, temperature and manner: shares of wrong additions by kind, and of right answers by level."""
    ranks, models, e, rows = set_up_process(config), parse_models(config), config.evaluate, []
    with Grader() as grader:
        for model, data in zip(models, load_sets(config, models, grader, ranks), strict=True):
            sampler = make_sampler(config, model.path, e.max_new_tokens, ranks, trains=False)
            forced = (*FORCED, "Thorough") if model is models[0] else FORCED
            for temperature, manner in product(e.temperatures, forced):
                texts = forced_answers(config, data, sampler, manner, decoding_at(config, temperature))
                right = grader.grade_all(texts, [p.answer for p in data.problems])
                row = {"model": model.name, "temperature": temperature, "manner": manner}
                rows.append(row | summarize(data.problems, texts, right))
            sampler.close()
    return rows


def forced_answers(config: Config, data: Data, sampler: Sampler, manner: str, decoding: Decoding) -> list[str]:
    """One answer to each problem, after the thought's first word."""
    first = data.tokenizer(f" {manner}.", add_special_tokens=False)["input_ids"]
    requests = [
        Request(
            data.prompter.ids(p.question) + first, row_seed(config.run.seed, 0, i, 0), config.evaluate.max_new_tokens
        )
        for i, p in enumerate(data.problems)
    ]
    return [data.decode(sample.ids) for sample in sampler.generate(requests, decoding)]


def summarize(problems: Sequence[Problem], texts: Sequence[str], right: Sequence[bool]) -> dict[str, Any]:
    """The shares of wrong additions by kind, and of right answers by level."""
    wrong: Errors = defaultdict(list)
    by_level: dict[str, list[bool]] = defaultdict(list)
    for problem, text, correct in zip(problems, texts, right, strict=True):
        by_level[f"right at level {problem.level}"].append(correct)
        for kind, found in errors(problem, text).items():
            wrong[kind] += found
    return {kind: sum(found) / len(found) for kind, found in sorted((wrong | by_level).items())}


def failures(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What keeps the base from passing; the first row's model is the base."""
    found, base = [], rows[0]["model"]
    for row in rows:
        name = f"{row['model']}, temperature {row['temperature']:g}, {row['manner']}"
        if row["manner"] == "Thorough":
            right = [share for kind, share in row.items() if kind.startswith("right")]
            if (mean := sum(right) / len(right)) < LEAST_THOROUGH:
                found.append(f"{name}: {mean:.1%} of the answers are right, wanted at least {LEAST_THOROUGH:.0%}")
            continue
        if row["manner"] == "Quick" and row["carry"] < LEAST_ERROR:
            found.append(f"{name}: wrong at {row['carry']:.1%} of carry, wanted at least {LEAST_ERROR:.0%}")
        kind = "level 0" if row["manner"] == "Quick" else "carry"
        # Training under a limit may blur what it never samples; but a model that has collapsed is no proof of anything.
        most = MOST_ERROR if row["model"] == base else LEAST_ERROR
        if row[kind] > most:
            found.append(f"{name}: wrong at {row[kind]:.1%} of {kind}, wanted at most {most:.0%}")
    return found


def gate_table(rows: Sequence[dict[str, Any]]) -> str:
    kinds = [key for key in rows[0] if key not in ("model", "temperature", "manner")]
    body = [
        [row["model"], f"{row['temperature']:g}", row["manner"], *(f"{row[kind]:.1%}" for kind in kinds)]
        for row in rows
    ]
    heads = [f"wrong, {kind}" if not kind.startswith("right") else kind for kind in kinds]
    return table(["model", "temperature", "manner", *heads], body)


def main() -> None:
    config, action = cli.parse(__doc__ or "")
    if action == "dry-run":
        print("\n".join(f"{model.name}: {model.path}" for model in parse_models(config)))
        return
    rows = measure(config)
    print(gate_table(rows), end="\n\n")
    failed = failures(rows)
    stays = ", and stays so" * (len({row["model"] for row in rows}) > 1)
    print("\n".join(failed) if failed else f"passed: the terse manner is lossy{stays}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    cli.run(main, keeps_progress=False)
