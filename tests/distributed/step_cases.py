"""One step up to the advantages with an echo engine, checkpoints, and a slow rank; on any number of ranks.

    python tests/distributed/launch.py 2 step_cases.py MODEL OUT_FOLDER

Used by test_steps_on_ranks.py. Every rank writes what it holds to OUT_FOLDER/rankRofN.json.
"""

from __future__ import annotations

import json
import pickle
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
import numpy as np
from reading_cases import main_rank_decides, what_all_get, what_ranks_read
from tiny import make_config, make_rows

import nanolapo.ranks
from nanolapo.alarms import Alarms
from nanolapo.checkpoint import load_checkpoint, optimizer_tensors, save_checkpoint
from nanolapo.config import PromptConfig, SourceConfig
from nanolapo.data.demo_task import parse_question
from nanolapo.data.load import Data
from nanolapo.data.problems import Problem, load_problems
from nanolapo.data.prompts import Prompter
from nanolapo.demo.pretrain import TEMPLATE, make_tokenizer
from nanolapo.grader import Grader
from nanolapo.methods.base import Method, MonitorPlan, SamplingPlan
from nanolapo.metrics import Stopwatch
from nanolapo.model.folder import load_model, save_model
from nanolapo.model.sharding import to_host
from nanolapo.model.spread import all_tensors, load_on_main
from nanolapo.policy import Policy, freeze
from nanolapo.ranks import Ranks
from nanolapo.rollouts import Measured, Rollouts
from nanolapo.samplers.sampler import Decoding, Request, Sample
from nanolapo.sampling import grader_errors, monitor_pass, next_draw, sample_and_grade
from nanolapo.session import Session
from nanolapo.update import update_policy

RUNAWAY = "9^{9^{9^{9^9}}}"  # an answer that math-verify never finishes


class CountingRanks(Ranks):
    """Knows how many bytes this rank has sent in the last `gather` of an array or of rollouts."""

    sent = 0

    def gather(self, value: Any) -> list[Any]:
        if isinstance(value, (np.ndarray, Rollouts)):
            self.sent = len(pickle.dumps(value))
        return super().gather(value)


class WatchAll(Method):
    """A monitor pass over all problems before step 0."""

    whole_rows = False

    def start(self, problems: list[Problem]) -> None:
        self.num_problems = len(problems)

    def monitor(self, step: int) -> MonitorPlan | None:
        return MonitorPlan(tuple(reversed(range(self.num_problems))), 4, 1.0, 64, self.whole_rows)

    def on_monitor(self, found: Measured | Rollouts) -> dict[str, float]:
        self.found = found
        return {}


