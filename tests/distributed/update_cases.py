"""Updates of every kind, run alike on any number of ranks; what came out goes to a file. Used by test_update_on_ranks.py.

python tests/distributed/launch.py 2 update_cases.py TIED_MODEL UNTIED_MODEL OUT_FOLDER
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from tiny import fill, make_config, make_rows

from nanolapo.losses import Loss, LossInputs
from nanolapo.methods.base import Method
from nanolapo.methods.drpo import Drpo
from nanolapo.methods.hapo_tokens import TokenHapo
from nanolapo.model.folder import load_model, named_weights
from nanolapo.model.sharding import gather_full
from nanolapo.policy import Policy
from nanolapo.ranks import Ranks
from nanolapo.update import update_policy

LENGTHS = (3, 200, 5, 60, 17, 9, 120, 30)  # two optimizer batches of four rows
ADVANTAGES = (1.0, -1.0, 0.5, -0.5, 2.0, -2.0, 0.3, -0.3)


@dataclass(frozen=True)
class Case:
    name: str
    model: str = "tied"
    aggregation: str = "token_mean"
    lengths: tuple[int, ...] = LENGTHS
    advantages: tuple[float, ...] = ADVANTAGES
    config: dict[str, dict[str, Any]] = field(default_factory=dict)
    nan_on_last_rank: bool = False
    method: type[Method] = Method
    loss: type[Loss] | None = None  # instead of the method's own
    dropped: tuple[int, ...] = ()  # rows


class LooksUpEveryRow(Loss):
    """GRPO's loss, but it reads everything that is known about the rows it is given."""

    needs_entropy = True

    def __call__(self, x: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        used = [(len(x.rollouts.rows[row].response_ids), len(x.rollouts.old_entropies[row])) for row in x.rows]
        assert used and all(length == known > 0 for length, known in used) and x.mask_BT.sum(dim=1).all()
        return super().__call__(x)


class NanOnLastRank(Loss):
    """GRPO's loss, but not a number on one rank."""

    def __call__(self, x: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        loss_BT, logged = super().__call__(x)
        last = not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1
        return loss_BT * (float("nan") if last else 1.0), logged


# Two rows with an advantage, one in each optimizer batch: most ranks have nothing to train.
IDLE = (0.0, -1.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0)
PLAIN = [
    Case(f"{model}-{aggregation}", model, aggregation)
    for model, aggregation in product(("tied", "untied"), ("token_mean", "sequence_mean", "constant"))
]
CASES = [
    *PLAIN,
    Case("idle-ranks", advantages=IDLE),
    # What fills an idle rank's place has no row, so no loss can look one up: row 0 has no advantage, or is dropped.
    Case("idle-hapo-tokens", advantages=IDLE, method=TokenHapo),
    Case("dropped-hapo-tokens", method=TokenHapo, dropped=(0, 2, 3), config={"train": {"inner_epochs": 2}}),
    Case("dropped-kl-cov", config={"loss": {"kind": "kl_cov"}}, dropped=(0, 2, 3)),
    Case("dropped-kl", config={"loss": {"kl_coef": 0.5}}, dropped=(0, 2, 3)),
    # The mean drift of a later batch is that of all ranks together. A weak penalty, or rounding would be most of it
    Case("drift", aggregation="sequence_mean", method=Drpo, config={
        "train": {"inner_epochs": 2}, "method": {"options": {"beta": 1.0, "delta": 0.0}},
    }),
    Case("idle-looks-up-every-row", advantages=IDLE, loss=LooksUpEveryRow),
    Case("kl", "untied", config={"loss": {"kl_coef": 0.5}}),
    Case("two-epochs", config={"train": {"inner_epochs": 2}}),
    Case("checkpointing", config={"model": {"gradient_checkpointing": True}}),
    Case("offload", config={"model": {"offload_reference": True}, "loss": {"kl_coef": 0.5}}),
    Case("lora", config={"model": {"lora_rank": 4}, "loss": {"kl_coef": 0.5}}),
    Case("compiled", config={"model": {"compile": True, "gradient_checkpointing": True}, "loss": {"kl_coef": 0.5}}),
    # One optimizer step, for a second gradient may differ by 15 %: Adam turns rounding into full steps, and a ratio may
    # then fall on the other side of the loss's clip limit.
    Case("bfloat16", config={"model": {"dtype": "bfloat16"}, "train": {"batch_size": 8}}),
    Case("nan", loss=NanOnLastRank, nan_on_last_rank=True),
    Case("nothing", advantages=(0.0,) * 8),
]  # fmt: skip


def run_case(case: Case, folders: dict[str, str], sharding: str) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Two calls of update_policy: the gradients of every optimizer step, the weights after each call, what was logged."""
    sections = {
        "model": {"sharding": sharding},
        "loss": {"aggregation": case.aggregation},
        "train": {"batch_size": 4, "microbatch_tokens": 256, "learning_rate": 1e-3, "grad_clip": 0.1},
    }
    for name, values in case.config.items():
        sections[name] = sections.get(name, {}) | values
    config = make_config(folders[case.model], **sections)
    ranks = Ranks()
    torch.manual_seed(0)  # of LoRA's first matrices
    # What is traced and where graphs break does not depend on the backend; test_compiling.py has the one that needs C++.
    with patch.object(torch, "compile", partial(torch.compile, backend="eager")):
        policy = Policy(config, ranks.device, ranks)
    start = {name: tensor.clone() for name, tensor in policy.named_weights()}
    logged = what_this_rank_holds(policy)
    seen: dict[str, Tensor] = {}
    steps = 0

    def keep_gradients(*_: object) -> None:
        nonlocal steps
        seen.update({f"gradient {steps} {n}": gather_full(p.grad).clone() for n, p in policy.trained.items()})
        steps += 1

    policy.optimizer.register_step_pre_hook(keep_gradients)
    method = case.method(config)
    method.loss = case.loss(config) if case.loss else method.loss
    rollouts = make_rows(case.lengths)
    fill(rollouts, keep=[row not in case.dropped for row in range(len(rollouts))])
    for call in range(1 if case.nan_on_last_rank else 2):
        result = update_policy(policy, method, rollouts, torch.tensor(case.advantages))
        logged |= {f"{name} {call}": value for name, value in result.items()}
        seen.update({f"weights {call} {name}": tensor.clone() for name, tensor in policy.named_weights()})
    if case.nan_on_last_rank:
        assert all(torch.equal(start[name], tensor) for name, tensor in policy.named_weights())
        assert not policy.optimizer.state and policy.bad_steps == 2 and steps == 0
    logged |= what_is_sent(policy)
    return {name: tensor.contiguous() for name, tensor in seen.items()}, logged


class GatheredBytes(TorchDispatchMode):
    """Counts what this rank gives to all-gathers."""

    total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "all_gather" in str(function):
            self.total += args[0].nbytes
        return function(*args, **(kwargs or {}))


def what_is_sent(policy: Policy) -> dict[str, float]:
    """The trained weights for a bf16 sampler: how many differ in a bit from the float32 weights, gathered first and then
    cast, and their share of the bytes that those take (0 where nothing is gathered)."""
    with GatheredBytes() as whole:
        wanted = {name: tensor.to(torch.bfloat16) for name, tensor in policy.named_weights()}
    with GatheredBytes() as cast:
        sent = dict(named_weights(policy.model, torch.bfloat16))
    assert sent.keys() == wanted.keys()
    differ = sum(sent[n].dtype != w.dtype or not torch.equal(sent[n], w) for n, w in wanted.items())
    return {"sent_differ": float(differ), "sent_share": cast.total / max(1, whole.total)}


def what_this_rank_holds(policy: Policy) -> dict[str, float]:
    """The share of all parameters that lies on this rank, whether head and embedding are one tensor, and how many buffers
    (rotary frequencies) differ from those of a model that was simply loaded."""
    plain = load_model(policy.config.model.path, policy.device)
    buffers = dict(policy.model.named_buffers())
    head, embedding = policy.model.get_output_embeddings().weight, policy.model.get_input_embeddings().weight
    held = sum(p.to_local().numel() if policy.sharded else p.numel() for p in policy.model.parameters())
    return {
        "held_share": held / sum(p.numel() for p in policy.model.parameters()),
        "head_is_embedding": float(head is embedding),
        "buffers": float(len(buffers)),
        "buffers_that_differ": float(sum(not torch.equal(buffers[n], b) for n, b in plain.named_buffers())),
    }


def everything(folders: dict[str, str]) -> Iterator[tuple[str, dict[str, Tensor], dict[str, float]]]:
    for sharding in ("ddp", "fsdp2"):
        for case in CASES:
            yield f"{sharding} {case.name}", *run_case(case, folders, sharding)


def main(tied: str, untied: str, out: str) -> None:
    if not dist.is_initialized():
        dist.init_process_group("gloo")  # also for one rank, which accelerate leaves without a group
    torch.set_num_threads(1)
    tensors, numbers = {}, {}
    for label, seen, logged in everything({"tied": tied, "untied": untied}):
        tensors |= {f"{label} | {name}": tensor for name, tensor in seen.items()}
        numbers |= {f"{label} | {name}": torch.tensor(value, dtype=torch.float64) for name, value in logged.items()}
    # Every rank writes: all of them must hold the same.
    save_file(tensors | numbers, Path(out) / f"rank{dist.get_rank()}of{dist.get_world_size()}.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
