"""Kinds of models: what docs/MODELS.md says of each is what the policy and the samplers do with it.

Run: python -m pytest tests/model/test_families.py
A model that trains has the log-probs and the gradient of transformers' plain forward pass; all others end with one line.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_helpers import discard_as_level_2_does, make_requests, perturb, reference, save
from families import BEGIN, END, FAMILIES, LONGEST, PAGE, Row, family_config, tiny_family, try_family
from test_policy import plain_logprobs, scored
from test_update import gradients, slow_gradients
from tiny import CPU, make_config, make_rows
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from nanolapo.config import UserError
from nanolapo.model import attention, trial
from nanolapo.model.attention import pack
from nanolapo.model.folder import layers_of, named_weights
from nanolapo.model.precision import make_copy
from nanolapo.model.trial import check_packed, packed_difference, tolerance
from nanolapo.policy import Policy
from nanolapo.samplers.choose import check_engine
from nanolapo.samplers.sampler import Decoding, Request, Sampler
from nanolapo.samplers.torch_sampler import TorchSampler

TABLE = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].splitlines(keepends=True)[2:]
LINES = dict(zip(FAMILIES, TABLE, strict=True))
TRAINS = [name for name, line in LINES.items() if line.split(" | ")[1] == "yes"]
BY_TORCH = [name for name, line in LINES.items() if line.split(" | ")[2] == "yes"]
BY_VLLM = [name for name, line in LINES.items() if line.split(" | ")[3] == "yes"]
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": LONGEST}
LONGROPE |= {"short_factor": [1.5] * 16, "long_factor": [4.0] * 16}
RUN_IN_VLLM: dict[str, dict[str, Any]] = {
    "mistral": {},
    "qwen3": {},
    "phi3": {"rope_parameters": LONGROPE, "original_max_position_embeddings": LONGEST},
}
needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")


def without_vllm(line: str) -> str:
    cells = line.split(" | ")
    return (
        " | ".join(cells[:3]) if cells[1] == "yes" else line
    )  # the reason of a "no" is vLLM's if the trainer has none


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_the_page_says_what_happens(name: str, tmp_path: Path) -> None:
    """vLLM's registry decides its column, so without vLLM this column is not compared."""
    line = try_family(name, tmp_path).line()
    if find_spec("vllm"):
        assert line == LINES[name]
    assert without_vllm(line) == without_vllm(LINES[name])


def test_the_page_is_worth_reading() -> None:
    assert len(TRAINS) >= 25 and len(FAMILIES) - len(TRAINS) >= 15 and len(BY_TORCH) >= 3 and len(BY_VLLM) >= 10
    assert Row("x", None, None, "why").line() == "| x | yes | yes | no | why |\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINS)
def test_logprobs_and_gradients_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """Rows of 10 to 50 tokens (windows are 32), four in one sequence, against each row alone (gradients in float64,
    which transformers' experts do not know)."""
    model = tiny_family(name)
    model.save_pretrained(tmp_path)
    rollouts, advantages = make_rows([5, 45, 9, 40]), [1.0, -1.0, 0.5, -0.5]
    config = family_config(tmp_path)
    policy = Policy(replace(config, model=replace(config.model, gradient_checkpointing=0.5)), CPU)
    assert [layer.training for layer in layers_of(policy.model)] == [True, False]
    assert len(policy.packed) == 1 and policy.packed[0].startswith("float32: off by ")
    got = scored(policy, rollouts, [0, 1, 2, 3])
    for row in range(4):
        want = plain_logprobs(tmp_path, rollouts, row)
        assert want.std() > 0.3, "too near to uniform: nothing would show"
        np.testing.assert_allclose(got[row, : len(want)], want, atol=1e-4)
    dtype = torch.float32 if any("experts" in key for key, _ in model.named_parameters()) else torch.float64
    exact = slow_gradients(tmp_path, rollouts, advantages, "token_mean", [0, 1, 2, 3], dtype)
    mine = gradients(policy, rollouts, advantages)
    assert mine.keys() == exact.keys()
    largest = max(float(gradient.abs().max()) for gradient in exact.values() if gradient is not None)
    for parameter, gradient in exact.items():
        if gradient is None:  # an expert without tokens
            assert not mine[parameter].any()
        else:
            assert float((mine[parameter].double() - gradient).abs().max()) < 1e-4 * largest, parameter


