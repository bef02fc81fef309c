"""The policy's weights: names for the sampler, float32 masters, learning-rate schedule, loading and its messages.

Run: python -m pytest tests/model/test_policy_weights.py
"""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from folders import edit
from safetensors.torch import load_file, save_file
from tiny import CPU, make_config, make_rows, same_tensors, tiny_llama, tiny_qwen, update, weights_of
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import CohereConfig, CohereForCausalLM, PreTrainedModel

from nanolapo.config import UserError
from nanolapo.demo.pretrain import make_tokenizer
from nanolapo.model.folder import load_model, load_tokenizer, save_model
from nanolapo.policy import Policy
from nanolapo.ranks import Ranks
from nanolapo.samplers.choose import make_sampler


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_A4_names_are_those_of_a_saved_checkpoint(tied_model, untied_model, kind):
    """Plain, under torch.compile, and with activation checkpoint wrappers: exactly the names and values on disk."""
    folder = tied_model if kind == "tied" else untied_model
    saved = load_file(folder / "model.safetensors")
    assert ("lm_head.weight" in saved) == (kind == "untied")
    plain, compiled, wrapped, both = (Policy(make_config(folder), CPU) for _ in range(4))
    for policy in (wrapped, both):
        layers = policy.model.get_decoder().layers
        for i, layer in enumerate(layers):
            layers[i] = checkpoint_wrapper(layer)
    for policy in (compiled, both):
        policy.model = torch.compile(policy.model)  # wraps; nothing is compiled until it is called
    for policy in (plain, compiled, wrapped, both):
        sent = dict(policy.named_weights())
        assert sent.keys() == saved.keys()
        assert all(torch.equal(sent[name], saved[name]) for name in saved)


@pytest.mark.parametrize(
    "model, rollout, dtype",
    [("bfloat16", "", "bfloat16"), ("bfloat16", "float32", "float32"), ("float32", "bfloat16", "bfloat16")],
)
def test_the_sampler_gets_the_weights_in_its_own_dtype(tied_model, model, rollout, dtype):
    """rollout.dtype, or else model.dtype. The masters are float32 in any case."""
    policy = Policy(make_config(tied_model, model={"dtype": model}, rollout={"dtype": rollout}), CPU)
    masters, sent = dict(policy.named_weights()), dict(policy.sampler_weights())
    assert sent.keys() == masters.keys()
    for name, tensor in sent.items():
        assert tensor.dtype == getattr(torch, dtype)
        assert torch.equal(tensor, masters[name].to(tensor.dtype)) and masters[name].dtype == torch.float32


def test_named_weights_are_the_live_ones(tied_model):
    policy = Policy(make_config(tied_model), CPU)
    before = weights_of(policy)
    update(policy, make_rows([3, 9]), [1.0, -1.0])
    assert all(not torch.equal(before[name], tensor) for name, tensor in policy.named_weights())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_B16_small_steps_move_the_master_weights(tied_model, dtype):
    """One step at the paper's 1e-6: over 99 % of the weights change, and everything AdamW keeps is float32."""
    config = make_config(tied_model, model={"dtype": dtype}, train={"learning_rate": 1e-6})
    policy = Policy(config, CPU)
    before = weights_of(policy)
    update(policy, make_rows([30, 60, 20, 40]), [1.0, -1.0, 0.5, -0.5])
    moved = torch.cat([(before[name] != tensor).flatten() for name, tensor in policy.named_weights()])
    # Ids that were not in the batch move too: the tied head's softmax sends every embedding row a gradient.
    assert moved.float().mean() > 0.99
    assert all(tensor.dtype == torch.float32 for _, tensor in policy.named_weights())
    state = [value for values in policy.optimizer.state.values() for value in values.values()]
    assert len(state) == 3 * len(list(policy.model.parameters())) and all(v.dtype == torch.float32 for v in state)


def test_learning_rate_schedule(tied_model):
    """10 warm-up steps up to the peak, then a cosine that ends at a tenth of it."""
    train = {"steps": 50, "batch_size": 4, "warmup_fraction": 0.1, "final_lr_fraction": 0.1, "learning_rate": 2e-4}
    policy = Policy(make_config(tied_model, train=train), CPU)
    assert policy.total_steps == 100  # 50 rollout steps of 8 rollouts, 4 an optimizer step
    rates = []
    for policy.num_steps in range(101):
        rates.append(policy.learning_rate())
    for step in range(10):
        assert rates[step] == pytest.approx(2e-4 * (step + 1) / 10)
    for step in range(10, 101):
        cosine = (1 + math.cos(math.pi * (step - 10) / 90)) / 2
        assert rates[step] == pytest.approx(2e-4 * (0.1 + 0.9 * cosine))
    assert max(rates) == pytest.approx(2e-4) and rates[100] == pytest.approx(2e-5)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_learning_rate_follows_a_run_that_tokens_end(tied_model):
    """Half of the tokens sampled after 3 of 100 steps: the middle of the cosine, with a warm-up of a tenth in front."""
    train = {"steps": 100, "warmup_fraction": 0.1, "final_lr_fraction": 0.1, "learning_rate": 2e-4}
    policy = Policy(make_config(tied_model, train=train), CPU)
    policy.num_steps, found = 3, {}
    for policy.progress in (0.0, 0.05, 0.1, 0.55, 1.0, 1.2):
        found[policy.progress] = policy.learning_rate() / 2e-4
    # 0.0: three steps of a hundred are further than the loop says, so the fourth of ten warm-up steps
    want = {0.0: 0.4, 0.05: 0.6, 0.1: 1.0, 0.55: 0.1 + 0.9 / 2, 1.0: 0.1, 1.2: 0.1}
    assert found == pytest.approx(want)


