"""What the engine tests share: tiny model folders with a tokenizer, an fp32 reference, a look at sockets and children."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from nanolapo.samplers.sampler import Decoding, Request, Sample

VOCAB = 120  # the engine pads this to 128
END_CONFIG, END_GENERATION, END_TOKENIZER = 3, 7, 9  # each known to one file of the folder only


def tiny_model(tied: bool, seed: int = 0) -> PreTrainedModel:
    """Random, with weights large enough that its predictions are far from uniform and errors show."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=1024, tie_word_embeddings=tied, initializer_range=0.2,
        eos_token_id=END_CONFIG, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


def save(model: PreTrainedModel, folder: Path, generation: dict[str, Any] | None = None) -> str:
    """A complete Hugging Face folder; `generation` adds settings to its generation_config.json."""
    model.save_pretrained(folder)
    settings = {"eos_token_id": [END_CONFIG, END_GENERATION]} | (generation or {})
    (folder / "generation_config.json").write_text(json.dumps(settings))
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token=f"w{END_TOKENIZER}").save_pretrained(folder)
    return str(folder)


def named_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """As Policy.named_weights sends them: a tied head once, under the embedding's name."""
    return ((name, p.detach()) for name, p in model.named_parameters())


def perturb(model: PreTrainedModel, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator))


def make_requests(count: int, length: int = 32, seed: int = 0) -> list[Request]:
    """Prompts of 1 to 20 ids, all different."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(10, VOCAB, rng.integers(1, 21)).tolist() for _ in range(count)]
    return [Request(prompt, seed=1000 * seed + i, max_new_tokens=length) for i, prompt in enumerate(prompts)]


@torch.no_grad()
def reference(model: PreTrainedModel, request: Request, sample: Sample, temperature: float = 1.0) -> np.ndarray:
    """Log-probs of the sampled tokens by transformers: one row alone, log_softmax(logits / T) in fp32."""
    ids = torch.tensor([request.prompt_ids + sample.ids.tolist()])
    logits = model(ids).logits[0, len(request.prompt_ids) - 1 : -1].float()
    logprobs = torch.log_softmax(logits / temperature, -1)
    return logprobs.gather(-1, torch.from_numpy(sample.ids)[:, None])[:, 0].numpy()


def mismatch(
    model: PreTrainedModel, requests: Sequence[Request], samples: Iterable[Sample], temperature: float = 1.0
) -> np.ndarray:
    """d = logp_trainer - logp_sampler of every sampled token, in one array."""
    pairs = zip(requests, samples, strict=True)
    return np.concatenate([reference(model, r, s, temperature) - s.logprobs for r, s in pairs])


def score(sampler: Any, model: PreTrainedModel, temperature: float = 1.0, count: int = 8) -> np.ndarray:
    """Sample a few rows now; |d| of each token against `model`."""
    requests = make_requests(count)
    return np.abs(mismatch(model, requests, sampler.generate(requests, Decoding(temperature)), temperature))


def listening_addresses() -> set[str]:
    """Addresses this process listens on for TCP, e.g. {"127.0.0.1"} (Linux; hexadecimal where not that one)."""
    own = set()
    for entry in Path("/proc/self/fd").iterdir():
        if entry.is_symlink() and (target := os.readlink(entry)).startswith("socket:["):
            own.add(target[8:-1])
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in own:
                address = fields[1].split(":")[0]
                found.add("127.0.0.1" if address == "0100007F" else address)
    return found


def children() -> list[str]:
    """Command lines of this process's children (Linux), but for Python's own resource tracker, which ends with it."""
    ids = " ".join(task.read_text() for task in Path("/proc/self/task").glob("*/children")).split()
    commands = [Path(f"/proc/{i}/cmdline").read_text().replace("\0", " ") for i in ids]
    return [command for command in commands if "resource_tracker" not in command]


def discard_as_level_2_does(sampler: Any) -> int:
    """Overwrite what vLLM's sleep at level 2 takes from an engine's model: every tensor but the buffers, which it saves,
    and the cache of keys and values, which holds nothing then. Returns how many tensors these are."""

    def overwrite(worker: Any) -> int:
        model = worker.get_model()
        kept = {buffer.data_ptr() for buffer in model.buffers()}
        tensors = list(model.parameters())
        for module in model.modules():
            for holder in (module, getattr(module, "impl", None)):
                plain = vars(holder).items() if holder is not None else ()
                tensors += [x for name, x in plain if isinstance(x, Tensor) and name != "kv_cache"]
        lost = [x for x in tensors if x.is_floating_point() and x.numel() and x.data_ptr() not in kept]
        for tensor in lost:
            tensor.data.fill_(float("nan"))
        return len(lost)

    (count,) = sampler.llm.collective_rpc(overwrite)
    return int(count)