class EchoEngine:
    """Answers each prompt with the prompt itself and a boxed number; every third seed has the prompt's right answer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer, self.every = tokenizer, 17  # every so many seeds the answer is RUNAWAY

    def generate(
        self,
        requests: Sequence[Request],
        decoding: Decoding,
        progress: Callable[[int], object] | None = None,
        finished: Callable[[int, Sample], None] | None = None,
    ) -> list[Sample]:
        samples = []
        for request in requests:
            right = parse_question(self.tokenizer.decode(request.prompt_ids)).values()[-1]
            number = right if request.seed % 3 == 0 else request.seed % 1000
            answer = RUNAWAY if request.seed % self.every == 0 else f"{number:03}"
            ids = request.prompt_ids + self.tokenizer(rf" \boxed{{{answer}}}")["input_ids"]
            samples.append(Sample(np.array(ids), np.full(len(ids), -1.0, np.float32), finished=request.seed % 5 > 0))
        for i in reversed(range(len(samples))):  # an engine's rows end in any order
            if finished is not None:
                finished(i, samples[i])
        return samples

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None: ...
    def sleep(self) -> None: ...
    def wake(self) -> None: ...
    def close(self) -> None: ...


def step_up_to_advantages(model: str, ranks: CountingRanks) -> dict[str, Any]:
    """Sample, grade, gather, reward and advantage as loop.run_step does them; everything a rank then holds."""
    config = make_config(model, rollout={"prompts_per_step": 6, "group_size": 8})
    tokenizer = make_tokenizer()
    problems, _ = load_problems([SourceConfig(name="demo", path="demo", count=40, seed=1, levels=(1, 2, 3))])
    data = Data(problems, Prompter(tokenizer, PromptConfig(template=TEMPLATE)))
    method = Method(config)
    policy = Policy(config, ranks.device, ranks)
    policy.model.config.vocab_size = len(tokenizer)  # more than this model has, but it is trained on none of these ids
    with Grader(workers=1, deadline_s=2.0) as grader:
        s = Session(config, method, ranks, data, grader, policy, EchoEngine(tokenizer), Alarms(config), None)
        plan = method.sampling(0)
        rollouts = sample_and_grade(s, plan, next_draw(s, plan, []), Stopwatch())
        errors = sum(ranks.gather(grader.errors))
        monitored = monitor_all(s, ranks)
        on_few = stop_on_few_answers(s, ranks)
        stopped = what_all_get(lambda: stop_on_the_last_rank(s, plan))
    rewards_PG = rollouts.by_group(method.reward(rollouts)["correct"])
    advantages_B = method.advantage(rollouts, torch.from_numpy(rewards_PG))
    return {
        "problems": [asdict(problem) for problem in rollouts.problems],
        "texts": rollouts.texts,
        "finished": rollouts.finished_B.tolist(),
        "correct": rollouts.correct_B.tolist(),
        "errors": errors,
        "advantages": advantages_B.tolist(),
        "monitored": monitored,
        "stopped": stopped,
        "on few": on_few,
    }


def monitor_all(s: Session, ranks: CountingRanks) -> list[dict[str, Any]]:
    """The same monitor pass twice: with the numbers only, and with whole rows. What a rank then holds, and sent."""
    seen = []
    s.sampler.every = 10**12  # type: ignore[attr-defined]
    for whole_rows in (False, True):
        s.method, before = WatchAll(s.config), s.sampled_tokens
        s.method.whole_rows = whole_rows
        s.method.start(s.data.problems)
        monitor_pass(s, Stopwatch())
        found = s.method.found
        seen.append({
            "type": type(found).__name__,
            "problems": [problem.id for problem in found.problems],
            "lengths": found.lengths_B.tolist(),
            "correct": found.correct_B.tolist(),
            "tokens": s.sampled_tokens - before,
            "bytes a row": max(ranks.gather(ranks.sent)) * ranks.count / len(found),
        })  # fmt: skip
    return seen


def stop_on_the_last_rank(s: Session, plan: SamplingPlan) -> None:
    """The grader of one rank has failed on too many answers."""
    if s.ranks.index == s.ranks.count - 1:
        s.grader.total, s.grader.errors = 400, 100
    sample_and_grade(s, plan, next_draw(s, plan, []), Stopwatch())


def stop_on_few_answers(s: Session, ranks: Ranks) -> str:
    """180 answers on all ranks together, 12 of them errors; then 240 and 16, when no rank has seen 200 by itself."""
    s.grader.total, s.grader.errors = 180 // ranks.count, 12 // ranks.count
    rate = grader_errors(s)
    s.grader.total, s.grader.errors = 240 // ranks.count, 16 * (ranks.index == 0)
    return f"{rate:.4f}, then {what_all_get(lambda: grader_errors(s))}"


def load_split(model: str, ranks: Ranks) -> dict[str, Any]:
    """What load_on_main gives: nothing, then to the bit what a plain load gives; and one line if it cannot load."""
    plain = load_model(model, ranks.device)
    empty, give = load_on_main(model, freeze, ranks)
    was_empty = all(tensor.is_meta for tensor in all_tensors(empty).values())
    give(empty)
    given, wanted = all_tensors(empty), all_tensors(plain)
    return {
        "was empty": was_empty,
        "differ": [name for name in wanted if not torch.equal(wanted[name], given[name])],
        "names": sorted(given) == sorted(wanted) and len(given) > 10,
        "buffers": len(dict(empty.named_buffers())),
        "frozen": not any(p.requires_grad for p in empty.parameters()),
        "tied": empty.get_output_embeddings().weight is empty.get_input_embeddings().weight,
        "freed": not give.full,  # type: ignore[attr-defined]
        "refused": what_all_get(lambda: load_on_main(f"{model}/missing/folder", freeze, ranks)),
    }


def train_and_resume(model: str, out: Path, sharding: str, ranks: Ranks) -> None:
    """Six updates in one go, with the model exported half-way, and three, a checkpoint, and three more by another policy;
    both end states to files."""
    config = make_config(model, model={"sharding": sharding}, train={"learning_rate": 1e-3, "warmup_fraction": 0.01})

    def steps(policy: Policy, which: range) -> None:
        for seed in which:
            rows, advantages = make_rows([3, 20, 9, 7], seed=seed), torch.tensor([1.0, -1.0, 0.5, -0.5])
            update_policy(policy, Method(config), rows, advantages)

    def everything(policy: Policy) -> dict[str, Tensor]:
        return to_host((policy.trained | optimizer_tensors(policy)).items(), keep=True)

    whole, first, second = (Policy(config, ranks.device, ranks) for _ in range(3))
    folder = out / f"checkpoints-{sharding}"
    steps(whole, range(3))
    save_model(whole.model, torch.float32, make_tokenizer(), out / f"models-{sharding}/step-000003", ranks.is_main)
    steps(whole, range(3, 6))
    steps(first, range(3))
    state: dict[str, Any] = {"fingerprint": {}}
    save_checkpoint(folder, 3, first, state, 2)
    ranks.wait()
    save_file(everything(first), out / f"three-{sharding}-rank{ranks.index}.safetensors")
    loaded = load_checkpoint(folder, second, {})
    assert loaded is not None and loaded["step"] == 3 and second.num_steps == 3
    steps(second, range(3, 6))
    save_file(everything(whole), out / f"whole-{sharding}-rank{ranks.index}.safetensors")
    save_file(everything(second), out / f"resumed-{sharding}-rank{ranks.index}.safetensors")
    for step in (900, 1000, 1100):  # D10
        save_checkpoint(folder, step, first, state, 2)
        ranks.wait()


def slow_rank(ranks: Ranks) -> float:
    """One rank comes three time limits late to the gather; then all add up a tensor. Returns the sum."""
    time.sleep(3 * nanolapo.ranks.TENSOR_PATIENCE.total_seconds() if ranks.index == 1 else 0)
    assert ranks.gather(ranks.index) == list(range(ranks.count))
    total = torch.ones(1)
    dist.all_reduce(total)
    return total.item()


def main(model: str, out: str) -> None:
    nanolapo.ranks.TENSOR_PATIENCE = timedelta(seconds=5)
    torch.set_num_threads(1)
    ranks = CountingRanks()
    result = step_up_to_advantages(model, ranks)
    result["decided"] = main_rank_decides(Path(out), ranks)
    result["read"] = what_ranks_read(model, Path(out), ranks)
    result["split"] = load_split(model, ranks) if ranks.count > 1 else {}
    for sharding in ("ddp", "fsdp2"):
        train_and_resume(model, Path(out), sharding, ranks)
    result["sum after a slow rank"] = slow_rank(ranks)
    (Path(out) / f"rank{ranks.index}of{ranks.count}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
