"""Tensors in memory, readable like those in files, so that they can be written by the same code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from arriero.checkpoint.tensors.stream import Bytes, Matrix, TensorView, ViewReader, dtype_name, matrix_shape

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class MemoryMatrix(Matrix):
    """A tensor in memory."""

    tensor: torch.Tensor

    def read_rows(self, row: int, out: Bytes) -> None:
        """Fills `out` with rows from `row` on."""
        import torch

        part = self.tensor.reshape(self.rows, self.columns)[row : row + out.shape[0]].cpu().contiguous()
        out[:] = part.view(-1).view(torch.uint8).numpy().reshape(out.shape)


def in_memory(tensors: Mapping[str, torch.Tensor]) -> ViewReader:
    """A reader of tensors in memory, such as a model's `state_dict()`."""
    views = {}
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        matrix = MemoryMatrix(name, dtype_name(tensor.dtype), *matrix_shape(shape), tensor.detach())
        views[name] = TensorView.of(matrix, shape)
    return ViewReader(views, where="the model in memory")
