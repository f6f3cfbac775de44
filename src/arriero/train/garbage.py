"""Python's garbage collector, run between steps and at the same ones on every process, never within a step.

Left alone it runs whenever enough objects were made: in the middle of a step, at another step on each process, and all
wait for the one that collects (Megatron-LM's --manual-gc, and torchtitan's gc_freq, are for the same).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STEPS_BETWEEN = 100
"""A step leaves some hundred small objects in cycles, and no tensor: measured in every layout."""


@contextmanager
def manual_gc() -> Iterator[Callable[[int], None]]:
    """Within it nothing is collected but by the call that it gives: `collect(step)`, after every step.

    What is there already is never looked at again. At the end all is as it was before.
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