def test_learning_rate_is_the_one_the_optimizer_uses(tied_model):
    policy = Policy(make_config(tied_model, train={"warmup_fraction": 0.5, "steps": 20}), CPU)
    logged = update(policy, make_rows([3, 9]), [1.0, -1.0])
    assert logged["learning_rate"] == policy.optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 / 10)
    assert policy.learning_rate() == pytest.approx(2e-2 / 10)


def test_gradient_is_clipped_and_the_norm_before_clipping_is_logged(tied_model):
    """What the optimizer sees has the norm asked for."""
    policy = Policy(make_config(tied_model, train={"grad_clip": 0.5}), CPU)
    seen = []
    policy.optimizer.register_step_pre_hook(
        lambda optimizer, *_: seen.append(
            math.sqrt(sum(float(p.grad.double().square().sum()) for p in policy.model.parameters()))
        )
    )
    norm = update(policy, make_rows([3, 9]), [1.0, -1.0])["grad_norm"]
    assert norm > 0.5 and seen == [pytest.approx(0.5, rel=1e-3)]


# ------------------------------------------------------------------------------------------------------ loading


def test_missing_model_is_one_line(tmp_path):
    for path in ("", str(tmp_path)):
        with pytest.raises(UserError, match="model.path=.*no config.json there"):
            load_model(path, CPU)


def test_models_with_scaled_or_capped_logits_are_refused(tmp_path):
    """Their forward pass changes the logits after the head; scoring from the head alone would be silently wrong."""
    config = CohereConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=32, logit_scale=0.1
    )
    CohereForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="cohere cannot be trained here: packed log-probs are off"):
        Policy(make_config(tmp_path), CPU)


def test_F3_model_folder_with_code_is_refused_and_not_run(tmp_path):
    canary = tmp_path / "ran"
    tiny_qwen().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "code.Own", "AutoModelForCausalLM": "code.OwnModel"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text(f"open({str(canary)!r}, 'w')\n")
    with pytest.raises(UserError, match="model.path"):
        load_model(str(tmp_path), CPU)
    assert not canary.exists()


class Payload:
    """Unpickling this makes a folder."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("format", ["pickle", "torch"])
def test_F2_pickle_in_a_model_folder_is_refused_and_not_run(tmp_path, name, format):
    canary = tmp_path / "ran"
    tiny_llama().config.save_pretrained(tmp_path)
    if format == "pickle":
        (tmp_path / name).write_bytes(pickle.dumps(Payload(str(canary))))
    else:
        torch.save(Payload(str(canary)), tmp_path / name)
    with pytest.raises(UserError, match="model.path"):
        load_model(str(tmp_path), CPU)
    assert not canary.exists()


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def read_by(reader: str, folder: Path) -> PreTrainedModel:
    """The model as the trainer has it, or as an evaluation by the torch sampler has it, which is given no other weights."""
    if reader == "trainer":
        return load_model(str(folder), CPU)
    config = make_config(folder, rollout={"engine": "torch"})
    return make_sampler(config, str(folder), 8, Ranks(), trains=False).model


READERS = pytest.mark.parametrize("reader", ["trainer", "evaluation"])
LACK = "the files lack {} weights of the model, such as {}; fetch or save the model again"


@READERS
@pytest.mark.parametrize(
    "change, lack",
    [
        (lambda w: {n: t for n, t in w.items() if "layers.1." not in n}, (9, "model.layers.1.input_layernorm.weight")),
        (lambda w: {n: t for n, t in w.items() if n != "lm_head.weight"}, (1, "lm_head.weight")),
        (lambda w: {f"module.{n}": t for n, t in w.items()}, (21, "lm_head.weight")),
    ],
)
def test_weights_that_do_not_fill_the_model_are_refused(untied_model, tmp_path, reader, change, lack):
    """What a file lacks would be at random values, with no more than a warning."""
    folder = shutil.copytree(untied_model, tmp_path / "model")
    change_weights(folder, change)
    with pytest.raises(UserError, match=LACK.format(*lack)):
        read_by(reader, folder)


@READERS
def test_a_head_that_is_not_the_embedding_though_config_json_says_so_is_refused(tied_model, tmp_path, reader):
    """transformers would use both, and vLLM the embedding alone. Files without a head, or with an equal one, are tied."""
    folder = shutil.copytree(tied_model, tmp_path / "model")
    make_tokenizer().save_pretrained(folder)
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    for weights in ({}, {"lm_head.weight": embedding.clone()}):
        change_weights(folder, lambda w, more=weights: w | more)
        model = read_by(reader, folder)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(model.lm_head.weight, embedding)
    change_weights(folder, lambda w: w | {"lm_head.weight": embedding * 1.01})
    with pytest.raises(UserError, match="model.*: config.json says .*; set tie_word_embeddings to false") as error:
        read_by(reader, folder)
    assert "\n" not in str(error.value)


@READERS
def test_a_head_that_config_json_knows_of_is_read_and_written(tied_model, tmp_path, reader):
    """The remedy of that message: both weights are those of the files, and an export has both again."""
    folder = shutil.copytree(tied_model, tmp_path / "model")
    make_tokenizer().save_pretrained(folder)
    change_weights(folder, lambda w: w | {"lm_head.weight": w["model.embed_tokens.weight"] * 1.01})
    edit(folder / "config.json", lambda c: c.update(tie_word_embeddings=False))
    saved = load_file(folder / "model.safetensors")
    model = read_by(reader, folder)
    assert same_tensors(dict(model.state_dict()), saved)
    save_model(model, torch.float32, load_tokenizer(str(folder)), tmp_path / "out")
    assert same_tensors(load_file(tmp_path / "out/model.safetensors"), saved)
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
