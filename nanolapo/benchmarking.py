"""Runs an evaluation: any number of models x problem sets x temperatures, each sampled n times, resumable.

Without any length instruction first; then, where evaluate.guidance_factors is set, the last model is also told to use
that multiple of the mean length it needed by itself, problem by problem, to see whether it follows.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nanolapo.config import Config, UserError
from nanolapo.config_file import to_yaml
from nanolapo.evaluation import Answer, aes, per_problem, read_answers, sample_file, summarize
from nanolapo.grader import Grader
from nanolapo.metrics import append
from nanolapo.problems import Problem
from nanolapo.prompts import NO_GUIDANCE, Guidance, exact_guidance
from nanolapo.ranks import Ranks
from nanolapo.rollouts import Decoding, Request, row_seed
from nanolapo.session import Data, Sampler, load_data, make_sampler, set_up_process


@dataclass(frozen=True)
class Model:
    name: str
    path: str


def parse_models(config: Config) -> list[Model]:
    """Split every "name=path" of evaluate.models, and refuse settings that would sample nothing."""
    e = config.evaluate
    for key, good in {
        "temperatures": bool(e.temperatures) and min(e.temperatures) >= 0,
        "samples": e.samples >= 1,
        "max_new_tokens": e.max_new_tokens >= 1,
        "bootstrap": e.bootstrap >= 1,
        "top_p": 0 < e.top_p <= 1,
    }.items():
        if not good:
            raise UserError(
                f"evaluate.{key}={getattr(e, key)!r} cannot be used; see EvaluateConfig in nanolapo/config.py"
            )
    models = [Model(name, path) for name, _, path in (entry.partition("=") for entry in config.evaluate.models)]
    if not models or not all(m.name and m.path for m in models):
        raise UserError("evaluate.models: list at least one model as name=folder or name=hub/name")
    if len({m.name for m in models}) < len(models):
        raise UserError("evaluate.models: two models have the same name")
    return models


def evaluate(config: Config) -> dict[str, Any]:
    """Sample what is missing, then compute every number from the sample files. Returns what results.json holds."""
    ranks, models = set_up_process(config), parse_models(config)
    rows: list[dict[str, Any]] = []
    with Grader() as grader:
        loaded = [(m, load_set(config, m, grader)) for m in models]  # a missing folder must not show hours later
        for model, data in loaded:
            runs = Benchmark(config, model, data, grader, ranks)
            if ranks.is_main:
                print(*data.report, f"evaluating {model.name} on {len(data.problems)} problems", sep="\n", flush=True)
            for temperature in config.evaluate.temperatures:
                answers = runs.answers(temperature, {})
                rows += score_sets(model.name, temperature, "", answers, config)
                if model is models[-1]:
                    for factor in config.evaluate.guidance_factors:
                        wanted = per_problem(answers, lambda a, f=factor: f * a.length)  # type: ignore[misc]
                        guided = runs.answers(temperature, wanted)
                        rows += score_sets(model.name, temperature, f"{factor:g}x own length", guided, config)
            runs.close()
    add_aes(rows, models[0].name)
    return {"base": models[0].name, "rows": rows}


def load_set(config: Config, model: Model, grader: Grader) -> Data:
    """The problems as this model's tokenizer reads them."""
    return load_data(replace(config, model=replace(config.model, path=model.path)), grader)


def describe(config: Config) -> None:
    """--dry-run: check every model's tokenizer and all data; print the config, how much to sample, and one prompt."""
    models, e = parse_models(config), config.evaluate
    with Grader() as grader:
        loaded = [load_set(config, model, grader) for model in models]
    print(to_yaml(config))
    most = 0
    for model, data in zip(models, loaded, strict=True):
        passes = len(e.temperatures) * (1 + (len(e.guidance_factors) if model is models[-1] else 0))
        answers = passes * len(wanted_samples(config, data))
        most += answers * e.max_new_tokens
        print("\n".join([*data.report, f"{model.name}: {len(data.problems)} problems, {answers:,} answers"]))
    print(f"at most {most:,} sampled tokens (upper bound: every answer at the limit)")
    print(f"one prompt, as the model sees it:\n---\n{loaded[0].prompter.render(loaded[0].problems[0].question)}\n---")


def wanted_samples(config: Config, data: Data) -> list[tuple[int, int]]:
    """(problem, which of its samples) of a whole pass over the problem sets."""
    per_set = {source.name: source.samples or config.evaluate.samples for source in config.data.sources}
    return [(i, k) for i, p in enumerate(data.problems) for k in range(per_set[p.source])]


