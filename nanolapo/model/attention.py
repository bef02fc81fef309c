"""Attention over one long sequence that holds many rows without padding and reads equal prompts once.

A micro-batch is one sequence: a prompt, all responses to it, the next prompt, its responses, and so on. A prompt sees
itself. A response sees its prompt and itself, but not the other responses. So the prompt of a group is computed once for
its G rollouts (its gradient is the sum over them), and no position is padding. transformers lets a model use such a
function by name, and passes it every keyword that the model was called with: here `packing`.

On a GPU one kernel a layer computes all pieces, with the keys gathered by an index that is made once a micro-batch.
Elsewhere, and for what the kernel does not take, there is one call a piece.

Legend: S all tokens of the sequence, R the tokens that each piece sees (a prompt counts once for each of its pieces), H
query heads, K key/value heads, D head size.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel

from nanolapo.ranks import to_device

NAME = "nanolapo_shared_prompts"
# Newer versions of torch must be told that several query heads share a key head; older ones see it by the shapes.
GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


@dataclass(frozen=True)
class Packing:
    """Which tokens of the sequence see which. A piece is a prompt or a response; the pieces follow each other in S."""

    sizes: list[int]  # tokens of each piece
    prompt_of: list[int]  # the index of each piece's prompt; a prompt's own index
    seen_R: Tensor  # the places in S of all tokens that piece 0 sees, then of those that piece 1 sees, and so on
    query_ends: Tensor  # int32: 0, then the end of each piece in S ...
    key_ends: Tensor  # ... and in seen_R
    longest: tuple[int, int]  # the most tokens of a piece, and the most that a piece sees


def pack(sizes: Sequence[int], prompt_of: Sequence[int], device: torch.device) -> Packing:
    """Say what each piece sees: its prompt, then itself.

    >>> packing = pack([2, 3, 1], [0, 0, 0], torch.device("cpu"))  # a prompt of 2 tokens with two responses
    >>> packing.seen_R, packing.key_ends, packing.longest
    (tensor([0, 1, 0, 1, 2, 3, 4, 0, 1, 5]), tensor([ 0,  2,  7, 10], dtype=torch.int32), (3, 5))
    """
    ends = np.cumsum([0, *sizes])
    places = [np.arange(first, end) for first, end in pairwise(ends)]
    seen = [places[i] if p == i else np.concatenate([places[p], places[i]]) for i, p in enumerate(prompt_of)]
    counts = [len(piece) for piece in seen]
    seen_R, query_ends, key_ends = (
        to_device(array, device)
        for array in (np.concatenate(seen), ends.astype(np.int32), np.cumsum([0, *counts]).astype(np.int32))
    )
    return Packing(list(sizes), list(prompt_of), seen_R, query_ends, key_ends, (max(sizes), max(counts)))


@torch.compiler.disable  # it depends on the pieces of each micro-batch, and its kernels are fused already
def shared_prompt_attention(
    module: nn.Module,
    query_1HSD: Tensor,
    key_1KSD: Tensor,
    value_1KSD: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    packing: Packing | None = None,
    sliding_window: int | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Attend causally within each prompt and its responses: [1, S, H, D]. transformers fixes the signature."""
    if attention_mask is not None or unused.get("s_aux") is not None or unused.get("softcap") is not None:
        raise NotImplementedError("its attention has sinks, capped logits or a mask of the layer's own")
    if packing is None:
        raise NotImplementedError("its layers do not tell the attention where the rows are")
    if not has_varlen_kernel(query_1HSD, value_1KSD):
        return attend_by_piece(query_1HSD, key_1KSD, value_1KSD, packing, scaling, sliding_window), None
    query_SHD, key_SKD, value_SKD = (x[0].transpose(0, 1) for x in (query_1HSD, key_1KSD, value_1KSD))
    window = (-1 if sliding_window is None else sliding_window - 1, 0)  # tokens before and after its own; -1: all
    out_SHD: Any = varlen_attn(  # the type says that there may be more than one output
        query_SHD.contiguous(), key_SKD[packing.seen_R], value_SKD[packing.seen_R], packing.query_ends,
        packing.key_ends, *packing.longest, scale=scaling, window_size=window, **GROUPED,
    )  # fmt: skip
    return out_SHD[None], None


def has_varlen_kernel(query: Tensor, value: Tensor) -> bool:
    """Whether torch's kernel for pieces of any length takes these: CUDA from Ampere on, 16 bits, equal head sizes."""
    D = query.shape[-1]
    common = value.shape[-1] == D and D % 8 == 0 and D <= 256 and query.dtype in (torch.bfloat16, torch.float16)
    return common and query.is_cuda and torch.cuda.get_device_capability(query.device) >= (8, 0)


def attend_by_piece(
    query_1HSD: Tensor, key_1KSD: Tensor, value_1KSD: Tensor, packing: Packing, scaling: float, window: int | None
) -> Tensor:
    """Attend piece by piece: [1, S, H, D]. It takes every device and dtype."""
    # One split for all: the gradient of a slice would be a tensor of the whole length S for each piece.
    queries, keys, values = (x.split(packing.sizes, dim=2) for x in (query_1HSD, key_1KSD, value_1KSD))
    outputs: list[Tensor] = []
    for i, prompt in enumerate(packing.prompt_of):
        key, value = keys[i], values[i]
        if prompt != i:
            key, value = torch.cat([keys[prompt], key], dim=2), torch.cat([values[prompt], value], dim=2)
        outputs.append(attend(queries[i], key, value, scaling, window))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


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
    # Not every kind of model lists them
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    common = model._supports_attention_backend and not model._is_stateful
    if not common or kinds - {"full_attention", "sliding_attention"}:
        raise NotImplementedError("its layers do not mix tokens by attention only, in transformers' common form")
    AttentionInterface.register(NAME, shared_prompt_attention)
    model.set_attn_implementation(NAME)
