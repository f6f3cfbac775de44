"""torch.save files, read without running their pickles.

A .pt file is a zip archive of uncompressed records: `data.pkl` lists the objects, `data/N` hold the raw
bytes of each storage. The pickle inside is a program; here its opcodes are followed symbolically: a global becomes
its name, a call becomes a record of the call, nothing is imported and nothing is called. That is stricter than
`torch.load(weights_only=True)` and reads more: the `argparse.Namespace` and enums that Megatron saves beside the
weights are plain data to it. A global outside the few families that checkpoints are made of is refused by name.
"""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path
from typing import Any

from arriero.checkpoint.tensors.pickle_symbols import (
    MAX_NODES,
    MAX_PICKLE_BYTES,
    Call,
    Global,
    TensorRef,
    parse_symbolically,
)
from arriero.checkpoint.tensors.raw_file import RawFile
from arriero.checkpoint.tensors.stream import ITEMSIZE, FileMatrix, TensorView, ViewReader, matrix_shape
from arriero.common.errors import UserError
from arriero.common.text import escape


class TorchFile:
    """A torch.save archive: `.root` is its object, with `TensorRef`s where tensors are.

    Args:
        path: the file.
        begin: where the archive begins in it, in bytes (DCP packs several into one file).
        size: the archive's length; None is the rest of the file.

    Raises:
        UserError: not a torch.save archive, or a dangerous or broken one.
    """

    def __init__(self, path: Path, *, begin: int = 0, size: int | None = None, file: RawFile | None = None) -> None:
        self.path, self.begin = path, begin
        self.file = file or RawFile(path)
        window = _Window(self.file, begin, self.file.size - begin if size is None else size)
        try:
            archive = zipfile.ZipFile(window)
        except (zipfile.BadZipFile, ValueError, OSError, struct.error, OverflowError, NotImplementedError, UserError):
            raise UserError(
                f"{path}: is not a torch.save archive, or is cut short",
                "fetch it again; a file of torch before 1.6 must be saved again with a newer one",
            ) from None
        self.records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        main = self.records.get("data.pkl")
        if main is None or main.file_size > MAX_PICKLE_BYTES:
            raise UserError(f"{path}: holds no data.pkl of a sensible size", "is it a torch.save file?")
        start = self._start(main)
        self.root = parse_symbolically(self.file.read(start, main.file_size), str(path))

    def _start(self, info: zipfile.ZipInfo) -> int:
        """The byte of the file at which a record's data begin."""
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise UserError(f"{self.path}: record {info.filename} is compressed", "save it again with torch.save")
        at = self.begin + info.header_offset
        head = self.file.read(at, 30)
        name, extra = struct.unpack_from("<HH", head, 26)
        start = at + 30 + name + extra
        if head[:4] != b"PK\x03\x04" or start + info.file_size > self.file.size:
            raise UserError(f"{self.path}: record {info.filename} is cut short", "fetch the file again")
        return int(start)

    def tensor(self, ref: TensorRef, label: str) -> TensorView:
        """Where a tensor lies.

        Raises:
            UserError: the view leaves its storage, or is neither row by row nor a window of a wider matrix.
        """
        where, storage, size = f"{self.path}: {label}", ref.storage, ITEMSIZE[ref.storage.dtype]
        info = self.records.get(f"data/{storage.key}")
        rows, columns = matrix_shape(ref.shape)
        row_stride = _row_stride(ref)
        if row_stride is None:
            raise UserError(f"{where} is a transposed view", "save it again with .contiguous()")
        last = ref.offset + max(0, rows - 1) * row_stride + columns
        if info is None or ref.offset < 0 or min(ref.shape, default=1) < 0 or row_stride < 0:
            raise UserError(f"{where} lies outside its storage", "fetch the file again")
        if rows * columns and last * size > info.file_size:
            raise UserError(f"{where} needs {last * size:,} bytes of a record of {info.file_size:,}", "fetch it again")
        start = self._start(info) + ref.offset * size
        stored = FileMatrix(where, storage.dtype, rows, columns, self.file, start, row_stride * size)
        return TensorView.of(stored, ref.shape)

    def tensors(self, tree: Any) -> dict[str, TensorView]:
        """All tensors below a nested dict, named by their joined keys.

        Raises:
            UserError: a tensor is of a kind that is no plain array, such as quantized, sparse or distributed ones.
        """
        found: dict[str, TensorView] = {}
        waiting, seen = [("", 0, tree)], 0
        while waiting:
            prefix, depth, branch = waiting.pop()
            items = branch.items() if isinstance(branch, dict) else ()
            seen += 1 + len(items)
            if depth > 64 or seen > MAX_NODES:
                raise UserError(f"{self.path}: is nested without end", "fetch the file again")
            below = []
            for key, value in items:
                if not isinstance(key, (str, int)):
                    continue
                if isinstance(value, dict):
                    below.append((f"{prefix}{key}.", depth + 1, value))
                elif isinstance(value, TensorRef):
                    found[f"{prefix}{key}"] = self.tensor(value, f"{prefix}{key}")
                elif special := _special_tensor(value):
                    fix = "save it as a plain tensor: dequantized, dense and whole"
                    raise UserError(f"{self.path}: {escape(f'{prefix}{key}')} is rebuilt by {escape(special)}", fix)
            waiting += reversed(below)
        return found

    def reader(self) -> ViewReader:
        """All tensors of a file that holds one flat state dict."""
        return ViewReader(self.tensors(self.root), where=str(self.path))


def _special_tensor(value: Any) -> str:
    """The function that would make a tensor of this, if it is one that is no plain array; else empty."""
    if not (isinstance(value, Call) and isinstance(value.function, Global)):
        return ""
    name = value.function.name
    return name if name.rpartition(".")[2].startswith("_rebuild_") else ""


def _row_stride(ref: TensorRef) -> int | None:
    """Elements between rows of the tensor seen as a matrix, or None if it is no such thing."""
    rows, columns = matrix_shape(ref.shape)
    if len(ref.stride) != len(ref.shape):
        return None
    if len(ref.shape) < 2:
        return ref.stride[0] if ref.shape and rows > 1 else columns
    if ref.stride[-1] != 1 and columns > 1:
        return None
    expected = ref.stride[-2]
    for size, stride in zip(ref.shape[-2::-1], ref.stride[-2::-1], strict=True):
        if size > 1 and stride != expected:
            return None
        expected *= size
    return ref.stride[-2] if rows > 1 else columns


class _Window:
    """A part of a file, with the methods that zipfile needs."""

    def __init__(self, file: RawFile, begin: int, size: int) -> None:
        self.file, self.begin, self.size, self.at = file, begin, size, 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = offset + (0, self.at, self.size)[whence]
        if self.at < 0:
            raise OSError("before the start")
        return self.at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.size - self.at)
        count = left if size is None or size < 0 else min(size, left)
        data = self.file.read(self.begin + self.at, count)
        self.at += count
        return data