class Benchmark:
    """One model on all problem sets; the sampler is only started when samples are missing."""

    def __init__(self, config: Config, model: Model, data: Data, grader: Grader, ranks: Ranks) -> None:
        self.config, self.model, self.data, self.grader, self.ranks = config, model, data, grader, ranks
        self.folder = config.run_dir / "samples"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.identity = model_identity(model.path)
        self.golds = sha256("\n".join(f"{p.id} {p.answer}" for p in data.problems).encode()).hexdigest()[:16]
        self.sampler: Sampler | None = None

    def close(self) -> None:
        """Free the engine: the next model's needs the memory."""
        if self.sampler is not None:
            self.sampler.close()
            self.sampler = None

    def answers(self, temperature: float, budgets: dict[str, float]) -> list[Answer]:
        """All answers at one temperature; `budgets` maps problem ids to a stated length ({}: nothing is stated)."""
        e = self.config.evaluate
        decoding = Decoding(temperature, e.top_p if temperature < 1 else 1.0)
        settings = {"model": self.identity, "prompt": asdict(self.config.prompt), "decoding": asdict(decoding),
                    "max_new_tokens": e.max_new_tokens, "seed": self.config.run.seed, "budgets": budgets,
                    "dtype": self.config.rollout.dtype or self.config.model.dtype, "golds": self.golds}  # fmt: skip
        files = {
            source: sample_file(self.folder, self.model.name, source, temperature, settings)
            for source in dict.fromkeys(p.source for p in self.data.problems)
        }
        done = {(a.problem, a.index) for file in files.values() for a in self.read(file)}
        wanted = wanted_samples(self.config, self.data)
        missing = [(i, k) for i, k in wanted if (self.data.problems[i].id, k) not in done]
        engine, engines = self.ranks.engine(self.config.rollout.tensor_parallel)
        mine = missing[engine::engines]
        if self.ranks.any(bool(missing)):
            self.sample(mine, decoding, budgets, files)
        self.ranks.wait()
        order = {p.id: i for i, p in enumerate(self.data.problems)}
        unique = {
            (order[a.problem], a.index): a for file in files.values() for a in self.read(file) if a.problem in order
        }
        return [unique[place] for place in wanted]

    def read(self, file: Path) -> list[Answer]:
        """A set's samples, from the files of all ranks."""
        parts = sorted(file.parent.glob(f"{file.stem}*.jsonl"))
        return [answer for part in parts for answer in read_answers(part)]

    def sample(
        self,
        missing: Sequence[tuple[int, int]],
        decoding: Decoding,
        budgets: dict[str, float],
        files: dict[str, Path],
    ) -> None:
        """Sample in chunks and append each chunk to disk at once, so that an interruption loses one chunk."""
        e, r = self.config.evaluate, self.config.rollout
        if self.sampler is None:
            config = replace(self.config, model=replace(self.config.model, path=self.model.path))
            self.sampler = make_sampler(config, self.model.path, e.max_new_tokens, self.ranks)
        chunk = 4 * r.max_rows
        hidden = None if self.ranks.is_main else True  # None: shown on a terminal
        with tqdm(total=len(missing), unit="answer", desc=self.model.name, leave=False, disable=hidden) as bar:
            for first in range(0, len(missing), chunk):
                part = missing[first : first + chunk]
                problems = [self.data.problems[i] for i, _ in part]
                guidances = [guidance_for(p, budgets, self.config.prompt.length_multiple) for p in problems]
                requests = [
                    Request(
                        self.data.prompter.ids(p.question, g), row_seed(self.config.run.seed, 0, i, k), e.max_new_tokens
                    )
                    for p, g, (i, k) in zip(problems, guidances, part, strict=True)
                ]
                samples = self.sampler.generate(requests, decoding)
                texts = [self.data.decode(s.ids) for s in samples]
                verdicts = self.grader.grade_all(texts, [p.answer for p in problems])
                self.grader.stop_if_untrustworthy()  # before anything is written: a failure is no wrong answer
                rows = zip(part, problems, guidances, samples, texts, verdicts, strict=True)
                by_file = defaultdict(list)
                for (_, k), p, g, s, text, right in rows:
                    answer = Answer(
                        p.id, p.source, p.level, k, len(s.ids), right and s.finished, s.finished, text, g.budget
                    )
                    file = files[p.source]
                    by_file[file.with_stem(f"{file.stem}-rank{self.ranks.index}")].append(asdict(answer))
                if self.ranks.index % r.tensor_parallel == 0:  # the ranks of an engine hold the same
                    for file, lines in by_file.items():
                        append(file, lines)
                bar.update(len(part))


def model_identity(path: str) -> str:
    """The hub name, or for a local folder a hash of its weights: samples of a model trained anew are sampled anew."""
    files = sorted(Path(path).glob("*.safetensors"))
    digest = sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(2**24):
                digest.update(block)
    return digest.hexdigest() if files else path


def guidance_for(problem: Problem, budgets: dict[str, float], multiple: int) -> Guidance:
    """The stated length, printed in the multiples that training printed."""
    if problem.id not in budgets:
        return NO_GUIDANCE
    return exact_guidance(max(multiple, round(budgets[problem.id] / multiple) * multiple))


def score_sets(
    model: str, temperature: float, guidance: str, answers: Sequence[Answer], config: Config
) -> list[dict[str, Any]]:
    """One row per problem set, and their unweighted average where there are several (as the paper does)."""
    by_source = defaultdict(list)
    for answer in answers:
        by_source[answer.source].append(answer)
    rows: list[dict[str, Any]] = [
        {"model": model, "set": source, "temperature": temperature, "guidance": guidance}
        | summarize(found, config.evaluate.bootstrap)
        for source, found in by_source.items()
    ]
    if len(rows) > 1:
        means = {key: float(np.mean([row[key] for row in rows])) for key in ("accuracy", "tokens", "truncated")}
        rows.append({"model": model, "set": "average", "temperature": temperature, "guidance": guidance} | means)
    return rows


def add_aes(rows: list[dict[str, Any]], base: str) -> None:
    """Fill in each row's AES against the unguided base at the same set and temperature."""
    bases = {(r["set"], r["temperature"]): r for r in rows if r["model"] == base and not r["guidance"]}
    for row in rows:
        reference = bases[row["set"], row["temperature"]]
        row["aes"] = aes(row["accuracy"], row["tokens"], reference["accuracy"], reference["tokens"])


def without_nan(value: Any) -> Any:
    """JSON has no NaN: an AES against a base without a right answer, and the like, is written as null."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and np.isnan(value) else value


def write_results(config: Config, results: dict[str, Any]) -> Path:
    path = config.run_dir / "results.json"
    path.write_text(json.dumps(without_nan(results), indent=1, allow_nan=False), encoding="utf-8")
    return path
