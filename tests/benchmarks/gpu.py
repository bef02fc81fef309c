"""What only a GPU can show: that the trainer is right there, and the seconds of a step. In at most six minutes:

    python tests/benchmarks/gpu.py [--out runs/bench/gpu] [--only attention,step] [--peak-tflops 989]
    python tests/benchmarks/gpu.py --tiny [--dtype bfloat16] [--engine vllm]     # on a CPU: proves the script, not the GPU
    VLLM_USE_V2_MODEL_RUNNER=1 python tests/benchmarks/gpu.py --only engine,step      # vLLM's other model runner

Every part runs in a process of its own with a time limit. A part that fails does not stop the others; the exit code is 1
then. First come the parts that prove something (gpu_correct.py). Those that measure get the time that is left, and say so
when they were cut; run them alone then. All weights are random, so no network is needed. vLLM must be installed; TRL is
measured if it is.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import table
from gpu_correct import ROOT, attention, engine, evaluation, fsdp2, random_model, resume

PROOFS = {"attention": 40, "fsdp2": 90, "engine": 90, "resume": 90, "evaluation": 110}  # at most so many seconds
MEASURES = {"update": 240, "step": 150, "trl": 150}
SECONDS = PROOFS | MEASURES
TOTAL = 360  # seconds of all parts
PATIENCE = 5  # times as long with --tiny: a CPU may be busy with other work
WORTH = 60  # a measure is not begun with fewer: an engine alone takes 40 to 60 s to start


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=Path("runs/bench/gpu"))
    p.add_argument("--only", default=",".join(SECONDS))
    p.add_argument("--tiny", action="store_true")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), help="bfloat16; float32 with --tiny")
    p.add_argument("--engine", choices=("torch", "vllm"), help="vllm; torch with --tiny")
    p.add_argument("--peak-tflops", type=float, default=989.0, help="dense bf16 peak; 989 for an H100 or H200 SXM")
    p.add_argument("--part", choices=tuple(SECONDS), help=argparse.SUPPRESS)
    args = p.parse_args()
    if unknown := set(args.only.split(",")) - set(SECONDS):
        raise SystemExit(f"--only {args.only}: there is no part {sorted(unknown)[0]!r}; take {', '.join(SECONDS)}")
    if not args.tiny and not torch.cuda.is_available():
        raise SystemExit("no CUDA device is here; --tiny tries every part on a CPU")
    args.dtype = args.dtype or ("float32" if args.tiny else "bfloat16")
    args.engine = args.engine or ("torch" if args.tiny else "vllm")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part:
        return PARTS[args.part](args)
    results = run_parts(args)
    print(table([["part", "result", "seconds"], *results]))
    sys.exit(any(result != "ok" and not result.startswith(("left out", "cut")) for _, result, _ in results))


def run_parts(args: Any) -> list[list[Any]]:
    """Run each part in turn; its name, `ok` or what went wrong, and its seconds."""
    started, results, patience = time.monotonic(), list[list[Any]](), PATIENCE if args.tiny else 1
    for name in args.only.split(","):
        if name == "trl" and not importlib.util.find_spec("trl"):
            results.append([name, "left out: TRL is not installed", 0.0])
            continue
        print(f"--- {name}", flush=True)
        begun = time.monotonic()
        limit = min(SECONDS[name] * patience, TOTAL * patience - (begun - started))
        result = finish(command_of(name, args), limit, name in MEASURES)
        results.append([name, result, time.monotonic() - begun])
    return results


def command_of(name: str, args: Any) -> list[str]:
    given = {"out": args.out, "peak-tflops": args.peak_tflops, "dtype": args.dtype, "engine": args.engine}
    common = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    return [sys.executable, __file__, "--part", name, *common, *(["--tiny"] if args.tiny else [])]


def finish(command: list[str], limit: float, measures: bool) -> str:
    """Run a command in a session of its own; `ok`, or its exit code, or that its time was over (then all of it ends). A
    measure without enough time is cut, and that is no failure."""
    if limit < (WORTH if measures else 1):
        return "cut: not begun, no time was left" if measures else "no time was left"
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": paths}, start_new_session=True)
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.wait()
        return f"{'cut: ' * measures}not done after {limit:.0f} s"
    return "ok" if code == 0 else f"exit code {code}"


# ------------------------------------------------------------------------------------------------------------- tables


def script(args: Any, name: str, *more: str) -> None:
    """Run another benchmark script on the random model of the tables."""
    folder = random_model(args, "large", large=True)
    sizes = ("2", "2", "4", "2") if args.tiny else ("16", "8", "1024", "2")
    flags = ("--prompts", "--group", "--tokens", "--steps")
    given = [word for pair in zip(flags, sizes, strict=True) for word in pair]
    out = ["--dtype", args.dtype, "--out", str(args.out / f"{Path(name).stem}.json")]
    command = [sys.executable, str(Path(__file__).with_name(name)), "--model", str(folder), *given, *out, *more]
    subprocess.run(command, check=True)


def step(args: Any) -> None:
    """Whole steps by phase; sampling beside the engine's own generate; the update's share of the peak."""
    peak = ["--peak-tflops", str(args.peak_tflops), "--microbatch-tokens", "32768", "--gradient-checkpointing"]
    script(args, "step.py", "--engine", args.engine, *([] if args.tiny else [*peak, "--raw-only"]))


def update(args: Any) -> None:
    """The update with each of its settings for speed, and its kernels by kind."""
    from gpu_update import update_table

    update_table(random_model(args, "large", large=True), args.tiny, args.peak_tflops)


def trl(args: Any) -> None:
    """TRL's step on the same workload."""
    script(args, "trl_step.py", "--gradient-checkpointing")


PARTS = {
    "attention": attention, "fsdp2": fsdp2, "engine": engine, "resume": resume, "evaluation": evaluation, "update": update,
    "step": step,
    "trl": trl,
}  # fmt: skip


if __name__ == "__main__":
    main()
