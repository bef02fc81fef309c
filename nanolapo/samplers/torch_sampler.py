"""The reference sampler: Llama- and Qwen2-type models in plain PyTorch with a static key/value cache.

For a model of a million parameters, the Python between the matrix products takes most of the time. So this file runs the
layers of the Hugging Face model (its modules, its weights) instead of its `generate`, which is about ten times slower.

- A cache row belongs to one request and starts at column 0. So no row is padded on the left, and position == column.
  Prompts are padded on the right while they are read: causal attention never looks there, and decoding overwrites it.
- Waiting requests take the rows of finished ones. When none wait, the cache is compacted. Equal prompts are read once.
- A token is drawn with one uniform number and the inverse of the cumulative distribution. The numbers come from the
  request's seed. So a request's tokens do not depend on the other requests in the batch (up to float rounding).

Returned log-probs are those of softmax(logits / temperature) over the whole vocabulary, in float32. This also holds with
top_p, which is for evaluation only. Greedy decoding (temperature 0) returns those at temperature 1.

Legend: R cache rows, T new tokens per row, S cache columns, V vocabulary, K key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from nanolapo.config import UserError
from nanolapo.model.folder import load_tokenizer, read_model, read_settings
from nanolapo.samplers.sampler import Decoding, Request, Sample

REPACK = 0.25  # replace or drop free rows once they are this fraction of the cache
Cache = list[tuple[Tensor, Tensor]]  # keys and values of each layer, [R, K, S, D]


def end_token_ids(
    tokenizer: PreTrainedTokenizerBase, model_config: PreTrainedConfig, generation_config: GenerationConfig | None
) -> list[int]:
    """Return every token that ends a response, according to generation_config (one or several), config or tokenizer.

    The configs are those of `read_settings`.
    """
    found: set[int] = set()
    for source in (generation_config, model_config, model_config.get_text_config(), tokenizer):
        value = getattr(source, "eos_token_id", None)
        found.update([value] if isinstance(value, int) else value or [])
    return sorted(found)


def pick_tokens(logits_RV: Tensor, uniform_R: Tensor, decoding: Decoding) -> tuple[Tensor, Tensor]:
    """Return each row's next token, the first whose cumulative probability exceeds `uniform`, and its log-prob.

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


