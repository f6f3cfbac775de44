"""Tensors on disk, read a slice at a time.

Every format comes down to rectangles of rows and columns at known byte offsets of known files. A `FileMatrix` is one
such matrix, a `Slice` is a part of it with its place in a tensor, and a `TensorView` is a tensor made of slices: a
q_proj that a Megatron file interleaves with k and v is read like one that a safetensors file stores whole. torch is
imported only when a tensor is read: conversions need numpy alone, a third of the memory of `import torch`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from arriero.checkpoint.tensors.raw_file import RawFile
from arriero.common.checkpoint_names import DAMAGED
from arriero.common.errors import UserError, closest_match

if TYPE_CHECKING:
    import torch

Bytes = np.ndarray  # uint8 [rows, columns * itemsize]

ITEMSIZE = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes an element of each dtype takes, under safetensors' names."""

TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64",
    "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype name."""
    import torch

    dtype: torch.dtype = getattr(torch, TORCH_NAMES[name])
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype."""
    short = str(dtype).removeprefix("torch.")
    return next(name for name, known in TORCH_NAMES.items() if known == short)


@dataclass(frozen=True)
class Matrix:
    """A matrix whose rows can be read; tensors of other dimensions are seen as one (see `matrix_shape`)."""

    label: str  # its name in errors
    dtype: str  # safetensors' name
    rows: int
    columns: int

    def read_rows(self, row: int, out: Bytes) -> None:
        """Fills `out` [n, columns * itemsize] with rows [row, row + n)."""
        raise NotImplementedError


@dataclass(frozen=True)
class FileMatrix(Matrix):
    """A matrix in a file, row after row."""

    file: RawFile
    offset: int
    row_bytes: int  # distance of rows in the file; more than the row's own bytes for a view of a wider tensor

    def read_rows(self, row: int, out: Bytes) -> None:
        """Fills `out` (contiguous) with rows from `row` on."""
        if out.shape[1] == self.row_bytes:
            self.file.read_into(self.offset + row * self.row_bytes, out.reshape(-1).data)
        else:
            self.read_columns(row, 0, out)

    def read_columns(self, row: int, column: int, out: Bytes) -> None:
        """Fills `out` [n, width * itemsize] with columns from `column` on, reading no other bytes."""
        start = self.offset + column * ITEMSIZE[self.dtype] + row * self.row_bytes
        if self.file.mapped and out.size:
            out[:] = np.ndarray(out.shape, np.uint8, self.file.pages, start, (self.row_bytes, 1))
            return
        for i in range(out.shape[0]):
            self.file.read_into(start + i * self.row_bytes, out[i].data)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a tensor seen as a matrix: [n] is [n, 1], [a, b, c] is [a * b, c]."""
    if len(shape) < 2:
        return (shape[0] if shape else 1), 1
    return math.prod(shape[:-1]), shape[-1]


@dataclass(frozen=True)
class Slice:
    """Rows row, row + step, ... and columns [column, column + columns) of a source, and their place in the tensor."""

    source: Matrix
    row: int
    column: int
    rows: int
    columns: int
    out_row: int = 0
    out_column: int = 0
    step: int = 1  # 0 repeats one row (vocabulary padding), 2 undoes an interleaving


