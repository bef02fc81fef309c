"""The matrix products of a phase, recorded as it runs, and timed alone: the machine's own limit for that phase.

Recorded are mm and addmm, that is every product with a weight: shape, strides and dtype, forward, backward and what is
computed again. Attention's own products (bmm, fused kernels) are not among them.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from nanolapo.model import attention

COLD = 2**26  # bytes: operands are taken in turn from copies of at least this size, so that a cache does not hold them
Operand = tuple[tuple[int, ...], tuple[int, ...]]  # shape, strides
Product = tuple[Operand, Operand, torch.dtype, str]


class Products(TorchDispatchMode):
    """Counts every product of two matrices while it is entered, also in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Product] = Counter()
        self.attend = attention.attend

    def __enter__(self) -> Products:
        def unseen(*args: Any) -> Tensor:  # torch cannot make its causal mask while a mode looks on
            with _disable_current_modes():
                return self.attend(*args)

        attention.attend = unseen
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        attention.attend = self.attend
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.linear):
            a, b = args[-2:]
            if func._overloadpacket is torch.ops.aten.linear:  # in inference mode torch does not take it apart
                a, b = args[0].flatten(0, -2), args[1].T
            left, right = (tuple(a.shape), a.stride()), (tuple(b.shape), b.stride())
            self.counts[left, right, a.dtype, a.device.type] += 1
        return func(*args, **(kwargs or {}))

    @property
    def flops(self) -> float:
        """2 per multiplication and addition."""
        return sum(2.0 * a[0][0] * a[0][1] * b[0][1] * count for (a, b, *_), count in self.counts.items())

    def seconds(self, tries: int = 3) -> float:
        """Seconds of all of them alone, one after the other: of each kind the best of a few tries, times its count."""
        return sum(count * one_product(product, tries) for product, count in self.counts.items())


def one_product(product: Product, tries: int) -> float:
    """Seconds of one product, the best of `tries` runs of some calls each."""
    left, right, dtype, device = product
    size = dtype.itemsize * max(left[0][0] * left[0][1], right[0][0] * right[0][1])
    pairs = [(operand(left, dtype, device), operand(right, dtype, device)) for _ in range(min(8, 1 + COLD // size))]
    torch.mm(*pairs[0])
    best = float("inf")
    for _ in range(tries):
        start = clock(device)
        for a, b in pairs:
            torch.mm(a, b)
        best = min(best, (clock(device) - start) / len(pairs))
    return best


def operand(one: Operand, dtype: torch.dtype, device: str) -> Tensor:
    return torch.empty_strided(*one, dtype=dtype, device=device).normal_()


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