def torch_objection(config: PreTrainedConfig) -> str | None:
    """Say why this file cannot sample from a model; None if it can."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if config.model_type in ("llama", "qwen2") and kinds == {"full_attention"}:
        return None
    layers = ", ".join(sorted(kinds))
    return f"the torch sampler knows llama and qwen2 with full attention, not {config.model_type} with {layers}"


class Rows:
    """The requests that are sampled side by side. Row r works on request owner_R[r]. A free row (owner -1) computes along,
    but its tokens are never read."""

    def __init__(self, cache: Cache, num: int, longest: int, vocab: int, device: torch.device) -> None:
        self.cache, self.owner_R = cache, np.full(num, -1)
        self.logits_RV = torch.zeros(num, vocab, device=device)  # of each row's next token
        self.column_R = torch.zeros(num, dtype=torch.long, device=device)  # the next cache column to fill
        self.count_R = torch.zeros_like(self.column_R)  # tokens drawn so far ...
        self.limit_R = torch.zeros_like(self.column_R)  # ... and at most
        self.uniform_RT = torch.zeros(num, longest, dtype=torch.float64, device=device)
        self.ids_RT = torch.zeros(num, longest, dtype=torch.long, device=device)
        self.logprobs_RT = torch.zeros(num, longest, device=device)

    def admit(self, at: Tensor, requests: list[Request], logits_RV: Tensor) -> None:
        """Start requests in the rows `at`, whose cache holds their prompts; `logits_RV` are those after each prompt."""
        longest = self.ids_RT.shape[1]
        self.logits_RV[at] = logits_RV
        self.column_R[at] = torch.tensor([len(r.prompt_ids) for r in requests], device=at.device)
        self.count_R[at] = 0
        self.limit_R[at] = torch.tensor([r.max_new_tokens for r in requests], device=at.device)
        drawn = [np.random.default_rng(r.seed).random(longest) for r in requests]
        self.uniform_RT[at] = torch.from_numpy(np.stack(drawn)).to(at.device)

    def compact(self) -> None:
        """Drop the free rows."""
        keep = torch.from_numpy(np.flatnonzero(self.owner_R >= 0)).to(self.ids_RT.device)
        num, used = len(keep), int(self.column_R.max())
        for keys_values in self.cache:
            for part in keys_values:
                part[:num, :, :used] = part[keep, :, :used]
        self.cache = [(keys[:num], values[:num]) for keys, values in self.cache]
        self.owner_R = self.owner_R[self.owner_R >= 0]
        self.column_R, self.count_R, self.limit_R = self.column_R[keep], self.count_R[keep], self.limit_R[keep]
        self.logits_RV, self.uniform_RT = self.logits_RV[keep], self.uniform_RT[keep]
        self.ids_RT, self.logprobs_RT = self.ids_RT[keep], self.logprobs_RT[keep]

    def draw(self, busy_R: Tensor, decoding: Decoding, end_ids: Tensor) -> tuple[Tensor, dict[int, Sample]]:
        """Draw a token in every row. Return the tokens, and by request the samples now complete; their rows become free."""
        step_R1 = self.count_R[:, None].clamp(max=self.ids_RT.shape[1] - 1)  # free rows stand still at their last token
        token_R, logprob_R = pick_tokens(self.logits_RV, self.uniform_RT.gather(1, step_R1)[:, 0], decoding)
        self.ids_RT.scatter_(1, step_R1, token_R[:, None])
        self.logprobs_RT.scatter_(1, step_R1, logprob_R[:, None])
        self.count_R += busy_R
        ended_R = torch.isin(token_R, end_ids)
        done_R = busy_R & (ended_R | (self.count_R >= self.limit_R))
        complete = {}
        for row in done_R.nonzero()[:, 0].tolist():
            num = int(self.count_R[row])
            ids, logprobs = (part[row, :num].cpu().numpy().copy() for part in (self.ids_RT, self.logprobs_RT))
            complete[int(self.owner_R[row])] = Sample(ids, logprobs, bool(ended_R[row]))
            self.owner_R[row] = -1
        return token_R, complete


class TorchSampler:
    """Implements sampler.Sampler, as vllm_sampler.VLLMSampler does."""

    def __init__(self, model_path: str, dtype: torch.dtype, device: torch.device, max_rows: int = 256):
        model: torch.nn.Module = read_model(model_path, model_path, dtype=dtype)
        self.model = cast(Any, model.to(device).eval())  # its layers are used by name below
        config = self.model.config
        if reason := torch_objection(config):
            raise UserError(f"{model_path}: {reason}; set rollout.engine=vllm (`make vllm` installs it)")
        self.device, self.dtype, self.max_rows = device, dtype, max_rows
        self.num_kv_heads = config.num_key_value_heads
        self.head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        ends = end_token_ids(load_tokenizer(model_path), *read_settings(model_path, "model.path"))
        self.end_ids = torch.tensor(ends, device=device, dtype=torch.long)

    def sleep(self) -> None:
        """Do nothing: the cache lives only inside `generate`."""

    def wake(self) -> None:
        """Do nothing, see `sleep`."""

    def close(self) -> None:
        """Do nothing, see `sleep`."""

    @torch.no_grad()
    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copy weights in by Hugging Face name. Every name must match; only a tied lm_head may be left out."""
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

    def _check_rotary(self, longest: int) -> None:
        """Raise UserError if rows so long change the rotary factors of all rows in their batch (longrope, dynamic NTK)."""
        near = torch.tensor([[0, 1]], device=self.device)
        far = torch.tensor([[0, 1, longest - 1]], device=self.device)
        cos, beside = (self.model.model.rotary_emb(x.float(), x)[0][:, 1] for x in (near, far))
        if not torch.equal(cos, beside):
            raise UserError(
                f"rows of {longest} tokens would change the rotary factors of all rows in their batch, so the torch "
                "sampler cannot sample them; lower the limit of tokens, or set rollout.engine=vllm"
            )

    def _new_cache(self, rows: int, columns: int) -> Cache:
        """Return a cache of zeros. Uninitialised memory could hold a NaN, which a mask does not hide."""
        shape = (rows, self.num_kv_heads, columns, self.head_size)
        layers = range(self.model.config.num_hidden_layers)
        both = torch.zeros(2, len(layers), *shape, dtype=self.dtype, device=self.device)
        return [(both[0, layer], both[1, layer]) for layer in layers]

    def _hidden(self, ids_RT: Tensor, position_RT: Tensor, cache: Cache, used: int) -> Tensor:
        """Run the layers on new tokens, write their keys and values into the cache, return hidden states [R, T, H].

        Attention reads the first `used` columns of the cache. A token at position p sees column s if s <= p.
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
        progress: Callable[[int], object] | None = None,
        finished: Callable[[int, Sample], None] | None = None,
    ) -> list[Sample]:
        """Sample every request and return the samples in the order of the requests.

        `progress` gets the number of tokens of each decode step. `finished` gets a request's number and its sample as soon
        as it is complete.
        """
        if not requests:
            return []
        num = min(self.max_rows, len(requests))
        longest = max(r.max_new_tokens for r in requests)
        columns = max(len(r.prompt_ids) + r.max_new_tokens for r in requests)
        self._check_rotary(columns)
        cache = self._new_cache(num, columns)
        rows = Rows(cache, num, longest, self.model.config.vocab_size, self.device)
        waiting = list(range(len(requests)))[::-1]  # popped from the end
        samples: dict[int, Sample] = {}
        while len(samples) < len(requests):
            free = np.flatnonzero(rows.owner_R < 0)
            if len(free) >= REPACK * len(rows.owner_R):
                if waiting:
                    new = [waiting.pop() for _ in free[: len(waiting)]]
                    rows.owner_R[free[: len(new)]] = new
                    chosen, at = [requests[i] for i in new], torch.from_numpy(free[: len(new)]).to(self.device)
                    rows.admit(at, chosen, self._read_prompts(chosen, rows.cache, at))
                else:
                    rows.compact()
            busy_R = torch.from_numpy(rows.owner_R >= 0).to(self.device)
            token_R, complete = rows.draw(busy_R, decoding, self.end_ids)
            if progress is not None:
                progress(int(busy_R.sum()))
            for number, sample in complete.items():
                samples[number] = sample
                if finished is not None:
                    finished(number, sample)
            if (rows.owner_R >= 0).any():
                self._read_tokens(token_R, rows, busy_R)
        return [samples[number] for number in range(len(requests))]

    def _read_tokens(self, token_R: Tensor, rows: Rows, busy_R: Tensor) -> None:
        """Put the tokens into the rows' cache and set the logits after each."""
        used = int(rows.column_R[busy_R].max()) + 1
        hidden = self._hidden(token_R[:, None], rows.column_R[:, None].clamp(max=used - 1), rows.cache, used)
        rows.logits_RV = self.model.lm_head(hidden[:, 0]).float()
        rows.column_R += torch.from_numpy(rows.owner_R >= 0).to(self.device)

    def _read_prompts(self, chosen: list[Request], cache: Cache, at: Tensor) -> Tensor:
        """Put prompts into the cache rows `at` and return the logits after each, [R, V]. Equal prompts are read once."""
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
    """Apply the rotary position embedding to [R, T, heads, D]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
