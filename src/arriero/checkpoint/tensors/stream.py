"""Tensors on disk, read a slice at a time.

Every format that this package reads comes down to the same thing: rectangles of rows and columns that lie at known
byte offsets of known files. `Stored` is one such matrix, a `Piece` says which part of it lands where in a tensor, and
an `Assembly` is a tensor made of pieces: a q_proj that a Megatron file keeps interleaved with k and v is as readable,
slice by slice, as one that a safetensors file keeps whole. Nothing here imports torch before a tensor is asked for:
the conversions run on numpy alone, in a third of the memory that `import torch` takes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

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


class TensorReader(Protocol):
    """Named tensors that can be read in part."""

    def names(self) -> list[str]:
        """All names, in the order they lie in."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole tensor's shape."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """As stored."""
        ...

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> torch.Tensor:
        """The tensor, or the part that `index` (slices of step 1, one a dimension) selects; in the stored dtype."""
        ...


class Source(Protocol):
    """A matrix whose rows can be read."""

    @property
    def label(self) -> str:
        """Names the matrix in errors."""
        ...

    @property
    def dtype(self) -> str:
        """safetensors' name."""
        ...

    @property
    def rows(self) -> int:
        """Height."""
        ...

    @property
    def columns(self) -> int:
        """Width."""
        ...

    def read_rows(self, row: int, out: Bytes) -> None:
        """Fills `out` [n, columns * itemsize] with rows [row, row + n)."""
        ...


@dataclass(frozen=True)
class Stored:
    """A matrix in a file, row after row (see `matrix_shape` for tensors of other dimensions)."""

    file: RawFile
    label: str
    offset: int
    dtype: str
    rows: int
    columns: int
    row_bytes: int  # distance of rows in the file; more than the row's own bytes for a view of a wider tensor

    @classmethod
    def of(cls, file: RawFile, label: str, offset: int, dtype: str, shape: tuple[int, ...]) -> Stored:
        """A contiguous tensor at `offset`."""
        rows, columns = matrix_shape(shape)
        return cls(file, label, offset, dtype, rows, columns, columns * ITEMSIZE[dtype])

    def read_rows(self, row: int, out: Bytes) -> None:
        """Fills `out` (contiguous) with rows from `row` on."""
        if out.shape[1] == self.row_bytes:
            self.file.read_into(self.offset + row * self.row_bytes, _flat(out))
        else:
            self.read_columns(row, 0, out)

    def read_columns(self, row: int, column: int, out: Bytes) -> None:
        """Fills `out` [n, width * itemsize] with columns from `column` on, reading no other bytes."""
        start = self.offset + column * ITEMSIZE[self.dtype] + row * self.row_bytes
        for i in range(out.shape[0]):
            self.file.read_into(start + i * self.row_bytes, _flat(out[i]))


