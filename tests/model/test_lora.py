"""LoRA: only the adapters move, and what leaves the trainer is the plain model with them merged in.

Run: python -m pytest tests/model/test_lora.py        Many ranks: tests/distributed.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from tiny import CPU, make_config, make_rows, same_tensors, score_rows, tiny_qwen, update, weights_of
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from nanolapo.checkpoint import load_checkpoint, optimizer_tensors, save_checkpoint
from nanolapo.demo.pretrain import make_tokenizer
from nanolapo.fingerprint import fingerprint_of
from nanolapo.microbatches import make_microbatch
from nanolapo.model.folder import save_model
from nanolapo.model.lora import lora_layers, merged_delta
from nanolapo.policy import Policy

LORA = {"lora_rank": 4, "lora_alpha": 8}


def lora_policy(folder, **sections) -> Policy:
    torch.manual_seed(0)  # of the A matrices
    sections["model"] = LORA | sections.get("model", {})
    return Policy(make_config(folder, **sections), CPU)


def train(policy: Policy, steps: int = 3, first: int = 0) -> None:
    for seed in range(first, first + steps):
        update(policy, make_rows([3, 20, 9, 7], seed=seed), [1.0, -1.0, 0.5, -0.5])


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_only_the_adapters_are_trained(tied_model, untied_model, kind):
    """Every linear layer of the decoder has A [rank, in] and B [out, rank]; embedding, head and norms stay."""
    folder = tied_model if kind == "tied" else untied_model
    policy = lora_policy(folder)
    assert len(policy.trained) == 2 * 2 * 7 and all(".lora_" in name for name in policy.trained)
    base = {n: p.clone() for n, p in policy.model.named_parameters() if ".lora_" not in n}
    adapters = {n: p.detach().clone() for n, p in policy.trained.items()}
    train(policy)
    assert all(torch.equal(p, base[n]) for n, p in policy.model.named_parameters() if n in base)
    assert all(not torch.equal(p, adapters[n]) for n, p in policy.trained.items())


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_A4_the_sampler_gets_the_plain_names_and_merged_weights(tied_model, untied_model, kind):
    """Before training the weights of the file, to the bit; afterwards W + (alpha / rank) B A, entry by entry."""
    folder = tied_model if kind == "tied" else untied_model
    saved, policy = load_file(folder / "model.safetensors"), lora_policy(folder)
    assert same_tensors(weights_of(policy), saved)
    train(policy)
    sent = weights_of(policy)
    assert sent.keys() == saved.keys()
    for name, tensor in sent.items():
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A.default.weight" not in policy.trained:
            assert torch.equal(tensor, saved[name]), name
            continue
        low, up = (policy.trained[f"{layer}.lora_{x}.default.weight"].detach().double() for x in "AB")
        by_hand = saved[name].double() + 8 / 4 * torch.einsum("or,ri->oi", up, low)
        torch.testing.assert_close(tensor.double(), by_hand, rtol=1e-6, atol=1e-6)
        assert not torch.equal(tensor, saved[name]), name


def test_the_exported_folder_is_the_trained_model(tied_model, tmp_path):
    """transformers loads it without peft and gives the trainer's log-probs."""
    policy = lora_policy(tied_model)
    train(policy)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer().backend_tokenizer, eos_token=" <end>")
    save_model(policy.model, torch.float32, tokenizer, tmp_path / "model")
    assert not any("lora" in name for name in load_file(tmp_path / "model/model.safetensors"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    rollouts = make_rows([12, 30])
    score_rows(policy, rollouts)
    for prompt, response, logprobs in zip(
        rollouts.prompt_ids, rollouts.response_ids, rollouts.sampler_logprobs, strict=True
    ):
        ids = torch.cat([torch.from_numpy(prompt), torch.from_numpy(response)])[None]
        with torch.no_grad():
            logp = plain(ids).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
        expected = logp.gather(-1, torch.from_numpy(response)[:, None])[:, 0]
        torch.testing.assert_close(torch.from_numpy(logprobs), expected, rtol=0, atol=1e-4)


def test_in_bfloat16_the_sampler_loses_what_is_less_than_half_a_step(tmp_path):
    """It holds W + scale * B A rounded once: the file's W to the bit, where the trainer, which adds the two products, has
    moved. Preflight notes it (tests/test_preflight_checks.py). In float32 the sampler has nearly all of it."""
    model = tiny_qwen().to(torch.bfloat16)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "_proj.weight" in name:
                weight.copy_(weight.sign() / 4)  # no weight so small that what is added must be invisible everywhere
    model.save_pretrained(tmp_path)
    saved, micro = load_file(tmp_path / "model.safetensors"), make_microbatch(make_rows([5, 9, 30, 20]), range(4), CPU)
    for dtype in ("bfloat16", "float32"):
        policy = lora_policy(tmp_path, model={"dtype": dtype})
        with torch.no_grad():
            before = policy.logprobs(micro)[0]
            for layer in lora_layers(policy.model).values():  # half a step of bfloat16 is at least 2^-9 of a number
                up = layer.lora_B["default"].weight.fill_(1.0)
                up *= layer.base_layer.weight.abs().min() * 2**-9 / 2 / merged_delta(layer).abs().max()
            policy.weights_changed()
            assert not torch.equal(policy.logprobs(micro)[0], before)
        sent = dict(policy.sampler_weights())
        assert same_tensors({n: t.bfloat16() for n, t in sent.items()}, saved)
        moved = [n for n, t in sent.items() if not torch.equal(t.float(), saved[n].float())]
        assert len(moved) == (0 if dtype == "bfloat16" else len(lora_layers(policy.model)))


def test_the_reference_is_the_model_without_adapters(tied_model):
    """Before training KL is 0 and the reference's log-probs are the policy's, to the bit; afterwards they are still those
    of the untouched model, and asking for them leaves the adapters on."""
    policy = lora_policy(tied_model, loss={"kl_coef": 0.1})
    micro = make_microbatch(make_rows([5, 9]), [0, 1], CPU)

    def logprobs(**options) -> torch.Tensor:
        with torch.no_grad():
            return policy.logprobs(micro, **options)[0]

    before = logprobs()
    assert torch.equal(before, logprobs(reference=True))
    train(policy)
    after = logprobs()
    assert torch.equal(logprobs(reference=True), before) and not torch.equal(after, before)
    assert torch.equal(logprobs(), after)


def test_D2_resuming_is_bit_equal_and_the_checkpoint_small(tied_model, tmp_path):
    whole, first, second = (lora_policy(tied_model) for _ in range(3))
    train(whole, 6)
    train(first, 3)
    save_checkpoint(tmp_path, 3, first, {"fingerprint": {}}, keep=1)
    assert load_file(tmp_path / "step-000003/model.safetensors").keys() == first.trained.keys()
    assert load_checkpoint(tmp_path, second, {}) is not None
    train(second, 3, first=3)
    assert same_tensors(weights_of(second), weights_of(whole))
    assert same_tensors(optimizer_tensors(second), optimizer_tensors(whole))


def test_an_offloaded_reference_gives_the_same_kl(tied_model):
    """Its weights wait elsewhere (the parameters are empty shells) and come when a layer is used."""
    plain, offloaded = (
        Policy(make_config(tied_model, model={"offload_reference": offload}, loss={"kl_coef": 0.1}), CPU)
        for offload in (False, True)
    )
    assert offloaded.reference is not None and all(p.device.type == "meta" for p in offloaded.reference.parameters())
    rollouts = make_rows([5, 9, 3, 30])
    for policy in (plain, offloaded):
        for _ in range(2):
            logged = update(policy, rollouts, [1.0, -1.0, 0.5, -0.5])
        assert logged["kl"] > 1e-6
    assert same_tensors(weights_of(plain), weights_of(offloaded))


def test_lora_is_part_of_what_a_resumed_run_must_share(tied_model):
    from nanolapo.data.load import Data
    from nanolapo.methods.base import Method

    config = make_config(tied_model, model=LORA)
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, lora_alpha=16))
    data = Data([], None)  # type: ignore[arg-type]
    one, two = (fingerprint_of(c, Method(c), data) for c in (config, other))
    assert {key for key in one if one[key] != two[key]} == {"model.lora_alpha"}
