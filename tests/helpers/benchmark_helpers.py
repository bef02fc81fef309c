"""An evaluation without an engine: ranks one after the other in one process, a sampler that remembers what it is asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from tiny import make_config

from nanolapo.config import Config, EvaluateConfig, PromptConfig, SourceConfig
from nanolapo.data.load import Data
from nanolapo.data.problems import Problem
from nanolapo.data.prompts import Prompter
from nanolapo.demo.pretrain import make_tokenizer
from nanolapo.evaluation.evaluate import Benchmark
from nanolapo.evaluation.passes import Model
from nanolapo.grader import Grader
from nanolapo.samplers.sampler import Decoding, Sample


class FakeRanks:
    """One rank of `count` after the other, in one process."""

    def __init__(self, index: int, count: int) -> None:
        self.index, self.count, self.is_main = index, count, index == 0

    def engine(self, tensor_parallel: int) -> tuple[int, int]:
        return self.index // tensor_parallel, self.count // tensor_parallel

    def from_main(self, make):
        return make()

    def wait(self) -> None: ...


class FakeSampler:
    """Says every token once per seed, the last row first; remembers how much it was asked for, and the prompts."""

    def __init__(self) -> None:
        self.asked = 0
        self.prompts: list[list[int]] = []
        self.seeds: dict[str, list[int]] = {}  # by set
        self.closed = False

    def generate(self, requests, decoding: Decoding, progress=None, finished=None) -> list[Sample]:
        self.asked += len(requests)
        self.prompts += [request.prompt_ids for request in requests]
        for request in requests:
            self.seeds.setdefault(request.problem.source, []).append(request.seed)
        ids = [np.arange(5, 8 + request.seed % 3) for request in requests]
        samples = [Sample(i, np.zeros(len(i), dtype=np.float32), True) for i in ids]
        for number in reversed(range(len(samples))):
            finished(number, samples[number])
        return samples

    def close(self) -> None:
        self.closed = True


def evaluation_config(folder: Path, samples: int = 3) -> Config:
    config = make_config("unused", run={"dir": str(folder), "name": "e"}, rollout={"max_rows": 2})
    sources = (SourceConfig("s", "demo", samples=1), SourceConfig("t/u", "demo"))
    evaluate = EvaluateConfig(models=("m=unused",), samples=samples, bootstrap=10, max_new_tokens=8)
    return replace(config, data=replace(config.data, sources=sources), evaluate=evaluate)


def benchmark(
    config: Config, grader: Grader, index: int = 0, count: int = 1, prompt: PromptConfig | None = None,
    path: str = "unused", end: str | None = None,
) -> Benchmark:  # fmt: skip
    """`path`: the model's folder or hub name. `end`: the tokenizer's end token, if it is another one than the demo's."""
    prompt = prompt or config.prompt
    tokenizer = make_tokenizer()
    tokenizer.eos_token = end or tokenizer.eos_token
    problems = [Problem(f"{s}:{i}", f"q {i}", "1", None, s) for s in ("s", "t/u") for i in range(3)]
    data = Data(problems, Prompter(tokenizer, prompt))
    model = Model("m", path, prompt)
    runs = Benchmark(config, model, data, grader, FakeRanks(index, count))  # type: ignore[arg-type]
    runs.sampler = FakeSampler()  # type: ignore[assignment]
    return runs
