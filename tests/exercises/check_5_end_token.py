"""Exercise 5: a mask made from token ids loses the end token, and rule zero stops the run. Run: make exercise N=5"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import CPU, make_config, make_rows, tiny_qwen, update
from transformers import AutoModelForCausalLM

from nanolapo.alarms import Alarms, MismatchError
from nanolapo.microbatches import make_microbatch
from nanolapo.policy import Policy
from nanolapo.rollouts import Rollouts

END = 1  # the id of the demo's end token


def answers(model: Path) -> Rollouts:
    """Four answers that end in the end token, with the log-probs of an exact sampler: plain transformers, no masks."""
    rollouts = make_rows([5, 9, 3, 7])
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for row, (prompt, ids) in enumerate(zip(rollouts.prompt_ids, rollouts.response_ids, strict=True)):
        ids[:] = np.append(np.maximum(ids[:-1], 2), END)
        with torch.no_grad():
            logp = network(torch.from_numpy(np.concatenate([prompt, ids]))[None]).logits[0].log_softmax(-1)
        logp_T = logp[len(prompt) - 1 : -1].gather(-1, torch.from_numpy(ids)[:, None])[:, 0]
        rollouts.rows[row].sampler_logprobs = logp_T.numpy()
    return rollouts


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_qwen().save_pretrained(folder)
    return folder


def test_the_mask_is_broken_as_asked(model):
    rollouts = answers(model)
    width = 9
    mask = [row + [0.0] * (width - len(row)) for row in make_microbatch(rollouts, range(4), CPU).mask_BT.tolist()]
    whole = [[1.0] * n + [0.0] * (width - n) for n in (5, 9, 3, 7)]
    broken = [[1.0] * (n - 1) + [0.0] * (width - n + 1) for n in (5, 9, 3, 7)]
    assert mask != whole, (
        "the mask of make_microbatch (nanolapo/microbatches.py) still holds the end token. That is right, and you are "
        "asked to break it: 0 wherever the token id is 1"
    )
    assert mask == broken, f"only the end token, id 1, should be missing from the mask; the four rows are now {mask}"


def test_rule_zero_stops_the_run_at_step_0(model):
    rollouts, policy = answers(model), Policy(make_config(model), CPU)
    mismatch = update(policy, rollouts, [1.0, -1.0, 0.5, -0.5])["mismatch"]
    stopped = False
    try:
        Alarms(policy.config).check_mismatch(0, mismatch)
    except MismatchError:
        stopped = True
    assert stopped, (
        f"the end token is gone from the mask, and nobody noticed: mean |dlogp| is {mismatch:.1e} at step 0. Break the "
        "mask alone: tokens_N, predictor_N and lengths_B stay, so that the masked place takes the next token's value"
    )
