"""Seconds and memory of one training step, split into its phases, each beside its floor measured in the same run.

    python tests/benchmarks/step.py --model FOLDER [--engine vllm|torch] [--dtype bfloat16|float32] [--prompts 4 --group 8
        --tokens 96 --steps 5] [--microbatch-tokens 896] [--peak-tflops 989] [--out FILE.json]

The step is the trainer's own (nanolapo.loop.run_step). Two things differ from a run: completions never end early, so that
every step samples the same number of tokens, and rewards are random, so that every group has a signal and is trained on.

Floors: sample, vLLM's LLM.generate on the same prompts, once after every step; update, model(ids, labels=ids) with
loss.backward() of the bare transformers model in the same dtype on the same unpadded rows, a group at a time, and a fused
AdamW step; sync, one copy of all weights in memory. The update computes a group's prompt once, the bare model G times, so a
ratio above 1 can be had.

Limit: one more step records the matrix products of its update, and of the torch sampler (products.py; vLLM's own are not
seen). They are timed alone, on the same machine in the same run, and the share of a phase's seconds is printed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from common import forget_peak, memory_gb, parser, save, spread, table, texts, use_cpu_clock
from products import Products
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanolapo.alarms import Alarms
from nanolapo.config import Config, PromptConfig
from nanolapo.config_file import build
from nanolapo.data.load import Data
from nanolapo.data.problems import Problem
from nanolapo.data.prompts import Prompter
from nanolapo.grader import Grader
from nanolapo.loop import run_step
from nanolapo.methods.base import Method
from nanolapo.policy import Policy
from nanolapo.ranks import Ranks
from nanolapo.rollouts import Rollouts
from nanolapo.samplers.choose import make_sampler
from nanolapo.session import Session

PHASES = ("sample", "grade", "update", "sync")


class RandomReward(Method):
    """Every group has a signal, whatever the model says."""

    def reward(self, rollouts: Rollouts) -> dict[str, np.ndarray]:
        return {"correct": np.random.default_rng(len(rollouts)).random(len(rollouts))}


class LastMetrics:
    """Stands where the run's log stands, and keeps the last step's numbers."""

    metrics: dict[str, float] = {}

    def step(self, step: int, metrics: dict[str, float], share: float) -> None:
        self.metrics = metrics

    def rollouts(self, *_: Any) -> None: ...


def config_of(args: Any) -> Config:
    values = {
        "run": {"print_every": 0, "checkpoint_every": args.steps + 2},
        "model": {
            "path": args.model, "dtype": args.dtype, "gradient_checkpointing": args.gradient_checkpointing,
            "compile": args.compile or None,  # None: as the trainer chooses, on a GPU compiled
        },
        "rollout": {
            "engine": args.engine, "prompts_per_step": args.prompts, "group_size": args.group, "max_prompt_tokens": 128,
            "max_new_tokens": args.tokens, "max_rows": min(256, args.prompts * args.group), "mismatch_factor": 1e9,
        },
        "train": {"batch_size": 0, "microbatch_tokens": args.microbatch_tokens, "steps": args.steps + 2},
        "loss": {"kl_coef": 0.0},
    }  # fmt: skip
    return build(Config, values, "")


def timed(count: int, action: Callable[[], Any]) -> list[float]:
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return seconds


def bare_update(folder: str, dtype: torch.dtype, groups: list[torch.Tensor], device: torch.device, count: int) -> dict:
    """Forward, loss, backward on [G, S] rows, group by group, then AdamW. One more than `count`, the first is dropped."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def once() -> None:
        for ids in groups:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return spread(timed(count + 1, once)[1:])


