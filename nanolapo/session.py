"""Set-up of a run: everything the loop needs, built and checked once, in the order in which mistakes are cheapest.

Config and data are checked before any weight is loaded, so that a misspelt file costs a second and not a model load.
"""

from __future__ import annotations

import importlib.util
import json
import signal
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nanolapo.alarms import Alarms
from nanolapo.config import Config, UserError
from nanolapo.config_checks import validate
from nanolapo.grader import Grader
from nanolapo.methods.base import Method, SamplingPlan
from nanolapo.metrics import RunLog
from nanolapo.policy import Policy, compile_token_wise
from nanolapo.problems import Problem, load_problems
from nanolapo.prompts import Prompter, split_by_length
from nanolapo.ranks import Ranks
from nanolapo.rollouts import Decoding, Request, Rollouts, Sample

NO_FOLDER = "no such folder; the run that writes it comes first (the demo's models: make demo)"
GUIDANCE_ROOM = 64  # tokens kept free for a method's guidance beyond rollout.max_prompt_tokens


class Sampler(Protocol):
    """What the loop asks of an engine; sampler_torch.py and sampler_vllm.py both are one."""

    def generate(
        self,
        requests: Sequence[Request],
        decoding: Decoding,
        progress: Callable[[int], None] | None = None,
        finished: Callable[[int, Sample], None] | None = None,
    ) -> list[Sample]: ...
    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None: ...
    def sleep(self) -> None: ...
    def wake(self) -> None: ...
    def close(self) -> None: ...


@dataclass
class Data:
    """Training problems with their prompter and tokenizer, checked, and what had to be left out."""

    problems: list[Problem]
    prompter: Prompter
    tokenizer: PreTrainedTokenizerBase
    report: list[str] = field(default_factory=list)

    def decode(self, ids: np.ndarray) -> str:
        """A response as text. Ids beyond the tokenizer (models with a padded vocabulary can sample them) are left out."""
        known = ids[(ids >= 0) & (ids < len(self.tokenizer))]
        return str(self.tokenizer.decode(known.tolist(), skip_special_tokens=True))

    def fingerprint(self, config: Config, method: Method) -> dict[str, Any]:
        """What a resumed run must share with the run that wrote the checkpoint."""
        ids = "\n".join(p.id for p in self.problems)
        return {
            "model.path": config.model.path,
            "model.lora_rank": config.model.lora_rank,
            "model.lora_alpha": config.model.lora_alpha,
            "method": f"{type(method).__module__}:{type(method).__name__}",
            "loss.kind": config.loss.kind,
            "data": sha256(ids.encode()).hexdigest()[:16],
            "rollout.group_size": config.rollout.group_size,
            "rollout.prompts_per_step": config.rollout.prompts_per_step,
            "rollout.max_new_tokens": config.rollout.max_new_tokens,
            "train.batch_size": config.train.batch_size,
            "run.seed": config.run.seed,
        }


Draw = dict[int, int]  # place in the step -> index of the problem


@dataclass(frozen=True)
class Ahead:
    """The first round of the next step, sampled while this one trained (ahead.py): this rank's share, graded."""

    plan: SamplingPlan
    draw: Draw
    rollouts: Rollouts


@dataclass
class Session:
    """What one step works with. `step` is the next step to do; it and `sampled_tokens` are part of a checkpoint."""

    config: Config
    method: Method
    ranks: Ranks
    data: Data
    grader: Grader
    policy: Policy
    sampler: Sampler
    alarms: Alarms
    log: RunLog | None  # rank 0 only
    token_limit: int = 0  # see token_limit()
    step: int = 0
    sampled_tokens: int = 0
    ahead: Ahead | None = None
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))  # for ahead.py

    @property
    def progress(self) -> float:
        return progress(self.config, self.token_limit, self.step, self.sampled_tokens)


def must_be_local(path: str) -> bool:
    """Can this path be no hub name (organisation/name)? It has more slashes, or begins with a folder that is here.

    >>> [must_be_local(path) for path in ("runs/base", "./base", "../base", "/base", "a/b/c", "someone/base", "base")]
    [True, True, True, True, True, False, False]
    """
    first, slash, _ = path.partition("/")
    return path.count("/") > 1 or (bool(slash) and (first == "runs" or Path(first).is_dir()))


def load_tokenizer(path: str, key: str = "model.path") -> PreTrainedTokenizerBase:
    """Raises UserError naming the config's key when there is no tokenizer."""
    if must_be_local(path) and not Path(path).exists():  # the hub would be asked for a minute without a network
        raise UserError(f"{key}={path!r}: {NO_FOLDER}")
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # a damaged file may be anything: KeyError, TypeError, tokenizers' bare Exception
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{key}={path!r}: no tokenizer to be had there ({first}); without a network give a local folder"
        ) from None


def load_data(config: Config, grader: Grader) -> Data:
    """Problems whose gold answer can be graded and whose prompt fits; the rest is counted in the report."""
    prompter = Prompter(load_tokenizer(config.model.path), config.prompt)
    return fit_prompts(config, prompter, *gradable_problems(config, grader))