def _flat(out: Bytes) -> memoryview:
    return out.reshape(-1).data


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a tensor seen as a matrix: [n] is [n, 1], [a, b, c] is [a * b, c]."""
    if len(shape) < 2:
        return (shape[0] if shape else 1), 1
    return int(np.prod(shape[:-1])), shape[-1]


@dataclass(frozen=True)
class Piece:
    """Rows row, row + step, ... and columns [column, column + columns) of a source, and where they land."""

    source: Source
    row: int
    column: int
    rows: int
    columns: int
    at_row: int = 0
    at_column: int = 0
    step: int = 1  # 0 repeats one row (vocabulary padding), 2 undoes an interleaving

    def part(self, row: int, column: int, rows: int, columns: int) -> Piece:
        """The sub-rectangle that begins at (row, column) of this piece."""
        return Piece(
            self.source, self.row + row * self.step, self.column + column, rows, columns,
            self.at_row + row, self.at_column + column, self.step,
        )  # fmt: skip


@dataclass(frozen=True)
class Assembly:
    """A tensor made of pieces that cover it exactly once."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @classmethod
    def whole(cls, source: Source, shape: tuple[int, ...]) -> Assembly:
        """A tensor that lies in one piece."""
        return cls(source.dtype, shape, (Piece(source, 0, 0, source.rows, source.columns),))

    @property
    def numel(self) -> int:
        """Number of elements."""
        rows, columns = matrix_shape(self.shape)
        return rows * columns

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.numel * ITEMSIZE[self.dtype]

    def window(self, row: int, column: int, rows: int, columns: int) -> Iterator[Piece]:
        """The parts of the pieces that lie in a rectangle, placed relative to its corner."""
        for piece in self.pieces:
            r0, r1 = max(row, piece.at_row), min(row + rows, piece.at_row + piece.rows)
            c0, c1 = max(column, piece.at_column), min(column + columns, piece.at_column + piece.columns)
            if r0 < r1 and c0 < c1:
                cut = piece.part(r0 - piece.at_row, c0 - piece.at_column, r1 - r0, c1 - c0)
                yield replace(cut, at_row=r0 - row, at_column=c0 - column)

    def read_window(self, row: int, column: int, out: Bytes) -> None:
        """Fills `out` with the rectangle whose corner is (row, column)."""
        size = ITEMSIZE[self.dtype]
        for piece in self.window(row, column, out.shape[0], out.shape[1] // size):
            left, right = piece.at_column * size, (piece.at_column + piece.columns) * size
            read_piece(piece, out[piece.at_row : piece.at_row + piece.rows, left:right])


CHUNK_BYTES = 2 << 20  # per thread and buffer; larger gains no speed and leaves the processor's cache
_buffers = threading.local()


def buffer(name: str, rows: int, width: int) -> Bytes:
    """This thread's buffer of that name: touched once, not once a chunk (first touch is dear on virtual machines)."""
    held: Bytes | None = getattr(_buffers, name, None)
    if held is None or held.size < rows * width:
        held = np.empty(max(CHUNK_BYTES, rows * width), np.uint8)
        setattr(_buffers, name, held)
    return held[: rows * width].reshape(rows, width)


def read_piece(piece: Piece, out: Bytes) -> None:
    """Reads one piece into `out` [rows, columns * itemsize], through a scratch of `CHUNK_BYTES` where it must."""
    source, size = piece.source, ITEMSIZE[piece.source.dtype]
    full = piece.columns == source.columns
    if piece.step == 1 and full and out.flags.c_contiguous:
        source.read_rows(piece.row, out)
        return
    skipped = (source.columns - piece.columns) * size
    if piece.step == 1 and isinstance(source, Stored) and skipped >= 4096:  # a page or more a row is left unread
        source.read_columns(piece.row, piece.column, out)
        return
    left, right = piece.column * size, (piece.column + piece.columns) * size
    if piece.step == 0:
        line = np.empty((1, source.columns * size), np.uint8)
        source.read_rows(piece.row, line)
        out[:] = line[:, left:right]
        return
    block = max(1, CHUNK_BYTES // max(1, source.columns * size * piece.step))
    for first in range(0, piece.rows, block):
        count = min(block, piece.rows - first)
        scratch = buffer("scratch", (count - 1) * piece.step + 1, source.columns * size)
        source.read_rows(piece.row + first * piece.step, scratch)
        out[first : first + count] = scratch[:: piece.step, left:right]


class PieceReader:
    """A `TensorReader` over assemblies; what every opener of this package returns."""

    def __init__(self, tensors: Mapping[str, Assembly], *, where: str) -> None:
        self.tensors = dict(tensors)
        self.where = where

    def names(self) -> list[str]:
        """All names, in the order they lie in."""
        return list(self.tensors)

    def assembly(self, name: str) -> Assembly:
        """The pieces of one tensor."""
        if name not in self.tensors:
            raise UserError(f"{self.where}: holds no tensor {name!r}", closest_match(name, self.tensors))
        return self.tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole tensor's shape."""
        return self.assembly(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """As stored."""
        return torch_dtype(self.assembly(name).dtype)

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> torch.Tensor:
        """The tensor or a slice of it; only the slice's bytes are read."""
        import torch

        tensor = self.assembly(name)
        bounds = [_bounds(s, n, name) for s, n in zip(index or (), tensor.shape, strict=False)]
        bounds += [(0, n) for n in tensor.shape[len(bounds) :]]
        if len(bounds) > 2:
            raise ValueError(f"{name}: slices of {len(bounds)} dimensions are not supported")
        (row, row_end), (column, _) = ([*bounds, (0, 1), (0, 1)])[:2]
        out = torch.empty([stop - start for start, stop in bounds], dtype=torch_dtype(tensor.dtype))
        if out.numel():
            raw = out.view(-1).view(torch.uint8).numpy().reshape(row_end - row, -1)
            tensor.read_window(row, column, raw)
        return out


def _bounds(part: slice, size: int, name: str) -> tuple[int, int]:
    start, stop, step = part.indices(size)
    if step != 1:
        raise ValueError(f"{name}: slices must have step 1, not {step}")
    return start, max(start, stop)


def check_cover(name: str, tensor: Assembly, *, where: str) -> None:
    """Raises UserError unless the pieces lie inside the tensor and have as many elements as it."""
    rows, columns = matrix_shape(tensor.shape)
    inside = all(
        p.at_row >= 0 and p.at_column >= 0 and p.at_row + p.rows <= rows and p.at_column + p.columns <= columns
        for p in tensor.pieces
    )
    area = sum(p.rows * p.columns for p in tensor.pieces)
    if not inside or area != rows * columns:
        raise UserError(f"{where}: {name} has {area:,} of {rows * columns:,} elements", DAMAGED)
