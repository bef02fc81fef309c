"""TorchSampler against independent references: transformers' own forward and generate, and exact probabilities.

Run: python -m pytest tests/samplers/test_torch_sampler.py
Traps: A15 (several end tokens), A16 (a cut response is not finished), A17 (batch composition), A19 (seeds).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

from nanolapo.config import Config, UserError
from nanolapo.config_file import build
from nanolapo.ranks import Ranks
from nanolapo.samplers.choose import make_sampler as make_run_sampler
from nanolapo.samplers.sampler import Decoding, Request
from nanolapo.samplers.torch_sampler import TorchSampler, pick_tokens

VOCAB = 40
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": None, "pad_token_id": None}  # fmt: skip
KINDS = {
    "qwen2-tied": Qwen2Config(**SIZES, eos_token_id=1, tie_word_embeddings=True),
    "llama-untied": LlamaConfig(**SIZES, eos_token_id=1, tie_word_embeddings=False),
}


def save_model(folder: Path, kind: str = "qwen2-tied", seed: int = 0) -> str:
    """A random model with opinions (large weights), so that log-probs are far from uniform and errors show."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(KINDS[kind])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 or name.endswith("bias"):
                parameter.normal_(std=0.25)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2").save_pretrained(folder)  # a second end token
    return str(folder)


def make_sampler(folder: str, max_rows: int = 64) -> TorchSampler:
    return TorchSampler(folder, torch.float32, torch.device("cpu"), max_rows)


