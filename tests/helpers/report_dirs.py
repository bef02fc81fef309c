"""Small run and evaluation directories for the tests of report.html, with numbers from a seed and texts that bite."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from tiny import make_config

from nanolapo.config import EvaluateConfig
from nanolapo.evaluation.evaluate import write_results
from nanolapo.evaluation.scores import Answer, add_aes, sample_file, score_sets
from nanolapo.metrics import append
from nanolapo.report.content import content
from nanolapo.report.html import page
from nanolapo.report.runs import read_all

NASTY = (
    "<script>alert(1)</script>", "</script><script>alert(2)</script>", "<!-- <script>", "-->",
    "<img src=x onerror=alert(3)>", "]]>", "a\u2028b\u2029c", "\"'`${alert(4)}\\", "&lt;b&gt; &amp;", "{{data}} {{texts}}",
    "\U0001f600 \u4f60\u597d", "lone \ud800 and \udc00", "tab\tnul\x00bell\x07", " leading\n\n trailing \n", "\u202egnirts",
)  # fmt: skip


def rollout(step: int = 0, problem: str = "p", **more: object) -> dict:
    return {"step": step, "problem": problem, "level": 1, "question": f"question {problem}", "reference_answer": "7",
            "text": "text", "correct": True, "finished": True, "length": 10, "budget": None, "reward": {"correct": 1.0},
            **more}  # fmt: skip


def write_lines(path: Path, rows: list[dict]) -> None:
    """As metrics.append writes them, U+2028 and all; half a surrogate pair has no UTF-8, it needs an escape."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    whole = [line.encode("utf-8", "ignore").decode() == line for line in lines]
    lines = [line if ok else json.dumps(row) for line, row, ok in zip(lines, rows, whole, strict=True)]
    path.write_bytes("".join(f"{line}\n" for line in lines).encode())


def write_run(folder: Path, rollouts: list[dict], metrics: list[dict] | None = None) -> Path:
    """A run as train_stage*.py leaves it, by hand."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("# torch: 2\n# git: abc1234\nrun:\n  seed: 3\ntrain:\n  steps: 2\n")
    write_lines(folder / "rollouts.jsonl", rollouts)
    plain = [{"step": 0, "reward": 0.5, "accuracy": 0.25}, {"step": 1, "reward": 0.75, "accuracy": None}]
    write_lines(folder / "metrics.jsonl", metrics or plain)
    return folder


def two_stages(folder: Path) -> list[Path]:
    """Two runs of 2 steps, 2 groups of 3, the last one logged in part; lengths, verdicts and levels from a seed."""
    rng = np.random.default_rng(0)
    made = []
    for name in ("stage1", "stage2"):
        rows = [
            rollout(step, f"q{step}{group}", text=f"{name.title()} {step} {group} {i}", length=int(rng.integers(5, 50)),
                    level=group, correct=bool(rng.random() < 0.7), finished=bool(rng.random() < 0.8),
                    budget=10.0 * (group + 1) if name == "stage2" else None,
                    reward={"correct": float(rng.random()), "length": float(rng.random())})
            for step in range(2) for group in range(2) for i in range(3)
        ][:-1]  # fmt: skip
        metrics = [{"step": s, "reward": rng.random(), "length": 1.0, "length_p90": 2.0, "truncated": 0.0, "mismatch": 1e-6,
                    "accuracy": rng.random(), "map/target_mean": 20.0 - s} for s in range(2)]  # fmt: skip
        made.append(write_run(folder / name, rows, metrics))
        entries = {"q00": 12.0, "q01": None, "q10": 9.5, "x": 40.0, "y": 41.0, "z": 90.0}
        (folder / name / "length_map.json").write_text(json.dumps({"statistic": "median", "entries": entries}))
    return made


def answers(shift: int, right: str, budget: float | None = None) -> list[Answer]:
    """Two samples for each of three problems; `right` has a digit for each sample."""
    return [
        Answer(f"s:{i}", "s", i, k, 10 + shift + i + 2 * k, right[2 * i + k] == "1", (i, k) != (2, 1),
               f"{shift} {i} {k}", budget)
        for i in range(3) for k in range(2)
    ]  # fmt: skip


def write_evaluation(folder: Path) -> dict[str, list[Answer]]:
    """An evaluation of two models, the second also told a length; file names and results as evaluate.py makes them."""
    made = {
        "base": answers(20, "111101"),
        "org/new": answers(0, "110111"),
        "org/new, told 2x own length": answers(9, "100111", 30),
    }
    config = replace(
        make_config(run={"dir": str(folder.parent), "name": folder.name}), evaluate=EvaluateConfig(bootstrap=20)
    )
    rows = []
    (folder / "samples").mkdir(parents=True)
    for label, found in made.items():
        model, _, told = label.partition(", told ")
        stem = sample_file(folder / "samples", model, "s", 0.6, {"told": told}).stem
        rows += [row | {"answers": stem} for row in score_sets(model, 0.6, told, found, config)]
        for rank in range(2):
            append(folder / f"samples/{stem}-rank{rank}.jsonl", [asdict(a) for a in found[rank::2]])
    add_aes(rows, "base")
    write_results(config, {"base": "base", "rows": rows})
    write_lines(folder / "problems.jsonl", [{"id": f"s:{i}", "question": f"how much is {i}?", "answer": str(i), "level": i,
                                             "source": "s"} for i in range(3)])  # fmt: skip
    return made


def html(*folders: Path, max_rows: int = 20_000) -> str:
    material = read_all(folders)
    return page(material, *content(material, max_rows))


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