@pytest.mark.parametrize("name", BY_TORCH)
def test_the_torch_sampler_agrees_with_the_trainer(name: str, tmp_path: Path) -> None:
    model = tiny_family(name)
    sampler = TorchSampler(save(model, tmp_path), torch.float32, CPU, max_rows=4)
    check_samples(sampler, model)


def check_samples(sampler: Sampler, model: PreTrainedModel) -> None:
    """The log-probs of a few samples are those of transformers, each row alone."""
    requests = [Request([token % 60 for token in r.prompt_ids], r.seed, r.max_new_tokens) for r in make_requests(8)]
    for request, sample in zip(requests, sampler.generate(requests, Decoding()), strict=True):
        np.testing.assert_allclose(sample.logprobs, reference(model, request, sample), atol=1e-4)


@needs_vllm
@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("name", RUN_IN_VLLM)
def test_vllm_agrees_with_the_trainer_and_takes_new_weights(name: str, tmp_path: Path) -> None:
    """Heads of 32, which vLLM needs on a CPU. phi3 has longrope, and vLLM is given rows up to its original length."""
    from nanolapo.samplers.vllm_sampler import VLLMSampler

    model = tiny_family(
        name, hidden_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=32, **RUN_IN_VLLM[name]
    )
    sampler = VLLMSampler(save(model, tmp_path), torch.float32, max_model_len=LONGEST, max_rows=8)
    check_samples(sampler, model)
    perturb(model, 0.1, seed=1)
    discard_as_level_2_does(sampler)
    sampler.load_weights(named_weights(model))
    check_samples(sampler, model)
    sampler.close()


# ------------------------------------------------------------------------------------------------- what the trial sees


@pytest.mark.parametrize("rope", ["longrope", "dynamic"])
def test_rotary_factors_that_depend_on_the_batch(rope: str, tmp_path: Path) -> None:
    """Rows within the original length train, longer ones are refused; the torch sampler refuses them, too."""
    name = {"longrope": "phi3, longrope, longer rows", "dynamic": "llama, dynamic NTK, longer rows"}[rope]
    model = tiny_family(name)
    assert check_packed(model, "folder", 1000) < 1e-5
    longest = 1001 if rope == "longrope" else 2000  # dynamic NTK begins gently
    with pytest.raises(
        UserError, match=f"cannot be trained here: short rows are right, but in rows of {longest} tokens"
    ):
        check_packed(model, "folder", longest)
    assert check_packed(model, "folder", 1000) < 1e-5  # the refusal has left nothing behind
    if rope == "dynamic":
        sampler = TorchSampler(save(model, tmp_path), torch.float32, CPU)
        (before,) = sampler.generate([Request([5, 6], 0, 8)], Decoding())
        with pytest.raises(UserError, match="rows of 1002 tokens would change the rotary factors"):
            sampler.generate([Request([5, 6], 0, 1000)], Decoding())
        (after,) = sampler.generate([Request([5, 6], 0, 8)], Decoding())
        np.testing.assert_array_equal(after.logprobs, before.logprobs)


@pytest.mark.parametrize("name", ["mistral", "qwen2_moe, sliding window", "phimoe, sliding window"])
def test_windows_are_tried_only_where_rows_cross_them(name: str) -> None:
    """All windows are 32 tokens. mistral hands its window to the attention, the two others leave it to the mask."""
    model = tiny_family(name)
    short, long = packed_difference(model, 32), packed_difference(model, LONGEST)
    assert short < 1e-5 and (long < 1e-5) == (name == "mistral")
    assert model.config.sliding_window == 32 and model.config._attn_implementation == "sdpa"


