"""The matmul peak of this device: what MFU is measured against where no data sheet is known."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from arriero.common.device import synchronize

SIZES = {"cpu": (512, 1024, 2048, 4096)}
"""Edges of the square matrices that are tried, by device; accelerators need larger ones to be filled."""
LARGE_SIZES = (2048, 4096, 8192, 16384)
AT_ONCE = {"cpu": 1}
"""Multiplications between two readings of the clock; an accelerator's queue must not run dry in between."""


@dataclass(frozen=True)
class Peak:
    """The fastest matrix multiplication of one dtype."""

    dtype: str
    tflops: float
    """2 n^3 over the shortest time, TFLOP/s of one process."""
    size: int
    """n, of the n x n matrices."""
    how: str
    """Which of the device's routines it was."""


def matmul_peak(device: torch.device, dtype: str, *, seconds: float = 1.0) -> Peak:
    """Measures for about `seconds`: sizes from small to large, each several times; the best counts.

    A short burst on a cool card: a long run may be held lower by its power limit.
    """
    kind, wide = device.type, "float32" if dtype == "tf32" else dtype
    began, best = time.perf_counter(), Peak(dtype, 0.0, 0, "")
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    try:
        for size in SIZES.get(kind, LARGE_SIZES):
            a, b = (torch.randn(size, size, device=device).to(getattr(torch, wide)) for _ in range(2))
            for how, multiply in routines(kind, wide):
                shortest = _shortest(lambda m=multiply, x=a, y=b: m(x, y), kind, seconds / 16)  # type: ignore[misc]
                best = max(best, Peak(dtype, 2 * size**3 / shortest / 1e12, size, how), key=lambda peak: peak.tflops)
            if time.perf_counter() - began > seconds / 2:  # the next size takes eight times as long
                break
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
    return best


def routines(kind: str, dtype: str) -> Iterator[tuple[str, Callable[[Tensor, Tensor], Tensor]]]:
    """The ways to multiply: torch's, and on the CPU oneDNN's, which is twice as fast as MKL on AMD in float32."""
    yield "torch.mm", lambda x, y: torch.mm(x, y.t())
    if kind == "cpu" and dtype == "float32" and torch.backends.mkldnn.is_available():
        yield "oneDNN", lambda x, y: torch.ops.mkldnn._linear_pointwise(x, y, None, "none", [], "")


def _shortest(multiply: Callable[[], Tensor], kind: str, seconds: float) -> float:
    """The shortest time of one call, seconds, of at least three readings after one that warms up."""
    count, shortest = AT_ONCE.get(kind, 20), math.inf
    multiply()
    synchronize(kind)
    began, readings = time.perf_counter(), 0
    while readings < 3 or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        for _ in range(count):
            multiply()
        synchronize(kind)
        shortest = min(shortest, (time.perf_counter() - start) / count)
        readings += 1
    return shortest
