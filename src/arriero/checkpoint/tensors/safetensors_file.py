"""The safetensors header, checked when read, and written.

Layout: u64 little-endian length N, N bytes of JSON {name: {dtype, shape, data_offsets}}, then the data. The offsets
are relative to the end of the header, must not overlap and must leave no hole.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arriero.checkpoint.tensors.raw_file import RawFile
from arriero.checkpoint.tensors.stream import ITEMSIZE, TensorView, ViewReader
from arriero.common.errors import UserError
from arriero.common.untrusted import MAX_JSON_BYTES, schema_problem

FIX = "fetch the file again, or ask who made it"


class SafetensorsFile(ViewReader):
    """One checked safetensors file.

    Raises:
        UserError: on opening, if the header is anything but well-formed; names the file and the tensor.
    """

    def __init__(self, path: Path, *, mapped: bool = False) -> None:
        file = RawFile(path, mapped=mapped)
        header, start = _read_header(file)
        self.metadata = _metadata(header.pop("__metadata__", {}), path)
        tensors, ranges = {}, []
        for name, entry in header.items():
            dtype, shape, begin, end = _entry(entry, f"{path}: tensor {name!r}", file.size - start)
            ranges.append((begin, end, name))
            tensors[name] = TensorView.in_file(file, f"{path}: {name}", start + begin, dtype, shape)
        _check_coverage(sorted(ranges), file.size - start, path)
        super().__init__(tensors, where=str(path))


def _refuse(problem: str) -> UserError:
    return UserError(problem, FIX)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _refuse(f"names {twice!r} twice")
    return result


def _read_header(file: RawFile) -> tuple[dict[str, Any], int]:
    """The decoded header and the byte at which the data begins."""
    if file.size < 8:
        raise _refuse(f"{file.path}: {file.size} bytes are too few for a safetensors file")
    length = int.from_bytes(file.read(0, 8), "little")
    if length > min(MAX_JSON_BYTES, file.size - 8):
        raise _refuse(f"{file.path}: claims a header of {length:,} bytes in a file of {file.size:,}")
    raw = file.read(8, length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=lambda c: 1 / 0)
    except UserError as error:
        raise _refuse(f"{file.path}: the header {error.problem}") from None
    except (ValueError, RecursionError, ZeroDivisionError):
        raise _refuse(f"{file.path}: the header is not JSON") from None
    if not isinstance(header, dict) or not raw.startswith(b"{"):
        raise _refuse(f"{file.path}: the header is not a JSON object")
    return header, 8 + length


def _metadata(value: Any, path: Path) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise _refuse(f"{path}: __metadata__ is not a table of strings")
    return value


def _entry(entry: Any, where: str, data_bytes: int) -> tuple[str, tuple[int, ...], int, int]:
    """Checks one tensor's entry; returns dtype, shape, begin, end."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _refuse(f"{where} needs dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        raise _refuse(f"{where} has the unknown dtype {dtype!r}")
    for key, value in (("shape", shape), ("data_offsets", offsets)):
        if schema_problem(value, [int]) or min((0, *value)) < 0 or (key == "data_offsets" and len(value) != 2):
            raise _refuse(f"{where} has the impossible {key} {str(value)[:80]}")
    begin, end = offsets
    size = ITEMSIZE[dtype] * math.prod(shape)
    if not begin <= end <= data_bytes:
        raise _refuse(f"{where} lies at bytes {begin:,} to {end:,} of {data_bytes:,} (the file is truncated?)")
    if size != end - begin:
        raise _refuse(f"{where} is {dtype} {shape}, {size:,} bytes, but has {end - begin:,}")
    return dtype, tuple(shape), begin, end


def _check_coverage(ranges: list[tuple[int, int, str]], data_bytes: int, path: Path) -> None:
    at, before = 0, "the header"
    for begin, end, name in ranges:
        if begin != at:
            what = "overlaps" if begin < at else "leaves a hole after"
            raise _refuse(f"{path}: tensor {name!r} {what} {before!r}")
        at, before = end, name
    if at != data_bytes:
        raise _refuse(f"{path}: {data_bytes - at:,} bytes follow the last tensor")


def build_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[bytes, dict[str, int], int]:
    """Header bytes for {name: (dtype, shape)}, the absolute offset of each tensor's data, and the file's size.

    The data begin at a multiple of 8 bytes; wide dtypes should be listed first, as the library does, so that every
    tensor is aligned to its element.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = ITEMSIZE[dtype] * math.prod(shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        offsets[name] = at
        at += size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return (
        len(text).to_bytes(8, "little") + text,
        {name: start + offset for name, offset in offsets.items()},
        start + at,
    )
