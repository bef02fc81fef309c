"""Attention over rows that lie side by side in one long sequence, without padding, equal prompts read once.

A micro-batch is one sequence of *stems*: a prompt, then all responses to it. A prompt sees itself; a response sees the
prompt and itself, never the response beside it. So the prompt of a group is computed once for its G rollouts (its gradient
is the sum over them), and no position is padding. transformers' models take such a function by name, and hand it whatever
keyword the model was called with: here `stems`.

Legend: S all tokens of the sequence, P prompt tokens, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, PreTrainedModel

from nanolapo.config import UserError

NAME = "nanolapo_stems"


@dataclass(frozen=True)
class Stem:
    """Where a prompt lies in the sequence, and where each response to it does: (first token, number of tokens)."""

    prompt: tuple[int, int]
    responses: tuple[tuple[int, int], ...]

    def pieces(self) -> Iterator[tuple[int, int, int]]:
        """(first token, number of tokens, tokens of the prompt that it also sees) of each piece, in order."""
        yield *self.prompt, 0
        for first, count in self.responses:
            yield first, count, self.prompt[1]


def stem_attention(
    module: nn.Module,
    query_1HSD: Tensor,
    key_1KSD: Tensor,
    value_1KSD: Tensor,
    attention_mask: Tensor | None,
    *,
    stems: Sequence[Stem],
    scaling: float,
    sliding_window: int | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each stem, [1, S, H, D]. The signature is transformers'."""
    if unused.get("s_aux") is not None or unused.get("softcap") is not None:
        raise UserError("model.path: attention with sinks or capped logits is not supported")
    pieces = []
    for stem in stems:
        start = stem.prompt[0]
        for first, count, seen in stem.pieces():
            own = slice(first, first + count)
            key, value = key_1KSD[:, :, own], value_1KSD[:, :, own]
            if seen:
                key = torch.cat([key_1KSD[:, :, start : start + seen], key], dim=2)
                value = torch.cat([value_1KSD[:, :, start : start + seen], value], dim=2)
            pieces.append(attend(query_1HSD[:, :, own], key, value, scaling, sliding_window))
    return torch.cat(pieces, dim=2).transpose(1, 2), None


def attend(query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
    """The queries are the last of the keys' positions; each sees its own and all before it, at most `window` of them."""
    T, S, dtype = query.shape[2], key.shape[2], query.dtype
    if query.device.type == "cpu":  # torch's bf16 kernel for CPUs takes 1.5 times as long as its float32 one
        query, key, value = query.float(), key.float(), value.float()
    mask: Tensor = causal_lower_right(T, S)  # a note to the kernel, not a tensor in memory
    if window is not None and window < S:
        mask = torch.ones(T, S, dtype=torch.bool, device=query.device).tril(S - T).triu(S - T - window + 1)
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out.to(dtype)


def use_stems(model: PreTrainedModel) -> None:
    """Let the model attend by stems from now on. Raises UserError where rows side by side would mix in another way."""
    kinds = set(getattr(model.config, "layer_types", None) or ())  # not every kind of model lists them
    common = model._supports_attention_backend and not model._is_stateful
    if not common or kinds - {"full_attention", "sliding_attention"}:
        raise UserError(
            f"model.path: {model.config.model_type} cannot be trained here; its layers must mix tokens by attention only, "
            "in transformers' common form (llama, mistral, qwen2, qwen3, ...)"
        )
    AttentionInterface.register(NAME, stem_attention)
    model.set_attn_implementation(NAME)