def requests(count: int, limit: int = 24) -> list[Request]:
    rng = np.random.default_rng(5)
    prompts = [rng.integers(3, VOCAB, size=length).tolist() for length in (1, 9, 4, 15, 2, 7, 30, 5)]
    return [Request(prompts[i % 8], seed=100 + i, max_new_tokens=limit - i % 3) for i in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_A17_logprobs_match_the_unpadded_forward(tmp_path: Path, kind: str) -> None:
    """Eight prompts of different length in one batch: every log-prob equals a plain forward of that row alone."""
    folder = save_model(tmp_path, kind)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    asked = requests(24)
    for sample, request in zip(make_sampler(folder).generate(asked, Decoding(0.7)), asked, strict=True):
        ids = torch.tensor([request.prompt_ids + sample.ids.tolist()])
        with torch.no_grad():
            logprobs = torch.log_softmax(model(ids).logits[0, len(request.prompt_ids) - 1 : -1] / 0.7, -1)
        reference = logprobs.gather(-1, torch.from_numpy(sample.ids)[:, None])[:, 0].numpy()
        np.testing.assert_allclose(sample.logprobs, reference, atol=1e-4)


@pytest.mark.parametrize("max_rows", [1, 3, 7, 64])
def test_A17_batch_composition_does_not_matter(tmp_path: Path, max_rows: int) -> None:
    """Refilled rows (3, 7), all at once (64), one by one (1): the same tokens, in the order of the requests."""
    sampler = make_sampler(save_model(tmp_path), max_rows)
    asked, told = requests(20), list[int]()
    samples = sampler.generate(asked, Decoding(), told.append)
    assert sum(told) == sum(len(sample.ids) for sample in samples)  # progress: free rows do not count
    for request, sample in zip(asked, samples, strict=True):
        (alone,) = sampler.generate([request], Decoding())
        assert sample.ids.tolist() == alone.ids.tolist()
        assert np.abs(sample.logprobs - alone.logprobs).max() < 1e-4


def test_greedy_equals_transformers_generate(tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    asked = requests(8)
    for sample, request in zip(make_sampler(folder).generate(asked, Decoding(0.0)), asked, strict=True):
        output = model.generate(
            torch.tensor([request.prompt_ids]), do_sample=False, max_new_tokens=request.max_new_tokens,
            eos_token_id=[1, 2], pad_token_id=0,
        )  # fmt: skip
        assert sample.ids.tolist() == output[0, len(request.prompt_ids) :].tolist()


def test_A15_A16_end_tokens_and_cut_responses(tmp_path: Path) -> None:
    """Token 1 ends (config) and token 2 ends (tokenizer); a response that meets the limit is not finished."""
    sampler = make_sampler(save_model(tmp_path))
    assert sampler.end_ids.tolist() == [1, 2]
    asked = requests(200)
    samples = sampler.generate(asked, Decoding(1.5))
    last = {int(sample.ids[-1]) for sample in samples if sample.finished}
    assert last == {1, 2}
    for request, sample in zip(asked, samples, strict=True):
        assert not set(sample.ids[:-1].tolist()) & {1, 2}
        assert sample.finished == (int(sample.ids[-1]) in (1, 2))
        assert sample.finished or len(sample.ids) == request.max_new_tokens
    assert any(not sample.finished for sample in samples)


def test_A19_seeds(tmp_path: Path) -> None:
    """Same seed, same tokens; another seed, other tokens; a group of eight is not eight copies."""
    sampler = make_sampler(save_model(tmp_path))
    group = [Request([5, 6, 7], seed, 20) for seed in range(8)]
    first, again = (sampler.generate(group, Decoding(1.5)) for _ in range(2))
    assert [s.ids.tolist() for s in first] == [s.ids.tolist() for s in again]
    assert len({tuple(s.ids.tolist()) for s in first}) >= 7
    shifted = sampler.generate([Request([5, 6, 7], seed + 8, 20) for seed in range(8)], Decoding(1.5))
    assert all(a.ids.tolist() != b.ids.tolist() for a, b in zip(first, shifted, strict=True))


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.0, 0.7)])
def test_first_token_has_the_right_frequencies(tmp_path: Path, temperature: float, top_p: float) -> None:
    """4,000 seeds: the counts of the first token against exact probabilities, within five standard errors."""
    folder = save_model(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        full = torch.softmax(model(torch.tensor([[3, 4, 5]])).logits[0, -1] / temperature, -1).double().numpy()
    probs, total = np.zeros(VOCAB), 0.0
    for token in np.argsort(-full):  # the plain definition of top-p, token by token
        if total < top_p:
            probs[token] = full[token]
            total += full[token]
    probs /= probs.sum()
    asked = [Request([3, 4, 5], seed, 1) for seed in range(4000)]
    samples = make_sampler(folder, 512).generate(asked, Decoding(temperature, top_p))
    counts = np.bincount([int(s.ids[0]) for s in samples], minlength=VOCAB)
    assert (np.abs(counts - 4000 * probs) <= 5 * np.sqrt(4000 * probs * (1 - probs)) + 1e-9).all()
    for sample in samples[:50]:  # log-probs are those of the full distribution, also under top-p
        assert sample.logprobs[0] == pytest.approx(np.log(full[sample.ids[0]]), abs=1e-4)


@pytest.mark.slow
def test_compiling_changes_speed_not_samples(tmp_path: Path) -> None:
    """With model.compile: few graphs serve prompts and single tokens, whatever the number of rows, and are really used."""
    folder, asked = save_model(tmp_path), requests(40)
    plain = make_sampler(folder, 16).generate(asked, Decoding())
    torch._dynamo.reset()
    counters.clear()
    values = {
        "model": {"path": folder, "dtype": "float32", "compile": True},
        "rollout": {"engine": "torch", "max_rows": 16},
    }
    compiled = make_run_sampler(build(Config, values, ""), folder, 24, Ranks()).generate(asked, Decoding())
    assert 2 <= counters["stats"]["unique_graphs"] <= 6
    for a, b in zip(plain, compiled, strict=True):
        assert a.ids.tolist() == b.ids.tolist() and np.abs(a.logprobs - b.logprobs).max() < 1e-4


def test_zero_probability_is_never_drawn() -> None:
    logits = torch.tensor([[-float("inf"), 0.0, -float("inf")]])
    for uniform in (0.0, 0.5, 1 - 1e-16):
        assert pick_tokens(logits, torch.tensor([uniform], dtype=torch.float64), Decoding())[0].item() == 1


@pytest.mark.parametrize("kind", KINDS)
def test_load_weights_changes_what_is_sampled(tmp_path: Path, kind: str) -> None:
    """After load_weights the sampler is indistinguishable from one made from those weights."""
    sampler = make_sampler(save_model(tmp_path / "a", kind))
    other = make_sampler(save_model(tmp_path / "b", kind, seed=1))
    asked = requests(8)
    before, wanted = sampler.generate(asked, Decoding()), other.generate(asked, Decoding())
    assert [s.ids.tolist() for s in before] != [s.ids.tolist() for s in wanted]
    sampler.load_weights(other.model.state_dict().items())
    after = sampler.generate(asked, Decoding())
    assert [s.ids.tolist() for s in after] == [s.ids.tolist() for s in wanted]
    assert all((a.logprobs == b.logprobs).all() for a, b in zip(after, wanted, strict=True))


def test_load_weights_refuses_wrong_names(tmp_path: Path) -> None:
    tied = make_sampler(save_model(tmp_path / "a"))
    weights = dict(tied.model.state_dict())
    tied.load_weights({k: v for k, v in weights.items() if k != "lm_head.weight"}.items())  # tied: optional
    with pytest.raises(ValueError, match=r"missing.*model.norm.weight"):
        tied.load_weights({k: v for k, v in weights.items() if k != "model.norm.weight"}.items())
    with pytest.raises(ValueError, match=r"unexpected.*_orig_mod.model.norm.weight"):
        tied.load_weights((weights | {"_orig_mod.model.norm.weight": weights["model.norm.weight"]}).items())
    untied = make_sampler(save_model(tmp_path / "b", "llama-untied"))
    with pytest.raises(ValueError, match="missing.*lm_head.weight"):
        untied.load_weights({k: v for k, v in untied.model.state_dict().items() if k != "lm_head.weight"}.items())


def test_unknown_architecture_is_refused(tmp_path: Path) -> None:
    from transformers import GPT2Config

    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1))
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="gpt2"):
        make_sampler(str(tmp_path))
