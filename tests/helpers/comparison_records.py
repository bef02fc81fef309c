"""Records of a comparison for tests: made up scores of a few problems, with the rows that evaluate.py would write."""

from __future__ import annotations

from collections.abc import Sequence

from tiny import make_answer, make_config

from nanolapo.evaluation.scores import add_aes, score_sets
from nanolapo.reproduce.records import Record

COSTS = {"sampled_tokens": 1000.0, "trained_tokens": 500.0, "steps": 4.0, "seconds": 8.0}
LEVELS = (0, 0, 1, 2, None, None)


def record(
    method: str, seed: int, right: Sequence[int], tokens: Sequence[int], base: str = "b", **other: str
) -> Record:
    """right: of the two answers to each problem. The base has two right answers of 100 tokens to each."""
    rows = []
    for name, verdicts, lengths in (("base", [2] * len(right), [100] * len(right)), (method, right, tokens)):
        answers = [
            make_answer(f"q{q}", k, lengths[q], k < verdicts[q], level=LEVELS[q % 6])
            for q in range(len(right))
            for k in range(2)
        ]
        rows += score_sets(name, 0.6, "", answers, make_config(evaluate={"bootstrap": 5}))
    add_aes(rows, "base")
    score = {
        "row": rows[-1], "problems": "p", "levels": [LEVELS[q % 6] for q in range(len(right))],
        "accuracy": [n / 2 for n in right], "tokens": list(tokens),
    }  # fmt: skip
    costs = {} if method == "base" else COSTS
    return Record(method, seed, other.get("digest", "d"), base, other.get("setting", ""), costs, [score])


def records(method: str, *seeds: tuple[Sequence[int], Sequence[int]]) -> list[Record]:
    return [record(method, seed, right, tokens) for seed, (right, tokens) in enumerate(seeds)]
