"""The fields of a protocol-buffer message, without the schema: enough for the few fields that are read."""

from __future__ import annotations

from collections.abc import Iterator


class DamagedMessageError(ValueError):
    """The bytes are no protocol-buffer message from some place on."""


def read_fields(data: bytes) -> Iterator[tuple[int, int, int | bytes]]:
    """(field number, wire type, value) of each field: an int for a varint (wire type 0), else the bytes.

    Raises:
        DamagedMessageError: the message ends inside a field, or has a wire type that is not in use.
    """
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at)
        field, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _read_varint(data, at)
            yield field, wire, value
            continue
        if wire == 2:
            length, at = _read_varint(data, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise DamagedMessageError(f"wire type {wire}")
        if at + length > len(data):
            raise DamagedMessageError("a field is longer than its message")
        yield field, wire, data[at : at + length]
        at += length


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    result = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise DamagedMessageError("it ends inside a number")
        byte = data[at]
        at += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, at
    raise DamagedMessageError("a number of more than 64 bits")
