"""DOT: which answers are cut and where, what they are worth then, how much is sampled, and that all of it resumes.

Run: python -m pytest tests/methods/test_dot.py        As a script it is the two-rank run of the last test.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from round_methods import make_base, make_run
from safetensors.torch import load_file
from tiny import fill, make_config, make_problems, make_rows

from nanolapo.config import Config, UserError
from nanolapo.config_file import load_config
from nanolapo.data.order import round_indices
from nanolapo.loop import train
from nanolapo.methods import load_method
from nanolapo.methods.dot import Dot, oversampling
from nanolapo.ranks import Ranks
from nanolapo.rollouts import Rollout, Rollouts
from nanolapo.sampling import regrade

ROOT = Path(__file__).parents[2]


def build(group_size: int = 8, base: float = 8086, prompts: int = 4, **options: object) -> Dot:
    rollout = {"max_new_tokens": 4096, "base_tokens": base, "group_size": group_size, "prompts_per_step": prompts}
    method = Dot(make_config(rollout=rollout, method={"options": {"spread": 1.0, **options}}))
    method.start(make_problems(40))
    return method


def edited(method: Dot, lengths: list[int], correct: list[bool]) -> Rollouts:
    """As it mostly ends: what was cut has lost its box."""
    rollouts = make_rows(lengths, method.config.rollout.group_size, correct=correct)
    for row in method.edit_rollouts(rollouts):
        row.correct = False
    return rollouts


# ------------------------------------------------------------------------------------------------------ what is cut


@pytest.mark.parametrize(("group_size", "bound"), [(8, 2.47), (10, 2.85), (11, 3.02), (16, 3.75)])
def test_one_outlier_lies_at_most_so_many_standard_deviations_above_the_mean(group_size, bound):
    """METHODS' numbers: all answers but one of one length, which is cut just below the bound; above it nothing could be."""
    assert (group_size - 1) / math.sqrt(group_size) == pytest.approx(bound, abs=0.006)
    lengths, solved = [100] * (group_size - 1) + [4000], [True] * group_size
    below, above = round(bound - 0.05, 2), round(bound + 0.02, 2)
    assert edited(build(group_size, spread=below), lengths, solved).lengths_B[-1] < 4000
    with pytest.raises(UserError, match=f"spread={above}: with rollout.group_size={group_size} no answer lies"):
        build(group_size, spread=above)


def test_the_published_three_needs_eleven_answers():
    for group_size in (2, 4, 8, 10):
        with pytest.raises(UserError, match="method.options.spread=3.0"):
            Dot(make_config(rollout={"group_size": group_size}))
    assert Dot(make_config(rollout={"group_size": 11}, train={"batch_size": 0})).options.spread == 3.0
    for options in ({"spread": 0.0}, {"min_cut": 0}, {"min_cut": -1}):
        with pytest.raises(UserError, match=next(iter(options))):
            build(**options)
    with pytest.raises(UserError, match="group_size=1: an advantage compares"):
        build(group_size=1)


def slow_cut(lengths: list[int], spread: float, min_cut: float, min_tokens: float) -> list[int]:
    threshold = math.floor(statistics.mean(lengths) + spread * statistics.stdev(lengths))
    return [
        threshold if n - threshold >= (min_cut if min_cut >= 1 else max(min_cut * n, min_tokens)) else n
        for n in lengths
    ]


@pytest.mark.parametrize("min_cut", [32, 1, 0.25, 0.01])
def test_equals_a_slow_one(min_cut):
    rng = np.random.default_rng(0)
    cut = 0
    for _ in range(100):
        lengths = (rng.integers(20, 300, 8) * rng.choice([1, 1, 1, 1, 1, 9], 8)).tolist()
        want = slow_cut(lengths, 1.5, min_cut, 16)
        rollouts = edited(build(spread=1.5, min_cut=min_cut), lengths, [True] * 8)
        assert rollouts.lengths_B.tolist() == want
        assert [len(p) for p in rollouts.sampler_logprobs] == want
        assert rollouts.finished_B.tolist() == [n == w for n, w in zip(lengths, want, strict=True)]
        cut += sum(n != w for n, w in zip(lengths, want, strict=True))
    assert cut > 20, "hardly anything was cut: this compares nothing"


