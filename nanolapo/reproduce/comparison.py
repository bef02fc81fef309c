"""The table of a comparison of methods: what each scored with its uncertainty, and how many of the differences are real."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanolapo.config import UserError
from nanolapo.evaluation.scores import without_nan
from nanolapo.report.tables import Row, level_cells, number, table, with_interval
from nanolapo.reproduce import differences
from nanolapo.reproduce.differences import NUMBERS, Scores
from nanolapo.reproduce.over_seeds import mean_row, none_first
from nanolapo.reproduce.records import Record

NOTES = """\
The best AES comes first. A **bold** method could not be told apart from the best (corrected for the number of comparisons
with the best). "Better / worse than" says of how many methods that is certain by AES, corrected for the number of all
pairs. \\* is on the Pareto front of accuracy and tokens; "on the front" is the share of draws of seeds and problems in
which a method is. Of one with (u) something is unverified, see its file. Intervals are over seeds and problems; with one
seed they are over problems only, and with two they hold the truth in about 88 %. Seconds are those of training, without
start-up. AES is the mean over the seeds, each against its own base. "Worst seed" is the one of the lowest AES, with its
accuracy / tokens. Adaptivity is the mean tokens above the lowest level minus those at it. Intervals suppose that seeds
scatter normally: of a method that now and then ends elsewhere altogether, few seeds say too little.
"""
Place = tuple[str, float]  # a problem set, a temperature
Found = Mapping[str, Sequence[Record]]  # method -> its seeds


def compare_methods(records: Found, bases: Sequence[Record], unverified: set[str]) -> dict[str, Any]:
    """The rows, best AES first, the pairs and the front of every set and temperature. bases: for each record the base
    that it was trained from. Raises UserError where they did not all answer the same problems."""
    of_seed = {(one.seed, one.base): one for one in bases}
    places = dict.fromkeys((at["row"]["set"], at["row"]["temperature"]) for one in bases for at in one.scores)
    rows, pairs, fronts = list[Row](), list[Row](), list[Row]()
    for place in places:
        same_problems(place, records)
        scores = {name: scores_at(place, found, of_seed) for name, found in records.items()}
        mine = [row_of(place, records[name], scores[name]) | {"unverified": name in unverified} for name in records]
        mine.sort(key=lambda row: -none_first(row["aes"]))
        best_first = [scores[row["model"]] for row in mine]
        points = differences.drawn_points(best_first)
        on_front = differences.front(*(np.array([row[key] for row in mine]) for key in ("accuracy", "tokens")))
        for row, at, share in zip(mine, on_front, differences.front_shares(*points), strict=True):
            row |= {"pareto": bool(at), "front_share": float(share)}
        at_place = {"set": place[0], "temperature": place[1]}
        pairs.append(at_place | compare_pairs(mine, best_first))
        fronts.append(at_place | differences.front_band(*points))
        rows += mine
    return {"rows": rows, "pairs": pairs, "fronts": fronts}


def same_problems(place: Place, records: Found) -> None:
    of_record = {
        f"{one.method}, seed {one.seed}": score_of(one, place)["problems"] for mine in records.values() for one in mine
    }
    counts = Counter(of_record.values())
    if len(counts) > 1:
        others = [name for name, problems in of_record.items() if problems != max(counts, key=counts.__getitem__)]
        raise UserError(f"{place[0]}: {'; '.join(others)} answered other problems than the rest, so they cannot be paired: "
                        "delete their lines in the records and run them again")  # fmt: skip


def scores_at(place: Place, found: Sequence[Record], bases: Mapping[tuple[int, str], Record]) -> Scores:
    mine = [score_of(one, place) for one in found]
    theirs = [score_of(bases[one.seed, one.base], place) for one in found]
    levels = mine[0]["levels"]
    known = [level for level in levels if level is not None]
    levels_Q = np.array([min(known, default=0) if level is None else level for level in levels])

    def column(side: Sequence[dict[str, Any]], key: str) -> np.ndarray:
        return np.array([at[key] for at in side], dtype=np.float64)

    return Scores(
        tuple(one.seed for one in found), column(mine, "accuracy"), column(mine, "tokens"), column(theirs, "accuracy"),
        column(theirs, "tokens"), levels_Q,
    )  # fmt: skip


def score_of(record: Record, place: Place) -> dict[str, Any]:
    for at in record.scores:
        if (at["row"]["set"], at["row"]["temperature"]) == place:
            return at
    raise UserError(
        f"{record.method}, seed {record.seed}: its record has nothing of {place[0]} at temperature {place[1]:g}, but "
        "that of the base has; delete its line in the records and run it again"
    )


def row_of(place: Place, found: Sequence[Record], scores: Scores) -> Row:
    """Means over the seeds as in mean_row, but with intervals over seeds and problems, and with the costs."""
    row = mean_row([score_of(one, place)["row"] for one in found])
    estimates = differences.estimates(scores)
    with_level = [q for q, level in enumerate(score_of(found[0], place)["levels"]) if level is not None]
    if with_level:  # the value of adaptivity is of these problems alone
        estimates[-1] = differences.estimates(scores.only(with_level))[-1]
    for key, estimate in zip(NUMBERS, estimates, strict=True):
        low, high = differences.interval(estimate)
        if not np.isnan(low):
            row[f"{key}_interval"] = (
                within_a_share(low, high, len(scores.levels_Q)) if key == "accuracy" else (low, high)
            )
    row["seeds"], row["setting"] = list(scores.seeds), found[0].setting
    costs = [one.costs for one in found]
    known = set.intersection(*map(set, costs))  # a lost metrics.jsonl leaves none
    return row | {key: float(np.mean([cost[key] for cost in costs])) for key in sorted(known)}


def within_a_share(low: float, high: float, problems: int) -> tuple[float, float]:
    """Bounds of an accuracy. Where every answer was right, or none, nothing varies: up to 3 / problems may still be
    otherwise, the 95 % bound for what was not seen in so many (the rule of three).

    >>> within_a_share(0.97, 1.01, 100), within_a_share(1 - 1e-15, 1 + 1e-15, 100), within_a_share(0.0, 0.0, 100)
    ((0.97, 1.0), (0.97, 1.0), (0.0, 0.03))
    """
    if high - low < 1e-9:
        low, high = (low, 3 / problems) if high < 1e-9 else (1 - 3 / problems, high) if low > 1 - 1e-9 else (low, high)
    return max(low, 0.0), min(high, 1.0)


def compare_pairs(rows: Sequence[Row], scores: Sequence[Scores]) -> dict[str, Any]:
    """Write into each row which methods are really worse and better by AES, and whether it differs from the best, rows[0].
    Returns how many pairs differ in each number. Two seeds are too few for a test: it would err in 12 % of the cases."""
    places = [(i, j) for i, j in itertools.combinations(range(len(rows)), 2)
              if len(set(scores[i].seeds) & set(scores[j].seeds)) > 2]  # fmt: skip
    found = [differences.difference(scores[i], scores[j]) for i, j in places]
    p_of = {key: [differences.p_value(one[k]) for one in found] for k, key in enumerate(NUMBERS[:3])}
    differ = {key: differences.holm(p_values) for key, p_values in p_of.items()}
    for row in rows:
        row |= {"better_than": [], "worse_than": []}
    for (i, j), one, real in zip(places, found, differ["aes"], strict=True):
        better, worse = (i, j) if one[NUMBERS.index("aes")][0] > 0 else (j, i)
        if real:
            rows[better]["better_than"].append(rows[worse]["model"])
            rows[worse]["worse_than"].append(rows[better]["model"])
    with_best = [(j, p) for (i, j), p in zip(places, p_of["aes"], strict=True) if i == 0]
    apart = {j for (j, _), real in zip(with_best, differences.holm([p for _, p in with_best]), strict=True) if real}
    for j, row in enumerate(rows):
        row["like_best"] = bool(with_best) and j not in apart and rows[0]["aes"] is not None
    return {
        "pairs": len(places),
        **{key: sum(real) for key, real in differ.items()},
        "aes_uncorrected": sum(p <= differences.LEVEL for p in p_of["aes"]),
    }


# -------------------------------------------------------------------------------------------------------- as Markdown


def comparison_table(rows: Sequence[Row], bases: Sequence[str] = ()) -> str:
    """Markdown of one set and temperature. bases: the methods that started from other base models than most."""
    tuned = any(row.get("setting") for row in rows)
    body = []
    for r in rows:
        name = r["model"] + " (u)" * r["unverified"] + " †" * (r["model"] in bases)
        thousand = [number(r[k] / 1000 if k in r else None, ".0f") for k in ("sampled_tokens", "trained_tokens")]
        share = f"{r['front_share']:.0%}" if "front_share" in r else "-"
        body.append([
            (f"**{name}**" if r.get("like_best") else name) + " \\*" * r["pareto"],
            *([r.get("setting") or "-"] if tuned else []),
            with_interval(r, "accuracy", ".1%"), with_interval(r, "tokens", ".1f"), with_interval(r, "aes", "+.2f"),
            f"{len(r['better_than'])} / {len(r['worse_than'])}" if "better_than" in r else "-", share,
            with_interval(r, "adaptivity", "+.1f"), *thousand, number(r.get("seconds"), ".0f"),
            str(len(r.get("seeds", [])) or "-"), f"{r['worst']['accuracy']:.1%} / {r['worst']['tokens']:.1f}",
        ])  # fmt: skip
    head = ["method", *(["setting"] if tuned else []), "accuracy (95 %)", "tokens (95 %)", "AES (95 %)",
            "better / worse than", "on the front", "adaptivity (95 %)", "sampled (k)", "trained (k)", "seconds", "seeds",
            "worst seed"]  # fmt: skip
    return table(head, body)


def comparison_text(
    tokens: int,
    rows: Sequence[Row],
    pairs: Sequence[Row] = (),
    missing: Mapping[str, str] | None = None,
    bases: Sequence[str] = (),
    **_: Any,
) -> str:
    """results.md, from what results.json holds: one table per set and temperature, and how to read them.

    missing: "method, seed" -> why it has no result. bases: the methods that started from other base models than most.
    """
    parts = []
    for place in dict.fromkeys((r["set"], r["temperature"]) for r in rows):
        mine = [r for r in rows if (r["set"], r["temperature"]) == place]
        parts.append(f"### {place[0]}, temperature {place[1]:g}, {tokens:,} sampled tokens each\n")
        parts.append(comparison_table(mine, bases) + "\n")
        parts += [pairs_text(one) for one in pairs if (one["set"], one["temperature"]) == place]
        if mine[0].get("by_level"):
            parts += ["Accuracy % / tokens by level:\n", table(*level_cells(mine)) + "\n"]
    if missing:
        parts.append("**Not in the table:** " + "; ".join(f"{name}: {why}" for name, why in missing.items()) + "\n")
    if bases:
        parts.append("† from other base models than most, made on another machine or commit. Each row is measured against "
                     "its own: equal answers have a higher AES where the bases are longer or worse. Differences, bold and "
                     "the front tell most within one set of bases.\n")  # fmt: skip
    parts.append(NOTES)
    return "\n".join(parts)


def pairs_text(one: Row) -> str:
    """How many pairs are really different."""
    if not one["pairs"]:
        return "No two methods have three seeds in common, so no difference can be tested.\n"
    return (
        f"Of {one['pairs']:,} pairs of methods, {one['aes']:,} differ in AES, {one['accuracy']:,} in accuracy and "
        f"{one['tokens']:,} in tokens (paired by seed and problem; Holm's correction, 5 % for all pairs together). "
        f"Without the correction {one['aes_uncorrected']:,} would differ in AES.\n"
    )


def write_comparison(folder: Path, found: dict[str, Any]) -> list[Path]:
    """results.md and results.json in `folder`."""
    paths = [folder / "results.md", folder / "results.json"]
    found = without_nan(found)
    folder.mkdir(parents=True, exist_ok=True)
    paths[0].write_text(comparison_text(**found), encoding="utf-8")
    paths[1].write_text(json.dumps(found, indent=1), encoding="utf-8")
    return paths
