"""Micro-batches: which rows are trained together on which rank, and how they lie side by side in one sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanolapo.model.attention import Stem
from nanolapo.rollouts import Rollouts


@dataclass(frozen=True)
class MicroBatch:
    """Rows without padding: S tokens, each run of equal prompts once, the responses behind it. N response tokens of all
    rows, in row order; T = the longest response, for values that are padded to [B, T] after the model."""

    rows: list[int]
    ids_S: Tensor
    positions_S: Tensor  # 0, 1, 2, ... in each prompt, going on in each of its responses
    stems: list[Stem]
    tokens_N: Tensor  # where in S each response token lies ...
    before_N: Tensor  # ... and the token before it, whose hidden state predicts it (the prompt's last, for the first)
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
    """Put the rows' prompts and responses one after the other; neighbours with the same prompt share it.

    Without rows it is a batch of one masked token: a sharded model needs all ranks in every forward and backward pass, also
    those that have nothing left to train. Rows marked broken keep their place with length 0, so they add nothing anywhere.

    Worked example: prompt [5, 6] with responses [7, 8, 2] and [3], prompt [5] with response [9] give
    ids        5 6 | 7 8 2 | 3 | 5 | 9
    positions  0 1 | 2 3 4 | 2 | 0 | 1
    tokens     2 3 4  5  7     before 1 2 3  1  6      mask [[1, 1, 1], [1, 0, 0], [1, 0, 0]]
    """
    empty = np.zeros(0, dtype=np.int64)
    chosen = [rollouts.rows[r] for r in rows]
    prompts = [row.prompt_ids for row in chosen]
    responses = [empty if row.broken else row.response_ids for row in chosen]
    if not rows:
        rows, prompts, responses = [0], [rollouts.rows[0].prompt_ids[:1]], [empty]
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    before: list[np.ndarray] = []
    tokens: list[np.ndarray] = []
    stems: list[Stem] = []
    end = 0
    for b, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        if b == 0 or not np.array_equal(prompt, prompts[b - 1]):
            stems.append(Stem((end, len(prompt)), ()))
            ids.append(prompt)
            positions.append(np.arange(len(prompt)))
            end += len(prompt)
        first, count = stems[-1].prompt
        if len(response):
            stems[-1] = Stem((first, count), (*stems[-1].responses, (end, len(response))))
            ids.append(response)
            positions.append(count + np.arange(len(response)))
            tokens.append(end + np.arange(len(response)))
            before.append(np.concatenate([[first + count - 1], tokens[-1][:-1]]))
            end += len(response)
    lengths = np.array([len(x) for x in responses], dtype=np.int64)
    mask_BT = np.arange(max(1, lengths.max(initial=1)))[None, :] < lengths[:, None]

    def tensor(parts: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate([empty, *parts])).to(device)

    return MicroBatch(
        rows=list(rows),
        ids_S=tensor(ids),
        positions_S=tensor(positions),
        stems=stems,
        tokens_N=tensor(tokens),
        before_N=tensor(before),
        lengths_B=torch.from_numpy(lengths).to(device),
        mask_BT=torch.from_numpy(mask_BT.astype(np.float32)).to(device),
    )


def plan_microbatches(
    rollouts: Rollouts, rows: Sequence[int], num_ranks: int, token_budget: int
) -> list[list[list[int]]]:
    """Split rows over ranks and micro-batches by token count: plan[rank] is that rank's list of row lists.

    Longest first, each row goes to the rank with the fewest tokens so far; a rank's rows, in order so that those of a group
    are neighbours, are cut where the tokens would pass the budget (a prompt that neighbours share counts once). Every rank
    gets the same number of micro-batches (some may be empty). A pure function of numbers all ranks know, so no rank needs
    to ask another.
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
