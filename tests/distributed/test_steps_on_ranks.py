"""A step's data, its checkpoints and its waiting, on one, two and three ranks.

Run: python -m pytest tests/distributed/test_steps_on_ranks.py        launch.py runs step_cases.py on the ranks.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import on_ranks
from safetensors.torch import load_file
from step_cases import RUNAWAY
from tiny import CPU, make_config, same_tensors
from torch import Tensor
from transformers import AutoModelForCausalLM

from nanolapo.checkpoint import load_checkpoint, optimizer_tensors
from nanolapo.policy import Policy

pytestmark = pytest.mark.slow
RANKS = [1, 2, 3]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory, tied_model) -> Callable[[int], Path]:
    """The folder that step_cases.py filled on this many ranks; each is run once."""
    folders: dict[int, Path] = {}

    def run(ranks: int) -> Path:
        if ranks not in folders:
            folders[ranks] = tmp_path_factory.mktemp(f"on{ranks}")
            result = on_ranks(ranks, "step_cases.py", tied_model, folders[ranks])
            assert result.returncode == 0, result.stderr[-3000:]
        return folders[ranks]

    return run


def held(folder: Path, ranks: int) -> dict[str, Any]:
    """What every rank held after the step: the same on all."""
    results = [json.loads((folder / f"rank{rank}of{ranks}.json").read_text()) for rank in range(ranks)]
    assert all(result == results[0] for result in results)
    return results[0]


@pytest.mark.parametrize("ranks", RANKS)
def test_A20_C11_completions_and_verdicts_stay_with_their_prompts(outcome, ranks):
    """The engine echoes the prompt and a boxed number. Every row's text opens with its own problem's question, and its
    verdict is that of its own number, answers that never finish and answers that were cut among them."""
    step = held(outcome(ranks), ranks)
    assert len(step["texts"]) == len(step["correct"]) == 48
    right = runaway = 0
    for b, text in enumerate(step["texts"]):
        problem = step["problems"][b // 8]
        assert text.startswith(problem["question"] + " <think>")
        boxed = text.rsplit("\\boxed{", 1)[1].removesuffix("}")
        answer = f"{sum(map(int, re.findall(r'[0-9]{3}', problem['question'])))}"[-3:]
        assert step["correct"][b] == (boxed == answer and step["finished"][b]), text
        right, runaway = right + step["correct"][b], runaway + (boxed == RUNAWAY)
    assert right > 0 and runaway > 0 and not all(step["finished"])


def test_B4_groups_and_advantages_do_not_depend_on_ranks(outcome):
    """Whole steps are equal; and each advantage is that of its own group of eight, by hand."""
    steps = [held(outcome(ranks), ranks) for ranks in RANKS]
    for name in ("problems", "texts", "finished", "correct", "advantages"):
        assert steps[0][name] == steps[1][name] == steps[2][name], name
    for first in range(0, 48, 8):
        rewards = [float(x) for x in steps[0]["correct"][first : first + 8]]
        mean = sum(rewards) / 8
        spread = math.sqrt(sum((r - mean) ** 2 for r in rewards) / 7)
        for reward, advantage in zip(rewards, steps[0]["advantages"][first : first + 8], strict=True):
            assert advantage == pytest.approx((reward - mean) / spread if spread else 0.0, rel=1e-4)


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_model_to_be_split_is_read_by_the_main_rank_only(outcome, ranks):
    """Without storage at first, also on the main rank. Then every weight and buffer (rotary frequencies are in no file) is
    that of a plain load, ties included, and the main rank has freed its own copy. An error ends all ranks with its line."""
    split = held(outcome(ranks), ranks)["split"]
    assert split.pop("refused").startswith("UserError: model.path=") and split.pop("buffers") > 0
    assert split.pop("differ") == [] and all(split.values()), split


@pytest.mark.parametrize("ranks", RANKS)
def test_the_main_rank_decides_which_problems_are_kept(outcome, ranks):
    """A grader that is too slow for every question, and a file that is not whole, are on one rank: nothing changes. And a
    source that only the main rank finds missing ends all ranks with its line."""
    decided = held(outcome(ranks), ranks)["decided"]
    assert decided["kept"] == [f"question {i}" for i in (0, 2, 3)]
    assert sum("cannot be graded" in line for line in decided["report"]) == 1
    assert decided["refused"].startswith("UserError: ") and "nothing.jsonl" in decided["refused"]


@pytest.mark.parametrize("ranks", RANKS)
def test_a_grader_that_fails_on_one_rank_stops_all(outcome, ranks):
    assert "RunStopped: the grader failed on" in held(outcome(ranks), ranks)["stopped"]


@pytest.mark.parametrize("ranks", RANKS)
def test_graders_are_judged_by_the_answers_of_all_ranks(outcome, ranks):
    """180 answers on all ranks are too few to judge. Of 240, 16 errors on one rank stop the run, however many ranks share
    the answers; no single rank has seen the 200 that it takes."""
    stopped = "RunStopped: the grader failed on 7% of 240 answers"
    assert held(outcome(ranks), ranks)["on few"].startswith(f"0.0667, then {stopped}")


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_that_read_other_files_do_not_start(outcome, ranks):
    """Each would train on something else, or wait for ever, without a word. The line names what differs, on every rank."""
    read, last = held(outcome(ranks), ranks)["read"], f"UserError: rank {ranks - 1} has "
    assert read["same"] == "no error"
    assert read["override"].startswith(f"{last}train.microbatch_tokens=512, rank 0 has 1024: ")
    assert read["weight"].startswith(f"{last}in model.path='weight' the sum of all bits=")
    assert read["template"].startswith(f"{last}prompt, rendered='Asked: ")
    assert read["map"].startswith(f"{last}method, length_map='") and "all nodes share" in read["map"]
    assert read["torn"].startswith("UserError: model.path='torn': cannot be loaded")


@pytest.mark.parametrize("ranks", RANKS)
def test_a_monitor_pass_sends_lengths_and_verdicts_only(outcome, ranks):
    """40 problems with 4 answers each, named backwards: the same numbers as with whole rows, in 24 bytes an answer."""
    numbers, whole = held(outcome(ranks), ranks)["monitored"]
    assert (numbers.pop("type"), whole.pop("type")) == ("Measured", "Rollouts")
    few, many = numbers.pop("bytes a row"), whole.pop("bytes a row")
    assert numbers == whole and len(numbers["lengths"]) == len(numbers["correct"]) == 160
    assert numbers["tokens"] == sum(numbers["lengths"]) and 0 < sum(numbers["correct"]) < 160
    assert few < 30 and many > 300


def test_D5_a_slow_rank_is_waited_for(outcome):
    """One rank came to the gather three times the tensor time limit late; afterwards all ranks add up a tensor."""
    for ranks in (2, 3):
        assert held(outcome(ranks), ranks)["sum after a slow rank"] == ranks


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
@pytest.mark.parametrize("ranks", RANKS)
def test_D2_resuming_on_many_ranks_is_bit_equal(outcome, ranks, sharding):
    """Three steps, a checkpoint, three more by a new policy: weights, both moments and step counts as after six."""
    folder = outcome(ranks)
    for rank in range(ranks):
        whole, resumed, three = (
            load_file(folder / f"{name}-{sharding}-rank{rank}.safetensors") for name in ("whole", "resumed", "three")
        )
        assert same_tensors(whole, resumed) and not same_tensors(whole, three)
        assert sum(name.startswith("exp_avg_sq:") for name in whole) * 4 == len(whole)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
@pytest.mark.parametrize("ranks", RANKS)
def test_D13_another_number_of_ranks_can_go_on(outcome, tied_model, ranks, sharding):
    """One process takes up, to the bit, what any number of ranks has saved, whole copies or slices."""
    folder = outcome(ranks)
    policy = Policy(make_config(tied_model, train={"learning_rate": 1e-3}), CPU)
    state = load_checkpoint(folder / f"checkpoints-{sharding}", policy, {})
    assert state is not None and state["step"] == 1100
    three = load_file(folder / f"three-{sharding}-rank0.safetensors")
    assert same_tensors({n: p.detach() for n, p in policy.trained.items()} | optimizer_tensors(policy), three)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
@pytest.mark.parametrize("ranks", RANKS)
def test_a_model_exported_on_the_way(outcome, ranks, sharding):
    """run.export_every: whole weights of that step, on any number of ranks. That training goes on as if nothing had been
    is test_D2's matter: the run that exported equals the one that did not."""
    folder = outcome(ranks)
    model = AutoModelForCausalLM.from_pretrained(folder / f"models-{sharding}/step-000003", dtype=torch.float32)
    three = load_file(folder / f"three-{sharding}-rank0.safetensors")
    weights = {name: tensor for name, tensor in three.items() if ":" not in name}
    assert weights.keys() == dict(model.named_parameters()).keys()
    assert same_tensors(weights, {name: p.detach() for name, p in model.named_parameters()})


@pytest.mark.parametrize("ranks", RANKS)
def test_D10_retention_on_many_ranks(outcome, ranks):
    for sharding in ("ddp", "fsdp2"):
        names = sorted(path.name for path in (outcome(ranks) / f"checkpoints-{sharding}").iterdir())
        assert names == ["step-001000", "step-001100"]


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_ranks_agree_on_the_result(outcome, sharding):
    """Six steps on one, two and three ranks: the mean weight differs by float32 rounding (Adam scales some of it up)."""
    ends: list[dict[str, Tensor]] = [load_file(outcome(n) / f"whole-{sharding}-rank0.safetensors") for n in RANKS]
    for name, tensor in ends[0].items():
        if not name.startswith(("exp_avg", "step")) and not name.endswith("k_proj.bias"):
            assert all((tensor - other[name]).abs().mean() < 1e-5 for other in ends[1:]), name
    assert torch.isfinite(torch.cat([tensor.flatten() for tensor in ends[0].values()])).all()
