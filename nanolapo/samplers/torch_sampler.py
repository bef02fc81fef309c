"""The reference sampler: Llama- and Qwen2-type models, plain PyTorch, a static key/value cache.

For a model of a million parameters the Python around the matrix products is what costs, so this file runs the layers of
the Hugging Face model itself (its modules, its weights) instead of `generate`, about ten times faster. Three ideas:

- A cache row belongs to one request and starts at column 0, so no row is padded on the left and position == column.
  Prompts are padded on the right while they are read: causal attention never looks there, decoding overwrites it.
- Rows that end are replaced by waiting requests; when none wait, the cache is compacted. Equal prompts are read once.
- Tokens come from the inverse of the cumulative distribution and one uniform number per token, drawn from the request's
  seed. So a request's tokens do not depend on the batch it travels in (up to float rounding).

Returned log-probs are those of softmax(logits / temperature) over the whole vocabulary, in fp32, also under top_p (which
is for evaluation only). Greedy decoding (temperature 0) returns those at temperature 1.

Legend: R cache rows, T new tokens per row, S cache columns, V vocabulary, K key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanolapo.config import UserError
from nanolapo.samplers.sampler import Decoding, Request, Sample

REPACK = 0.25  # replace or drop finished rows once they are this fraction of the cache


def end_token_ids(model_path: str, model_config: object, generation_config: object) -> list[int]:
    """Every token that ends a response: generation_config (one or several), config, tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    found: set[int] = set()
    for value in (getattr(generation_config, "eos_token_id", None), getattr(model_config, "eos_token_id", None)):
        found.update([value] if isinstance(value, int) else value or [])
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    return sorted(found)


def pick_tokens(logits_RV: Tensor, uniform_R: Tensor, decoding: Decoding) -> tuple[Tensor, Tensor]:
    """Next token of each row and its log-prob: the first token whose cumulative probability exceeds `uniform`.

    >>> logits = torch.tensor([[0.5, 0.3, 0.2]]).log().repeat(3, 1)
    >>> pick_tokens(logits, torch.tensor([0.49, 0.51, 0.99], dtype=torch.float64), Decoding())[0].tolist()
    [0, 1, 2]
    >>> pick_tokens(logits, torch.tensor([0.49, 0.51, 0.99], dtype=torch.float64), Decoding(top_p=0.7))[0].tolist()
    [0, 0, 1]
    """
    greedy = decoding.temperature == 0
    logprobs_RV = torch.log_softmax(logits_RV.float() / (1.0 if greedy else decoding.temperature), dim=-1)
    if greedy:
        tokens_R = logprobs_RV.argmax(dim=-1)
    else:
        probs_RV = logprobs_RV.exp()
        if decoding.top_p < 1:  # keep the most probable tokens until their sum reaches top_p, the first one always
            sorted_RV, order_RV = probs_RV.sort(dim=-1, descending=True)
            drop_RV = sorted_RV.cumsum(-1) - sorted_RV >= decoding.top_p
            probs_RV = probs_RV.masked_fill(drop_RV.scatter(-1, order_RV, drop_RV), 0.0)
        cumulative_RV = probs_RV.cumsum(-1, dtype=torch.float64)  # 64 bit: 150k small terms lose digits in 32
        threshold_R = uniform_R * cumulative_RV[:, -1]
        # right=True: strictly above, so a token of probability 0 is never chosen
        tokens_R = torch.searchsorted(cumulative_RV, threshold_R[:, None], right=True)[:, 0]
        tokens_R = tokens_R.clamp_(max=probs_RV.shape[-1] - 1)
    return tokens_R, logprobs_RV.gather(-1, tokens_R[:, None])[:, 0]


