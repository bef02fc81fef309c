"""Micro-batches: choose which rows are trained together on which rank, and put them into one sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanolapo.model.attention import Packing, pack
from nanolapo.ranks import to_device
from nanolapo.rollouts import Rollouts


@dataclass(frozen=True)
class MicroBatch:
    """Rows in one sequence of S tokens without padding. Neighbours with equal prompts share one copy.

    N counts the response tokens of all B rows, in row order. T is the longest response: after the model, values are padded
    to [B, T]. One without rows (see make_microbatch) has B = T = 1 and no tokens.
    """

    rows: list[int]
    ids_S: Tensor
    positions_S: Tensor  # 0, 1, 2, ... in each prompt; each of its responses counts on
    packing: Packing  # which tokens see which
    tokens_N: Tensor  # the place in S of each response token ...
    predictor_N: Tensor  # ... and of the token whose hidden state predicts it (for the first: the prompt's last)
    lengths: list[int]  # response lengths, 0 if there is no row: on the host, which never waits for the device ...
    lengths_B: Tensor  # ... and on the device
    mask_BT: Tensor  # 1 where response token t of row b exists: by position, never by token id
    places_M: Tensor  # where mask_BT is 1, as indices into B * T

    def scatter(self, values_N: Tensor) -> Tensor:
        """Put the values of the N response tokens into [B, T], with zeros elsewhere. The gradient flows through."""
        # Like masked_scatter, whose backward pass would ask the device how many places there are.
        zeros = values_N.new_zeros(self.mask_BT.numel())
        return zeros.index_copy(0, self.places_M, values_N[: len(self.places_M)]).view(self.mask_BT.shape)

    def pad(self, ragged: Sequence[np.ndarray]) -> Tensor:
        """Put one array [T_b] per row of this micro-batch into float32 [B, T], with zeros where mask_BT is 0."""
        out_BT = np.zeros(self.mask_BT.shape, dtype=np.float32)
        for b, length in enumerate(self.lengths):
            out_BT[b, :length] = ragged[b][:length]
        return to_device(out_BT, self.mask_BT.device)


def make_microbatch(rollouts: Rollouts, rows: Sequence[int], device: torch.device) -> MicroBatch:
    """Put the rows' prompts and responses one after the other. Neighbours with the same prompt share it.

    Without rows the result is one masked token: a sharded model needs all ranks in every forward and backward pass, even
    ranks with nothing left to train.

    Worked example: prompt [5, 6] with responses [7, 8, 2] and [3], prompt [5] with response [9] give
    ids        5 6 | 7 8 2 | 3 | 5 | 9
    positions  0 1 | 2 3 4 | 2 | 0 | 1
    tokens     2 3 4  5  7     predictor 1 2 3  1  6   mask [[1, 1, 1], [1, 0, 0], [1, 0, 0]]
    """
    empty = np.zeros(0, dtype=np.int64)
    chosen = [rollouts.rows[r] for r in rows]
    prompts = [row.prompt_ids for row in chosen]
    responses = [row.response_ids for row in chosen]
    if not rows:
        prompts, responses = [np.repeat(rollouts.rows[0].prompt_ids[:1], 2)], [empty]  # torch would compile S = 1 apart
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    predictors: list[np.ndarray] = []
    tokens: list[np.ndarray] = []
    sizes: list[int] = []  # of the pieces: prompts and responses as they follow each other
    prompt_of: list[int] = []  # each piece's prompt
    end = 0  # of the sequence so far
    piece = count = last = 0  # the current prompt: its index in `sizes`, its tokens, the place in S of its last one
    for b, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        if b == 0 or not np.array_equal(prompt, prompts[b - 1]):
            piece, count, last = len(sizes), len(prompt), end + len(prompt) - 1
            end += count
            ids.append(prompt)
            positions.append(np.arange(count))
            sizes.append(count)
            prompt_of.append(piece)
        if len(response):
            ids.append(response)
            positions.append(count + np.arange(len(response)))
            sizes.append(len(response))
            prompt_of.append(piece)
            tokens.append(end + np.arange(len(response)))
            predictors.append(np.concatenate([[last], tokens[-1][:-1]]))
            end += len(response)
    lengths = np.array([len(x) for x in responses], dtype=np.int64)
    mask_BT = np.arange(max(1, lengths.max(initial=1)))[None, :] < lengths[:, None]

    def tensor(parts: list[np.ndarray]) -> Tensor:
        return to_device(np.concatenate([empty, *parts]), device)

    return MicroBatch(
        rows=list(rows),
        ids_S=tensor(ids),
        positions_S=tensor(positions),
        packing=pack(sizes, prompt_of, device),
        tokens_N=tensor(tokens),
        predictor_N=tensor(predictors),
        lengths=lengths.tolist(),
        lengths_B=to_device(lengths, device),
        mask_BT=to_device(mask_BT.astype(np.float32), device),
        places_M=to_device(np.flatnonzero(mask_BT), device),
    )


def plan_microbatches(
    rollouts: Rollouts, rows: Sequence[int], num_ranks: int, token_budget: int
) -> list[list[list[int]]]:
    """Split rows over ranks and micro-batches by token count: plan[rank] is that rank's list of row lists.

    The longest rows are placed first, each on the rank with the fewest tokens so far. A rank's rows are then sorted, so
    rows of a group are neighbours, and cut into micro-batches where the tokens would exceed the budget. A prompt that
    neighbours share counts once. Every rank gets the same number of micro-batches; some may be empty. All ranks know all
    inputs, so they compute the same plan without communication.
    """
    prompts = rollouts.prompt_ids
    lengths = {row: len(rollouts.rows[row].response_ids) for row in rows}
    sizes = {row: lengths[row] + len(prompts[row]) for row in rows}
    loads, shares = [0] * num_ranks, [[] for _ in range(num_ranks)]  # type: ignore[var-annotated]
    for row in sorted(rows, key=lambda row: -sizes[row]):
        rank = loads.index(min(loads))
        loads[rank] += sizes[row]
        shares[rank].append(row)
    plan: list[list[list[int]]] = []
    for share in shares:
        batches: list[list[int]] = []
        used = 0
        for row in sorted(share):
            last = batches[-1][-1] if batches else None
            shared = last is not None and np.array_equal(prompts[row], prompts[last])
            used += lengths[row] if shared else sizes[row]
            if last is None or used > token_budget:
                batches.append([])
                used = sizes[row]
            batches[-1].append(row)
        plan.append(batches)
    most = max(len(batches) for batches in plan)
    return [batches + [[] for _ in range(most - len(batches))] for batches in plan]
