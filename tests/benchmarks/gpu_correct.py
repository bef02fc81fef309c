"""What only a GPU can show to be right: the parts of gpu.py that compare numbers. Each ends with SystemExit if they differ.

Allowed differences. float32 (the CPU's trial) differs by the order of sums. bf16 has 8 significant bits: rounding moves a
number by at most 2**-8, and by 1.7e-3 of it in the mean (root of the squares), whatever its size. So results that were
rounded k times on the way, independently of each other, are sqrt(k) * 1.7e-3 apart in relative norm. An error in the
logic, such as one key too many, is above 0.05 at these sizes.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from nanolapo.policy import Policy
    from nanolapo.ranks import Ranks

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]


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
    model.to(getattr(torch, args.dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def check(what: str, found: float, most: float) -> None:
    """Print a difference, and end the part if it is larger than allowed, or NaN."""
    print(f"{what}: {found:.2e}, allowed {most:.0e}", flush=True)
    if not found <= most:
        raise SystemExit(f"{what} is {found:.2e}, more than {most:.0e}")


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    wanted = wanted.detach().float()
    return float((found.detach().float() - wanted).norm() / wanted.norm())


def allowed(args: Any, float32: float, bfloat16: float) -> float:
    return float32 if args.dtype == "float32" else bfloat16


def rollout_of(args: Any) -> dict[str, Any]:
    """16 rows at once, so that vLLM records few CUDA graphs."""
    return {"engine": args.engine, "gpu_memory_utilization": 0.3, "max_rows": 16}


def attention(args: Any) -> None:
    """The trainer's attention, whatever it picks, against float32 SDPA row by row; output and the three gradients.

    In bf16 the probabilities and the result are rounded, or for a gradient three such factors: 2.4e-3 and 2.9e-3 in an
    emulation in float32. The gradients of a prompt are sums over its answers, in bf16 again.
    """
    import torch.nn.functional as F

    from nanolapo.model.attention import pack, shared_prompt_attention

    torch.manual_seed(0)
    dtype, most = getattr(torch, args.dtype), allowed(args, 1e-5, 6e-3)
    P, answers = (5, (7, 1, 12)) if args.tiny else (100, (256, 1, 900))
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
        check(f"row of {count}", relative(out[:, start : start + count], wanted[:, P:]), most)
        loss = loss + (wanted[:, P:] * weight[:, start : start + count]).sum()
    loss.backward()
    answered = torch.cat([torch.arange(start, start + count, device=device()) for _, start, count in spans])
    (out.float() * weight)[:, answered].sum().backward()
    for name, mine, reference in zip("qkv", qkv, exact, strict=True):
        assert mine.grad is not None and reference.grad is not None
        check(f"gradient of {name}", relative(mine.grad, reference.grad), most)


def engine(args: Any) -> None:
    """Log-probs of the engine against the trainer's, before and after sleep, wake and new weights; in between it refuses.

    Both compute in bf16, in kernels of their own: vLLM for CPUs is 1.0e-2 away in the mean, with the larger new weights
    1.9e-2. Stale or missing weights must be at least three times as far away as is allowed.
    """
    from rows import make_config

    from nanolapo.data.problems import Problem
    from nanolapo.microbatches import make_microbatch
    from nanolapo.policy import Policy
    from nanolapo.ranks import Ranks
    from nanolapo.rollouts import make_rollouts
    from nanolapo.samplers.choose import make_sampler
    from nanolapo.samplers.sampler import Decoding, Request

    folder, ranks = random_model(args, "small", large=False), Ranks()
    config = make_config(folder, model={"dtype": args.dtype}, rollout=rollout_of(args) | {"max_new_tokens": 32})
    policy = Policy(config, ranks.device, ranks)
    sampler = make_sampler(config, str(folder), 32, ranks)
    requests = [Request([5 + i, 6, 7], i, 32, Problem(f"{i // 2}", "", "", None, "")) for i in range(8)]

    def mismatch() -> float:
        rollouts = make_rollouts(requests, sampler.generate(requests, Decoding(1.0)), 2)
        micro = make_microbatch(rollouts, range(8), ranks.device)
        with torch.no_grad():
            own_BT = policy.logprobs(micro)[0]
        sampled_BT = micro.pad([row.sampler_logprobs for row in rollouts.rows])
        return float(((own_BT - sampled_BT).abs() * micro.mask_BT).sum() / micro.mask_BT.sum())

    most = allowed(args, 1e-4, 3e-2)
    if args.engine == "vllm":
        describe(sampler)
    sampler.load_weights(policy.sampler_weights())
    check("mean |d log-prob|", mismatch(), most)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in policy.trained.values():
            p.add_(0.1 * torch.randn_like(p))
    policy.weights_changed()
    if (stale := mismatch()) < 3 * most:
        raise SystemExit(f"other weights change nothing: {stale:.2e}")
    before = free_gb()
    sampler.sleep()
    print(f"sleep frees {free_gb() - before:.2f} GB on the device")
    sampler.wake()
    if args.engine == "vllm":
        refuses(lambda: sampler.generate(requests, Decoding(1.0)))
    sampler.load_weights(policy.sampler_weights())
    check("after sleep, wake and sync", mismatch(), most)
    sampler.close()


def describe(sampler: Any) -> None:
    """Print what the engine has chosen for itself."""
    import vllm

    config = sampler.llm.llm_engine.vllm_config
    runner, graphs = "V2" if config.use_v2_model_runner else "V1", config.compilation_config.cudagraph_mode
    print(f"vLLM {vllm.__version__}, model runner {runner}, CUDA graphs: {graphs}")


def free_gb() -> float:
    return torch.cuda.mem_get_info()[0] / 1e9 if torch.cuda.is_available() else 0.0


def refuses(call: Callable[[], Any]) -> None:
    try:
        call()
    except RuntimeError as error:
        print(f"refused: {error}")
        return
    raise SystemExit("it samples although the new weights have not come")


def fsdp2(args: Any) -> None:
    """One rank that holds everything as slices, gathers and reduces them (NCCL; gloo on a CPU) against the plain trainer:
    log-probs, the gradient, and the change of the weights by one optimizer step.

    In bf16 on a CPU log-probs are equal to the bit, the gradient is 1.3e-3 apart (fsdp2 adds the embedding's rows in bf16),
    and the change 1.7e-3 (AdamW's first step is the gradient's sign, and the smallest ones turn over). On a GPU the order
    of sums is not fixed, so four to ten times as much is allowed. A gradient that is
    halved on its way gave 0.2 (clipping hides a part of it).
    """
    from nanolapo.policy import Policy
    from nanolapo.ranks import Ranks

    class Split(Policy):
        sharded = True  # a Policy on one rank is not

    folder, ranks = random_model(args, "small", large=False), Ranks()
    plain = one_update(Policy, args, folder, ranks, cut=False)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    split = one_update(Split, args, folder, ranks, cut=True)
    dist.destroy_process_group()
    limits = {"log-probs": (1e-5, 5e-3), "gradient": (1e-5, 5e-3), "change of the weights": (1e-3, 2e-2)}
    for what, (found, wanted) in zip(limits, zip(split, plain, strict=True), strict=True):
        check(f"{what}, {backend} against unsharded", relative(found, wanted), allowed(args, *limits[what]))


def one_update(kind: type[Policy], args: Any, folder: Path, ranks: Ranks, cut: bool) -> list[torch.Tensor]:
    """Log-probs of a few rows, the gradient of all weights, and how one optimizer step changes them; one vector each. The
    keys' bias is left out: it shifts all scores of a query alike, so its gradient is nothing but rounding."""
    from rows import make_config, make_rows
    from tiny import update

    from nanolapo.microbatches import make_microbatch
    from nanolapo.model.sharding import gather_full

    policy = kind(make_config(folder, model={"dtype": args.dtype, "sharding": "fsdp2"}), ranks.device, ranks)
    rows, gradient = make_rows([40, 7, 90, 23], vocab=policy.vocab_size), list[torch.Tensor]()
    trained = [p for name, p in policy.trained.items() if not name.endswith("k_proj.bias")]

    if isinstance(trained[0], DTensor) != cut:
        raise SystemExit(f"slices: {not cut}, wanted: {cut}")

    def vector(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
        return torch.cat([gather_full(tensor.detach()).float().flatten().cpu() for tensor in tensors])

    with torch.no_grad():
        logprobs_BT, _ = policy.logprobs(make_microbatch(rows, range(4), ranks.device))
    before = vector(trained)
    policy.optimizer.register_step_pre_hook(lambda *_: gradient.append(vector(p.grad for p in trained)))
    update(policy, rows, [1.0, -1.0, 0.5, -0.5])
    return [vector([logprobs_BT]), gradient[0], vector(trained) - before]


def resume(args: Any) -> None:
    """Three steps at once, and the same run whose third step comes after a restart from the checkpoint of the second.

    On a CPU both end with the same bits. A GPU adds gradients up in any order, and AdamW may turn over the smallest: of the
    norm of the third step's change a few percent. Without Adam's moments, or with other rows, it would be about all.
    """
    from round_methods import make_run
    from safetensors.torch import load_file
    from step import RandomReward

    from nanolapo.loop import train

    folder = random_model(args, "small", large=False)
    shutil.rmtree(args.out / "resume", ignore_errors=True)
    config = make_run(
        folder, args.out / "resume", train={"steps": 3}, model={"dtype": args.dtype}, run={"keep_checkpoints": 3}
    )
    checkpoints = config.run_dir / "checkpoints"
    train(config, RandomReward(config))

    def weights(step: int) -> torch.Tensor:
        stored = load_file(checkpoints / f"step-{step:06d}" / "model.safetensors")
        return torch.cat([tensor.flatten() for tensor in stored.values()])

    start, whole = weights(2), weights(3)
    shutil.rmtree(config.run_dir / "model")
    shutil.rmtree(checkpoints / "step-000003")
    train(config, RandomReward(config))
    exact = not torch.cuda.is_available()
    check("the third step after a restart", relative(weights(3) - start, whole - start), 0.0 if exact else 0.1)


def evaluation(args: Any) -> None:
    """Two models, so two engines, one after the other in one process."""
    from round_methods import make_run

    from nanolapo.evaluation.evaluate import evaluate

    folders = [random_model(args, name, large=False) for name in ("small", "other")]
    shutil.rmtree(args.out / "evaluation", ignore_errors=True)
    config = make_run(
        folders[0], args.out / "evaluation", model={"dtype": args.dtype}, rollout=rollout_of(args),
        evaluate={"models": [f"{f.name}={f}" for f in folders], "samples": 1, "max_new_tokens": 8},
    )  # fmt: skip
    rows = evaluate(config)["rows"]
    if {row["model"] for row in rows} != {"small", "other"}:
        raise SystemExit(f"models in the results: {[row['model'] for row in rows]}")
    print(f"{len(rows)} rows of results")
