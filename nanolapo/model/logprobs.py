"""From hidden states to log-probs: head, softmax and their gradients. A [tokens, vocabulary] tensor never exists."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# At most this many logits exist at a time, for any vocabulary. On a CPU they take 8 MiB: they stay in the cache, and the C
# library reuses blocks of this size, while it gets larger ones as fresh, cleared pages. On a GPU 256 MiB: few launches.
CPU_LOGITS, GPU_LOGITS = 2**21, 2**26
GPU_COLUMNS = 256  # a GPU's fast matrix kernels need widths that fill their tiles, and rows that start at 16 bytes


class HeadLogprobs(torch.autograd.Function):
    """Log-prob of one target per token under softmax(head's logits), and the entropy, by blocks of the vocabulary.

    Take one token with logits z = W h / temperature, p = softmax(z), target y and entropy H = log Z - p.z. With respect to
    z, the gradient of the log-prob is g (1[y] - p). (The entropy has none: no loss uses it.) So the backward pass computes
    the logits again, block by block, and autograd keeps nothing of size [N, V]. The blocks cut the vocabulary,
    not the tokens, so the gradient of each row of W is added once.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, temperature: float,
        with_entropy: bool, head: LogprobHead,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.temperature, ctx.head = temperature, head
        log_z_N = torch.full_like(targets_N, -torch.inf, dtype=torch.float32)
        chosen_N = torch.zeros_like(log_z_N)
        mean_N = torch.zeros_like(log_z_N) if with_entropy else None
        add, _ = head.of_block(len(hidden_ND))
        for block, logits_NC in blocks(hidden_ND, weight_VD, bias_V):
            log_z_N, chosen_N, mean_N = add(logits_NC, targets_N - block.start, temperature, log_z_N, chosen_N, mean_N)
        entropy_N = log_z_N[:0] if mean_N is None else log_z_N - mean_N
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, targets_N, log_z_N)
        ctx.mark_non_differentiable(entropy_N)
        return chosen_N - log_z_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V, targets_N, log_z_N = ctx.saved_tensors
        grad_hidden_ND = torch.zeros_like(hidden_ND, dtype=torch.float32)
        grad_weight_VD = None  # a frozen head (LoRA) gets none
        if ctx.needs_input_grad[1]:
            new_sum = partial(torch.zeros_like, weight_VD, dtype=torch.float32)
            grad_weight_VD = (ctx.head.gradient_sum or new_sum)()
        grad_bias_V = None if bias_V is None else torch.zeros_like(bias_V, dtype=torch.float32)
        _, gradient = ctx.head.of_block(len(hidden_ND))
        for block, logits_NC in blocks(hidden_ND, weight_VD, bias_V):
            grad_NC = gradient(logits_NC, targets_N - block.start, ctx.temperature, log_z_N, gradients[0])
            grad_hidden_ND += grad_NC @ weight_VD[block]
            if grad_weight_VD is not None:
                grad_weight_VD[block] += grad_NC.T @ hidden_ND
            if grad_bias_V is not None:
                grad_bias_V[block] += grad_NC.sum(0)
        returned = None if grad_weight_VD is None or ctx.head.gradient_sum else grad_weight_VD.to(weight_VD.dtype)
        grad_bias_V = None if grad_bias_V is None else grad_bias_V.to(weight_VD.dtype)
        return grad_hidden_ND.to(hidden_ND.dtype), returned, grad_bias_V, None, None, None, None


