"""Attention over one long sequence that holds many rows without padding and reads equal prompts once.

A micro-batch is one sequence: a prompt, all responses to it, the next prompt, its responses, and so on. A prompt sees
itself. A response sees its prompt and itself, but not the other responses. So the prompt of a group is computed once for
its G rollouts (its gradient is the sum over them), and no position is padding. transformers lets a model use such a
function by name, and passes it every keyword that the model was called with: here `shared_prompts`.

Legend: S all tokens of the sequence, H query heads, K key/value heads, D head size.
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

NAME = "nanolapo_shared_prompts"


@dataclass(frozen=True)
class SharedPrompt:
    """The place of a prompt and of each response to it in the sequence: (first token, number of tokens)."""

    prompt: tuple[int, int]
    responses: tuple[tuple[int, int], ...]

    def pieces(self) -> Iterator[tuple[int, int, int]]:
        """Yield (first token, number of tokens, number of prompt tokens it also sees) of each piece, in order."""
        yield *self.prompt, 0
        for first, count in self.responses:
            yield first, count, self.prompt[1]


def shared_prompt_attention(
    module: nn.Module,
    query_1HSD: Tensor,
    key_1KSD: Tensor,
    value_1KSD: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    shared_prompts: Sequence[SharedPrompt] | None = None,
    sliding_window: int | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Attend causally within each prompt and its responses: [1, S, H, D]. transformers fixes the signature."""
    if attention_mask is not None or unused.get("s_aux") is not None or unused.get("softcap") is not None:
        raise NotImplementedError("its attention has sinks, capped logits or a mask of the layer's own")
    if shared_prompts is None:
        raise NotImplementedError("its layers do not tell the attention where the rows are")
    # One split for all: the gradient of a slice would be a tensor of the whole length S for each piece.
    sizes = [count for shared in shared_prompts for _, count, _ in shared.pieces()]
    queries, keys, values = (x.split(sizes, dim=2) for x in (query_1HSD, key_1KSD, value_1KSD))
    outputs: list[Tensor] = []
    for shared in shared_prompts:
        prompt = len(outputs)  # the index of its piece
        for _, _, seen in shared.pieces():
            query, key, value = (pieces[len(outputs)] for pieces in (queries, keys, values))
            if seen:
                key, value = torch.cat([keys[prompt], key], dim=2), torch.cat([values[prompt], value], dim=2)
            outputs.append(attend(query, key, value, scaling, sliding_window))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def attend(query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
    """Attend causally. The queries stand at the last positions of the keys; a query sees at most `window` positions."""
    T, S, dtype = query.shape[2], key.shape[2], query.dtype
    if query.device.type == "cpu":  # torch's bf16 kernel for CPUs takes 1.5 times as long as its float32 one
        query, key, value = query.float(), key.float(), value.float()
    mask: Tensor = causal_lower_right(T, S)  # a note to the kernel: it takes no memory
    if window is not None and window < S:
        mask = torch.ones(T, S, dtype=torch.bool, device=query.device).tril(S - T).triu(S - T - window + 1)
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out.to(dtype)


def use_shared_prompts(model: PreTrainedModel) -> None:
    """Switch the model to `shared_prompt_attention`. Raises NotImplementedError if the model says that its layers also mix
    tokens in another way. trial.py tries what models do not say."""
    kinds = set(
        getattr(model.config.get_text_config(), "layer_types", None) or ()
    )  # not every kind of model lists them
    common = model._supports_attention_backend and not model._is_stateful
    if not common or kinds - {"full_attention", "sliding_attention"}:
        raise NotImplementedError("its layers do not mix tokens by attention only, in transformers' common form")
    AttentionInterface.register(NAME, shared_prompt_attention)
    model.set_attn_implementation(NAME)
