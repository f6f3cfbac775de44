"""TensorBoard event files, scalars alone: records framed as TFRecord, each a protobuf message `Event`.

They are decoded here, because of the messages' dozens of fields three are needed, and the `tensorboard` package brings
grpc, protobuf and a web server. Formats: TensorFlow's record_writer.h, event.proto, summary.proto and tensor.proto.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from arriero.common.errors import UserError
from arriero.common.protobuf import DamagedMessageError, read_fields
from arriero.common.text import escape
from arriero.observe.curves.curve import VALIDATION, Curves, CurvesBuilder, canonical_name, normalize_name
from arriero.observe.curves.text_lines import open_text

MAX_RECORD = 1 << 20
"""Bytes of a record that is decoded: a scalar has about 60. Larger ones, such as images and graphs, are passed over."""
_HEADER = 12  # length (u64), its masked CRC (u32)
_FLOAT, _DOUBLE, _HALF, _BFLOAT16 = 1, 2, 19, 14  # DataType of tensor.proto
_UNPACK = {_FLOAT: "<f", _DOUBLE: "<d", _HALF: "<e"}


def _crc_table() -> list[int]:
    """CRC-32C (Castagnoli), reflected polynomial 0x82F63B78."""
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)  # noqa: PLW2901
        table.append(value)
    return table


_TABLE = _crc_table()


def masked_crc(data: bytes) -> int:
    """The CRC-32C of `data` in TFRecord's masked form: rotated right by 15 bits, plus a constant."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def is_event_file(head: bytes) -> bool:
    """Whether a file that begins with `head` is framed as event files are."""
    return len(head) >= _HEADER and masked_crc(head[:8]) == struct.unpack("<I", head[8:12])[0]


def read_events(path: Path, files: Iterable[Path], only: Collection[str] | None) -> Curves:
    """Reads the scalars of event files in the order of `files`, as several starts of one run write them.

    A record that is not whole at the end of a file, as a kill leaves it, is left out. Tags that count samples instead
    of steps, Megatron's `... vs samples`, are passed over.

    Args:
        path: what the user has named, for messages and for the result.
        files: the files, the oldest first.
        only: the quantities to keep, None for all.

    Raises:
        UserError: a record that is damaged, named by file and byte.
    """
    found = CurvesBuilder(path, only)
    for file in files:
        with open_text(file) as stream:
            for at, data in _records(file, stream):
                try:
                    step, scalars = _event(data)
                except (DamagedMessageError, struct.error, IndexError) as error:
                    raise _damaged(file, at, str(error)) from None
                for tag, value in scalars:
                    if not tag.endswith(" vs samples"):
                        name = normalize_name(tag)
                        found.add(
                            step, {name: value}, training=canonical_name(name) != VALIDATION and "valid" not in name
                        )
    return found.curves("TensorBoard's event file")


def _damaged(file: Path, at: int, reason: str) -> UserError:
    return UserError(f"{escape(file)}, byte {at}: not a TensorBoard record ({reason})", "restore the file")


def _records(path: Path, stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """(place, bytes) of each record that is small enough; the checksums of the length and of the data are compared."""
    at, size = 0, os.fstat(stream.fileno()).st_size
    while len(head := stream.read(_HEADER)) == _HEADER:
        length, crc = struct.unpack("<QI", head)
        if masked_crc(head[:8]) != crc:
            raise _damaged(path, at, "the checksum of its length differs")
        if at + _HEADER + length + 4 > size:
            return  # cut off by a kill
        if length > MAX_RECORD:
            stream.seek(length + 4, os.SEEK_CUR)
        else:
            data, tail = stream.read(length), stream.read(4)
            if masked_crc(data) != struct.unpack("<I", tail)[0]:
                raise _damaged(path, at, "its checksum differs")
            yield at, data
        at += _HEADER + length + 4


def _event(data: bytes) -> tuple[int, list[tuple[str, float]]]:
    """Event: step (2), summary (5); Summary: value (1); Value: tag (1), simple_value (2), tensor (8)."""
    step, scalars = 0, []
    for field, wire, value in read_fields(data):
        if field == 2 and wire == 0:
            step = int(value)
        elif field == 5 and isinstance(value, bytes):
            scalars += [one for kind, _, part in read_fields(value) if kind == 1 and (one := _scalar(part))]
    if scalars and step >= 10**15:  # a negative step is one of nearly 2^64 here
        raise DamagedMessageError("its step is out of range")
    return step, scalars


def _scalar(data: int | bytes) -> tuple[str, float] | None:
    tag, number = "", None
    if not isinstance(data, bytes):
        raise DamagedMessageError("a value is no message")
    for field, wire, value in read_fields(data):
        if field == 1 and isinstance(value, bytes):
            tag = value.decode("utf-8", "replace")
        elif field == 2 and wire == 5 and isinstance(value, bytes):
            number = struct.unpack("<f", value)[0]
        elif field == 8 and isinstance(value, bytes):
            number = _tensor(value)
    return (tag, float(number)) if tag and number is not None else None


def _tensor(data: bytes) -> float | None:
    """The one number of TensorProto: dtype (1), tensor_content (4), half_val (13), float_val (5), double_val (6)."""
    dtype, content, single = 0, b"", None
    for field, wire, value in read_fields(data):
        if field == 1 and wire == 0:
            dtype = int(value)
        elif field == 4 and isinstance(value, bytes):
            content = value
        elif field in (5, 6) and isinstance(value, bytes):
            form = "<f" if field == 5 else "<d"
            single = struct.unpack(form, value)[0] if len(value) == struct.calcsize(form) else None
    if dtype in _UNPACK and len(content) == struct.calcsize(_UNPACK[dtype]):
        return float(struct.unpack(_UNPACK[dtype], content)[0])
    if dtype == _BFLOAT16 and len(content) == 2:
        return float(struct.unpack("<f", b"\0\0" + content)[0])
    return None if single is None else float(single)
