"""Every method of this family: hard batches give finite numbers, and its state survives JSON.

Run: python -m pytest tests/methods/test_limit_configs.py
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import make_problems, make_rows

from nanolapo.config_file import load_config
from nanolapo.data.prompts import GivenTokens
from nanolapo.methods import load_method
from nanolapo.methods.base import Method

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = [
    "truncation", "thinkprune-4k", "thinkprune-iterative", "dler", "da-dler", "dapo", "dapo-overlong-filter", "conciser",
    "palu", "drpo", "spo", "sas", "hapo-tokens", "aepo", "dot", "gfpo", "siri", "lapo-dler", "adapt-think",
]  # fmt: skip


def method_of(name: str) -> Method:
    config = load_config(
        CONFIGS / "demo" / "stage1.yaml",
        [
            f"method={CONFIGS / 'methods' / name}.yaml",
            "rollout.group_size=4",
            "rollout.prompts_per_step=2",
            "train.batch_size=0",
            *(["method.options.spread=1.0"] if name == "dot" else []),  # no more than 1.5 is possible in a group of 4
        ],
    )
    method = load_method(config)
    if name.startswith("sas"):
        # in place of a tokenizer
        method.texts = {token: " word" if token % 5 else " end.\n\n" for token in range(64)}
    elif name == "adapt-think":
        # in place of a tokenizer and of the first model's pass
        method.closing_id, method.opening_id = 1, 2
        method.on_monitor(make_rows([9] * 8, 4))
    else:
        method.start(make_problems(8))
    return method


HARD = {  # name -> lengths, correct, finished
    "none right": ([5, 9, 1, 30, 200, 256, 2, 3], [False] * 8, [True] * 8),
    "one right": ([5, 9, 1, 30, 200, 256, 2, 3], [True] + [False] * 7, [True] * 8),
    "all right, all equal": ([7] * 8, [True] * 8, [True] * 8),
    "all cut": ([256] * 8, [False] * 8, [False] * 8),
    "single tokens": ([1] * 8, [True, False] * 4, [True] * 8),
    "ties": ([40, 40, 40, 40, 9, 9, 40, 40], [True, True, False, False] * 2, [True] * 8),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", HARD)
def test_hard_batches_are_finite_and_state_resumes(name, case):
    lengths, correct, finished = HARD[case]
    methods = [method_of(name), method_of(name)]
    group_size = 1 if name == "spo" else 4
    results = []
    for visit in range(2):
        if visit:  # the second method takes up the state of the first, as JSON
            methods[1].load_state_dict(json.loads(json.dumps(methods[0].state_dict())))
        for method in methods[: visit + 1]:
            rollouts = make_rows(lengths, group_size, correct=correct, finished=finished)
            if name == "adapt-think":
                for b, row in enumerate(rollouts.rows):
                    row.given, row.response_ids[0] = GivenTokens((1 + b % 2,), math.log(0.5)), 1 + b % 2
            method.sampling(visit)
            for row in method.edit_rollouts(rollouts):
                row.correct = False
            parts = method.reward(rollouts)
            rewards_PG = rollouts.by_group(sum(parts.values()))
            assert np.isfinite(rewards_PG).all() and set(np.unique(parts["correct"])) <= {0.0, 1.0}
            advantages = method.advantage(rollouts, torch.from_numpy(rewards_PG))
            kept_P = method.keep_groups(rollouts, rewards_PG)
            assert kept_P.shape == (len(rollouts.problems),) and kept_P.dtype == bool
            assert torch.isfinite(advantages).all() and advantages.shape[0] == 8
            if case in ("none right", "all right, all equal", "all cut") and name not in ("spo", "adapt-think"):
                zero = advantages.reshape(8, -1).any(dim=1).numpy() & np.repeat(kept_P, group_size)
                assert not zero.any()  # nothing to tell answers apart, whatever their length
            logged = method.after_step(rollouts)
            assert all(isinstance(value, float) for value in logged.values())
            results.append((rewards_PG, advantages, json.dumps(method.state_dict())))
    np.testing.assert_array_equal(results[1][0], results[2][0])
    assert torch.equal(results[1][1], results[2][1]) and results[1][2] == results[2][2]