def test_smallest_cut():
    """Seven answers of 100 and one of 100 + 8d: mean 100 + d, std d sqrt(8), so for a = 1 T = floor(100 + 3.83 d)."""
    for longest, threshold in [(160, 128), (159, 128)]:  # d 7.5 and 7.375: 32 and 31 tokens above T, and m is 32
        want = threshold if longest - threshold >= 32 else longest
        assert edited(build(), [100] * 7 + [longest], [True] * 8).lengths_B[-1] == want
    share = [100] * 7 + [160]  # 32 above T: a fifth of it
    assert edited(build(min_cut=0.2), share, [True] * 8).lengths_B[-1] == 128
    assert edited(build(min_cut=0.21), share, [True] * 8).lengths_B[-1] == 160
    short = [10] * 7 + [36]  # 14 above T: more than a tenth, but less than 16 tokens
    assert edited(build(min_cut=0.1), short, [True] * 8).lengths_B[-1] == 36


def test_smallest_cut_scales_with_the_base_and_is_at_least_a_token():
    assert [build(base=8086 * share).min_cut for share in (2, 1, 0.25, 0.01)] == pytest.approx([64, 32, 8, 1])
    assert [build(base=8086 * share, min_cut=0.1).min_tokens for share in (1, 0.25, 0.01)] == pytest.approx([16, 4, 1])
    assert build(base=200, min_cut=32).min_cut == 32


def test_only_groups_that_are_right_throughout_are_cut():
    lengths, almost = [10, 10, 10, 90] * 3, [True] * 4 + [True, True, False, True] + [False] * 4
    rollouts = edited(build(group_size=4, min_cut=16), lengths, almost)
    assert rollouts.lengths_B.tolist() == [10, 10, 10, 70, 10, 10, 10, 90, 10, 10, 10, 90]
    assert rollouts.correct_B.tolist() == [True, True, True, False, *almost[4:]]


def test_edges_equal_lengths_single_tokens_and_nothing_to_cut():
    for lengths in ([7] * 8, [1] * 8, [4096] * 8, [1, 2, 1, 2, 1, 2, 1, 2]):
        rollouts = make_rows(lengths, 8, correct=[True] * 8)
        assert build().edit_rollouts(rollouts) == []
        assert rollouts.lengths_B.tolist() == lengths and rollouts.finished_B.all()


def test_a_cut_answer_is_worth_what_is_left_of_it():
    """Through the loop's own regrade; the answer is token 7. Row 3 shows it before the cut and stays right, row 7 does not.
    Group 0 stays without signal and is dropped, group 1 is pushed: the cut answer down, the others a third of that up."""
    method = build(group_size=4, min_cut=1)
    rollouts = make_rows([1] * 8, 4, correct=[True] * 8)
    early, late = [7] + [1] * 89, [1] * 89 + [7]
    fill(rollouts, response_ids=[np.array(ids) for ids in [[1] * 9 + [7]] * 3 + [early] + [[1] * 9 + [7]] * 3 + [late]])
    fill(rollouts, sampler_logprobs=[np.zeros(len(ids), dtype=np.float32) for ids in rollouts.response_ids])
    grader = SimpleNamespace(grade_all=lambda texts, references: ["7" in text for text in texts], errors=0, total=8)
    data = SimpleNamespace(decode=lambda ids: "".join(map(str, ids)))
    session = SimpleNamespace(data=data, grader=grader, method=method, ranks=Ranks())
    regrade(session, method.edit_rollouts(rollouts))
    assert rollouts.lengths_B.tolist() == [10, 10, 10, 70] * 2 and rollouts.texts[3] == "7" + "1" * 69
    rewards_PG = rollouts.by_group(sum(method.reward(rollouts).values()))
    assert rewards_PG.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert method.keep_groups(rollouts, rewards_PG).tolist() == [False, True]
    advantages = method.advantage(rollouts, torch.from_numpy(rewards_PG))
    assert advantages.tolist() == pytest.approx([0, 0, 0, 0, 0.5, 0.5, 0.5, -1.5])
    assert method.after_step(rollouts) == {"dot/cut": 0.25, "dot/kept_share": 0.5}


