"""Runs an evaluation: every model answers every problem n times at every temperature. It resumes where it was stopped.

The first pass states no length. The passes that passes.py lists, which state one, come after it.
"""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nanolapo.config import Config, UserError
from nanolapo.data.load import Data
from nanolapo.data.problems import Problem
from nanolapo.data.prompts import NO_GUIDANCE, Guidance
from nanolapo.evaluation.passes import (
    Model,
    Pass,
    decoding_at,
    load_sets,
    parse_models,
    passes,
    preflight,
    wanted_samples,
)
from nanolapo.evaluation.scores import (
    Answer,
    add_aes,
    per_problem,
    read_answers,
    sample_file,
    score_sets,
    without_nan,
)
from nanolapo.fingerprint import digest
from nanolapo.grader import Grader, check_errors
from nanolapo.methods.tools import stated
from nanolapo.metrics import append, write_config
from nanolapo.provenance import model_identity
from nanolapo.ranks import Ranks
from nanolapo.rollouts import row_seed
from nanolapo.samplers.choose import make_sampler
from nanolapo.samplers.sampler import Decoding, Request, Sampler
from nanolapo.sampling import sample_beside_grading
from nanolapo.session import set_up_process

TOLERATED = 2  # answers of a chunk that could not be graded, however few answers it has


def evaluate(config: Config) -> dict[str, Any]:
    """Sample what is missing, then compute every number from the sample files. Returns what results.json holds."""
    ranks, models = set_up_process(config), parse_models(config)
    rows: list[dict[str, Any]] = []
    with Grader() as grader:
        loaded = load_sets(config, models, grader, ranks)  # of all models: a missing folder must not show hours later
        checked = ranks.from_main(lambda: preflight(config, models, loaded))
        if ranks.is_main:
            for model, found in zip(models, checked, strict=True):
                print(*[f"{model.name}: {line}" for line in found.lines()], sep="\n", flush=True)
            write_setup(config, loaded[0].problems)
        for model, data in zip(models, loaded, strict=True):
            runs = Benchmark(config, model, data, grader, ranks)
            if ranks.is_main:
                print(*data.report, f"evaluating {model.name} on {len(data.problems)} problems", sep="\n", flush=True)
            asked = passes(config, model, model is models[-1])
            origin = {"run": model.run, "step": model.step} if model.run else {}
            for temperature in config.evaluate.temperatures:
                unguided = runs.answers(temperature, asked[0], {})
                for one in asked:
                    budgets = ranks.from_main(partial(stated_lengths, one, unguided))
                    answers = runs.answers(temperature, one, budgets) if one.name else unguided
                    for row in score_sets(model.name, temperature, one.name, answers, config):
                        rows.append(row | origin | {"answers": runs.files.get(row["set"])})
            runs.close()
    add_aes(rows, models[0].name)
    return {"base": models[0].name, "rows": rows}


