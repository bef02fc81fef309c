"""Any number of ranks, whole copies or slices, train what one process trains: gradients, norms, weights, logged numbers.

Run: python -m pytest tests/distributed/test_update_on_ranks.py        launch.py runs update_cases.py on the ranks.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from launch import on_ranks
from safetensors.torch import load_file
from tiny import make_rows
from torch import Tensor
from update_cases import CASES, LENGTHS, Case, run_case

pytestmark = pytest.mark.slow
DEPENDS_ON_RANKS = ("rank_imbalance", "held_share", "sent_share")
BY_NAME = {case.name: case for case in CASES}


@pytest.fixture(scope="module", params=[2, 3], ids=lambda ranks: f"{ranks}ranks")
def outcome(request, tmp_path_factory, tied_model, untied_model) -> dict[str, Tensor]:
    """What the cases gave on this many ranks; every rank must hold the same."""
    out = tmp_path_factory.mktemp("outcome")
    result = on_ranks(request.param, "update_cases.py", tied_model, untied_model, out)
    assert result.returncode == 0, result.stderr[-3000:]
    files = [load_file(out / f"rank{rank}of{request.param}.safetensors") for rank in range(request.param)]
    for name, tensor in files[0].items():
        if name.endswith(("held_share", "sent_share")):  # slices need not be of one size
            continue
        assert all(torch.equal(tensor, other[name]) or tensor.isnan().all() for other in files), name
    return files[0]


@pytest.fixture(scope="module")
def expected(tied_model, untied_model) -> dict[str, tuple[dict[str, Tensor], dict[str, float]]]:
    """The same cases in this one process, without any process group."""
    folders = {"tied": str(tied_model), "untied": str(untied_model)}
    return {case.name: run_case(case, folders, "ddp") for case in CASES}


def of(outcome: dict[str, Tensor], sharding: str, case: Case) -> dict[str, Tensor]:
    label = f"{sharding} {case.name} | "
    return {name.removeprefix(label): tensor for name, tensor in outcome.items() if name.startswith(label)}


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", [name for name in BY_NAME if name != "bfloat16"])
def test_B2_B18_ranks_train_what_one_process_trains(outcome, expected, sharding, name):
    """rtol 1e-5 of each tensor's largest value, with three exceptions that Adam makes, which turns the smallest gradient
    into a full step. A weight whose first gradient is below 1e-5 of its tensor's largest moves by rounding. The keys' bias
    shifts all of a query's scores alike, so its gradient is rounding and nothing else. And LoRA's A gets no gradient until
    B has moved; then its gradient is as exact as B's smallest entries, not its largest, and B's next one inherits that."""
    tensors, numbers = expected[name]
    got = of(outcome, sharding, BY_NAME[name])
    assert got.keys() == tensors.keys() | numbers.keys()
    for label, want in tensors.items():
        if label.endswith("k_proj.bias"):
            continue
        rtol = 1e-3 if "lora_A" in label else 1e-4 if "lora_B" in label and not label.startswith("gradient 0") else 1e-5
        difference, allowed = (got[label] - want).abs(), rtol * want.abs() + rtol * want.abs().max()
        first = tensors.get(f"gradient 0 {label.split()[-1]}", torch.ones_like(want)).abs()
        exact = (first > 1e-5 * first.max()) | (not label.startswith("weights"))
        assert (difference <= allowed)[exact].all() and difference.max() < 5e-3, label
        assert exact.float().mean() > 0.95 or "lora" in name, label
    for label, want in numbers.items():
        if label.split()[0] not in DEPENDS_ON_RANKS:
            small = 1e-6 if label.startswith("loss") else 1e-9  # the loss is a sum of terms near 1 that cancel
            assert float(got[label]) == pytest.approx(want, rel=1e-5, abs=small, nan_ok=True), label


@pytest.mark.parametrize("name", ["tied-token_mean", "untied-constant", "idle-ranks", "kl", "lora"])
def test_the_cases_move_the_weights(expected, name):
    """Else the comparison above would compare nothing."""
    tensors, numbers = expected[name]
    assert numbers["updates 0"] == numbers["updates 1"] == 2 and numbers["grad_norm 0"] > 0.1
    weights = [
        tensor for label, tensor in tensors.items() if label.startswith("weights 0") and "q_proj.weight" in label
    ]
    later = [tensor for label, tensor in tensors.items() if label.startswith("weights 1") and "q_proj.weight" in label]
    assert all(not torch.equal(one, two) for one, two in zip(weights, later, strict=True)) and weights


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_bfloat16_differs_by_rounding_only(outcome, expected, sharding):
    """fsdp2 rounds the norms' weights too, as the exported model and vLLM do; the masters stay float32. Adam's first step
    goes by a gradient's sign, so where that is beyond rounding, the weights are the same."""
    (tensors, numbers), got = expected["bfloat16"], of(outcome, sharding, BY_NAME["bfloat16"])
    assert numbers["updates 0"] == 1
    for name, tolerance in (("updates 0", 0), ("grad_norm 0", 2e-3), ("mismatch 0", 1e-3), ("trained_tokens 0", 0)):
        assert float(got[name]) == pytest.approx(numbers[name], rel=tolerance), name
    assert all(tensor.dtype in (torch.float32, torch.float64) for tensor in got.values())
    for label, want in tensors.items():
        if label.startswith("weights 0"):
            first = tensors[f"gradient 0 {label.split()[-1]}"].abs()
            clear = first > 0.05 * first.max()
            assert (got[label] - want).abs()[clear].max() < 1e-5, label


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_B17_nan_on_one_rank_skips_the_step_on_all(outcome, sharding):
    """update_cases.py has compared weights and optimizer state to the bit, on every rank."""
    got = of(outcome, sharding, BY_NAME["nan"])
    assert (float(got["updates 0"]), float(got["updates_bad 0"])) == (0, 2)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
