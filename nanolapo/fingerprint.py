"""What a resumed run must share with the run that wrote the checkpoint: everything that changes its numbers.

Every key of the config's training sections belongs to it, unless FREE says that it changes no number. So a new key is
compared until somebody decides otherwise. A key of TOLD may change, because users change it on purpose; a line says so.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

from nanolapo.config import Config, UserError
from nanolapo.data.load import Data
from nanolapo.methods.base import Method
from nanolapo.samplers.choose import pick_engine

SECTIONS = ("run", "model", "prompt", "rollout", "train", "loss", "lapo")
FREE = frozenset({
    # names, logs and what is kept
    "run.name", "run.dir", "run.checkpoint_every", "run.keep_checkpoints", "run.print_every", "run.log_rollouts",
    "run.export_every",
    # speed and memory: the same numbers but for rounding
    "run.threads", "model.gradient_checkpointing", "model.compile", "model.sharding", "model.offload_reference",
    "rollout.max_rows", "rollout.gpu_memory_utilization", "rollout.tensor_parallel", "train.microbatch_tokens",
    # when to give up
    "rollout.mismatch_factor", "rollout.mismatch_floor", "train.max_bad_steps",
    # compared by what they lead to: the problems, the length map in the checkpoint
    "rollout.max_prompt_tokens", "lapo.length_map",
})  # fmt: skip
RENDERED = "prompt, rendered"
LENGTH = frozenset({"train.steps", "train.sampled_tokens"})  # a run that goes on for longer
TOLD = LENGTH | frozenset({
    "train.learning_rate", "train.grad_clip",  # a run that had become unstable
    "rollout.engine",  # another machine
    RENDERED,  # with the same keys: a template that writes today's date
})  # fmt: skip
NUM_NAMED = 4  # changed keys in a message
NUM_SHOWN = 60  # characters of a value


def fingerprint_of(config: Config, method: Method, data: Data) -> dict[str, Any]:
    """Return everything that changes the numbers of a run, as JSON stores it."""
    found: dict[str, Any] = {"method": f"{type(method).__module__}:{type(method).__name__}"}
    for section in SECTIONS:
        values = asdict(getattr(config, section))
        found |= {f"{section}.{key}": value for key, value in values.items() if f"{section}.{key}" not in FREE}
    found |= {f"method.options.{key}": value for key, value in asdict(method.options).items()}
    found["rollout.engine"] = pick_engine(config)  # `auto` may be another one on another machine
    problems = data.problems
    found["data, problems"] = len(problems)
    found["data"] = digest([p.id for p in problems])
    found["data, answers"] = digest([p.answer for p in problems])
    if problems:
        found[RENDERED] = data.prompter.render(problems[0].question)
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return plain


def digest(lines: list[str]) -> str:
    """A short hash that says whether two lists are the same."""
    return sha256("\n".join(lines).encode()).hexdigest()[:16]


def refuse_changes(checkpoint: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise UserError, naming the keys with both values, if this run is not the one that wrote the checkpoint."""
    changed = [key for key in different(then, now) if key not in TOLD]
    if changed:
        pairs = [shown(then[key], now[key]) for key in changed[:NUM_NAMED]]
        old, new = (", ".join(f"{key}={pair[i]}" for key, pair in zip(changed, pairs, strict=False)) for i in (0, 1))
        more = f" (and {len(changed) - NUM_NAMED} more)" if len(changed) > NUM_NAMED else ""
        raise UserError(
            f"{checkpoint} was written with {old}, this run has {new}{more}: resume with the same settings, or choose "
            "another run.name"
        )


def changes(then: dict[str, Any], now: dict[str, Any], progress: float) -> list[str]:
    """Return a line for each key that a resumed run may change. `progress`: the share of the run that is done now."""
    pairs = [(key, *shown(then[key], now[key])) for key in different(then, now) if key in TOLD]
    share = f"; progress is now {progress:.0%}, and what follows it (learning rate, limits) goes on from there"
    return [f"{key}={new} from here on; it was {old}{share if key in LENGTH else ''}" for key, old, new in pairs]


def different(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The keys with two values. A key that an earlier version did not write has only one."""
    return [key for key in now if key in then and then[key] != now[key]]


def shown(then: Any, now: Any) -> tuple[str, str]:
    """Both values; of long ones the part where they begin to differ.

    >>> shown(1, 2), shown("a" * 99 + "yes", "a" * 99 + "no")
    (('1', '2'), ("'...aaaaaaaaaaaayes'", "'...aaaaaaaaaaaano'"))
    """
    texts = [value if isinstance(value, str) else repr(value) for value in (then, now)]
    if max(map(len, texts)) > NUM_SHOWN:
        start = max(0, len(os.path.commonprefix(texts)) - 12)
        before = "..." if start else ""
        texts = [before + text[start : start + NUM_SHOWN] + "..." * (len(text) > start + NUM_SHOWN) for text in texts]
        return repr(texts[0]), repr(texts[1])
    return repr(then), repr(now)
