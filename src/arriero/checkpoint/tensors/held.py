"""Tensors that are held in memory, or behind any reader, as the sources that conversions read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from arriero.checkpoint.tensors.stream import (
    Assembly,
    Bytes,
    PieceReader,
    TensorReader,
    dtype_name,
    matrix_shape,
)

if TYPE_CHECKING:
    import torch


class DictReader:
    """A `TensorReader` over tensors in memory."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = dict(tensors)

    def names(self) -> list[str]:
        """All names."""
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole tensor's shape."""
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Of the tensor in memory."""
        return self.tensors[name].dtype

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> torch.Tensor:
        """The tensor or a slice of it, without a copy where it is whole."""
        tensor = self.tensors[name].detach()
        return tensor[index] if index else tensor


class ReaderRows:
    """Any `TensorReader`'s tensor as a source of rows."""

    def __init__(self, reader: TensorReader, name: str) -> None:
        self.reader, self.name, self.label = reader, name, name
        self.shape = tuple(reader.shape(name))
        self.dtype = dtype_name(reader.dtype(name))
        self.rows, self.columns = matrix_shape(self.shape)

    def read_rows(self, row: int, out: Bytes) -> None:
        """Fills `out` with rows from `row` on."""
        import torch

        index = (slice(row, row + out.shape[0]),) if self.shape else None
        part = self.reader.read(self.name, index).detach().cpu().contiguous()
        out[:] = part.view(-1).view(torch.uint8).numpy().reshape(out.shape)


def assemblies(reader: TensorReader) -> dict[str, Assembly]:
    """Any reader's tensors as assemblies."""
    if isinstance(reader, PieceReader):
        return dict(reader.tensors)
    sources = {name: ReaderRows(reader, name) for name in reader.names()}
    return {name: Assembly.whole(source, source.shape) for name, source in sources.items()}
