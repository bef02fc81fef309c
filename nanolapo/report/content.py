"""Turns what was read from run directories into the data of report.html: long lists as columns, tables as text cells."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from nanolapo.report.files import Json
from nanolapo.report.runs import Evaluation, Material, Run, is_finished, known_levels, targets_by_level
from nanolapo.report.tables import Cells, number

TEXTS_PER_BLOCK = 256  # answers in one block of JSON; the page only parses the blocks it shows
DASH = "-"


class Texts:
    """All answers of the page. An answer that occurs several times is stored once."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def number(self, text: str) -> int:
        return self.numbers.setdefault(text, len(self.numbers))

    def blocks(self) -> list[list[str]]:
        found = list(self.numbers)
        return [found[i : i + TEXTS_PER_BLOCK] for i in range(0, len(found), TEXTS_PER_BLOCK)]


class Problems:
    """All problems of the page, each with a number. The same problem is stored once."""

    def __init__(self) -> None:
        self.numbers: dict[tuple[str, str | None, str | None, int | None], int] = {}
        self.by_id: dict[str, int] = {}

    def number(self, problem: str, question: str | None, reference_answer: str | None, level: int | None) -> int:
        found = self.numbers.setdefault((problem, question, reference_answer, level), len(self.numbers))
        self.by_id.setdefault(problem, found)
        return found


def content(material: Material, max_rows: int) -> tuple[Json, list[list[str]]]:
    """Everything on the page except the plots: (data, blocks of texts). In data, a text is given by its number."""
    texts, problems, notes = Texts(), Problems(), list(material.notes)
    rollouts = rollout_columns(material.runs, max_rows, texts, problems, notes)
    samples = sample_columns(material.evaluations, max_rows, texts, problems, notes)
    maps = {run.name: run.length_map for run in material.runs if run.length_map is not None}
    data = {
        "runs": run_cells(material.runs) if material.runs else None,
        "first_last": first_last_cells(material.runs) if material.runs else None,
        "evaluations": [
            {"name": e.name, "facts": evaluation_facts(e), "tables": e.tables} for e in material.evaluations
        ],
        "configs": [[name, text] for name, text in config_texts(material) if text],
        "maps": map_cells(material) if maps else None,
        "targets": {
            name: {problems.by_id[p]: target for p, target in found.entries.items() if p in problems.by_id}
            for name, found in maps.items()
        },
        "problems": [list(problem) for problem in problems.numbers],
        "rollouts": rollouts,
        "samples": samples,
        "notes": notes,
        "texts_per_block": TEXTS_PER_BLOCK,
    }
    return data, texts.blocks()


def config_texts(material: Material) -> list[tuple[str, str]]:
    runs = [(run.name, run.config_text) for run in material.runs]
    return runs + [(e.name, e.config_text) for e in material.evaluations]


def rollout_columns(runs: Sequence[Run], max_rows: int, texts: Texts, problems: Problems, notes: list[str]) -> Json:
    """All logged rollouts, run after run in file order. Beyond max_rows whole steps are left out, evenly."""
    every, kept = 1, [kept_steps(run, 1) for run in runs]
    while max(map(len, kept), default=0) > 1 and count_rows(runs, kept) > max_rows:
        every += 1
        kept = [kept_steps(run, every) for run in runs]
    columns: dict[str, list[Any]] = defaultdict(list)
    parts = []
    for place, run in enumerate(runs):
        names = list(dict.fromkeys(name for row in run.rollouts for name in row["reward"]))
        parts.append(names)
        for row in run.rollouts:
            if row["step"] in kept[place]:
                columns["run"].append(place)
                columns["step"].append(row["step"])
                columns["problem"].append(
                    problems.number(row["problem"], row["question"], row["reference_answer"], row.get("level"))
                )
                columns["text"].append(texts.number(row["text"]))
                columns["length"].append(row["length"])
                columns["budget"].append(row.get("budget"))
                columns["correct"].append(int(row["correct"]))
                columns["finished"].append(int(row["finished"]))
                columns["reward"].append([row["reward"].get(name) for name in names])
    if every > 1:
        notes.append(f"rollouts: one of {every} logged steps is shown (--max-rows {max_rows})")
    return {"runs": [run.name for run in runs], "parts": parts, "columns": columns}


def kept_steps(run: Run, every: int) -> set[int]:
    """The last logged step and every `every`-th one before it."""
    return set(sorted({row["step"] for row in run.rollouts})[::-1][::every])


def count_rows(runs: Sequence[Run], kept: Sequence[set[int]]) -> int:
    return sum(row["step"] in steps for run, steps in zip(runs, kept, strict=True) for row in run.rollouts)