@pytest.mark.parametrize("model", ["tied", "untied"])
def test_B19_slices_where_promised_ties_kept_buffers_whole(outcome, request, sharding, model):
    """A slice of 1/N on each rank under fsdp2 (rows are not cut, hence the 10 %), everything under ddp; head and embedding
    are one tensor exactly where the model says so; rotary frequencies are those of a plainly loaded model."""
    got = of(outcome, sharding, BY_NAME[f"{model}-token_mean"])
    ranks = request.node.callspec.params["outcome"]
    assert float(got["held_share"]) == (1.0 if sharding == "ddp" else pytest.approx(1 / ranks, rel=0.1))
    assert float(got["head_is_embedding"]) == (model == "tied")
    assert float(got["buffers"]) > 0 and float(got["buffers_that_differ"]) == 0


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", ["tied-token_mean", "untied-token_mean", "bfloat16", "lora"])
def test_weights_for_a_bf16_sampler_are_cast_before_they_are_gathered(outcome, sharding, name):
    """Half of the bytes, and the same bits: those of float32 weights that are gathered first. With LoRA the sum of both
    matrices must be gathered in float32."""
    got = of(outcome, sharding, BY_NAME[name])
    assert float(got["sent_differ"]) == 0
    share = float(got["sent_share"])
    assert share == 0 if sharding == "ddp" else 0.8 < share < 1 if name == "lora" else share == 0.5


def test_balance_is_better_than_as_sampled(outcome, request):
    """Rows go to ranks by length; a group's rows lie together when sampled, so the fullest rank had more before."""
    ranks, rollouts = request.node.callspec.params["outcome"], make_rows(LENGTHS)
    sizes = np.array([len(ids) for ids in rollouts.prompt_ids]) + rollouts.lengths_B
    loads = [np.bincount(np.arange(4) // 2 % ranks, sizes[first : first + 4]) for first in (0, 4)]  # as sampled
    before = sum(load.max() for load in loads) / (sizes.sum() / ranks)
    after = float(of(outcome, "ddp", BY_NAME["tied-token_mean"])["rank_imbalance 0"])
    assert 1.0 <= after <= before and (after < before or ranks == 1)
