"""Micro-batches: which rows are trained together on which rank, and how they lie side by side in tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanolapo.rollouts import Rollouts


@dataclass(frozen=True)
class MicroBatch:
    """Rows padded to the right. S = longest prompt + response; T = longest response of the rows."""

    rows: list[int]
    ids_BS: Tensor
    prompt_lengths_B: Tensor
    lengths_B: Tensor  # response lengths, 0 for a masked row
    mask_BT: Tensor  # 1 where response token t of row b exists: by position, never by token id

    def scatter(self, values_N: Tensor) -> Tensor:
        """Values of the N real response tokens -> [B, T] with zeros elsewhere (keeps the gradient)."""
        out_BT = values_N.new_zeros(self.mask_BT.shape)
        return out_BT.masked_scatter(self.mask_BT.bool(), values_N)

    def pad(self, ragged: Sequence[np.ndarray]) -> Tensor:
        """One array [T_b] per row of this micro-batch -> float32 [B, T], zeros where mask_BT is 0."""
        out_BT = np.zeros(self.mask_BT.shape, dtype=np.float32)
        for b, length in enumerate(self.lengths_B.tolist()):
            out_BT[b, :length] = ragged[b][:length]
        return torch.from_numpy(out_BT).to(self.mask_BT.device)


def make_microbatch(rollouts: Rollouts, rows: Sequence[int], device: torch.device) -> MicroBatch:
    """Put prompt + response of each row side by side, padded to the right with id 0.

    Without rows it is a batch of one masked token: a sharded model needs all ranks in every forward and backward pass, also
    those that have nothing left to train.

    Under causal attention nothing to the left sees the padding, so no attention mask is needed and position ids are plain
    0, 1, 2, ... Rows marked broken keep their place with length 0, so they add nothing anywhere.

    Worked example: prompt [5, 6], response [7, 8, 2] and prompt [5], response [9] give
    ids [[5, 6, 7, 8, 2], [5, 9, 0, 0, 0]] and mask [[1, 1, 1], [1, 0, 0]].
    """
    empty = np.zeros(0, dtype=np.int64)
    responses = [empty if rollouts.broken_B[r] else rollouts.response_ids[r] for r in rows]
    prompts = [rollouts.prompt_ids[r] for r in rows]
    if not rows:
        rows, responses, prompts = [0], [empty], [rollouts.prompt_ids[0][:1]]
    lengths = np.array([len(x) for x in responses], dtype=np.int64)
    width = max((len(p) + len(x) for p, x in zip(prompts, responses, strict=True)), default=1)
    ids_BS = np.zeros((len(rows), width), dtype=np.int64)
    for b, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        ids_BS[b, : len(prompt)] = prompt
        ids_BS[b, len(prompt) : len(prompt) + len(response)] = response
    mask_BT = np.arange(max(1, lengths.max(initial=1)))[None, :] < lengths[:, None]
    return MicroBatch(
        rows=list(rows),
        ids_BS=torch.from_numpy(ids_BS).to(device),
        prompt_lengths_B=torch.tensor([len(p) for p in prompts], device=device),
        lengths_B=torch.from_numpy(lengths).to(device),
        mask_BT=torch.from_numpy(mask_BT.astype(np.float32)).to(device),
    )


def plan_microbatches(
    rows: Sequence[int], sizes: Sequence[int], num_ranks: int, token_budget: int
) -> list[list[list[int]]]:
    """Split rows over ranks and micro-batches by token count: plan[rank] is that rank's list of row lists.

    Longest first, each row goes to the rank with the fewest tokens so far; a rank's rows, sorted by length so that little
    is padded, are cut where the padded size would pass the budget. Every rank gets the same number of micro-batches
    (some may be empty). A pure function of numbers all ranks know, so no rank needs to ask another.

    >>> plan_microbatches([0, 1, 2, 3], [10, 30, 10, 10], num_ranks=2, token_budget=32)
    [[[1]], [[0, 2, 3]]]
    """
    loads, shares = [0] * num_ranks, [[] for _ in range(num_ranks)]  # type: ignore[var-annotated]
    for row, size in sorted(zip(rows, sizes, strict=True), key=lambda pair: -pair[1]):
        rank = loads.index(min(loads))
        loads[rank] += size
        shares[rank].append((row, size))
    plan: list[list[list[int]]] = []
    for share in shares:
        batches: list[list[int]] = []
        widest = 0
        for row, size in share:  # descending sizes: the first row of a batch is its widest
            if not batches or widest * (len(batches[-1]) + 1) > token_budget:
                batches.append([])
                widest = size
            batches[-1].append(row)
        plan.append(batches)
    most = max(len(batches) for batches in plan)
    return [batches + [[] for _ in range(most - len(batches))] for batches in plan]