class TorchSampler:
    """`generate`, `load_weights`, `sleep`, `wake`: the same small interface as sampler_vllm.VLLMSampler."""

    def __init__(self, model_path: str, dtype: torch.dtype, device: torch.device, max_rows: int = 256):
        loaded: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
            model_path, dtype=dtype, trust_remote_code=False, use_safetensors=True
        )
        self.model = cast(Any, loaded.to(device).eval())  # its layers are used by name below
        config = self.model.config
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if config.model_type not in ("llama", "qwen2") or kinds != {"full_attention"}:
            raise UserError(
                f"{model_path}: the torch sampler knows llama and qwen2 with full attention, not {config.model_type} with "
                f"{', '.join(sorted(kinds))}; install vllm and set rollout.engine=vllm"
            )
        self.device, self.dtype, self.max_rows = device, dtype, max_rows
        self.num_kv_heads = config.num_key_value_heads
        self.head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.end_ids = torch.tensor(
            end_token_ids(model_path, config, self.model.generation_config), device=device, dtype=torch.long
        )

    def sleep(self) -> None:
        """Nothing to free: the cache lives only inside `generate`."""

    def wake(self) -> None:
        """See `sleep`."""

    def close(self) -> None:
        """See `sleep`."""

    @torch.no_grad()
    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copy weights in by Hugging Face name; every name must match, only a tied lm_head may be left out."""
        own = self.model.state_dict()
        given = dict(named_tensors)
        missing = own.keys() - given.keys()
        if self.model.config.tie_word_embeddings:
            missing -= {"lm_head.weight"}
        if missing or given.keys() - own.keys():
            raise ValueError(f"missing weights {sorted(missing)}, unexpected {sorted(given.keys() - own.keys())}")
        for name, tensor in given.items():
            if tensor.shape != own[name].shape:
                raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected {tuple(own[name].shape)}")
            own[name].copy_(tensor)  # state_dict shares storage with the model

    def _new_cache(self, rows: int, columns: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values per layer, [R, K, S, D]. Zeros, not empty: a masked column must not hold a NaN."""
        shape = (rows, self.num_kv_heads, columns, self.head_size)
        layers = range(self.model.config.num_hidden_layers)
        both = torch.zeros(2, len(layers), *shape, dtype=self.dtype, device=self.device)
        return [(both[0, layer], both[1, layer]) for layer in layers]

    def _hidden(self, ids_RT: Tensor, position_RT: Tensor, cache: list[tuple[Tensor, Tensor]], used: int) -> Tensor:
        """Run the layers on new tokens, write their keys and values into the cache, return hidden states [R, T, H].

        `used` is the number of cache columns in play; column s is visible to a token at position p when s <= p.
        """
        core, (R, T) = self.model.model, ids_RT.shape
        K, D = self.num_kv_heads, self.head_size
        x = core.embed_tokens(ids_RT)
        cos, sin = (t[:, :, None] for t in core.rotary_emb(x, position_RT))  # [R, T, 1, D]
        rows_R1 = torch.arange(R, device=self.device)[:, None]
        visible_RTS = torch.arange(used, device=self.device) <= position_RT[:, :, None]
        groups = self.model.config.num_attention_heads // K
        # Grouped heads: the query heads that share a key head become extra query rows, [R, K, groups * T, D].
        mask = torch.zeros(visible_RTS.shape, dtype=self.dtype, device=self.device)
        mask = mask.masked_fill(~visible_RTS, float("-inf"))[:, None].repeat(1, 1, groups, 1)
        for layer, (keys, values) in zip(core.layers, cache, strict=True):
            attention, normed = layer.self_attn, layer.input_layernorm(x)
            query = _rotate(attention.q_proj(normed).view(R, T, K * groups, D), cos, sin)
            keys[rows_R1, :, position_RT] = _rotate(attention.k_proj(normed).view(R, T, K, D), cos, sin)
            values[rows_R1, :, position_RT] = attention.v_proj(normed).view(R, T, K, D)
            query = query.view(R, T, K, groups, D).permute(0, 2, 3, 1, 4).reshape(R, K, groups * T, D)
            mixed = F.scaled_dot_product_attention(query, keys[:, :, :used], values[:, :, :used], attn_mask=mask)
            mixed = mixed.view(R, K, groups, T, D).permute(0, 3, 1, 2, 4).reshape(R, T, K * groups * D)
            x = x + attention.o_proj(mixed)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return core.norm(x)

    @torch.inference_mode()
    def generate(
        self,
        requests: Sequence[Request],
        decoding: Decoding,
        progress: Callable[[int], None] | None = None,
        finished: Callable[[int, Sample], None] | None = None,
    ) -> list[Sample]:
        """Sample every request; results in the order of the requests. `progress` gets the number of new tokens, `finished`
        the number of a request and its row, while others are still being sampled."""
        if not requests:
            return []
        rows = min(self.max_rows, len(requests))
        cache = self._new_cache(rows, max(len(r.prompt_ids) + r.max_new_tokens for r in requests))
        longest = max(r.max_new_tokens for r in requests)
        # State of each row. Row r holds request owner[r]; -1 is a free row, which computes but is never read.
        owner = np.full(rows, -1)
        logits_RV = torch.zeros(rows, self.model.config.vocab_size, device=self.device)
        state = torch.zeros(3, rows, dtype=torch.long, device=self.device)  # next column, tokens so far, token limit
        uniform = torch.zeros(rows, longest, dtype=torch.float64, device=self.device)
        ids = torch.zeros(rows, longest, dtype=torch.long, device=self.device)
        logprobs = torch.zeros(rows, longest, device=self.device)
        samples: list[Sample | None] = [None] * len(requests)
        waiting = list(range(len(requests)))[::-1]  # popped from the end

        while waiting or (owner >= 0).any():
            free = np.flatnonzero(owner < 0)
            if len(free) >= REPACK * len(owner):
                if waiting:
                    new = [waiting.pop() for _ in free[: len(waiting)]]
                    at = torch.from_numpy(free[: len(new)]).to(self.device)
                    owner[free[: len(new)]] = new
                    chosen = [requests[i] for i in new]
                    logits_RV[at] = self._read_prompts(chosen, cache, at)
                    state[0, at] = torch.tensor([len(r.prompt_ids) for r in chosen], device=self.device)
                    state[1, at] = 0
                    state[2, at] = torch.tensor([r.max_new_tokens for r in chosen], device=self.device)
                    drawn = [np.random.default_rng(r.seed).random(longest) for r in chosen]
                    uniform[at] = torch.from_numpy(np.stack(drawn)).to(self.device)
                elif len(free):
                    keep = torch.from_numpy(np.flatnonzero(owner >= 0)).to(self.device)
                    owner, n, used = owner[owner >= 0], len(keep), int(state[0].max())
                    for keys_values in cache:
                        for part in keys_values:
                            part[:n, :, :used] = part[keep, :, :used]
                    cache = [(keys[:n], values[:n]) for keys, values in cache]
                    logits_RV, state, uniform = logits_RV[keep], state[:, keep], uniform[keep]
                    ids, logprobs = ids[keep], logprobs[keep]

            column_R, count_R, limit_R = state
            steps_R = count_R[:, None].clamp(max=longest - 1)  # free rows stand still at their last token
            token_R, logprob_R = pick_tokens(logits_RV, uniform.gather(1, steps_R)[:, 0], decoding)
            ids.scatter_(1, steps_R, token_R[:, None])
            logprobs.scatter_(1, steps_R, logprob_R[:, None])
            busy_R = torch.from_numpy(owner >= 0).to(self.device)
            count_R += busy_R
            ended_R = torch.isin(token_R, self.end_ids)
            done_R = busy_R & (ended_R | (count_R >= limit_R))
            if progress is not None:
                progress(int((owner >= 0).sum()))
            for row in done_R.nonzero()[:, 0].tolist():
                num = int(count_R[row])
                row_ids, row_logprobs = (buffer[row, :num].cpu().numpy().copy() for buffer in (ids, logprobs))
                number, sample = int(owner[row]), Sample(row_ids, row_logprobs, bool(ended_R[row]))
                samples[number], owner[row] = sample, -1
                if finished is not None:
                    finished(number, sample)
            if (owner >= 0).any():
                used = int(column_R[busy_R].max()) + 1
                hidden = self._hidden(token_R[:, None], column_R[:, None].clamp(max=used - 1), cache, used)
                logits_RV = self.model.lm_head(hidden[:, 0]).float()
                column_R += torch.from_numpy(owner >= 0).to(self.device)
        return [sample for sample in samples if sample is not None]

    def _read_prompts(self, chosen: list[Request], cache: list[tuple[Tensor, Tensor]], at: Tensor) -> Tensor:
        """Put prompts into cache rows `at` and return the logits after each, [R, V]. Equal prompts are read once."""
        distinct = {prompt: i for i, prompt in enumerate(dict.fromkeys(tuple(r.prompt_ids) for r in chosen))}
        which = torch.tensor([distinct[tuple(r.prompt_ids)] for r in chosen], device=self.device)
        last = torch.tensor([len(p) - 1 for p in distinct], device=self.device)
        ids_PT = torch.nn.utils.rnn.pad_sequence([torch.tensor(p) for p in distinct], batch_first=True).to(self.device)
        num, width = ids_PT.shape
        position_PT = torch.arange(width, device=self.device).expand(num, width)
        fresh = self._new_cache(num, width)
        hidden = self._hidden(ids_PT, position_PT, fresh, width)
        logits = self.model.lm_head(hidden[torch.arange(num, device=self.device), last]).float()
        for (keys, values), (new_keys, new_values) in zip(cache, fresh, strict=True):
            keys[at, :, :width] = new_keys[which]
            values[at, :, :width] = new_values[which]
        return logits[which]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of [R, T, heads, D]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
