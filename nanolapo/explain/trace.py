"""Records one step: it listens to the parts of a session while loop.run_step uses them.

It computes and changes nothing. A listener sees the arguments and the result of a call that happens as usual. Hooks that
return nothing read the two gradients of a Pass from the backward pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from nanolapo.data.problems import Problem
from nanolapo.data.prompts import Guidance
from nanolapo.losses import LossInputs
from nanolapo.methods.lapo import Internalization, Lapo
from nanolapo.rollouts import Rollouts
from nanolapo.samplers.sampler import Request, Sample
from nanolapo.session import Session

Place = tuple[str, int]  # problem id, number of the rollout in its group


@dataclass
class Pass:
    """One micro-batch in the loss, with two gradients that the backward pass really computed."""

    update: int  # optimizer steps done in this step before it
    x: LossInputs  # without graph
    loss_BT: Tensor
    logged: dict[str, Tensor]
    weight_BT: Tensor | None = None  # d loss / d loss_BT: 1 / denominator for the tokens that count, else 0
    pull_BT: Tensor | None = None  # d loss / d log p: below 0, and the optimizer makes the token likelier

    def shares_BT(self) -> Tensor:
        """What each token adds to the loss of its optimizer step."""
        assert self.weight_BT is not None
        return self.loss_BT * self.weight_BT


@dataclass
class Trace:
    """The record of one step. A problem id is a key, because no problem comes twice within a step."""

    guidance: dict[Place, Guidance] = field(default_factory=dict)
    requests: dict[Place, Request] = field(default_factory=dict)
    # LAPO's M(q) of known problems, when rewards were due
    targets: dict[str, float | None] = field(default_factory=dict)
    centers: dict[str, float] = field(default_factory=dict)  # n of Eq. 7, stage 2
    parts: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)  # problem -> name -> [G]
    passes: list[Pass] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)  # of each optimizer step, before clipping
    weights_before: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)  # the line of metrics.jsonl

    rollouts: Rollouts = field(init=False)  # trained on; the method was asked for their advantages
    rewards_PG: Tensor = field(init=False)
    advantages: Tensor = field(init=False)  # [B], or [B, T]

    def observed(self, s: Session) -> ExitStack:
        """Listen to the parts of a session while the returned context is open."""
        asked: list[Place] = []  # the rows of the next call of the sampler

        def on_guidance(guidance: Guidance, problem: Problem, rollout: int, step: int) -> None:
            asked.append((problem.id, rollout))
            self.guidance[asked[-1]] = guidance

        def on_generate(samples: list[Sample], requests: list[Request], *_: Any) -> None:
            self.requests |= dict(zip(asked, requests, strict=True))
            asked.clear()

        def on_center(center: float, problem: Problem, *_: Any) -> None:
            self.centers[problem.id] = center

        def on_reward(parts: dict[str, np.ndarray], rollouts: Rollouts) -> None:
            grouped = {name: rollouts.by_group(values) for name, values in parts.items()}
            for g, problem in enumerate(rollouts.problems):
                self.parts[problem.id] = {name: values_PG[g] for name, values_PG in grouped.items()}
            if isinstance(s.method, Lapo):
                self.targets |= s.method.length_map.entries

        def on_advantage(advantages: Tensor, rollouts: Rollouts, rewards_PG: Tensor) -> None:
            self.rollouts, self.rewards_PG, self.advantages = rollouts, rewards_PG, advantages

        def on_loss(result: tuple[Tensor, dict[str, Tensor]], x: LossInputs) -> None:
            loss_BT, logged = result
            now = Pass(
                len(self.norms), dataclasses.replace(x, logprobs_BT=x.logprobs_BT.detach()), loss_BT.detach(), logged
            )
            loss_BT.register_hook(lambda gradient: setattr(now, "weight_BT", gradient))
            x.logprobs_BT.register_hook(lambda gradient: setattr(now, "pull_BT", gradient))
            self.passes.append(now)

        ears = ExitStack()
        for part, name, hear in (
            (s.method, "guidance", on_guidance),
            (s.sampler, "generate", on_generate),
            (s.method, "reward", on_reward),
            (s.method, "advantage", on_advantage),
            (s.method.loss, "__call__", on_loss),
            (s.policy, "step", self.norms.append),
            (s.log, "step", lambda _, step, metrics, share: self.metrics.update(metrics)),
        ):
            ears.enter_context(listening(part, name, hear))
        if isinstance(s.method, Internalization):
            ears.enter_context(listening(s.method, "center", on_center))
        return ears


@contextmanager
def listening(part: Any, name: str, hear: Callable[..., None]) -> Iterator[None]:
    """While it is open, call `hear(result, *arguments)` after every call of part.name, which itself stays the same.

    >>> class Part:
    ...     def double(self, x): return 2 * x
    >>> part, heard = Part(), []
    >>> with listening(part, "double", lambda result, x: heard.append((x, result))): part.double(4)
    8
    >>> part.double(5), heard
    (10, [(4, 8)])
    """
    kind = type(part)

    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        result = getattr(kind, name)(self, *arguments, **named)
        hear(result, *arguments, **named)
        return result

    part.__class__ = type(kind.__name__, (kind,), {name: call})  # unlike part.name = call, this works for __call__, too
    try:
        yield
    finally:
        part.__class__ = kind