# ------------------------------------------------------------------------------------------------------ how much is sampled


def test_oversampling_by_its_formula():
    rng = np.random.default_rng(0)
    for count in (1, 2, 20):
        for _ in range(20):
            shares = (rng.random(count) ** 2).tolist()
            want = (1 / statistics.mean(shares)) * (1 + statistics.pstdev(shares))
            assert oversampling(shares) == pytest.approx(min(5.0, max(1.2, want)))
    assert (oversampling([]), oversampling([1.0]), oversampling([0.0]), oversampling([0.1])) == (1.5, 1.2, 5.0, 5.0)


def test_the_plan_follows_the_last_twenty_steps():
    method = build(group_size=4, prompts=32, min_cut=1)
    plan = method.sampling(0)
    assert (plan.num_prompts, plan.group_size, plan.max_rounds) == (48, 4, 1)
    half = make_rows([9] * 8, 4, correct=[True, False, False, False] + [False] * 4)
    method.edit_rollouts(half)
    for step in range(1, 41):
        assert method.after_step(half)["dot/kept_share"] == 0.5
        assert method.sampling(step).num_prompts == 64  # 2 x 32
    assert len(method.kept_shares) == 20
    all_right = make_rows([9] * 8, 4, correct=[True] * 8)
    for _ in range(20):
        method.after_step(all_right)
    assert method.kept_shares == [0.0] * 20 and method.sampling(61).num_prompts == 160  # 5 x 32
    mixed = make_rows([9] * 8, 4, correct=[True, False, False, False] * 2)
    for _ in range(20):
        method.after_step(mixed)
    assert method.sampling(81).num_prompts == 38  # 1.2 x 32 = 38.4, rounded down


def test_each_problem_once_a_step_and_another_choice_every_step():
    """Steps differ in size. The order of epochs takes them to be equal: step 48 with 47 prompts would begin where step 47
    with 48 did, and bring the same problems again."""
    method = Dot(make_config(rollout={"prompts_per_step": 32, "group_size": 8}, method={"options": {"spread": 1.0}}))
    method.start(make_problems(400))
    draws = []
    for step in range(400):
        method.kept_shares = [] if step < 48 else [0.675]  # 48 prompts, then 47
        plan = method.sampling(step)
        draws.append(round_indices(400, step, 0, plan.num_prompts, 0, plan.weights))
    assert (len(draws[47]), len(draws[48])) == (48, 47) and all(len(set(draw)) == len(draw) for draw in draws)
    shared = [len(set(one) & set(other)) for one, other in zip(draws, draws[1:], strict=False)]
    assert max(shared) < 20  # 5.6 expected
    visits = np.bincount(np.concatenate(draws), minlength=400)  # 47 expected, standard deviation 6.4
    assert visits.min() > 47 - 5 * 6.4 and visits.max() < 47 + 5 * 6.4