def main() -> None:
    p = parser(__doc__ or "")
    p.add_argument("--engine", default="vllm", choices=("vllm", "torch"))
    p.add_argument("--microbatch-tokens", type=int, default=896, help="a group of 8 x 96 and its prompt, by default")
    p.add_argument("--gradient-checkpointing", action="store_true")
    p.add_argument("--compile", action="store_true", help="model.compile; the first step, not counted, takes longer")
    p.add_argument("--peak-tflops", type=float, default=0.0, help="of the device, for the update's MFU")
    p.add_argument("--no-floors", action="store_true")
    p.add_argument("--raw-only", action="store_true", help="of the floors only vLLM's own generate, and no limits")
    args = p.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.cpu_clock:
        use_cpu_clock()
    config = config_of(args)
    ranks, tokenizer, log = Ranks(), AutoTokenizer.from_pretrained(args.model), LastMetrics()
    problems = [Problem(f"bench:{i}", text, "1", None, "bench") for i, text in enumerate(texts(args.prompts))]
    prompter = Prompter(tokenizer, PromptConfig(style="raw", template="{question}"))
    data, method = Data(problems, prompter), RandomReward(config)
    memory = {"python and libraries": memory_gb("VmRSS")}
    policy = Policy(config, ranks.device)
    memory["+ policy"] = memory_gb("VmRSS")
    sampler: Any = make_sampler(config, args.model, args.tokens, ranks)
    sampler.end_ids = sampler.end_ids[:0]  # nothing ends a completion
    sampler.load_weights(policy.sampler_weights())
    memory["+ sampler"] = memory_gb("VmRSS")
    seconds: dict[str, list[float]] = {phase: [] for phase in (*PHASES, "other", "step")}
    prompts, raw = [prompter.ids(problem.question) for problem in problems], list[float]()
    with Grader() as grader:
        s = Session(config, method, ranks, data, grader, policy, sampler, Alarms(config), log)  # type: ignore[arg-type]
        run_step(s)
        memory["peak of the first step"], mismatch = memory_gb(), log.metrics["mismatch"]
        for _ in range(args.steps):
            total = timed(1, lambda: run_step(s))[0]
            parts = [log.metrics[f"seconds/{phase}"] for phase in PHASES]
            for phase, value in zip(seconds, [*parts, total - sum(parts), total], strict=True):
                seconds[phase].append(value)
            if log.metrics["length"] != args.tokens:
                raise SystemExit(f"{log.metrics['length']} tokens an answer, not {args.tokens}: something ended them")
            mismatch = log.metrics["mismatch"]
            print(f"step {total:.2f} s, memory peak {memory_gb():.2f} GB, mismatch {mismatch:.4f}", flush=True)
            if args.engine == "vllm" and not args.no_floors:
                raw.append(timed(1, lambda: generate(args, sampler, prompts))[0])
        recorded = {} if args.no_floors or args.raw_only else record_products(s, args.engine == "torch")
    memory["peak"] = memory_gb()
    result: dict[str, Any] = {"args": vars(args), "memory_gb": memory, "threads": torch.get_num_threads()}
    result |= {"seconds": {phase: spread(values) for phase, values in seconds.items()}}
    sampled = args.prompts * args.group * args.tokens
    result["tokens_per_second"] = sampled / result["seconds"]["step"]["median"]
    result["parameters"] = sum(p.numel() for p in policy.model.parameters())
    result["update_tokens"] = sampled + sum(map(len, prompts))  # a group's prompt once
    result["mismatch"] = mismatch
    if not args.no_floors:
        bare = {} if args.raw_only else floors(args, policy, ranks.device, prompts)
        result["floors"] = bare | ({"sample": spread(raw)} if raw else {})
        result["products"] = {
            phase: {"seconds": products.seconds(), "tflop": products.flops / 1e12}
            for phase, products in recorded.items()
        }
    report(args, result)
    save(result, args.out)


def record_products(s: Session, with_sampling: bool) -> dict[str, Products]:
    """The matrix products of one more step, by phase. The trainer lets the sampler sleep between the two phases."""
    found = ({"sample": Products()} if with_sampling else {}) | {"update": Products()}
    sleep = s.sampler.sleep
    with ExitStack() as recording:

        def next_phase() -> None:
            recording.close()
            sleep()
            recording.enter_context(found["update"])

        s.sampler.sleep = next_phase  # type: ignore[method-assign]
        if with_sampling:
            recording.enter_context(found["sample"])
        run_step(s)
    s.sampler.sleep = sleep  # type: ignore[method-assign]
    return found


def generate(args: Any, sampler: Any, prompts: list[list[int]]) -> None:
    """The engine's own generate, without what training needs: log-probs, and a seed for every row."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=args.tokens, ignore_eos=True, detokenize=False, n=args.group)
    sampler.llm.reset_prefix_cache()
    sampler.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)


def floors(args: Any, policy: Policy, device: torch.device, prompts: list[list[int]]) -> dict[str, dict]:
    """Seconds of the least that update and sync could do."""
    weights = [tensor for _, tensor in policy.sampler_weights()]
    room = [torch.empty_like(tensor) for tensor in weights]
    found = {"sync": spread(timed(5, lambda: [to.copy_(x) for to, x in zip(room, weights, strict=True)]))}
    dtype = getattr(torch, args.dtype)
    rng = torch.Generator().manual_seed(0)
    rows = [
        torch.cat([torch.tensor(ids).repeat(args.group, 1),
                   torch.randint(0, policy.vocab_size, (args.group, args.tokens), generator=rng)], dim=1).to(device)
        for ids in prompts
    ]  # fmt: skip
    del policy.optimizer  # the bare model's own moments need the room
    forget_peak()
    found["update"] = bare_update(args.model, dtype, rows, device, args.steps)
    return found


def report(args: Any, result: dict[str, Any]) -> None:
    step = result["seconds"]["step"]["median"]
    rows: list[list[Any]] = [
        ["phase", "seconds (median)", "min - max", "share of the step", "floor", "floor / seconds"]
    ]
    for phase, value in result["seconds"].items():
        floor = result.get("floors", {}).get(phase, {}).get("median")
        ends = f"{value['min']:.3g} - {value['max']:.3g}"
        ratio = "" if floor is None else floor / value["median"]
        rows.append([phase, value["median"], ends, value["median"] / step, "" if floor is None else floor, ratio])
    print(table(rows))
    print(
        f"{result['tokens_per_second']:.0f} sampled tokens/s; mean |d log-prob| to the sampler {result['mismatch']:.4f}"
    )
    for phase, found in result.get("products", {}).items():
        share, rate = found["seconds"] / result["seconds"][phase]["median"], found["tflop"] / found["seconds"]
        took = f"{found['seconds']:.3g} s ({rate:.3g} TFLOP/s)"
        print(f"{phase}: its matrix products alone take {took}, {share:.0%} of the phase")
    print(table([["memory, GB", ""], *result["memory_gb"].items()]))
    if args.peak_tflops:
        flops = 6 * result["parameters"] * result["update_tokens"]  # attention, and the head's second pass, left out
        mfu = flops / result["seconds"]["update"]["median"] / args.peak_tflops / 1e12
        print(f"update: {mfu:.1%} of the device's {args.peak_tflops} TFLOP/s")


if __name__ == "__main__":
    main()
