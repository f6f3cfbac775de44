"""Values as raw bytes, since numpy has no bfloat16: finiteness, dtypes, and a fingerprint of a model's weights."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping

import numpy as np

from arriero.checkpoint.tensors.stream import Bytes, TensorView
from arriero.common.errors import UserError

_WORDS = {"F64": ("8", 0x7FF), "F32": ("4", 0xFF), "F16": ("2", 0x1F), "BF16": ("2", 0xFF)}
_MANTISSA_BITS = {"F64": 52, "F32": 23, "F16": 10, "BF16": 7}


def is_finite(chunk: Bytes, dtype: str) -> bool:
    """Whether no element is NaN or infinite (True for integers).

    Read as integers, an exponent of all ones is the largest of its sign: two maxima suffice, at memory speed.
    """
    if dtype not in _WORDS or not chunk.size:
        return True
    width, exponent = _WORDS[dtype]
    limit = exponent << _MANTISSA_BITS[dtype]
    sign = 1 << (8 * int(width) - 1)
    return int(chunk.view(f"i{width}").max()) < limit and int(chunk.view(f"u{width}").max()) < limit + sign


def cast(chunk: Bytes, source: str, target: str) -> Bytes:
    """Converts float bytes between F64, F32, F16 and BF16, rounding to nearest even as torch does."""
    for dtype in (source, target):
        if dtype not in _WORDS:
            raise UserError(f"weights of dtype {dtype} cannot be converted", "convert from a float dtype")
    if source == "BF16":
        wide = (chunk.view("u2").astype("u4") << np.uint32(16)).view("f4")
    else:
        wide = chunk.view({"F64": "f8", "F32": "f4", "F16": "f2"}[source])
    with np.errstate(over="ignore"):
        if target != "BF16":
            return wide.astype({"F64": "f8", "F32": "f4", "F16": "f2"}[target]).view(np.uint8)
        bits = wide.astype("f4").view("u4")
        bits += np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        return (bits >> np.uint32(16)).astype("u2").view(np.uint8)


# The fingerprint: the same for the same weights, whatever files, ranks and order they lie in.


def _mix(n: np.ndarray) -> np.ndarray:
    """splitmix64: a well-spread odd 64-bit weight for each integer."""
    z = (n.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) | np.uint64(1)


@functools.lru_cache(maxsize=16)
def _column_weights(count: int) -> np.ndarray:
    return _mix(np.arange(count) + 2**32)


def partial_fingerprint(chunk: Bytes, row: int) -> int:
    """Sum over rows and 8-byte words of weight(row) * weight(word) * word, mod 2^64; chunks add up to their tensor."""
    unit = next(u for u in (8, 4, 2, 1) if chunk.shape[1] % u == 0)
    words = chunk.view(f"u{unit}")
    if unit != 8:
        words = words.astype(np.uint64)
    columns = _column_weights(words.shape[1])
    rows = _mix(np.arange(row, row + words.shape[0]))
    return int((np.einsum("rc,c->r", words, columns) * rows).sum(dtype=np.uint64))


def fingerprint(tensors: Mapping[str, TensorView], dtype: str | None, fingerprints: Mapping[str, int]) -> str:
    """One SHA-256 over names, shapes, dtypes and tensor fingerprints: equal for equal models, in whatever format."""
    lines = [
        f"{name} {dtype or t.dtype} {','.join(map(str, t.shape))} {fingerprints[name]:016x}\n"
        for name, t in sorted(tensors.items())
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
