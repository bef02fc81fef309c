"""Tries a model before it is trained: packed rows must get the log-probs that transformers gives each row alone.

No list of names can say which models compute the same when several rows stand in one sequence (attention.py). So we try
it with random tokens. The trial finds terms of the attention that ours leaves out, tokens that are mixed in another way,
and logits that are changed after the head. Two effects show only in long rows, which would take long, so the trial provokes
them in short ones:

- Rotary factors that depend on the longest row of the batch (longrope, dynamic NTK): one row stands at the last positions
  that the run allows.
- Windows that a model applies by its mask alone, which our attention does not read: the windows are made very short.

Legend: S all tokens of the sequence, N response tokens of all rows, T of one row, D size of a hidden state, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from nanolapo.config import UserError
from nanolapo.model.attention import pack, use_shared_prompts
from nanolapo.model.logprobs import LogprobHead

PROMPT, RESPONSES = 5, (4, 6, 9)  # tokens; the first two responses share a prompt
WINDOW = 6  # tokens


def tolerance(model: PreTrainedModel) -> float:
    """Return the `packed_difference` up to which it is rounding.

    float32: it is 2e-6 in a model of 135M parameters; a model that is computed wrongly has 0.005 to 1.

    bfloat16 rounds every value by at most u = 2**-8, about u / 2.5 on average. A layer rounds about ten times on its way,
    and errors add like a random walk: after L layers a hidden state is off by u / 2.5 * sqrt(10 L) of its size, and a logit
    by that share of the spread over the vocabulary. Two such log-probs differ by 1.13 times that in the mean of absolute
    values: 1.4 u sqrt(L). (Measured: 0.8 to 2.4 u sqrt(L) in the kinds of docs/MODELS.md, 1.5 in SmolLM2 with 30 layers.)
    Four times the expected value is allowed. What is hidden below that, the trial in float32 has seen.
    """
    if model.dtype == torch.float32:
        return 1e-3
    return 6 * 2**-8 * math.sqrt(model.config.get_text_config().num_hidden_layers)


def check_packed(model: PreTrainedModel, path: str, longest: int) -> float:
    """Return `packed_difference`. Raises UserError if it is above the tolerance, or if the model cannot be packed."""
    reason = objection(model, longest)
    if isinstance(reason, float):
        return reason
    if model.dtype != torch.float32:  # tried after float32, see policy.py
        raise UserError(f"model.path={path!r}: in {model.dtype} {reason}; set model.dtype=float32, in which they agree")
    remedy = "take a model of a kind that docs/MODELS.md lists, such as llama, mistral, qwen2 or qwen3"
    if isinstance(objection(model, 0), float):
        reason = f"short rows are right, but in rows of {longest} tokens {reason}; its config.json tells the length"
        remedy = f"lower rollout.max_new_tokens, or {remedy}"
    raise UserError(f"model.path={path!r}: {model.config.model_type} cannot be trained here: {reason}; {remedy}")


def objection(model: PreTrainedModel, longest: int) -> str | float:
    """Return `packed_difference` if it is within the tolerance, else in words why the model cannot be trained."""
    try:
        difference = packed_difference(model, longest)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a model's code may raise anything when it is used in a way that it does not know
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    if math.isnan(difference):
        return "its log-probs are not finite: a weight is nan or inf, or becomes so large that they are"
    allowed = tolerance(model)
    if difference <= allowed:  # False for NaN, too
        return difference
    return f"packed log-probs are off from transformers' by {difference:.2%} of their spread (allowed: {allowed:.1%})"


@torch.no_grad()
def packed_difference(model: PreTrainedModel, longest: int) -> float:
    """Return by how much the log-probs of response tokens in one packed sequence differ from those that transformers gives
    each row alone: the mean of absolute values, as a share of the spread of log-probs over the vocabulary (2 to 4 nats in
    a trained model; next to nothing in a new one, whose errors are as small).

    longest: how long rows (prompt and response) can become in the run, in tokens. The head must still be a linear layer.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size

    def draw(count: int) -> Tensor:
        return torch.randint(vocabulary, (count,), generator=generator).to(model.device)

    first, second = draw(PROMPT), draw(PROMPT)
    rows = list(zip((first, first, second), map(draw, RESPONSES), strict=True))
    last_start = max(0, longest - PROMPT - RESPONSES[-1])  # the position of the last row's first token
    before = model.config._attn_implementation
    with short_windows(model, longest):
        plain_NV = torch.cat([plain(model, *row, start) for row, start in zip(rows, (0, 0, last_start), strict=True)])
        targets_N1 = torch.cat([response for _, response in rows])[:, None]
        use_shared_prompts(model)
        try:
            packed_N = packed(model, rows, last_start)
        finally:
            model.set_attn_implementation(before)
    off_N = (packed_N - plain_NV.gather(-1, targets_N1)[:, 0]).abs()
    return float(off_N.mean() / plain_NV.std(-1).mean().clamp(min=1e-6))


def plain(model: PreTrainedModel, prompt: Tensor, response: Tensor, start: int) -> Tensor:
    """Return transformers' log-probs [T, V] where the response's tokens stand. The row's first position is `start`."""
    ids = torch.cat([prompt, response])
    where = {"position_ids": start + torch.arange(len(ids), device=ids.device)[None]} if start else {}
    return model(input_ids=ids[None], use_cache=False, **where).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)


def packed(model: PreTrainedModel, rows: list[tuple[Tensor, Tensor]], last_start: int) -> Tensor:
    """Return our log-probs [N] of all response tokens in one sequence: prompt, response, response, prompt, response. The
    first two rows share their prompt. The second prompt is at position `last_start`."""
    (first, one), (_, two), (second, three) = rows
    pieces = [first, one, two, second, three]
    starts = (0, len(first), len(first), last_start, last_start + len(second))
    positions_S = torch.cat([start + torch.arange(len(piece)) for piece, start in zip(pieces, starts, strict=True)])
    sizes, prompt_of = [len(piece) for piece in pieces], [0, 0, 0, 3, 3]  # a prompt is its own
    ends = np.cumsum(sizes).tolist()
    hidden_1SD = model.get_decoder()(
        input_ids=torch.cat(pieces)[None],
        position_ids=positions_S[None].to(first.device),
        use_cache=False,
        packing=pack(sizes, prompt_of, first.device),
    ).last_hidden_state
    predictors = [  # the prompt's last token predicts the first of a response
        s for i, p in enumerate(prompt_of) if p != i for s in (ends[p] - 1, *range(ends[i] - sizes[i], ends[i] - 1))
    ]
    hidden_ND = hidden_1SD[0, predictors]
    return LogprobHead(model.get_output_embeddings())(hidden_ND, torch.cat([one, two, three]), 1.0)[0]


@contextmanager
def short_windows(model: PreTrainedModel, longest: int) -> Iterator[None]:
    """Inside this context every sliding window that rows of `longest` tokens would cross is WINDOW tokens."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    owners: list[Any] = [*model.modules(), *configs.values()]
    sizes = [(owner, getattr(owner, "sliding_window", None)) for owner in owners]
    crossed = [(owner, size) for owner, size in sizes if isinstance(size, int) and WINDOW < size < longest]
    try:
        for owner, _ in crossed:
            owner.sliding_window = WINDOW
        yield
    finally:
        for owner, size in crossed:
            owner.sliding_window = size
