"""What one forward pass takes: a micro-batch on the device, cut for this process's part of each sequence."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from arriero.distributed.parallel.config import ParallelConfig
from arriero.distributed.parallel.context import positions_of
from arriero.distributed.parallel.mesh import Ranks
from arriero.model.head import IGNORE_INDEX


class MicroBatch(NamedTuple):
    """B samples of which this process holds P positions (all L of them without context parallelism).

    Attributes:
        tokens, labels: int64 [B, P].
        positions: int64 [B, P], or None where they count from 0 in every row.
        mask: boolean [B, 1, Q, L], True where a query may look, or None where attention is causal over the row.
        valid: number of labels that carry a loss, counted on the host: to ask the device would be to wait for it.
        squares: sum of squared lengths of the whole rows' documents, or of the rows: what attention costs.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor | None
    mask: Tensor | None
    valid: int
    squares: int


def micro_batch(
    tokens: np.ndarray, labels: np.ndarray, positions: np.ndarray | None, documents: np.ndarray | None, *,
    config: ParallelConfig, ranks: Ranks, device: torch.device,
) -> MicroBatch:  # fmt: skip
    """Copies rows [B, L] to the device; where attention stays within documents, the mask is made there."""
    rows = [torch.from_numpy(a).to(device) for a in (tokens, labels)]
    row_positions = None if positions is None else torch.from_numpy(positions).to(device)
    mask = None if documents is None else document_mask(torch.from_numpy(documents).to(device))
    if row_positions is None and config.sequence_parallel and config.pipeline_parallel > 1:
        # A later stage sees a part of the stream and could not count the positions.
        row_positions = torch.arange(tokens.shape[1], device=device).expand(len(tokens), -1)
    squares = tokens.size * tokens.shape[1] if documents is None else sum_of_squares(documents)
    if ranks.context == 1:
        return MicroBatch(rows[0], rows[1], row_positions, mask, int((labels != IGNORE_INDEX).sum()), squares)
    mine = positions_of(ranks.context_rank, config, tokens.shape[1])
    valid = int((labels[:, mine.numpy()] != IGNORE_INDEX).sum())
    mine = mine.to(device)
    row_positions = mine.expand(len(tokens), -1) if row_positions is None else row_positions[:, mine]
    if mask is not None and config.context_method == "all-gather":
        mask = mask[:, :, mine]  # this process's queries against all keys; Ulysses sees all queries
    return MicroBatch(rows[0][:, mine], rows[1][:, mine], row_positions, mask, valid, squares)


def sum_of_squares(documents_BL: np.ndarray) -> int:
    """Over all rows, the squared lengths of runs of one document."""
    begins = np.ones(documents_BL.shape, bool)
    begins[:, 1:] = documents_BL[:, 1:] != documents_BL[:, :-1]
    lengths = np.diff(np.flatnonzero(begins), append=begins.size)
    return int((lengths * lengths).sum())


def document_mask(documents_BL: Tensor) -> Tensor:
    """Boolean [B, 1, L, L]: causal, and within the same document."""
    length = documents_BL.shape[1]
    same = documents_BL[:, None, :, None] == documents_BL[:, None, None, :]
    return same & torch.ones(length, length, dtype=torch.bool, device=documents_BL.device).tril()
