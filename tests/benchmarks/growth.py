"""How the update grows: seconds and peak memory by vocabulary, response length, group size and model size.

    python tests/benchmarks/growth.py [--only vocabulary|length|group|model|prompt] [--dtype bfloat16] [--out FILE.json]

Small Llama models with random weights, 8,192 tokens per optimizer step unless the row says otherwise. Every row runs in a
process of its own. `held` is what must be there: float32 weights, gradients and two moments, and with bf16 the working
copy; `beyond` is the peak above that and above Python with its libraries: activations and what passes through the head.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import memory_gb, save, table
from transformers import LlamaConfig, LlamaForCausalLM

from nanolapo.config import Config
from nanolapo.config_file import build
from nanolapo.methods.base import Method
from nanolapo.policy import Policy
from nanolapo.problems import Problem
from nanolapo.ranks import Ranks
from nanolapo.rollouts import Rollouts
from nanolapo.update import update_policy

BASE: dict[str, int] = {
    "vocab": 32_000, "layers": 4, "hidden": 256, "prompt": 64, "group": 8, "length": 448, "prompts": 2, "micro": 8192,
}  # fmt: skip
SWEEPS: dict[str, list[dict[str, int]]] = {
    "vocabulary": [{"vocab": 32_000}, {"vocab": 152_000}],
    "length": [
        {"length": 192, "prompts": 4},
        {"length": 960, "prompts": 1},
        {"length": 1984, "prompts": 1, "group": 4},
    ],
    "group": [{"group": 2, "prompts": 8}, {"group": 16, "prompts": 1}],
    "prompt": [{"prompt": 16, "length": 496}, {"prompt": 256, "length": 256}],
    "model": [{"layers": 8}, {"hidden": 512}],
}


def one(settings: dict[str, int], dtype: str) -> dict[str, float]:
    """The third update of a policy in this process: the moments are there, everything has been used before."""
    torch.set_num_threads(settings.get("threads", torch.get_num_threads()))
    rng, (P, G) = np.random.default_rng(0), (settings["prompts"], settings["group"])
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=settings["vocab"], hidden_size=settings["hidden"], intermediate_size=3 * settings["hidden"],
        num_hidden_layers=settings["layers"], num_attention_heads=settings["hidden"] // 64,
        num_key_value_heads=settings["hidden"] // 64, tie_word_embeddings=True,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(shape).save_pretrained(folder)
        values = {
            "model": {"path": folder, "dtype": dtype},
            "rollout": {"prompts_per_step": P, "group_size": G, "max_new_tokens": settings["length"]},
            "train": {"batch_size": 0, "microbatch_tokens": settings["micro"]},
            "loss": {"kl_coef": 0.0},
        }
        libraries = memory_gb("VmRSS")
        policy = Policy(build(Config, values, ""), torch.device("cpu"))
    prompts = [rng.integers(0, settings["vocab"], settings["prompt"]) for _ in range(P)]
    rows = P * G
    rollouts = Rollouts(
        problems=[Problem(str(i), "", "1", None, "bench") for i in range(P)],
        group_size=G,
        prompt_ids=[prompts[b // G] for b in range(rows)],
        response_ids=[rng.integers(0, settings["vocab"], settings["length"]) for _ in range(rows)],
        sampler_logprobs=[np.zeros(settings["length"], dtype=np.float32)] * rows,
        finished_B=np.ones(rows, dtype=bool),
        budgets_B=np.full(rows, np.nan),
        correct_B=np.zeros(rows, dtype=bool),
        broken_B=np.zeros(rows, dtype=bool),
    )
    advantages = torch.from_numpy(rng.standard_normal(rows))
    seconds = []
    for _ in range(3):
        start = time.process_time()
        update_policy(policy, Method(policy.config), rollouts, advantages, np.ones(rows, dtype=bool), Ranks())
        seconds.append(time.process_time() - start)
    count = sum(p.numel() for p in policy.model.parameters())
    held = count * (16 + (2 if dtype == "bfloat16" else 0)) / 1e9
    tokens = P * settings["prompt"] + rows * settings["length"]
    found = {"parameters, M": count / 1e6, "tokens computed": tokens, "CPU seconds": statistics.median(seconds[1:])}
    found |= {"peak GB": memory_gb(), "held GB": held, "beyond GB": memory_gb() - held - libraries}
    return found


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--only", choices=tuple(SWEEPS))
    p.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    p.add_argument("--out", default="")
    p.add_argument("--one", default="", help=argparse.SUPPRESS)  # JSON of one row, for the process that measures it
    args = p.parse_args()
    if args.one:
        print(json.dumps(one(json.loads(args.one), args.dtype)))
        return
    rows: list[dict[str, Any]] = []
    for name, sweep in SWEEPS.items():
        for change in sweep if args.only in (None, name) else []:
            command = [sys.executable, __file__, "--dtype", args.dtype, "--one", json.dumps(BASE | change)]
            out = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parent).stdout
            rows.append({"sweep": name, "change": json.dumps(change)} | json.loads(out.splitlines()[-1]))
    print(table([list(rows[0]), *(list(row.values()) for row in rows)]))
    save({"base": BASE, "dtype": args.dtype, "rows": rows}, args.out)


if __name__ == "__main__":
    main()
