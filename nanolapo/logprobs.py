"""From hidden states to log-probs: the head, the softmax and their gradients, without ever holding [tokens, vocabulary]."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOGIT_ELEMENTS = 2**24  # at most this many float32 logits exist at a time (64 MiB), whatever the vocabulary


class HeadLogprobs(torch.autograd.Function):
    """Log-softmax of the head's logits at one target per token, and the entropy; `chunk` tokens at a time, both ways.

    For one token with logits z = W h / temperature, p = softmax(z), target y and entropy H = log Z - p.z, the gradient
    with respect to z is g (1[y] - p) for the log-prob and -g p (log p + H) for the entropy. So the backward pass needs the
    logits of one chunk at a time again, and autograd keeps nothing of size [N, V].
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, head: nn.Module, targets_N: Tensor,
        temperature: float, with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.temperature, ctx.with_entropy = temperature, with_entropy
        ctx.chunk = max(1, LOGIT_ELEMENTS // len(weight_VD))
        logprobs, entropies, log_zs = [], [], []
        for hidden, targets in zip(hidden_ND.split(ctx.chunk), targets_N.split(ctx.chunk), strict=True):
            # The module and not its weight: a head in host memory fetches it when called.
            logits = head(hidden).float().div_(temperature)
            log_z = torch.logsumexp(logits, dim=-1)
            logprobs.append(logits.gather(-1, targets[:, None]).squeeze(-1) - log_z)
            if with_entropy:
                entropies.append(log_z - (torch.softmax(logits, dim=-1) * logits).sum(-1))
            log_zs.append(log_z)
        logprobs_N = torch.cat(logprobs)
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, targets_N, torch.cat(log_zs))
        return logprobs_N, torch.cat(entropies) if with_entropy else logprobs_N.new_zeros(0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V, targets_N, log_z_N = ctx.saved_tensors
        grad_logprobs_N, grad_entropy_N = gradients
        grad_hidden_ND = torch.empty_like(hidden_ND)
        # Summed over chunks in float32; a frozen head (LoRA) gets none.
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=torch.float32) if bias_V is not None else None
        product_VD = torch.empty_like(weight_VD) if grad_weight_VD is not None else None  # one chunk's
        for first in range(0, len(hidden_ND), ctx.chunk):
            part = slice(first, first + ctx.chunk)
            hidden, targets, g = hidden_ND[part], targets_N[part], grad_logprobs_N[part, None]
            logits = F.linear(hidden, weight_VD, bias_V).float().div_(ctx.temperature).sub_(log_z_N[part, None])
            if ctx.with_entropy:
                p = logits.exp()
                entropy = -(p * logits).sum(-1, keepdim=True)
                grad_logits = -p * (g + grad_entropy_N[part, None] * (logits + entropy))
            else:
                grad_logits = logits.exp_().mul_(-g)
            grad_logits.scatter_add_(-1, targets[:, None], g)
            grad_logits = grad_logits.div_(ctx.temperature).to(hidden.dtype)
            torch.mm(grad_logits, weight_VD, out=grad_hidden_ND[part])
            if grad_weight_VD is not None:
                grad_weight_VD += torch.mm(grad_logits.T, hidden, out=product_VD)
            if grad_bias_V is not None:
                grad_bias_V += grad_logits.sum(0)
        del product_VD  # before the sum is cast, which takes as much again
        return (
            grad_hidden_ND,
            None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype),
            None if grad_bias_V is None else grad_bias_V.to(weight_VD.dtype),
            None, None, None, None,
        )  # fmt: skip


def token_logprobs(
    hidden_ND: Tensor, targets_N: Tensor, head: nn.Module, temperature: float, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-prob (and entropy) of each target under softmax(head(hidden) / temperature), both float32 [N].

    The softmax runs in float32, a chunk of tokens at a time, computed again in the backward pass, so a [N, V] tensor never
    exists. The temperature divides the logits, exactly as the sampler's does.
    """
    logprobs_N, entropy_N = HeadLogprobs.apply(
        hidden_ND, head.weight, getattr(head, "bias", None), head, targets_N, temperature, with_entropy
    )
    return logprobs_N, entropy_N if with_entropy else None