def sample_columns(
    evaluations: Sequence[Evaluation], max_rows: int, texts: Texts, problems: Problems, notes: list[str]
) -> list[Json]:
    """The samples of every table row, in columns. Beyond max_rows the first few samples of each problem."""
    everything = [answer for e in evaluations for s in e.samples for answer in s.answers]
    most = max((answer.index + 1 for answer in everything), default=0)
    kept = max(1, most * max_rows // max(len(everything), max_rows, 1))
    found = []
    for e in evaluations:
        for s in e.samples:
            columns: dict[str, list[Any]] = defaultdict(list)
            for a in s.answers:
                if a.index < kept:
                    stated = e.problems.get(a.problem)
                    if stated:
                        known = problems.number(a.problem, stated["question"], stated["answer"], stated.get("level"))
                    else:  # an evaluation of an earlier version: the question may stand in a rollout
                        known = problems.by_id.get(a.problem, -1)
                        known = problems.number(a.problem, None, None, a.level) if known < 0 else known
                    columns["problem"].append(known)
                    columns["index"].append(a.index)
                    columns["text"].append(texts.number(a.text))
                    columns["length"].append(a.length)
                    columns["budget"].append(a.budget)
                    columns["correct"].append(int(a.correct))
                    columns["finished"].append(int(a.finished))
            title = f"{e.name}: {s.source}, temperature {s.temperature:g}"
            found.append({"title": title, "model": s.model, "columns": columns})
    if kept < most:
        notes.append(f"samples: {kept} of {most} of a problem are shown side by side (--max-rows {max_rows})")
    return found


# ---- small tables ----


def fact(config: Json, key: str) -> str:
    """A config value as text, a dash where the file or the key is missing."""
    section, _, name = key.partition(".")
    value = config.get(section, {}).get(name)
    return DASH if value in (None, "") else f"{value:g}" if isinstance(value, float) else str(value)


def sources(config: Json) -> str:
    found = config.get("data", {}).get("sources")
    found = [s for s in found if isinstance(s, dict)] if isinstance(found, list) else []
    return ", ".join(f"{s.get('name')}{' (' + str(s['count']) + ')' if s.get('count') else ''}" for s in found) or DASH


def run_cells(runs: Sequence[Run]) -> Cells:
    """What was run: one line per run, from the config and the last line of its metrics."""
    head = ["run", "method", "model", "data", "rollouts a step", "limit", "learning rate", "steps", "tokens sampled",
            "minutes", "state", "seed", "commit"]  # fmt: skip
    body = []
    for run in runs:
        last = run.metrics[-1] if run.metrics else {}
        seconds = sum(v for line in run.metrics for k, v in line.items() if k.startswith("seconds/") and v is not None)
        tokens = last.get("sampled_tokens")
        body.append([
            run.name, fact(run.config, "method.name"), fact(run.config, "model.path"), sources(run.config),
            f"{fact(run.config, 'rollout.prompts_per_step')} x {fact(run.config, 'rollout.group_size')}",
            fact(run.config, "rollout.max_new_tokens"), fact(run.config, "train.learning_rate"),
            f"{last.get('step', -1) + 1} of {fact(run.config, 'train.steps')}",
            f"{tokens:,}" if isinstance(tokens, int) else DASH, f"{seconds / 60:.1f}",
            "finished" if is_finished(run) else "in progress or stopped", fact(run.config, "run.seed"),
            run.commit or DASH,
        ])  # fmt: skip
    return head, body


def evaluation_facts(e: Evaluation) -> str:
    base = e.results.get("base") if e.results else None
    told = [f"AES is measured against {base} (weights of O1-Pruner)"] if base else []
    if e.config:
        told.append(f"data {sources(e.config)}")
        told.append(
            f"at most {fact(e.config, 'evaluate.max_new_tokens')} tokens, top-p {fact(e.config, 'evaluate.top_p')}"
        )
        told.append(f"seed {fact(e.config, 'run.seed')}")
    return "; ".join([*told, f"commit {e.commit}" if e.commit else "commit not recorded"])


def first_last_cells(runs: Sequence[Run]) -> Cells:
    """The first and the last logged step of every run."""
    forms = {"reward": ".3f", "accuracy": ".1%", "length": ".1f", "truncated": ".1%", "entropy": ".4f",
             "mismatch": ".1e", "no_signal": ".0%", "map/target_mean": ".1f"}  # fmt: skip
    shown = {name: form for name, form in forms.items() if any(name in line for run in runs for line in run.metrics)}
    body = []
    for run in runs:
        ends = run.metrics[:1] + run.metrics[-1:]
        cells = [[number(end.get(name), form) for end in ends] for name, form in shown.items()]
        body.append(
            [run.name, *(f"{c[0]} \N{RIGHTWARDS ARROW} {c[1]}" if c and c != [DASH, DASH] else DASH for c in cells)]
        )
    return ["run", *shown], body


def map_cells(material: Material) -> Cells:
    """What stands in every length_map.json: solved problems, and by level the median M(q) (least to most)."""
    levels = known_levels(material)
    maps = {run.name: targets_by_level(run.length_map, levels) for run in material.runs if run.length_map is not None}
    heads = sorted({head for found in maps.values() for head in found})
    body = []
    for name, found in maps.items():
        cells = [spread([t for t in found.get(head, []) if t is not None]) for head in heads]
        targets = [target for head in heads for target in found.get(head, [])]
        body.append([name, f"{sum(t is not None for t in targets)} of {len(targets)}", *cells])
    return ["run", "solved", *(head[-1] for head in heads)], body


def spread(values: Sequence[float]) -> str:
    """Median and range, or the one value there is.

    >>> spread([7, 9, 14]), spread([7, 7]), spread([])
    ('9 (7 to 14)', '7', '-')
    """
    if not values:
        return DASH
    least, most = min(values), max(values)
    return f"{np.median(values):.0f}" + (f" ({least:.0f} to {most:.0f})" if least < most else "")
