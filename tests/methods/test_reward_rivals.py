r"""Every rival that only shapes the reward: its YAML file loads, and no batch, however odd, breaks it.

Run: python -m pytest tests/methods/test_reward_rivals.py
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import fill, make_problems, make_rows

from nanolapo.config_file import load_config
from nanolapo.methods import load_method
from nanolapo.methods.base import Method
from nanolapo.rollouts import Rollouts

ROOT = Path(__file__).parents[2]
NAMES = [
    "l1-exact", "l1-max", "laser", "laser-d", "laser-de", "efficient-reasoning", "hapo", "grpo-lambda",
    "train-long-think-short", "hbpo", "shorter-better", "o1-pruner", "kimi-k1.5", "smart-thinker", "alp", "ddca",
    "short-rl", "a-dlp",
]  # fmt: skip
TEXTS = [r"x </think> \boxed{1}", r"x \boxed{1}", "x </think>", ""]
CASES = {  # lengths and verdicts of one group of eight
    "none right": ([5, 9, 30, 256, 1, 77, 77, 12], [False] * 8),
    "one right": ([5, 9, 30, 256, 1, 77, 77, 12], [True] + [False] * 7),
    "all right": ([5, 9, 30, 256, 1, 77, 77, 12], [True] * 8),
    "all equal": ([40] * 8, [True] * 4 + [False] * 4),
    "all of one token": ([1] * 8, [True] * 4 + [False] * 4),
    "all cut": ([256] * 8, [False] * 8),
}


def make(name: str) -> Method:
    """As `train_stage1.py configs/demo/stage1.yaml method=configs/methods/NAME.yaml` makes it: limit 256, group size 8."""
    config = load_config(ROOT / "configs/demo/stage1.yaml", [f"method={ROOT}/configs/methods/{name}.yaml"])
    method = load_method(config)
    method.start(make_problems(40))
    return method


def batch(method: Method, step: int, cases: list[str]) -> Rollouts:
    """Groups of these cases with the prompts that the method would have given them."""
    lengths, correct = (sum((CASES[case][i] for case in cases), []) for i in (0, 1))
    finished = [n < 256 for n in lengths]
    rollouts = make_rows(lengths, group_size=8, seed=step, correct=correct, finished=finished)
    guidances = [method.guidance(p, g, step) for p in rollouts.problems for g in range(8)]
    fill(rollouts, budget=np.array([np.nan if g.budget is None else g.budget for g in guidances]))
    fill(rollouts, text=[TEXTS[0] if right else TEXTS[b % 4] for b, right in enumerate(correct)])
    return rollouts


def one_step(method: Method, step: int, rollouts: Rollouts) -> tuple[list[float], list[float]]:
    """Rewards and advantages of a step; state is updated."""
    rewards = sum(method.reward(rollouts).values())
    advantages = method.advantage(rollouts, torch.from_numpy(rollouts.by_group(rewards)))
    logged = method.after_step(rollouts)
    assert all(np.isfinite(value) for value in logged.values()), logged
    return rewards.tolist(), advantages.tolist()


@pytest.mark.parametrize("name", NAMES)
def test_parts_are_finite_one_per_row_and_correct_is_the_plain_verdict(name: str):
    method = make(name)
    for step in range(3):
        plan = method.sampling(step)
        assert (plan.num_prompts, plan.group_size, plan.temperature, plan.max_new_tokens) == (32, 8, 1.0, 256)
        if method.monitor(step):
            method.on_monitor(batch(method, step, ["one right", "all cut"]))
        rollouts = batch(method, step, list(CASES))
        parts = method.reward(rollouts)
        assert parts["correct"].tolist() == rollouts.correct_B.tolist()
        for values in parts.values():
            assert values.shape == (48,) and values.dtype == np.float64 and np.isfinite(values).all()
        _, advantages = one_step(method, step, rollouts)
        assert len(advantages) == 48 and np.isfinite(advantages).all()


@pytest.mark.parametrize("name", NAMES)
def test_state_survives_json_and_the_next_steps_are_the_same(name: str):
    method, again = make(name), make(name)
    for step in range(6):
        if step == 4:  # stop, save, resume
            again.load_state_dict(json.loads(json.dumps(method.state_dict())))
        for m in [method] if step < 4 else [method, again]:
            m.sampling(step)
            if m.monitor(step):
                m.on_monitor(batch(m, step, ["one right", "all right", "none right"]))
        rollouts = batch(method, step, ["one right", "all right", "none right", "all equal"])
        before = one_step(method, step, rollouts)
        if step >= 4:
            assert before == one_step(again, step, rollouts)
    assert method.state_dict() == again.state_dict()


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("grpo-lambda", "o1-pruner")])
def test_rewards_of_a_group_do_not_depend_on_its_neighbours(name: str):
    """GRPO-lambda ranks the groups of a step, O1-Pruner standardises over them; for all others a group stands alone."""
    method = make(name)
    method.sampling(10)
    if method.monitor(0):
        method.on_monitor(batch(method, 0, ["one right", "all right", "none right"]))
    together = batch(method, 10, ["one right", "all right", "none right"])
    alone = batch(method, 10, ["one right"])
    fill(alone, response_ids=together.response_ids[:8])
    got, want = (sum(method.reward(rollouts).values()) for rollouts in (together, alone))
    np.testing.assert_array_equal(got[:8], want)


@pytest.mark.parametrize("name", NAMES)
def test_right_answers_outscore_wrong_ones_of_the_same_length(name: str):
    method = make(name)
    method.sampling(39)
    rollouts = make_rows([40] * 8, group_size=8, correct=[True] * 4 + [False] * 4)
    fill(rollouts, budget=[g.budget or np.nan for g in [method.guidance(rollouts.problems[0], 0, 39)]] * 8)
    fill(rollouts, text=[TEXTS[0]] * 8)
    reward = sum(method.reward(rollouts).values())
    if name == "l1-max":  # beyond its limit a right answer has nothing left, and its wrong ones have nothing either
        assert reward[:4].min() >= reward[4:].max()
    else:
        assert reward[:4].min() > reward[4:].max()
    advantages = method.advantage(rollouts, torch.from_numpy(reward[None]))
    assert advantages[:4].min() >= advantages[4:].max()


@pytest.mark.parametrize("name", NAMES)
def test_the_yaml_file_opens_with_its_source(name: str):
    first = (ROOT / f"configs/methods/{name}.yaml").read_text().splitlines()[0]
    assert first.startswith("# ") and "arXiv" in first
    assert "unverified" not in first
