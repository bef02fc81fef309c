"""From hidden states to log-probs: the head, the softmax and their gradients, without ever holding [tokens, vocabulary]."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# At most this many logits exist at a time, whatever the vocabulary. On a CPU 8 MiB of float32: they stay in the cache, and
# the C library keeps such blocks, where the pages of larger ones are cleared anew. On a GPU 256 MiB: few launches.
CPU_LOGITS, GPU_LOGITS = 2**21, 2**26


class HeadLogprobs(torch.autograd.Function):
    """Log-softmax of the head's logits at one target per token, and the entropy; a block of the vocabulary at a time.

    For one token with logits z = W h / temperature, p = softmax(z), target y and entropy H = log Z - p.z, the gradient
    with respect to z is g (1[y] - p) for the log-prob and -g p (log p + H) for the entropy. So the backward pass needs the
    logits of one block at a time again, and autograd keeps nothing of size [N, V]. Blocks go over the vocabulary and not
    over the tokens, so that each row of W meets its gradient once.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, temperature: float,
        with_entropy: bool, gradient_sum: Callable[[], Tensor] | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.temperature, ctx.with_entropy, ctx.gradient_sum = temperature, with_entropy, gradient_sum
        log_z_N = torch.full_like(targets_N, -torch.inf, dtype=torch.float32)  # of the blocks so far, like the next two
        chosen_N, mean_N = torch.zeros_like(log_z_N), torch.zeros_like(log_z_N)  # the target's logit, and p.z
        for block, logits_NC in blocks(hidden_ND, weight_VD, bias_V, temperature):
            here_N, index_N1 = inside(targets_N, block)
            chosen_N = torch.where(here_N, logits_NC.gather(-1, index_N1).squeeze(-1), chosen_N)
            before_N, top_N1 = log_z_N, logits_NC.amax(dim=-1, keepdim=True)
            z_NC = logits_NC.clone() if with_entropy else None
            p_NC = logits_NC.sub_(top_N1).exp_()  # in place: a tensor of this size less; p / exp(top) so far
            log_z_N = torch.logaddexp(before_N, p_NC.sum(-1).log_().add_(top_N1[:, 0]))
            if z_NC is not None:
                added_N = (p_NC * z_NC).sum(-1) * (top_N1[:, 0] - log_z_N).exp()
                mean_N = mean_N * (before_N - log_z_N).exp() + added_N
        entropy_N = log_z_N - mean_N
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, targets_N, log_z_N, entropy_N)
        return chosen_N - log_z_N, entropy_N if with_entropy else entropy_N[:0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V, targets_N, log_z_N, entropy_N = ctx.saved_tensors
        grad_logprobs_N, grad_entropy_N = gradients
        grad_hidden_ND = torch.zeros_like(hidden_ND, dtype=torch.float32)
        grad_weight_VD = None  # a frozen head (LoRA) gets none
        if ctx.needs_input_grad[1]:
            grad_weight_VD = (
                ctx.gradient_sum() if ctx.gradient_sum else torch.zeros_like(weight_VD, dtype=torch.float32)
            )
        grad_bias_V = None if bias_V is None else torch.zeros_like(bias_V, dtype=torch.float32)
        for block, logits_NC in blocks(hidden_ND, weight_VD, bias_V, ctx.temperature):
            logp_NC = logits_NC.sub_(log_z_N[:, None])
            if ctx.with_entropy:
                grad_entropy = grad_entropy_N[:, None] * (logp_NC + entropy_N[:, None])
                grad_NC = -logp_NC.exp_() * (grad_logprobs_N[:, None] + grad_entropy)
            else:
                grad_NC = logp_NC.exp_().mul_(-grad_logprobs_N[:, None])
            here_N, index_N1 = inside(targets_N, block)
            grad_NC.scatter_add_(-1, index_N1, (grad_logprobs_N * here_N)[:, None])
            if ctx.temperature != 1:
                grad_NC.div_(ctx.temperature)
            grad_NC = grad_NC.to(hidden_ND.dtype)
            grad_hidden_ND += grad_NC @ weight_VD[block]
            if grad_weight_VD is not None:
                grad_weight_VD[block] += grad_NC.T @ hidden_ND
            if grad_bias_V is not None:
                grad_bias_V[block] += grad_NC.sum(0)
        returned = None if grad_weight_VD is None or ctx.gradient_sum else grad_weight_VD.to(weight_VD.dtype)
        grad_bias_V = None if grad_bias_V is None else grad_bias_V.to(weight_VD.dtype)
        return grad_hidden_ND.to(hidden_ND.dtype), returned, grad_bias_V, None, None, None, None


def blocks(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, temperature: float
) -> Iterator[tuple[slice, Tensor]]:
    """(block of the vocabulary, its logits / temperature [N, C] in float32), the caller's to write to."""
    most = CPU_LOGITS if hidden_ND.device.type == "cpu" else GPU_LOGITS
    size = max(1, most // max(1, len(hidden_ND)))
    for first in range(0, len(weight_VD), size):
        block = slice(first, first + size)
        logits_NC = F.linear(hidden_ND, weight_VD[block], None if bias_V is None else bias_V[block]).float()
        yield block, logits_NC if temperature == 1 else logits_NC.div_(temperature)


def inside(targets_N: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """Which targets lie in the block [N], and where [N, 1], with 0 for those that do not.

    >>> inside(torch.tensor([3, 4, 7]), slice(4, 8))
    (tensor([False,  True,  True]), tensor([[0],
            [0],
            [3]]))
    """
    here_N = (targets_N >= block.start) & (targets_N < block.stop)
    return here_N, ((targets_N - block.start) * here_N)[:, None]


class LogprobHead(nn.Module):
    """A model's head that is asked for log-probs and not for logits; weights and names are those of the linear layer.

    A module, so that whoever moves weights about (a head in host memory, a sharded one) has them in place during `forward`.
    """

    def __init__(self, head: nn.Module, gradient_sum: Callable[[], Tensor] | None = None) -> None:
        super().__init__()
        self.weight, self.bias = head.weight, getattr(head, "bias", None)
        # The float32 tensor [V, D] that the weight's gradient is added to; without it autograd gets a gradient of its own.
        self.gradient_sum = gradient_sum

    def forward(
        self, hidden_ND: Tensor, targets_N: Tensor, temperature: float, with_entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Log-prob (and entropy) of each target under softmax(W hidden / temperature), both float32 [N].

        The softmax runs in float32 over a block of the vocabulary at a time, computed again in the backward pass, so a
        [N, V] tensor never exists. The temperature divides the logits, exactly as the sampler's does.
        """
        logprobs_N, entropy_N = HeadLogprobs.apply(
            hidden_ND, self.weight, self.bias, targets_N, temperature, with_entropy, self.gradient_sum
        )
        return logprobs_N, entropy_N if with_entropy else None