def test_the_first_groups_that_differ_are_trained_on_and_no_more_than_the_batch_has():
    method = build(group_size=2, prompts=2, min_cut=1, spread=0.5)
    rewards_PG = np.array([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert method.keep_groups(make_rows([9] * 10, 2), rewards_PG).tolist() == [False, True, False, True, False]


def test_state_survives_json():
    method, again = build(group_size=4, prompts=30, min_cut=1), build(group_size=4, prompts=30, min_cut=1)
    for right in (3, 8, 5):
        rollouts = make_rows([9] * 12, 4, correct=[True] * right + [False] * (12 - right))
        method.edit_rollouts(rollouts)
        method.after_step(rollouts)
    again.load_state_dict(json.loads(json.dumps(method.state_dict())))
    assert again.sampling(3).num_prompts == method.sampling(3).num_prompts != build(prompts=30).sampling(3).num_prompts
    assert again.kept_shares == pytest.approx([1 / 3, 0, 1 / 3])
    assert again.state_dict() == method.state_dict()


def test_its_yaml_has_the_published_loss():
    config = load_config(ROOT / "configs/deepscaler-1.5b/stage1.yaml", [f"method={ROOT}/configs/methods/dot.yaml"])
    loss = config.loss
    assert (loss.kind, loss.aggregation, loss.options) == ("kl_cov", "sequence_mean", {"share": 0.002, "coef": 1.0})
    method = load_method(config)
    assert isinstance(method, Dot) and method.cut_answers_count and method.min_cut == pytest.approx(32 * 6229 / 8086)


# ------------------------------------------------------------------------------------------------------ in the loop


class Fortunate(Dot):
    """A random model is never right: every third problem is called solved throughout, and has one long answer; of the next
    one some answers are right, of the last none. What is cut goes to the real grader, which finds it wrong."""

    def edit_rollouts(self, rollouts: Rollouts) -> list[Rollout]:
        for b, row in enumerate(rollouts.rows):
            kind, place = int(row.problem.id[-2:], 16) % 3, b % 4
            row.correct = kind == 0 or (kind == 1 and place < 2)
            if place:
                row.response_ids = row.response_ids[: 1 + int(row.response_ids[0]) % 2]
                row.sampler_logprobs = row.sampler_logprobs[: len(row.response_ids)]
                row.finished = True
        return super().edit_rollouts(rollouts)


def dot_run(base: Path, folder: Path, steps: int) -> Config:
    return make_run(
        base,
        folder,
        method={"options": {"spread": 1.0, "min_cut": 1}},
        loss={"kind": "kl_cov", "aggregation": "sequence_mean", "options": {"share": 0.05}, "kl_coef": 0.0},
        rollout={"prompts_per_step": 6},
        train={"steps": steps},
    )


def metrics_of(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "run/metrics.jsonl").read_text().splitlines()
    timing = ("seconds/", "tokens_per_second", "memory_gb")
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(timing)} for line in lines]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("dot") / "base")


def test_a_run_samples_by_what_was_kept_and_resumes_bit_for_bit(base, tmp_path):
    for folder, stops in (("whole", [4]), ("resumed", [2, 4])):
        for steps in stops:
            config = dot_run(base, tmp_path / folder, steps)
            train(config, Fortunate(config))
    metrics = metrics_of(tmp_path / "whole")
    assert metrics == metrics_of(tmp_path / "resumed")
    weights = [load_file(tmp_path / x / "run/model/model.safetensors") for x in ("whole", "resumed")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    shares: list[float] = []
    for m in metrics:
        prompts = int(6 * oversampling(shares))
        assert m["kept_groups"] == pytest.approx(min(6, m["dot/kept_share"] * prompts)) and m["rounds"] == 1
        assert m["updates"] == math.ceil(
            m["kept_groups"] * 4 / 8
        )  # batch_size 8: all survivors, the last batch may be small
        assert 0 < m["dot/cut"] <= 1 / 4 and m["clip_fraction"] > 0
        shares.append(m["dot/kept_share"])
    assert len({round(share, 6) for share in shares}) > 1, "the share never changed: this shows nothing"


@pytest.mark.slow
def test_two_ranks_cut_and_train_the_same(base, tmp_path):
    """Numbers of prompts that two ranks cannot share evenly, and answers cut and graded again on both."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests/helpers'}", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, __file__, str(base), str(tmp_path / "two")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert result.returncode == 0, result.stderr
    config = dot_run(base, tmp_path / "one", 4)
    train(config, Fortunate(config))
    one, two = metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two")
    for name in ("sampled_tokens", "length", "accuracy", "dot/cut", "dot/kept_share", "kept_groups", "trained_tokens"):
        assert [m[name] for m in one] == [m[name] for m in two], name
    assert any(m["kept_groups"] / m["dot/kept_share"] % 2 for m in one), "always an even number of prompts"
    for name in ("grad_norm", "loss"):
        assert [m[name] for m in one] == pytest.approx([m[name] for m in two], rel=1e-3, abs=1e-6), name


if __name__ == "__main__":
    two_ranks = dot_run(Path(sys.argv[1]), Path(sys.argv[2]), 4)
    train(two_ranks, Fortunate(two_ranks))
