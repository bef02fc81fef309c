"""The scores of an evaluation: pass@1 over n samples, tokens, and the other numbers of the paper, from samples on disk.

Each rank writes one JSONL file of samples for every model, set, temperature and stated lengths. An interrupted evaluation
reads them and samples only what is missing. Tables and plots are made from these files alone, so every number can be traced
to answers.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from nanolapo.config import Config

# Paper, Fig. 4: under LAPO the first two groups become rarer, the last two do not. The paper's lists of words are not at
# hand, so these regular expressions are ours. "Let me check" does not count as context, or that group would fall as well.
KEYWORDS = {
    "self-correction": ("wait", "check", "verify", "mistake", "recheck"),
    "alternatives": ("alternatively", "another way", "or maybe"),
    "context": ("given", "we have", "we need", "let(?! me)"),
    "conclusion": ("therefore", "thus", "so the answer", "final answer"),
}


@dataclass(frozen=True)
class Answer:
    """One graded sample. `length` is the number of sampled tokens, the end token included."""

    problem: str
    source: str
    level: int | None
    index: int  # which of the n samples of this problem
    length: int
    correct: bool
    finished: bool
    text: str
    budget: float | None = None  # length asked for in the prompt, if any


def correctness(answer: Answer) -> float:
    return float(answer.correct)


def length(answer: Answer) -> float:
    return float(answer.length)


def read_answers(path: Path) -> list[Answer]:
    """All whole lines of a sample file. A line that a kill cut short, perhaps within a character, is left out."""
    if not path.exists():
        return []
    answers = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            answers.append(Answer(**json.loads(line)))
        except ValueError:
            continue
    return answers


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased pass@k for one problem: 1 - C(n - c, k) / C(n, k).

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    if k > num_samples:
        raise ValueError(f"pass@{k} needs at least {k} samples, there are {num_samples}")
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def pass_at_powers(answers: Sequence[Answer]) -> dict[str, float]:
    """pass@1, @2, @4, ... up to the samples that every problem has: mean over problems."""
    counts = [(len(verdicts), round(sum(verdicts))) for verdicts in group_by_problem(answers, correctness).values()]
    most = min(n for n, _ in counts)
    powers = [2**i for i in range(most.bit_length())]
    return {str(k): float(np.mean([pass_at_k(n, c, k) for n, c in counts])) for k in powers}


def group_by_problem(answers: Sequence[Answer], value: Callable[[Answer], float]) -> dict[str, list[float]]:
    """Problem id -> value(answer) for each of its answers."""
    groups: dict[str, list[float]] = defaultdict(list)
    for answer in answers:
        groups[answer.problem].append(value(answer))
    return groups


def per_problem(answers: Sequence[Answer], value: Callable[[Answer], float]) -> dict[str, float]:
    """Mean of value(answer) for each problem."""
    return {problem: float(np.mean(values)) for problem, values in group_by_problem(answers, value).items()}


def bootstrap_interval(values: Sequence[float], resamples: int) -> tuple[float, float]:
    """95 % interval of the mean, by resampling problems, because the samples of one problem are not independent."""
    return interval_of_average([values], resamples)


def interval_of_average(sets: Sequence[Sequence[float]], resamples: int) -> tuple[float, float]:
    """95 % interval of the unweighted average over problem sets. Problems are resampled within their set."""
    rng = np.random.default_rng(0)
    averages_R = np.zeros(resamples)
    for values in sets:
        array = np.asarray(values, dtype=np.float64)
        averages_R += [array[rng.integers(0, len(array), len(array))].mean() for _ in range(resamples)]
    low, high = np.percentile(averages_R / len(sets), [2.5, 97.5])
    return float(low), float(high)


def aes(accuracy: float, tokens: float, base_accuracy: float, base_tokens: float) -> float:
    """Accuracy-efficiency score of O1-Pruner (arXiv 2501.12570), from relative changes against a base model.

    >>> round(aes(76.8, 554, 73.4, 932), 3)
    0.545
    >>> round(aes(54.54, 3407, 52.37, 5118), 3)
    0.459
    """
    if not base_accuracy or not base_tokens:
        return float("nan")
    saved = (base_tokens - tokens) / base_tokens
    gained = (accuracy - base_accuracy) / base_accuracy
    return saved + (3 * gained if gained >= 0 else 5 * gained)


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rho. Ties get their mean rank. The result is nan where one side is constant.

    >>> rank_correlation([1, 2, 3], [10, 20, 15])
    0.5
    """

    def ranks(values: Sequence[float]) -> np.ndarray:
        array = np.asarray(values, dtype=np.float64)
        return np.array([(array < v).sum() + ((array == v).sum() - 1) / 2 for v in array])

    a, b = ranks(x) - np.mean(ranks(x)), ranks(y) - np.mean(ranks(y))
    scale = math.sqrt(float((a * a).sum() * (b * b).sum()))
    return float((a * b).sum() / scale) if scale else float("nan")


