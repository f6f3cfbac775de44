"""torch.save files laid out beforehand, so that the weights stream straight to their place in them.

The archive is what torch.save writes (zip, uncompressed, records aligned to 64 bytes, zip64 where needed), but for the
records' CRC-32, which torch does not check and which is left at 0, as `torch.serialization.set_crc32_options(False)`
permits: the bytes are not all known when the header is written.
"""

from __future__ import annotations

import math
import struct
import zlib
from dataclasses import dataclass
from typing import Any

from arriero.checkpoint.tensors.pickle_symbols import STORAGES
from arriero.checkpoint.tensors.stream import ITEMSIZE

ALIGN = 64
_STORAGE_OF = {dtype: name for name, dtype in STORAGES.items() if name != "UntypedStorage"}
_BIG = 0xFFFFFFFF


@dataclass(frozen=True)
class Namespace:
    """An `argparse.Namespace` to be, of plain values."""

    values: dict[str, Any]


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be: its storage is a record of its own."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def plan_archive(root: Any) -> tuple[int, list[tuple[int, bytes]], dict[int, int]]:
    """Lays out a torch.save archive of `root` (dicts, tuples, plain values, `TensorSpec`s and `Namespace`s).

    Returns:
        The file's size; the (offset, bytes) that are known; where the data of the n-th tensor to appear begin.
    """
    pickler = _Pickler()
    pickler.save(root)
    program = b"\x80\x02" + bytes(pickler.out) + b"."
    records: list[tuple[str, int, bytes | None]] = [("data.pkl", len(program), program), ("byteorder", 6, b"little")]
    records += [(f"data/{i}", spec.elements * ITEMSIZE[spec.dtype], None) for i, spec in enumerate(pickler.tensors)]
    records.append(("version", 2, b"3\n"))
    at, directory = 0, b""
    blobs: list[tuple[int, bytes]] = []
    offsets: dict[int, int] = {}
    for name, size, data in records:
        header, entry = _record(f"archive/{name}", size, at, data)
        start = at + len(header)
        blobs.append((at, header + (data or b"")))
        if data is None:
            offsets[len(offsets)] = start
        at = start + size
        directory += entry
    blobs.append((at, directory + _end(len(records), len(directory), at)))
    return at + len(blobs[-1][1]), blobs, offsets


def _record(name: str, size: int, at: int, data: bytes | None) -> tuple[bytes, bytes]:
    """Local header (padded so that the data are aligned) and central directory entry of one record."""
    crc, path = (zlib.crc32(data) if data else 0), name.encode()
    local_extra = struct.pack("<HHQQ", 1, 16, size, size) if size >= _BIG else b""
    pad = -(at + 30 + len(path) + len(local_extra) + 4) % ALIGN
    local_extra += struct.pack("<HH", 0x4246, pad) + b"Z" * pad  # torch's own filler: id "FB"
    short = min(size, _BIG)
    date = (0, 0x21)  # 1980-01-01: the same bytes on every run
    local = struct.pack("<4sHHHHHIIIHH", b"PK\3\4", 45, 0, 0, *date, crc, short, short, len(path), len(local_extra))
    wide = ([size, size] if size >= _BIG else []) + ([at] if at >= _BIG else [])
    extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
    central = struct.pack(
        "<4sHHHHHHIIIHHHHHII", b"PK\1\2", 45, 45, 0, 0, *date, crc, short, short, len(path), len(extra), 0, 0, 0, 0,
        min(at, _BIG),
    )  # fmt: skip
    return local + path + local_extra, central + path + extra


def _end(count: int, size: int, at: int) -> bytes:
    """End of the central directory, in zip64 form with the old form behind it."""
    wide = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, at)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, at + size, 1)
    short = min(count, 0xFFFF)
    end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, short, short, min(size, _BIG), min(at, _BIG), 0)
    return wide + locator + end


class _Pickler:
    """Protocol 2 without a memo, for the few kinds that a state dict is made of."""

    def __init__(self) -> None:
        self.out = bytearray()
        self.tensors: list[TensorSpec] = []

    def save(self, value: Any) -> None:
        """Appends the opcodes that make `value`."""
        if isinstance(value, TensorSpec):
            self._tensor(value)
        elif isinstance(value, Namespace):  # as Python pickles one: made without arguments, then its __dict__ is set
            self._name("argparse", "Namespace")
            self.out += b")\x81"
            self.save(value.values)
            self.out += b"b"
        elif value is None:
            self.out += b"N"
        elif isinstance(value, dict):
            self.out += b"}("
            for key, item in value.items():
                self.save(key)
                self.save(item)
            self.out += b"u"
        elif isinstance(value, tuple):
            self.out += b"("
            for item in value:
                self.save(item)
            self.out += b"t"
        elif isinstance(value, bool):
            self.out += b"\x88" if value else b"\x89"
        elif isinstance(value, int):
            size = value.bit_length() // 8 + 1
            self.out += b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)
        elif isinstance(value, float):
            self.out += b"G" + struct.pack(">d", value)
        elif isinstance(value, str):
            text = value.encode()
            self.out += b"X" + struct.pack("<I", len(text)) + text
        else:
            raise TypeError(f"cannot write a {type(value).__name__}")

    def _name(self, module: str, name: str) -> None:
        self.out += f"c{module}\n{name}\n".encode()

    def _tensor(self, spec: TensorSpec) -> None:
        self._name("torch._utils", "_rebuild_tensor_v2")
        self.out += b"(("
        self.save("storage")
        self._name("torch", _STORAGE_OF[spec.dtype])
        self.save(str(len(self.tensors)))
        self.save("cpu")
        self.save(spec.elements)
        self.out += b"tQ"
        self.save(0)
        self.save(spec.shape)
        self.save(tuple(math.prod(spec.shape[i + 1 :]) for i in range(len(spec.shape))))
        self.save(False)
        self._name("collections", "OrderedDict")
        self.out += b")RtR"
        self.tensors.append(spec)
