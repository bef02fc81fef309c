"""LAPO's reward and map with DLER's advantage and dynamic sampling, against numbers computed by hand and by NumPy.

Run: python -m pytest tests/methods/test_lapo_dler.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from round_methods import make_base, make_run
from tiny import fill, make_config, make_rows

from nanolapo.config import UserError
from nanolapo.config_file import load_config, read_yaml
from nanolapo.loop import train
from nanolapo.methods import load_method
from nanolapo.methods.lapo import Discovery
from nanolapo.methods.lapo_dler import LapoDler

METHODS = Path(__file__).parents[2] / "configs/methods"


def make(lapo: dict[str, Any] | None = None, **options: Any) -> LapoDler:
    config = make_config(
        rollout={"group_size": 4, "max_new_tokens": 300}, lapo={"decay": 100.0} | (lapo or {}),
        method={"options": options},
    )  # fmt: skip
    return LapoDler(config)


def batch():
    """Four groups: right throughout with other lengths, mixed, wrong throughout, right throughout with one length."""
    return make_rows(
        [10, 20, 30, 90, 50, 40, 60, 70, 9, 9, 9, 9, 80, 80, 80, 80], 4,
        correct=[True] * 4 + [True, True, False, False] + [False] * 4 + [True] * 4,
    )  # fmt: skip


def test_the_reward_is_discoverys_and_the_advantage_dlers():
    """Group 0 by hand: P30 = 19, P70 = 36 (linear), so d = 9, 0, 0, 54 and R = 1 + 0.7 (1 - d/100); group 1: P30 = 43,
    P70 = 47, d = 3, 3. Groups 2 and 3 are dropped: their rewards are all equal. Centred in the group,
    then (x - mean) / std over the eight rollouts that are kept, unbiased."""
    method, rollouts = make(), batch()
    parts = method.reward(rollouts)
    rewards = sum(parts.values())
    np.testing.assert_allclose(rewards[:8], [1.637, 1.7, 1.7, 1.322, 1.679, 1.679, 0, 0])
    assert parts.keys() == {"correct", "length"} and rewards[8:].tolist() == [0] * 4 + [1.7] * 4
    rewards_PG = rollouts.by_group(rewards)
    assert method.keep_groups(rollouts, rewards_PG).tolist() == [True, True, False, False]
    kept = rollouts.take([0, 1])
    centred = (rewards_PG[:2] - rewards_PG[:2].mean(axis=1, keepdims=True)).ravel()
    want = (centred - centred.mean()) / centred.std(ddof=1)
    np.testing.assert_allclose(method.advantage(kept, torch.from_numpy(rewards_PG[:2])), want, rtol=1e-12)
    tokens = kept.lengths_B
    mean = (tokens * centred).sum() / tokens.sum()
    std = np.sqrt((tokens * (centred - mean) ** 2).sum() / (tokens.sum() - 1))
    by_tokens = make(whiten="tokens").advantage(kept, torch.from_numpy(rewards_PG[:2]))
    np.testing.assert_allclose(by_tokens, (centred - mean) / std, rtol=1e-12)


def test_the_map_is_discoverys_over_all_that_was_sampled():
    """Dropped groups too: the one that is wrong throughout becomes unsolved, even if it was solved before; a cut answer
    never enters. The same as Discovery by itself writes."""
    method, rollouts = make(), fill(batch(), finished=[True] * 3 + [False] + [True] * 12)
    plain = Discovery(method.config.__class__(rollout=method.config.rollout, lapo=method.config.lapo))
    for one in (method, plain):
        one.length_map.update_discovery("demo:2", np.array([7.0]))
        one.after_step(rollouts)
    targets = [method.length_map.target(f"demo:{i}") for i in range(4)]
    assert targets == [20.0, 45.0, None, 80.0]
    assert method.state_dict() == plain.state_dict()


def test_the_limit_is_lapos_and_the_rounds_are_dlers():
    plan = make().sampling(0)
    assert (plan.max_new_tokens, plan.max_rounds) == (300, 4) and make(max_rounds=2).sampling(0).max_rounds == 2


@pytest.mark.parametrize("fidelity", ["recommended", "paper", "code"])
def test_lapos_readings_hold(fidelity):
    """A cut answer counts where LAPO says so; Dler would say no."""
    method, lapo = make({"fidelity": fidelity}), make({"fidelity": fidelity}).readings
    assert method.cut_answers_count == lapo.cut_answers_count == (fidelity != "recommended")
    assert method.grader_rule == lapo.grader_rule


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": 64}, "unknown key method.options.target"),  # a part of DLER's reward
        ({"cut_reward": 0.1}, "unknown key method.options.cut_reward"),
        ({"whiten": "rows"}, "method.options.whiten='rows' is not one of 'sequences', 'tokens'"),
    ],
)
def test_what_is_not_of_the_optimiser_is_refused(options, words):
    with pytest.raises(UserError, match=words):
        make(**options)


def test_it_is_discovery_for_everything_else():
    with pytest.raises(UserError, match="stage 1 makes its own map"):
        make({"length_map": "somewhere.json"}).start([])
    assert read_yaml(METHODS / "lapo-dler.yaml")["loss"] == read_yaml(METHODS / "dler.yaml")["loss"]
    config = load_config(METHODS.parent / "demo/stage1.yaml", [f"method={METHODS / 'lapo-dler.yaml'}"])
    assert load_method(config).sampling(0).max_new_tokens == 256  # the limit under which the demo's LAPO runs


@pytest.mark.slow
def test_a_step_that_drops_every_group_still_fills_the_map(tmp_path):
    """A model with random weights is never right: four rounds of four problems are sampled, none is trained on, and all
    sixteen are in the map, unsolved."""
    config = make_run(
        make_base(tmp_path / "base"), tmp_path, method={"name": "lapo_dler:LapoDler"}, lapo={"decay": 9.0},
        train={"steps": 1, "batch_size": 8, "learning_rate": 1e-2},
    )  # fmt: skip
    train(config, load_method(config))
    [line] = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert (line["rounds"], line["kept_groups"], line["updates"]) == (4, 0, 0)
    entries = json.loads((tmp_path / "run/length_map.json").read_text())["entries"]
    assert len(entries) == 16 and set(entries.values()) == {None} and line["map/solved_fraction"] == 0