def keyword_counts(text: str) -> dict[str, int]:
    """Occurrences of each keyword group in one answer, whole words, any case.

    >>> counts = keyword_counts("Wait, let me check. Let x = 2. Alternatively: wait.")
    >>> counts["self-correction"], counts["context"]
    (3, 1)
    """
    lowered = text.lower()
    return {group: sum(len(re.findall(rf"\b{word}\b", lowered)) for word in words) for group, words in KEYWORDS.items()}


def follows_need(answers: Sequence[Answer], resamples: int) -> dict[str, Any]:
    """Does the model think longer where more is needed? Every problem counts once, with its mean length.

    `adaptivity`: mean tokens of the problems above the lowest level minus mean tokens of those at the lowest level.
    `need_correlation`: rank correlation of level and length. Both are None where there are fewer than two levels.
    """
    levels = {a.problem: a.level for a in answers if a.level is not None}
    if len(set(levels.values())) < 2:
        return dict.fromkeys(("adaptivity", "adaptivity_interval", "need_correlation"))
    tokens, lowest = per_problem(answers, length), min(levels.values())
    above = [tokens[problem] for problem, level in levels.items() if level > lowest]
    minus_lowest = [-tokens[problem] for problem, level in levels.items() if level == lowest]
    low, high = interval_of_average([above, minus_lowest], resamples)  # half of the difference
    return {
        "adaptivity": float(np.mean(above) + np.mean(minus_lowest)),
        "adaptivity_interval": (2 * low, 2 * high),
        "need_correlation": rank_correlation(list(levels.values()), [tokens[problem] for problem in levels]),
    }


def summarize(answers: Sequence[Answer], resamples: int) -> dict[str, Any]:
    """Every number of one (model, set, temperature)."""
    accuracy = list(per_problem(answers, correctness).values())
    tokens = list(per_problem(answers, length).values())
    right = [a.length for a in answers if a.correct]
    counts = [keyword_counts(a.text) for a in answers]
    levels = sorted({a.level for a in answers if a.level is not None})
    by_level = {
        str(level): {
            "accuracy": float(np.mean([a.correct for a in answers if a.level == level])),
            "tokens": float(np.mean([a.length for a in answers if a.level == level])),
        }
        for level in levels
    }
    spreads = [float(np.std(found)) for found in group_by_problem(answers, length).values()]
    return {
        "problems": len(accuracy),
        "samples": len(answers),
        "accuracy": float(np.mean(accuracy)),
        "accuracy_interval": bootstrap_interval(accuracy, resamples),
        "pass_at_k": pass_at_powers(answers),
        "tokens": float(np.mean(tokens)),
        "tokens_interval": bootstrap_interval(tokens, resamples),
        "truncated": float(np.mean([not a.finished for a in answers])),
        "tokens_correct": float(np.mean(right)) if right else None,
        "by_level": by_level,
        **follows_need(answers, resamples),
        "length_spread": float(np.mean(spreads)) if len(answers) > len(spreads) else None,
        "keywords": {group: float(np.mean([c[group] for c in counts])) for group in KEYWORDS},
    }


def score_sets(
    model: str, temperature: float, guidance: str, answers: Sequence[Answer], config: Config
) -> list[dict[str, Any]]:
    """One row per problem set, and, as in the paper, their unweighted average where there are several."""
    by_source = defaultdict(list)
    for answer in answers:
        by_source[answer.source].append(answer)
    resamples = config.evaluate.bootstrap
    rows: list[dict[str, Any]] = [
        {"model": model, "set": source, "temperature": temperature, "guidance": guidance} | summarize(found, resamples)
        for source, found in by_source.items()
    ]
    if len(rows) > 1:
        average: dict[str, Any] = {key: sum(row[key] for row in rows) for key in ("problems", "samples")}
        average |= {key: float(np.mean([row[key] for row in rows])) for key in ("accuracy", "tokens", "truncated")}
        for key, value in (("accuracy", correctness), ("tokens", length)):
            sets = [list(per_problem(found, value).values()) for found in by_source.values()]
            average[f"{key}_interval"] = interval_of_average(sets, resamples)
        rows.append({"model": model, "set": "average", "temperature": temperature, "guidance": guidance} | average)
    return rows


def add_aes(rows: list[dict[str, Any]], base: str) -> None:
    """Fill in each row's AES against the unguided base at the same set and temperature."""
    bases = {(r["set"], r["temperature"]): r for r in rows if r["model"] == base and not r["guidance"]}
    for row in rows:
        reference = bases[row["set"], row["temperature"]]
        row["aes"] = aes(row["accuracy"], row["tokens"], reference["accuracy"], reference["tokens"])


def without_nan(value: Any) -> Any:
    """The same value with None in place of NaN, which JSON lacks, such as an AES against a base that is never right."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def sample_file(folder: Path, model: str, source: str, temperature: float, settings: dict[str, Any]) -> Path:
    """The file of one model, set, temperature and stated lengths. Its name ends in a hash of the settings."""
    model, source = (re.sub(r"[^\w .=+-]", "_", name) for name in (model, source))  # org/name is no folder here
    digest = sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
    return folder / f"{model}--{source}--T{temperature:g}--{digest}.jsonl"
