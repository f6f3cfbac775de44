"""Runs Python's garbage collector between steps, at the same steps on every process, never within a step.

By default it runs whenever enough objects were made: in the middle of a step, at another step on each process, and all
processes wait for the one that collects (Megatron-LM's --manual-gc and torchtitan's gc_freq have the same purpose).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STEPS_BETWEEN = 100
"""A step leaves some hundred small objects in cycles, and no tensor: measured in every layout."""


@contextmanager
def manual_gc() -> Iterator[Callable[[int], None]]:
    """Turns automatic collection off and yields `collect(step)`, to be called after every step.

    Objects that exist already are frozen, not scanned again. On exit the former state is restored.
    """
    was_on = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()

    def collect(step: int) -> None:
        if step % STEPS_BETWEEN == 0:
            gc.collect()

    try:
        yield collect
    finally:
        gc.unfreeze()
        if was_on:
            gc.enable()