@dataclass(frozen=True)
class TensorView:
    """A tensor made of slices that cover it exactly once."""

    dtype: str
    shape: tuple[int, ...]
    slices: tuple[Slice, ...]

    @classmethod
    def of(cls, source: Matrix, shape: tuple[int, ...]) -> TensorView:
        """A tensor that is one whole source."""
        return cls(source.dtype, shape, (Slice(source, 0, 0, source.rows, source.columns),))

    @classmethod
    def in_file(cls, file: RawFile, label: str, offset: int, dtype: str, shape: tuple[int, ...]) -> TensorView:
        """A tensor that lies in one contiguous range of a file."""
        rows, columns = matrix_shape(shape)
        return cls.of(FileMatrix(label, dtype, rows, columns, file, offset, columns * ITEMSIZE[dtype]), shape)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.numel * ITEMSIZE[self.dtype]

    def window(self, row: int, column: int, rows: int, columns: int) -> Iterator[Slice]:
        """The parts of the slices that lie in a rectangle, placed relative to its corner."""
        for one in self.slices:
            r0, r1 = max(row, one.out_row), min(row + rows, one.out_row + one.rows)
            c0, c1 = max(column, one.out_column), min(column + columns, one.out_column + one.columns)
            if r0 < r1 and c0 < c1:
                yield Slice(
                    one.source, one.row + (r0 - one.out_row) * one.step, one.column + c0 - one.out_column, r1 - r0,
                    c1 - c0, r0 - row, c0 - column, one.step,
                )  # fmt: skip

    def read_window(self, row: int, column: int, out: Bytes) -> None:
        """Fills `out` with the rectangle whose corner is (row, column).

        Raises:
            UserError: the slices do not cover it, or a file cannot be read.
        """
        size, filled = ITEMSIZE[self.dtype], 0
        for one in self.window(row, column, out.shape[0], out.shape[1] // size):
            left, right = one.out_column * size, (one.out_column + one.columns) * size
            read_slice(one, out[one.out_row : one.out_row + one.rows, left:right])
            filled += one.rows * (right - left)
        if filled != out.size:
            where = self.slices[0].source.label if self.slices else "a tensor"
            raise UserError(f"{where}: has {filled // size:,} of {out.size // size:,} elements", DAMAGED)

    def check_coverage(self, name: str) -> None:
        """Raises UserError unless the slices lie inside the tensor and have as many elements as it."""
        rows, columns = matrix_shape(self.shape)
        inside = all(
            s.out_row >= 0 and s.out_column >= 0 and s.out_row + s.rows <= rows and s.out_column + s.columns <= columns
            for s in self.slices
        )
        area = sum(s.rows * s.columns for s in self.slices)
        if not inside or area != rows * columns:
            raise UserError(f"{name} has {area:,} of {rows * columns:,} elements", DAMAGED)


CHUNK_BYTES = 2 << 20  # per thread and buffer; larger gains no speed and leaves the processor's cache
_buffers = threading.local()


def buffer(name: str, rows: int, width: int) -> Bytes:
    """This thread's buffer of that name: touched once, not once a chunk (first touch is dear on virtual machines)."""
    current: Bytes | None = getattr(_buffers, name, None)
    if current is None or current.size < rows * width:
        current = np.empty(max(CHUNK_BYTES, rows * width), np.uint8)
        setattr(_buffers, name, current)
    return current[: rows * width].reshape(rows, width)


def read_slice(part: Slice, out: Bytes) -> None:
    """Reads one slice into `out` [rows, columns * itemsize], through a buffer where they are strided."""
    source, size = part.source, ITEMSIZE[part.source.dtype]
    full = part.columns == source.columns
    if part.step == 1 and full and out.flags.c_contiguous:
        source.read_rows(part.row, out)
        return
    if part.step == 1 and isinstance(source, FileMatrix):
        skipped = (source.columns - part.columns) * size
        if source.file.mapped or skipped >= 4096:  # a page or more a row is left unread
            source.read_columns(part.row, part.column, out)
            return
    left, right = part.column * size, (part.column + part.columns) * size
    if part.step == 0:
        line = np.empty((1, source.columns * size), np.uint8)
        source.read_rows(part.row, line)
        out[:] = line[:, left:right]
        return
    block = max(1, CHUNK_BYTES // max(1, source.columns * size * part.step))
    for first in range(0, part.rows, block):
        count = min(block, part.rows - first)
        scratch = buffer("scratch", (count - 1) * part.step + 1, source.columns * size)
        source.read_rows(part.row + first * part.step, scratch)
        out[first : first + count] = scratch[:: part.step, left:right]


class ViewReader:
    """Named tensors that can be read in part; what every opener of this package returns."""

    def __init__(self, tensors: Mapping[str, TensorView], *, where: str) -> None:
        self.tensors = dict(tensors)
        self.where = where

    def names(self) -> list[str]:
        """All names, in the order of the source."""
        return list(self.tensors)

    def view(self, name: str) -> TensorView:
        """Where one tensor lies. Raises UserError if there is none of this name."""
        if name not in self.tensors:
            raise UserError(f"{self.where}: holds no tensor {name!r}", closest_match(name, self.tensors))
        return self.tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole tensor's shape."""
        return self.view(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """As stored."""
        return torch_dtype(self.view(name).dtype)

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> torch.Tensor:
        """The tensor, or the part that `index` (slices of step 1, one a dimension) selects; in the stored dtype.

        Raises:
            UserError: there is no such tensor, or a part of it is missing.
        """
        import torch

        shape = self.shape(name)
        bounds = [part.indices(n) for part, n in zip(index or (), shape, strict=False)]
        bounds += [(0, n, 1) for n in shape[len(bounds) :]]
        if any(step != 1 for *_, step in bounds):
            raise ValueError(f"{name}: slices must have step 1, not {index}")
        out = torch.empty([max(0, stop - start) for start, stop, _ in bounds], dtype=self.dtype(name))
        self.read_into(name, [start for start, *_ in bounds], out)
        return out

    def read_into(self, name: str, start: Sequence[int], out: torch.Tensor) -> None:
        """Fills `out` (contiguous, at most two dimensions, on the CPU) with the part of a tensor that begins at
        `start`: its bytes are read to where they belong, without another copy.

        Raises:
            UserError: as `read`.
        """
        import torch

        if out.dim() > 2:
            raise ValueError(f"{name}: slices of {out.dim()} dimensions are not supported")
        row, column = (*start, 0, 0)[:2]
        if out.numel():
            raw = out.reshape(-1).view(torch.uint8).numpy().reshape(matrix_shape(tuple(out.shape))[0], -1)
            self.view(name).read_window(row, column, raw)