class Benchmark:
    """One model on all problem sets. It starts a sampler only when samples are missing."""

    def __init__(self, config: Config, model: Model, data: Data, grader: Grader, ranks: Ranks) -> None:
        self.config = replace(config, model=replace(config.model, path=model.path), prompt=model.prompt)
        self.model, self.data, self.grader, self.ranks = model, data, grader, ranks
        self.folder = Path(config.evaluate.samples_dir or config.run_dir / "samples")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.identity = ranks.from_main(lambda: identity_of(model.path, data.tokenizer.eos_token_id))
        self.sampler: Sampler | None = None
        self.files: dict[str, str] = {}  # set -> how the names of its sample files begin, of the last pass

    def close(self) -> None:
        """Free the engine, because the next model's engine needs the memory."""
        if self.sampler is not None:
            self.sampler.close()
            self.sampler = None

    def answers(self, temperature: float, asked: Pass, budgets: dict[str, float]) -> list[Answer]:
        """All answers of one pass at one temperature. budgets: problem id -> the stated length ({} states none)."""
        e = self.config.evaluate
        decoding = decoding_at(self.config, temperature)
        prompts = self.ranks.from_main(lambda: self.prompts(asked, budgets))
        settings = {"model": self.identity, "decoding": asdict(decoding),
                    "max_new_tokens": e.max_new_tokens, "seed": self.config.run.seed,
                    "dtype": self.config.rollout.dtype or self.config.model.dtype}  # fmt: skip
        files = {}
        for source in dict.fromkeys(p.source for p in self.data.problems):
            problems = [p for p in self.data.problems if p.source == source]
            of_set = {  # and of no other set, because evaluations with other sets may share this one
                "budgets": {p.id: budgets[p.id] for p in problems if p.id in budgets},
                "golds": digest([f"{p.id} {p.answer}" for p in problems]),
                # What was rendered, not how: a template may write today's date, or change together with the tokenizer.
                "prompts": digest([str(prompts[p.id][1]) for p in problems]),
            }
            files[source] = sample_file(self.folder, self.model.name, source, temperature, settings | of_set)
        self.files = {source: file.stem for source, file in files.items()}
        wanted = wanted_samples(self.config, self.data)
        missing = self.ranks.from_main(lambda: self.missing(wanted, files))
        engine, engines = self.ranks.engine(self.config.rollout.tensor_parallel)
        mine = missing[engine::engines]
        if missing:
            self.sample(mine, decoding, prompts, files)
        self.ranks.wait()
        order = {p.id: i for i, p in enumerate(self.data.problems)}
        found = [a for file in files.values() for a in self.read(file) if a.problem in order]
        # The level is that of the data: samples stay where a set gets other levels.
        levels = [p.level for p in self.data.problems]
        unique = {(order[a.problem], a.index): replace(a, level=levels[order[a.problem]]) for a in found}
        if lost := set(wanted) - unique.keys():
            raise UserError(
                f"{self.folder}: {len(lost)} samples of {self.model.name} are not there although they were written; every "
                "rank must see this folder, so put it on a disk that all nodes share"
            )
        return [unique[place] for place in wanted]

    def prompts(self, asked: Pass, budgets: dict[str, float]) -> dict[str, tuple[Guidance, list[int]]]:
        """Problem id -> its stated length and its prompt. Rendered once: a template may read a clock."""
        guidances = {p.id: guidance_for(p, asked, budgets, self.config) for p in self.data.problems}
        return {
            p.id: (guidances[p.id], self.data.prompter.ids(p.question, guidances[p.id])) for p in self.data.problems
        }

    def missing(self, wanted: Sequence[tuple[int, int]], files: dict[str, Path]) -> list[tuple[int, int]]:
        """Those of the wanted samples that are not on disk yet."""
        done = {(a.problem, a.index) for file in files.values() for a in self.read(file)}
        return [(i, k) for i, k in wanted if (self.data.problems[i].id, k) not in done]

    def read(self, file: Path) -> list[Answer]:
        """The samples of one set, from the files of all ranks."""
        parts = sorted(file.parent.glob(f"{file.stem}*.jsonl"))
        return [answer for part in parts for answer in read_answers(part)]

    def sample(
        self,
        missing: Sequence[tuple[int, int]],
        decoding: Decoding,
        prompts: dict[str, tuple[Guidance, list[int]]],
        files: dict[str, Path],
    ) -> None:
        """Sample in chunks and append each chunk to disk at once, so that an interruption loses only one chunk."""
        e, r = self.config.evaluate, self.config.rollout
        if self.sampler is None:
            self.sampler = make_sampler(self.config, self.model.path, e.max_new_tokens, self.ranks, trains=False)
        chunk = 4 * r.max_rows
        hidden = None if self.ranks.is_main else True  # None: shown on a terminal
        counts: dict[str, itertools.count[int]] = defaultdict(itertools.count)
        within = [next(counts[p.source]) for p in self.data.problems]  # place in its set, which evaluations may share
        with tqdm(total=len(missing), unit="answer", desc=self.model.name, leave=False, disable=hidden) as bar:
            for first in range(0, len(missing), chunk):
                part = missing[first : first + chunk]
                problems, errors_before = [self.data.problems[i] for i, _ in part], self.grader.errors
                requests = [
                    Request(prompts[p.id][1], row_seed(self.config.run.seed, 0, within[i], k), e.max_new_tokens, p)
                    for p, (i, k) in zip(problems, part, strict=True)
                ]
                samples, texts, verdicts = sample_beside_grading(
                    self.sampler, self.data, self.grader, requests, decoding
                )
                rights = [verdict.result() for verdict in verdicts]
                self.check_verdicts(self.grader.errors - errors_before, len(part))
                by_file = defaultdict(list)
                for (_, k), p, s, text, right in zip(part, problems, samples, texts, rights, strict=True):
                    correct, budget = right and s.finished, prompts[p.id][0].budget
                    answer = Answer(p.id, p.source, p.level, k, len(s.ids), correct, s.finished, text, budget)
                    file = files[p.source]
                    by_file[file.with_stem(f"{file.stem}-rank{self.ranks.index}")].append(asdict(answer))
                if self.ranks.index % r.tensor_parallel == 0:  # the ranks of an engine hold the same
                    for file, lines in by_file.items():
                        append(file, lines)
                bar.update(len(part))

    def check_verdicts(self, failed: int, answers: int) -> None:
        """Raise RunStopped if too many answers of a chunk could not be graded. It must not be written: on disk each of them
        would be a wrong answer for good. A few are let through: where the answer is the cause, it would always stop."""
        check_errors(self.grader.errors, self.grader.total)
        if failed > TOLERATED:
            check_errors(failed, answers, least=0)
        if failed:
            tqdm.write(
                f"{self.model.name}: {failed} of {answers} answers could not be graded (time-outs or crashes) and count "
                "as wrong"
            )


