"""Tied embeddings: one table in the config, and what a file holds.

transformers 5 compares: a head that equals the embedding is one tensor with it, a head that differs is kept, whatever
`tie_word_embeddings` is, and a head without an embedding is both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from arriero.checkpoint.tensors.stream import CHUNK_BYTES, ITEMSIZE, FileMatrix, TensorView, matrix_shape
from arriero.checkpoint.tensors.values import cast
from arriero.common.text import escape
from arriero.model.config import LlamaConfig

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def resolve_tied_head(
    tensors: Mapping[str, TensorView], config: LlamaConfig, *, where: str
) -> tuple[dict[str, TensorView], LlamaConfig]:
    """The tensors and the config of one model: as many heads as there are.

    Args:
        tensors: under Hugging Face's names.
        config: the shape that config.json gives.
        where: the source, for the notice.

    Returns:
        The tensors, without a head that equals the embedding; the config, untied where the head differs.
    """
    found = dict(tensors)
    if not config.tie_word_embeddings or HEAD not in found:
        return found, config
    table, expected = found.get(EMBEDDING), (config.vocab_size, config.hidden_size)
    if table is None or (table.shape == expected and same_values(found[HEAD], table)):
        head = found.pop(HEAD)
        found.setdefault(EMBEDDING, head)
        return found, config
    notice = f"{escape(where)}: its head differs from the embeddings that its config ties: both are kept"
    return found, replace(config, tie_word_embeddings=False, notices=(*config.notices, notice))


def same_values(a: TensorView, b: TensorView) -> bool:
    """Whether two tensors hold the same values; read chunk by chunk, and only as far as they agree."""
    if a.shape != b.shape:
        return False
    if a.dtype == b.dtype and _same_place(a, b):
        return True
    floats = {"F64", "F32", "F16", "BF16"}
    if a.dtype != b.dtype and not {a.dtype, b.dtype} <= floats:
        return False
    rows, columns = matrix_shape(a.shape)
    step = max(1, CHUNK_BYTES // max(1, columns * 8))
    for row in range(0, rows, step):
        count = min(step, rows - row)
        parts = []
        for tensor in (a, b):
            raw = np.empty((count, columns * ITEMSIZE[tensor.dtype]), np.uint8)
            tensor.read_window(row, 0, raw)
            parts.append(raw if a.dtype == b.dtype or tensor.dtype == "F64" else cast(raw, tensor.dtype, "F64"))
        if not np.array_equal(parts[0], parts[1]):
            return False
    return True


def _same_place(a: TensorView, b: TensorView) -> bool:
    """Whether both are one part of one file: torch.save writes tied tensors so."""
    if len(a.slices) != 1 or len(b.slices) != 1:
        return False
    one, other = a.slices[0], b.slices[0]
    if not (isinstance(one.source, FileMatrix) and isinstance(other.source, FileMatrix)):
        return False
    return replace(one, source=replace(one.source, label="")) == replace(other, source=replace(other.source, label=""))
