"""From hidden states to log-probs: head, softmax and their gradients. A [tokens, vocabulary] tensor never exists."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
    z, the gradient of the log-prob is g (1[y] - p), and that of the entropy is -g p (log p + H). So the backward pass
    computes the logits again, block by block, and autograd keeps nothing of size [N, V]. The blocks cut the vocabulary,
    not the tokens, so the gradient of each row of W is added once.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, temperature: float,
        with_entropy: bool, gradient_sum: Callable[[], Tensor] | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.temperature, ctx.with_entropy, ctx.gradient_sum = temperature, with_entropy, gradient_sum
        log_z_N = torch.full_like(
            targets_N, -torch.inf, dtype=torch.float32
        )  # of the blocks so far, like the next line
        chosen_N, mean_N = torch.zeros_like(log_z_N), torch.zeros_like(log_z_N)  # the target's logit, and p.z
        for block, logits_NC in blocks(hidden_ND, weight_VD, bias_V, temperature):
            here_N, index_N1 = inside(targets_N, block)
            chosen_N = torch.where(here_N, logits_NC.gather(-1, index_N1).squeeze(-1), chosen_N)
            before_N, top_N1 = log_z_N, logits_NC.amax(dim=-1, keepdim=True)
            z_NC = logits_NC.clone() if with_entropy else None
            p_NC = logits_NC.sub_(top_N1).exp_()  # in place, to save a tensor; p / exp(top) so far
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
    """Yield (block of the vocabulary, its logits / temperature [N, C] in float32). The caller may overwrite the logits."""
    size = block_width(len(hidden_ND), hidden_ND.device)
    for first in range(0, len(weight_VD), size):
        block = slice(first, first + size)
        logits_NC = F.linear(hidden_ND, weight_VD[block], None if bias_V is None else bias_V[block]).float()
        yield block, logits_NC if temperature == 1 else logits_NC.div_(temperature)


def block_width(num_tokens: int, device: torch.device) -> int:
    """Return how many words of the vocabulary a block has. The last block may be narrower.

    >>> block_width(20_000, torch.device("cpu")), block_width(20_000, torch.device("cuda"))
    (104, 3328)
    """
    most, step = (CPU_LOGITS, 1) if device.type == "cpu" else (GPU_LOGITS, GPU_COLUMNS)
    return max(1, most // max(1, num_tokens) // step) * step


def inside(targets_N: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """Return which targets lie in the block [N] and their index in it [N, 1] (0 for the others).

    >>> inside(torch.tensor([3, 4, 7]), slice(4, 8))
    (tensor([False,  True,  True]), tensor([[0],
            [0],
            [3]]))
    """
    here_N = (targets_N >= block.start) & (targets_N < block.stop)
    return here_N, ((targets_N - block.start) * here_N)[:, None]


class LogprobHead(nn.Module):
    """A model's head that returns log-probs instead of logits. Its weights keep the names they have in the linear layer.

    It is a module because sharding and offloading bring weights to the device around a module's `forward`.
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias = head.weight, getattr(head, "bias", None)
        # Returns the float32 tensor [V, D] to add the weight's gradient to (precision.py). None: autograd gets it.
        self.gradient_sum: Callable[[], Tensor] | None = None

    def forward(
        self, hidden_ND: Tensor, targets_N: Tensor, temperature: float, with_entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Return the log-prob (and entropy) of each target under softmax(W hidden / temperature), both float32 [N].

        The temperature divides the logits, exactly as in the sampler. The softmax runs in float32.
        """
        logprobs_N, entropy_N = HeadLogprobs.apply(
            hidden_ND, self.weight, self.bias, targets_N, temperature, with_entropy, self.gradient_sum
        )
        return logprobs_N, entropy_N if with_entropy else None