def gradable_problems(config: Config, grader: Grader) -> tuple[list[Problem], list[str]]:
    """Problems whose gold answer can be graded, and the report of what came and what was left out."""
    if not config.data.sources:
        raise UserError("data.sources is empty: name at least one source of problems in the YAML file")
    problems, report = load_problems(config.data.sources)
    if config.data.exclude:
        banned = {p.question for p in load_problems(config.data.exclude)[0]}
        kept = [p for p in problems if p.question not in banned]
        report.append(f"{len(problems) - len(kept)} problems left out because they are in data.exclude")
        problems = kept
    failing = set(grader.golds_that_fail([p.answer for p in problems]))
    report += [f"dropped {problems[i].id}: gold {problems[i].answer!r} cannot be graded" for i in sorted(failing)]
    return [p for i, p in enumerate(problems) if i not in failing], report


def fit_prompts(config: Config, prompter: Prompter, problems: Sequence[Problem], report: Sequence[str]) -> Data:
    """The problems whose prompt is short enough; `report` with a line about the others."""
    limit, report = config.rollout.max_prompt_tokens, list(report)
    short, skipped = split_by_length([prompter.ids(p.question) for p in problems], limit)
    if skipped:
        report.append(f"skipped {len(skipped)} prompts longer than rollout.max_prompt_tokens={limit}: never cut")
    if not short:
        raise UserError(f"data.sources: no problem is left to work on ({'; '.join(report[-3:])})")
    return Data([problems[i] for i in short], prompter, prompter.tokenizer, report)


def pick_engine(config: Config) -> str:
    """rollout.engine, with `auto` resolved: vllm where it is installed, else torch."""
    if config.rollout.engine != "auto":
        return config.rollout.engine
    return "vllm" if importlib.util.find_spec("vllm") else "torch"


def make_sampler(config: Config, model_path: str, max_new_tokens: int, ranks: Ranks) -> Sampler:
    """The engine of this rank, holding the weights of `model_path`."""
    r = config.rollout
    dtype = getattr(torch, r.dtype or config.model.dtype)
    if pick_engine(config) == "torch":
        from nanolapo.sampler_torch import TorchSampler

        if r.engine == "auto" and ranks.is_main:
            print("rollouts: vLLM is not installed, using the torch sampler; `make vllm` installs vLLM")
        try:
            sampler = TorchSampler(model_path, dtype, ranks.device, max_rows=r.max_rows)
        except (OSError, ValueError, SafetensorError) as error:  # in evaluation nobody has loaded these weights before
            raise UserError(f"{model_path}: the model cannot be loaded ({str(error).strip()[:200]})") from None
        if config.model.compile:
            compile_token_wise(sampler.model)
        return sampler
    from nanolapo.sampler_vllm import VLLMSampler

    return VLLMSampler(
        model_path, dtype, max_model_len=r.max_prompt_tokens + GUIDANCE_ROOM + max_new_tokens, max_rows=r.max_rows,
        gpu_memory_utilization=r.gpu_memory_utilization, tensor_parallel=r.tensor_parallel,
        seed=config.run.seed, sleep_between_steps=not r.ahead,
    )  # fmt: skip


def set_up_process(config: Config) -> Ranks:
    """Threads, process group, and the checks that need the number of ranks."""
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    ranks = Ranks()
    validate(config, ranks.count)
    torch.manual_seed(config.run.seed)
    return ranks


def token_limit(config: Config) -> int:
    """How many tokens the run may sample: train.sampled_tokens, or what train.match_runs sampled together; 0: any."""
    total = config.train.sampled_tokens
    for run in config.train.match_runs:
        try:
            lines = (Path(run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            total += int(json.loads(lines[-1])["sampled_tokens"])
        except (OSError, IndexError, ValueError, KeyError, TypeError):
            raise UserError(f"train.match_runs: {run} has no metrics.jsonl with sampled_tokens; run it first") from None
    return total


def progress(config: Config, token_limit: int, steps_done: int, sampled_tokens: int) -> float:
    """Share of the run that is done, by steps or by tokens, whichever is further; 1 or more: it is complete."""
    return max(steps_done / config.train.steps, sampled_tokens / token_limit if token_limit else 0.0)


class StopRequest:
    """Turns the first Ctrl-C into a wish to stop after this step; the second stops at once.

    SIGTERM is the same wish, but never the second one: launchers send it beside the Ctrl-C that the terminal sends to all.
    """

    def __init__(self) -> None:
        self.wanted = False
        signal.signal(signal.SIGINT, self.on_signal)
        signal.signal(signal.SIGTERM, self.on_signal)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.wanted:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.wanted = True
        print("\nstopping after this step, with a checkpoint; press Ctrl-C again to stop at once", flush=True)


def final_model(config: Config) -> Path:
    """Where the trained model is written, and what the next stage's model.path points to."""
    return config.run_dir / "model"


def export_folder(config: Config, step: int) -> Path:
    """Where run.export_every writes the model as it is after `step` steps."""
    return config.run_dir / "models" / f"step-{step:06d}"
