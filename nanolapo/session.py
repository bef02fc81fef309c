"""Sets up a run: builds and checks everything the loop needs, the cheapest checks first.

Config and data are checked before any weight is loaded, so a misspelt file name costs a second and not a model load.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from nanolapo.alarms import Alarms
from nanolapo.checkpoint import load_checkpoint
from nanolapo.checks import Preflight
from nanolapo.config import Config
from nanolapo.config_file import validate
from nanolapo.data.load import Data, load_data
from nanolapo.fingerprint import changes, digest, fingerprint_of
from nanolapo.grader import Grader
from nanolapo.locks import alone_in
from nanolapo.methods.base import Method
from nanolapo.metrics import RunLog
from nanolapo.policy import Policy
from nanolapo.preflight import after_loading, before_training
from nanolapo.provenance import model_identity
from nanolapo.ranks import Ranks
from nanolapo.samplers.choose import make_sampler
from nanolapo.samplers.sampler import Sampler


@dataclass
class Session:
    """Everything that one step works with. A checkpoint holds `step` (the next to do) and `sampled_tokens`."""

    config: Config
    method: Method
    ranks: Ranks
    data: Data
    grader: Grader
    policy: Policy
    sampler: Sampler
    alarms: Alarms
    log: RunLog | None  # rank 0 only
    step: int = 0
    sampled_tokens: int = 0
    fingerprint: dict[str, Any] = field(default_factory=dict)  # see fingerprint.py
    preflight: Preflight = field(default_factory=Preflight)

    @property
    def progress(self) -> float:
        return progress(self.config, self.step, self.sampled_tokens)

    def say(self, *lines: str) -> None:
        """Print these lines once, on the main rank."""
        if self.ranks.is_main:
            print("\n".join(lines), flush=True)


@contextmanager
def open_session(config: Config, method: Method) -> Iterator[Session]:
    """Open a session: checked, resumed from its newest checkpoint, with a sampler that holds the trained weights.

    A run that is complete needs no sampler and no log, so it has none. No other process can open this run meanwhile.
    """
    ranks = set_up_process(config)
    with alone_in(config.run_dir, ranks.is_main), Grader(rule=method.grader_rule) as grader:
        data = load_data(config, grader, ranks)
        method.start(data.problems)
        arithmetic = f"{len(data.problems)} problems; {config.arithmetic(ranks.count)}"
        if ranks.is_main:
            print("\n".join([*data.report, arithmetic]), flush=True)
        checked = ranks.from_main(lambda: before_training(config, data, method))
        policy, alarms = Policy(config, ranks.device, ranks), Alarms(config)
        weights = ranks.from_main(lambda: model_identity(config.model.path))
        fingerprint = fingerprint_of(config, method, data) | {"model.path, the weights there": weights}
        # What each rank has read by itself: the tokenizer's folder, and what method.start reads, such as a length map.
        state = {f"method, {key}": digest([json.dumps(value)]) for key, value in method.state_dict().items()}
        ranks.agree(fingerprint | state, "every rank must read the same files: put them on a disk that all nodes share")
        saved = load_checkpoint(config.run_dir / "checkpoints", policy, fingerprint) or {}
        session = Session(
            config, method, ranks, data, grader, policy, None, alarms, None,  # type: ignore[arg-type]
            saved.get("step", 0), saved.get("sampled_tokens", 0), fingerprint, checked,
        )  # fmt: skip
        if saved:
            method.load_state_dict(saved["method"])
            method.loss.state |= saved.get("loss", {})
            same_engine = saved["fingerprint"].get("rollout.engine") == fingerprint["rollout.engine"]
            alarms.load_state_dict(saved["alarms"], same_engine)
        if session.progress < 1:
            if saved:
                told = changes(saved["fingerprint"], fingerprint, session.progress)
                session.say(f"resuming {config.run_dir} at step {session.step}", *told)
            session.sampler = make_sampler(config, config.model.path, config.rollout.max_new_tokens, ranks)
            # Before the first rollout too: a resumed run must sample from the model it trains.
            session.sampler.load_weights(policy.sampler_weights())
            session.say(*after_loading(checked, policy).lines())
            if ranks.is_main:
                session.log = RunLog(config, session.step, saved.get("wandb_id"), session.progress)
        try:
            yield session
        finally:
            if session.log:
                session.log.close()


def set_up_process(config: Config) -> Ranks:
    """Set threads and process group, and do the checks that need the number of ranks."""
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    ranks = Ranks()
    validate(config, ranks.count)
    keys = {f"{section}.{key}": value for section, part in asdict(config).items() for key, value in part.items()}
    ranks.agree(keys, "start every rank with the same YAML file and the same overrides")
    torch.manual_seed(config.run.seed)
    return ranks


def progress(config: Config, steps_done: int, sampled_tokens: int) -> float:
    """Return the share of the run that is done, by steps or by tokens, whichever is larger; at 1 it is complete."""
    limit = config.train.sampled_tokens  # 0: none
    return max(steps_done / config.train.steps, sampled_tokens / limit if limit else 0.0)


class StopRequest:
    """The first Ctrl-C stops the run after this step; the second stops it at once.

    SIGTERM only ever counts as the first: some launchers send it in addition to the terminal's Ctrl-C.
    """

    def __init__(self) -> None:
        self.wanted = False
        signal.signal(signal.SIGINT, self.on_signal)
        signal.signal(signal.SIGTERM, self.on_signal)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.wanted:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.wanted = True
        # Not print: the signal may have come while one was writing, and that one cannot be entered again
        os.write(1, b"\nstopping after this step, with a checkpoint; press Ctrl-C again to stop at once\n")


def final_model(config: Config) -> Path:
    """Return the folder of the trained model; the next stage's model.path points to it."""
    return config.run_dir / "model"


def export_folder(config: Config, step: int) -> Path:
    """Return the folder in which run.export_every writes the model after `step` steps."""
    return config.run_dir / "models" / f"step-{step:06d}"
