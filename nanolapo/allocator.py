"""Training on a CPU: memory that was freed is kept for the next tensors.

A training step makes the same activations again and again. As it comes, glibc gives memory at the end of its heap back to
the kernel, and every block above 128 kB to 32 MB (the border moves) as soon as it is freed; then the kernel has to find,
clear and map every page of 4 kB anew, up to a fourth of the update of a 135 M model (docs/PERFORMANCE.md).
"""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST_KEPT = 2**25  # bytes; glibc takes no higher border. Larger blocks still come and go


def keep_freed_memory() -> bool:
    """For the whole process, from now on: it stays as large as it was at its peak, but for tensors above LARGEST_KEPT.
    Returns False where the C library has no such setting (it is glibc's)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return bool(mallopt and mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT) and mallopt(M_TRIM_THRESHOLD, -1))