def test_prompts_that_are_shared_wrongly_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial looks at our own attention as well: without the prompt, or with the other response, it objects."""
    model = tiny_family("llama")
    assert packed_difference(model, 100) < 1e-5
    for wrong in ([0, 1, 2, 3, 4], [0, 0, 1, 3, 3]):
        monkeypatch.setattr(trial, "pack", lambda sizes, _, device, wrong=wrong: pack(sizes, wrong, device))
        assert packed_difference(model, 100) > 0.05  # 50 times the tolerance


@pytest.mark.parametrize(
    ("name", "layers"), [("llama", 2), ("qwen2", 24), ("phi3", 2), ("qwen3_moe", 2), ("gemma3_text", 2)]
)
def test_rounding_in_16_bits_is_as_large_as_derived(name: str, layers: int) -> None:
    """Expected is a fourth of the tolerance: less than half of that, or four times as much, was not derived rightly."""
    model = make_copy(tiny_family(name, num_hidden_layers=layers), torch.bfloat16)
    assert tolerance(model) == pytest.approx(4 * 1.5 * 2**-8 * layers**0.5)
    off = check_packed(model, "folder", 100)
    assert off == packed_difference(model, 100) and 0.1 < off / tolerance(model) < 0.6


def test_a_wrong_kernel_of_16_bits_is_refused_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU other kernels attend in 16 bits. Here one that looks at other scores in bfloat16 only, on a CPU. A float32
    run does not use it; a bfloat16 run tries both."""
    tiny_family("llama").save_pretrained(tmp_path)
    config = family_config(tmp_path)
    in_bf16 = replace(config, model=replace(config.model, dtype="bfloat16"))
    assert [words.split(":")[0] for words in Policy(in_bf16, CPU).packed] == ["float32", "bfloat16"]
    right = attention.attend

    def wrong(query: Tensor, *others: Any) -> Tensor:
        return right(query * 2 if query.dtype == torch.bfloat16 else query, *others)

    monkeypatch.setattr(attention, "attend", wrong)
    assert len(Policy(config, CPU).packed) == 1
    with pytest.raises(UserError, match=r"in torch.bfloat16 packed log-probs are off .* set model.dtype=float32"):
        Policy(in_bf16, CPU)


def test_no_number_is_refused() -> None:
    """A damaged model: NaN is not within any tolerance."""
    model = tiny_family("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="its log-probs are not finite"):
        check_packed(model, "folder", 100)


def test_learned_positions_that_run_out() -> None:
    """gpt2 has a table of positions: a run with longer rows ends at the start, not in its first long row."""
    model = tiny_family("gpt2")
    assert check_packed(model, "folder", 4096) < 1e-5
    with pytest.raises(
        UserError, match="gpt2 cannot be trained here: short rows are right, but in rows of 4097 tokens"
    ):
        check_packed(model, "folder", 4097)


# --------------------------------------------------------------------------------------------------------- samplers


@pytest.mark.parametrize("engine", ["torch", "vllm"])
@pytest.mark.parametrize("name", ["gpt2", "mixtral", "gemma3, with images"])
def test_advice_does_not_go_round_in_a_circle(name: str, engine: str, tmp_path: Path) -> None:
    """Neither sampler takes these: no message names the other one. Weights are not even there to be loaded."""
    tiny_family(name).save_pretrained(tmp_path)
    config = make_config(tmp_path, rollout={"engine": engine})
    with pytest.raises(UserError, match=r"^model.path=.*docs/MODELS.md") as error:
        check_engine(config)
    assert "rollout.engine" not in str(error.value) and "\n" not in str(error.value)


def test_the_other_sampler_is_advised_where_it_can(tmp_path: Path) -> None:
    tiny_family("qwen3").save_pretrained(tmp_path / "qwen3")
    with pytest.raises(UserError, match=r"not qwen3 with full_attention; set rollout.engine=vllm"):
        check_engine(make_config(tmp_path / "qwen3", rollout={"engine": "torch"}))
    tiny_family("llama, dynamic NTK, longer rows").save_pretrained(tmp_path / "dynamic")
    with pytest.raises(UserError, match=r"dynamic .*; set rollout.engine=torch"):
        check_engine(make_config(tmp_path / "dynamic", rollout={"engine": "vllm"}))
    check_engine(make_config(tmp_path / "dynamic", rollout={"engine": "torch"}))


def test_vllm_is_given_names_and_shapes_of_the_files(tmp_path: Path) -> None:
    """A head that is wider in the file than in the config, and a tensor too many."""
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=48
    )
    model = AutoModelForCausalLM.from_config(config)
    state = dict(model.state_dict())
    for number, changes in enumerate(({"lm_head.weight": torch.zeros(64, 32)}, {"model.extra": torch.zeros(2)})):
        model.save_pretrained(tmp_path / str(number), state_dict=state | changes)
        with pytest.raises(UserError, match=min(changes)):
            check_engine(make_config(tmp_path / str(number), rollout={"engine": "vllm"}))


@needs_vllm
@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm3", "olmo2", "starcoder2"])
def test_transformers_models_inside_vllm_are_refused(name: str, tmp_path: Path) -> None:
    tiny_family(name).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"vLLM has no {name} itself.*docs/MODELS.md"):
        check_engine(make_config(tmp_path, rollout={"engine": "vllm"}))
