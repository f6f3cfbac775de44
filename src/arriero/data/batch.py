"""What a batch of samples holds."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
    """Rows of a global batch. `labels` holds the next token, or -100 where no loss falls.

    Attributes:
        tokens, labels: int64 [count, sequence_length]; for plain text they are views of one array.
        positions: int64 [count, sequence_length], starting over in each document; None with attention = "window".
        documents: int64 [count, sequence_length], number of the document within the row; None likewise.
    """

    tokens: np.ndarray
    labels: np.ndarray
    positions: np.ndarray | None
    documents: np.ndarray | None
