"""Seconds and memory of one step of TRL's GRPOTrainer, on the workload of step.py. Runs in an environment of its own:

    python -m venv TRL && TRL/bin/pip install 'trl==1.16.0' 'torch==2.13.0' 'transformers==5.19.0'
    TRL/bin/python tests/benchmarks/trl_step.py --model FOLDER [--dtype float32|bfloat16] [--steps 5] [--out FILE.json]

Settings: TRL's defaults, but one optimizer step per generation, all rollouts in one forward pass, no gradient checkpointing
(its default; it would cost a second forward pass) unless asked for, random rewards. float32 is "as it comes" on a CPU; with
bfloat16 both the weights and the arithmetic are bf16, which is less than our step does (its masters are float32).
"""

from __future__ import annotations

import random
import time
from typing import Any

import torch
from common import memory_gb, parser, save, spread, texts, use_cpu_clock
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer


def reward(completions: list[str], **_: Any) -> list[float]:
    return [random.random() for _ in completions]


class StepTimes(TrainerCallback):
    """Wall time from one finished optimizer step to the next: generation, scoring and training."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())
        if len(self.ends) > 1:
            print(f"step {self.ends[-1] - self.ends[-2]:.2f} s, memory peak {memory_gb():.2f} GB", flush=True)


def main() -> None:
    p = parser(__doc__ or "")
    p.add_argument("--gradient-checkpointing", action="store_true", help="TRL's default")
    args = p.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.cpu_clock:
        use_cpu_clock()
    rollouts, bf16 = args.prompts * args.group, args.dtype == "bfloat16"
    config = GRPOConfig(
        output_dir="/tmp/trl_bench", per_device_train_batch_size=rollouts, gradient_accumulation_steps=1,
        num_generations=args.group, max_completion_length=args.tokens, generation_kwargs={"min_new_tokens": args.tokens},
        max_steps=args.steps + 1, learning_rate=1e-6, bf16=bf16, use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=args.gradient_checkpointing, report_to=[], save_strategy="no", logging_steps=1000,
        model_init_kwargs={"dtype": args.dtype},
    )  # fmt: skip
    times = StepTimes()
    data = Dataset.from_list([{"prompt": text} for text in texts(args.prompts)])
    trainer = GRPOTrainer(model=args.model, reward_funcs=reward, args=config, train_dataset=data, callbacks=[times])
    trainer.train()
    seconds = spread([after - before for before, after in zip(times.ends, times.ends[1:], strict=False)])
    speed = rollouts * args.tokens / seconds["median"]
    result = {"args": vars(args), "seconds": {"step": seconds}, "tokens_per_second": speed}
    result |= {"threads": torch.get_num_threads(), "memory_gb": {"peak": memory_gb()}}
    print(f"TRL {args.dtype}: {seconds['median']:.2f} s a step, {speed:.0f} tokens/s, peak {memory_gb():.2f} GB")
    save(result, args.out)


if __name__ == "__main__":
    main()
