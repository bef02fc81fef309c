"""What only a GPU can show: that the trainer is right there, and the seconds of a step. In at most six minutes:

    python tests/benchmarks/gpu.py [--out runs/bench/gpu] [--only attention,step] [--peak-tflops 989]
    python tests/benchmarks/gpu.py --tiny       # on a CPU with the torch sampler: it proves the script, not the GPU

Every part runs in a process of its own with a time limit. A part that fails does not stop the others; the exit code is 1
then. All weights are random, so no network is needed. vLLM must be installed; TRL is measured if it is.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import table

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]
SECONDS = {"attention": 40, "engine": 90, "resume": 60, "evaluation": 120, "update": 150, "step": 150, "trl": 100}
TOTAL = 360  # seconds of all parts


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=Path("runs/bench/gpu"))
    p.add_argument("--only", default=",".join(SECONDS))
    p.add_argument("--tiny", action="store_true")
    p.add_argument("--peak-tflops", type=float, default=989.0, help="dense bf16 peak; 989 for an H100 or H200 SXM")
    p.add_argument("--part", choices=tuple(SECONDS), help=argparse.SUPPRESS)
    args = p.parse_args()
    if unknown := set(args.only.split(",")) - set(SECONDS):
        raise SystemExit(f"--only {args.only}: there is no part {sorted(unknown)[0]!r}; take {', '.join(SECONDS)}")
    if not args.tiny and not torch.cuda.is_available():
        raise SystemExit("no CUDA device is here; --tiny tries every part on a CPU")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part:
        return PARTS[args.part](args)
    results = run_parts(args)
    print(table([["part", "result", "seconds"], *results]))
    sys.exit(any(result != "ok" and not result.startswith("left out") for _, result, _ in results))


def run_parts(args: Any) -> list[list[Any]]:
    """Run each part in turn; its name, `ok` or what went wrong, and its seconds."""
    started, results = time.monotonic(), list[list[Any]]()
    for name in args.only.split(","):
        if name == "trl" and not importlib.util.find_spec("trl"):
            results.append([name, "left out: TRL is not installed", 0.0])
            continue
        print(f"--- {name}", flush=True)
        begun = time.monotonic()
        limit = min(SECONDS[name], TOTAL - (begun - started))
        results.append([name, finish(command_of(name, args), limit), time.monotonic() - begun])
    return results


def command_of(name: str, args: Any) -> list[str]:
    common = ["--out", str(args.out), "--peak-tflops", str(args.peak_tflops), *(["--tiny"] if args.tiny else [])]
    return [sys.executable, __file__, "--part", name, *common]


def finish(command: list[str], limit: float) -> str:
    """Run a command in a session of its own; `ok`, or its exit code, or that its time was over (then all of it ends)."""
    if limit <= 0:
        return "no time was left"
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": paths}, start_new_session=True)
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.wait()
        return f"not done after {limit:.0f} s"
    return "ok" if code == 0 else f"exit code {code}"


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def random_model(args: Any, name: str, large: bool) -> Path:
    """A folder with random weights and the demo's tokenizer: the 1.5B shape of the tables, or two small layers."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from nanolapo.demo.pretrain import make_tokenizer

    folder = args.out / name
    tokenizer = make_tokenizer()
    shape = (1536, 28, 12, 2, 8960, 151_936) if large and not args.tiny else (128, 2, 4, 2, 256, len(tokenizer))
    names = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "vocab_size",
    )
    torch.manual_seed(sum(map(ord, name)))
    with device():
        model = Qwen2ForCausalLM(
            Qwen2Config(**dict(zip(names, shape, strict=True)), tie_word_embeddings=True, max_position_embeddings=4096,
                        initializer_range=0.02 if large else 0.1, eos_token_id=tokenizer.eos_token_id)
        )  # fmt: skip
    model.to(torch.float32 if args.tiny else torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def check(what: str, found: float, most: float) -> None:
    """Print a difference, and end the part if it is larger than allowed, or NaN."""
    print(f"{what}: {found:.2e}, allowed {most:.0e}", flush=True)
    if not found <= most:
        raise SystemExit(f"{what} is {found:.2e}, more than {most:.0e}")


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


# ------------------------------------------------------------------------------------------------------- correctness


def attention(args: Any) -> None:
    """The trainer's attention, whatever it picks, against float32 SDPA row by row; output and the three gradients."""
    import torch.nn.functional as F

    from nanolapo.model.attention import pack, shared_prompt_attention

    torch.manual_seed(0)
    dtype, (P, answers) = (
        torch.float32 if args.tiny else torch.bfloat16,
        (5, (7, 1, 12)) if args.tiny else (100, (256, 1, 900)),
    )
    spans, first = list[tuple[int, int, int]](), 0  # first token of the prompt and of the answer, tokens of the answer
    for _ in range(2):
        starts = [first + P + sum(answers[:i]) for i in range(len(answers))]
        spans += [(first, start, count) for start, count in zip(starts, answers, strict=True)]
        first += P + sum(answers)
    packing = pack([P, *answers] * 2, [0, 0, 0, 0, 4, 4, 4, 4], device())
    qkv = [torch.randn(1, heads, first, 64, device=device()).to(dtype).requires_grad_() for heads in (12, 2, 2)]
    out, _ = shared_prompt_attention(torch.nn.Module(), *qkv, None, scaling=0.125, packing=packing)
    exact = [x.detach().float().requires_grad_() for x in qkv]
    weight, loss = torch.randn_like(out.float()), torch.zeros((), device=device())
    for prompt, start, count in spans:
        row = [torch.cat([x[:, :, prompt : prompt + P], x[:, :, start : start + count]], 2) for x in exact]
        wanted = F.scaled_dot_product_attention(*row, is_causal=True, scale=0.125, enable_gqa=True).transpose(1, 2)
        check(f"row of {count}", relative(out[:, start : start + count], wanted[:, P:]), 1e-5 if args.tiny else 1e-2)
        loss = loss + (wanted[:, P:] * weight[:, start : start + count]).sum()
    loss.backward()
    answered = torch.cat([torch.arange(start, start + count, device=device()) for _, start, count in spans])
    (out.float() * weight)[:, answered].sum().backward()
    for name, mine, reference in zip("qkv", qkv, exact, strict=True):
        assert mine.grad is not None and reference.grad is not None
        check(f"gradient of {name}", relative(mine.grad, reference.grad), 1e-5 if args.tiny else 1e-2)


def engine(args: Any) -> None:
    """Log-probs of the engine against the trainer's, before and after sleep, wake and new weights."""
    from rows import make_config

    from nanolapo.data.problems import Problem
    from nanolapo.microbatches import make_microbatch
    from nanolapo.policy import Policy
    from nanolapo.ranks import Ranks
    from nanolapo.rollouts import make_rollouts
    from nanolapo.samplers.choose import make_sampler
    from nanolapo.samplers.sampler import Decoding, Request

    folder, ranks = random_model(args, "small", large=False), Ranks()
    config = make_config(folder, model=dtype_of(args), rollout=engine_of(args) | {"max_new_tokens": 32})
    policy = Policy(config, ranks.device, ranks)
    sampler = make_sampler(config, str(folder), 32, ranks)
    requests = [Request([5 + i, 6, 7], i, 32, Problem(f"{i // 2}", "", "", None, "")) for i in range(8)]

    def mismatch() -> float:
        rollouts = make_rollouts(requests, sampler.generate(requests, Decoding(1.0)), 2, policy.vocab_size)
        micro = make_microbatch(rollouts, range(8), ranks.device)
        with torch.no_grad():
            own_BT = policy.logprobs(micro)[0]
        sampled_BT = micro.pad([row.sampler_logprobs for row in rollouts.rows])
        return float(((own_BT - sampled_BT).abs() * micro.mask_BT).sum() / micro.mask_BT.sum())

    most = 1e-4 if args.tiny else 3e-2
    sampler.load_weights(policy.named_weights())
    check("mean |d log-prob|", mismatch(), most)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in policy.trained.values():
            p.add_(0.1 * torch.randn_like(p))
    policy.weights_changed()
    if (stale := mismatch()) < 3 * most:
        raise SystemExit(f"other weights change nothing: {stale:.2e}")
    sampler.sleep()
    sampler.wake()
    sampler.load_weights(policy.named_weights())
    check("after sleep, wake and sync", mismatch(), most)
    sampler.close()


def dtype_of(args: Any) -> dict[str, Any]:
    return {"dtype": "float32" if args.tiny else "bfloat16"}


def engine_of(args: Any) -> dict[str, Any]:
    return {"engine": "torch" if args.tiny else "vllm", "gpu_memory_utilization": 0.3}


def resume(args: Any) -> None:
    """Three steps at once, and the same run whose third step comes after a restart from the checkpoint of the second."""
    from round_methods import make_run
    from safetensors.torch import load_file
    from step import RandomReward

    from nanolapo.loop import train

    folder = random_model(args, "small", large=False)
    shutil.rmtree(args.out / "resume", ignore_errors=True)
    config = make_run(
        folder, args.out / "resume", train={"steps": 3}, model=dtype_of(args), run={"keep_checkpoints": 3}
    )
    train(config, RandomReward(config))
    whole = load_file(config.run_dir / "model" / "model.safetensors")
    shutil.rmtree(config.run_dir / "model")
    shutil.rmtree(config.run_dir / "checkpoints" / "step-000003")
    train(config, RandomReward(config))
    again = load_file(config.run_dir / "model" / "model.safetensors")
    check(
        "weights after a restart",
        max(float((whole[k] - again[k]).abs().max()) for k in whole),
        0.0 if args.tiny else 1e-2,
    )


def evaluation(args: Any) -> None:
    """Two models, so two engines, one after the other in one process."""
    from round_methods import make_run

    from nanolapo.evaluation.evaluate import evaluate

    folders = [random_model(args, name, large=False) for name in ("small", "other")]
    shutil.rmtree(args.out / "evaluation", ignore_errors=True)
    config = make_run(
        folders[0], args.out / "evaluation", model=dtype_of(args), rollout=engine_of(args),
        evaluate={"models": [f"{f.name}={f}" for f in folders], "samples": 1, "max_new_tokens": 8},
    )  # fmt: skip
    rows = evaluate(config)["rows"]
    if {row["model"] for row in rows} != {"small", "other"}:
        raise SystemExit(f"models in the results: {[row['model'] for row in rows]}")
    print(f"{len(rows)} rows of results")


# ------------------------------------------------------------------------------------------------------------- tables


def script(args: Any, name: str, *more: str) -> None:
    """Run another benchmark script on the random model of the tables."""
    folder = random_model(args, "large", large=True)
    sizes = ("2", "2", "4", "2") if args.tiny else ("32", "8", "1024", "2")
    flags = ("--prompts", "--group", "--tokens", "--steps")
    given = [word for pair in zip(flags, sizes, strict=True) for word in pair]
    out = ["--dtype", dtype_of(args)["dtype"], "--out", str(args.out / f"{Path(name).stem}.json")]
    command = [sys.executable, str(Path(__file__).with_name(name)), "--model", str(folder), *given, *out, *more]
    subprocess.run(command, check=True)


def step(args: Any) -> None:
    """Whole steps by phase, each beside its matrix products; the update's share of the peak."""
    peak = ["--peak-tflops", str(args.peak_tflops), "--microbatch-tokens", "32768", "--gradient-checkpointing"]
    script(args, "step.py", "--engine", engine_of(args)["engine"], *([] if args.tiny else peak))


def update(args: Any) -> None:
    """The update with each of its settings for speed, and its kernels by kind."""
    from gpu_update import update_table

    update_table(random_model(args, "large", large=True), args.tiny, args.peak_tflops)


def trl(args: Any) -> None:
    """TRL's step on the same workload."""
    script(args, "trl_step.py", "--gradient-checkpointing")


PARTS = {
    "attention": attention, "engine": engine, "resume": resume, "evaluation": evaluation, "update": update, "step": step,
    "trl": trl,
}  # fmt: skip


if __name__ == "__main__":
    main()