def blocks(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Yield (block of the vocabulary, its logits [N, C]). The caller may overwrite the logits."""
    size = block_width(len(hidden_ND), hidden_ND.device)
    for first in range(0, len(weight_VD), size):
        block = slice(first, first + size)
        yield block, F.linear(hidden_ND, weight_VD[block], None if bias_V is None else bias_V[block])


def tempered(logits_NC: Tensor, temperature: float) -> Tensor:
    """Return logits / temperature in float32, in place if they are float32 already."""
    z_NC = logits_NC.float()
    return z_NC if temperature == 1 else z_NC.div_(temperature)


def add_block(
    logits_NC: Tensor, index_N: Tensor, temperature: float, log_z_N: Tensor, chosen_N: Tensor, mean_N: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return log Z, the target's logit and (unless None is given) p.z over one block more. `index_N` is the target's place
    in this block: below 0 or at least C if it lies in another one."""
    z_NC, C = tempered(logits_NC, temperature), logits_NC.shape[1]
    in_block_N = z_NC.gather(-1, index_N.clamp(0, C - 1)[:, None])[:, 0]
    chosen_N = torch.where((index_N >= 0) & (index_N < C), in_block_N, chosen_N)
    top_N1 = z_NC.amax(dim=-1, keepdim=True)
    p_NC = (z_NC if mean_N is None else z_NC.clone()).sub_(top_N1).exp_()  # p / exp(top) so far
    total_N = torch.logaddexp(log_z_N, p_NC.sum(-1).log_().add_(top_N1[:, 0]))
    if mean_N is not None:
        added_N = (p_NC * z_NC).sum(-1) * (top_N1[:, 0] - total_N).exp()
        mean_N = mean_N * (log_z_N - total_N).exp() + added_N
    return total_N, chosen_N, mean_N


def logits_gradient(
    logits_NC: Tensor, index_N: Tensor, temperature: float, log_z_N: Tensor, grad_logprobs_N: Tensor
) -> Tensor:
    """Return the gradient of a block's logits, in their dtype."""
    dtype, C = logits_NC.dtype, logits_NC.shape[1]
    logp_NC = tempered(logits_NC, temperature).sub_(log_z_N[:, None])
    grad_NC = logp_NC.exp_().mul_(-grad_logprobs_N[:, None])
    # A comparison is part of the one pass; a scatter would write float32 and read it again
    if torch.compiler.is_compiling():
        at_target_NC = torch.arange(C, device=grad_NC.device) == index_N[:, None]
        grad_NC = grad_NC + torch.where(at_target_NC, grad_logprobs_N[:, None], 0.0)
    else:
        here_N = (index_N >= 0) & (index_N < C)
        grad_NC.scatter_add_(-1, index_N.clamp(0, C - 1)[:, None], (grad_logprobs_N * here_N)[:, None])
    return (grad_NC if temperature == 1 else grad_NC.div_(temperature)).to(dtype)


def block_width(num_tokens: int, device: torch.device) -> int:
    """Return how many words of the vocabulary a block has. The last block may be narrower.

    >>> block_width(20_000, torch.device("cpu")), block_width(20_000, torch.device("cuda"))
    (104, 3328)
    """
    most, step = (CPU_LOGITS, 1) if device.type == "cpu" else (GPU_LOGITS, GPU_COLUMNS)
    return max(1, most // max(1, num_tokens) // step) * step


class LogprobHead(nn.Module):
    """A model's head that returns log-probs instead of logits. Its weights keep the names they have in the linear layer.

    It is a module because sharding and offloading bring weights to the device around a module's `forward`.
    """

    def __init__(self, head: nn.Module, compiled: bool = False) -> None:
        super().__init__()
        self.weight, self.bias = head.weight, getattr(head, "bias", None)
        # Compiled, each reads a block of logits once or twice and writes no other; elsewhere they work in place.
        self.compiled = None
        if compiled:
            self.compiled = torch.compile(add_block, dynamic=True), torch.compile(logits_gradient, dynamic=True)
        # Returns the float32 tensor [V, D] to add the weight's gradient to (precision.py). None: autograd gets it.
        self.gradient_sum: Callable[[], Tensor] | None = None

    def of_block(self, num_tokens: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Return `add_block` and `logits_gradient` as they are to be called for so many tokens."""
        if self.compiled is None or num_tokens < 2:  # torch would compile again for no token, and for one
            return add_block, logits_gradient
        return self.compiled

    def forward(
        self, hidden_ND: Tensor, targets_N: Tensor, temperature: float, with_entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Return the log-prob (and entropy) of each target under softmax(W hidden / temperature), both float32 [N].

        The temperature divides the logits, exactly as in the sampler. The softmax runs in float32.
        """
        logprobs_N, entropy_N = HeadLogprobs.apply(
            hidden_ND, self.weight, self.bias, targets_N, temperature, with_entropy, self
        )
        return logprobs_N, entropy_N if with_entropy else None
