"""How the update grows: seconds and peak memory by vocabulary, response length, group size, model size and ranks.

    python tests/benchmarks/growth.py [--only vocabulary|length|group|prompt|model|ranks] [--dtype bfloat16] [--out FILE]

Small Llama models with random weights, 8,192 tokens per optimizer step unless the row says otherwise. Every row runs in
processes of its own, the rows of `ranks` with one thread on each rank. Seconds are rank 0's, without the first update.
`held` is what must be there on a rank: float32 weights, gradients and two moments, and with bf16 the working copy; with
fsdp2 its share of all but the copy. `beyond` is the peak above that and above Python with its libraries: activations and
what passes through the head.
"""

from __future__ import annotations

import argparse
import json
import os
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
from nanolapo.data.problems import Problem
from nanolapo.methods.base import Method
from nanolapo.policy import Policy
from nanolapo.ranks import Ranks
from nanolapo.rollouts import Rollout, Rollouts
from nanolapo.update import update_policy

BASE: dict[str, Any] = {
    "vocab": 32_000, "layers": 4, "hidden": 256, "prompt": 64, "group": 8, "length": 448, "prompts": 2, "micro": 8192,
    "ranks": 1, "sharding": "ddp",
}  # fmt: skip
SWEEPS: dict[str, list[dict[str, Any]]] = {
    "vocabulary": [{"vocab": 32_000}, {"vocab": 152_000}],
    "length": [
        {"length": 192, "prompts": 4},
        {"length": 960, "prompts": 1},
        {"length": 1984, "prompts": 1, "group": 4},
    ],
    "group": [{"group": 2, "prompts": 8}, {"group": 16, "prompts": 1}],
    "prompt": [{"prompt": 16, "length": 496}, {"prompt": 256, "length": 256}],
    "model": [{"layers": 8}, {"hidden": 512}],
    "ranks": [
        {"threads": 1, "hidden": 512, "micro": 2048, **ranks}
        for ranks in ({}, {"ranks": 2}, {"ranks": 2, "sharding": "fsdp2"})
    ],
}


def one(settings: dict[str, Any], dtype: str) -> dict[str, float]:
    """The later updates of a policy in this process: the moments are there, everything has been used before."""
    torch.set_num_threads(settings.get("threads", torch.get_num_threads()))
    rng, (P, G) = np.random.default_rng(0), (settings["prompts"], settings["group"])
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=settings["vocab"], hidden_size=settings["hidden"], intermediate_size=3 * settings["hidden"],
        num_hidden_layers=settings["layers"], num_attention_heads=settings["hidden"] // 64,
        num_key_value_heads=settings["hidden"] // 64, tie_word_embeddings=True,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:  # of its own for every rank
        LlamaForCausalLM(shape).save_pretrained(folder)
        ranks = Ranks()  # not earlier: in a group transformers saves on rank 0 only
        values = {
            "model": {"path": folder, "dtype": dtype, "sharding": settings["sharding"]},
            "rollout": {"prompts_per_step": P, "group_size": G, "max_new_tokens": settings["length"]},
            "train": {"batch_size": 0, "microbatch_tokens": settings["micro"]},
            "loss": {"kl_coef": 0.0},
        }
        libraries = memory_gb("VmRSS")
        policy = Policy(build(Config, values, ""), torch.device("cpu"))
    prompts = [rng.integers(0, settings["vocab"], settings["prompt"]) for _ in range(P)]
    rows = P * G
    problem, logprobs = Problem("0", "", "1", None, "bench"), np.zeros(settings["length"], dtype=np.float32)
    answers = [rng.integers(0, settings["vocab"], settings["length"]) for _ in range(rows)]
    rollouts = Rollouts([Rollout(problem, prompts[b // G], answers[b], logprobs, True) for b in range(rows)], G)
    advantages = torch.from_numpy(rng.standard_normal(rows))
    seconds, cpu_seconds = [], []
    for _ in range(4):
        start, cpu_start = time.perf_counter(), time.process_time()
        update_policy(policy, Method(policy.config), rollouts, advantages)
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    count, cut = sum(p.numel() for p in policy.model.parameters()), settings["ranks"] if policy.sharded else 1
    held = count * (16 / cut + (2 if policy.bf16_copy else 0)) / 1e9
    tokens = P * settings["prompt"] + rows * settings["length"]
    found = {"parameters, M": count / 1e6, "tokens": tokens, "seconds": statistics.median(seconds[1:])}
    found |= {"CPU seconds": statistics.median(cpu_seconds[1:])}
    found |= {"peak GB": memory_gb(), "held GB": held, "beyond GB": memory_gb() - held - libraries}
    ranks.wait()  # a rank that ends early breaks off what another one still sends
    return found


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--only", choices=tuple(SWEEPS))
    p.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    p.add_argument("--out", default="")
    p.add_argument("--one", default="", help=argparse.SUPPRESS)  # JSON of one row, for the process that measures it
    args = p.parse_args()
    if args.one:
        found = one(json.loads(args.one), args.dtype)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(found))
        return
    rows: list[dict[str, Any]] = []
    for name, sweep in SWEEPS.items():
        for change in sweep if args.only in (None, name) else []:
            settings = BASE | change
            launch = [sys.executable]
            if settings["ranks"] > 1:
                launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={settings['ranks']}"]
            command = [*launch, __file__, "--dtype", args.dtype, "--one", json.dumps(settings)]
            out = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parent).stdout
            rows.append({"sweep": name, "change": json.dumps(change)} | json.loads(out.splitlines()[-1]))
            head, _, line = table([list(rows[0]), list(rows[-1].values())]).splitlines()
            print(head + "\n" + line if len(rows) == 1 else line, flush=True)
            save({"base": BASE, "dtype": args.dtype, "rows": rows}, args.out)


if __name__ == "__main__":
    main()