def identity_of(path: str, end_token: int | None) -> str:
    """What the samples of a model belong to: its hub name, or the weights, configs and end token of its folder. To mend an
    end token changes where answers end, and the weights stay as they are."""
    if not Path(path).is_dir():
        return model_identity(path)
    files = [Path(path) / name for name in ("config.json", "generation_config.json")]
    configs = [file.read_text(encoding="utf-8") if file.is_file() else "" for file in files]
    return digest([model_identity(path), str(end_token), *configs])


def stated_lengths(asked: Pass, unguided: Sequence[Answer]) -> dict[str, float]:
    """Problem id -> tokens: the same number for all, or a multiple of the mean length that this model chose by itself."""
    if asked.tokens:
        return {answer.problem: float(asked.tokens) for answer in unguided}
    return per_problem(unguided, lambda answer: asked.factor * answer.length)


def guidance_for(problem: Problem, asked: Pass, budgets: dict[str, float], config: Config) -> Guidance:
    """The stated length, rounded to the same multiples as in training."""
    if problem.id not in budgets:
        return NO_GUIDANCE
    return asked.guidance(stated(config, budgets[problem.id]))


def write_setup(config: Config, problems: Sequence[Problem]) -> None:
    """Write config.yaml, and problems.jsonl with the question and reference answer of every problem id in the samples."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    write_config(config)
    lines = [json.dumps(asdict(p), ensure_ascii=False) + "\n" for p in problems]
    (config.run_dir / "problems.jsonl").write_text("".join(lines), encoding="utf-8")


def write_results(config: Config, results: dict[str, Any]) -> Path:
    config.run_dir.mkdir(parents=True, exist_ok=True)  # samples may be kept elsewhere
    path = config.run_dir / "results.json"
    path.write_text(json.dumps(without_nan(results), indent=1, allow_nan=False), encoding="utf-8")
    return path
