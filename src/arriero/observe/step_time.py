"""Where the time of a step goes: phases that follow each other without a gap, so that they sum to the whole.

On the CPU the host's clock is exact. An accelerator runs behind the host, so there an event is recorded at each
mark, but only in a step that is shown; they are read once the device has done the step, which costs no extra wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

IN_STEP = ("data_wait", "forward", "backward", "communication", "optimizer")
BETWEEN = ("checkpoint", "validation", "logging")
"""What happens after a step's end belongs to the next one; `logging` is all that is not named otherwise."""


class StepClock:
    """Seconds in each phase since the last `take`.

    Args:
        kind: of device: cpu, cuda, npu.
    """

    def __init__(self, kind: str) -> None:
        self._device: Any = None if kind == "cpu" else torch.get_device_module(kind)
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, Any]] = []
        self._recording = self._quiet = False
        self._last = self._began = time.perf_counter()

    def begin(self, *, shown: bool) -> None:
        """A step begins; what came since the last mark was logging. `shown`: the step's split will be looked at."""
        self.mark("logging")
        self._began = self._last
        self._recording = shown and self._device is not None
        self._events.clear()
        self._record("")

    def since_begin(self) -> float:
        """Seconds since the step began: on the CPU up to the last mark, so that its phases sum to exactly this."""
        return (self._last if self._device is None else time.perf_counter()) - self._began

    def mark(self, phase: str) -> None:
        """Gives the time since the last mark to `phase`."""
        if self._quiet:
            return
        now = time.perf_counter()
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._last
        self._last = now
        self._record(phase)

    def _record(self, phase: str) -> None:
        if self._recording:
            event = self._device.Event(enable_timing=True)
            event.record()
            self._events.append((phase, event))

    @contextmanager
    def whole(self, phase: str) -> Iterator[None]:
        """All that happens within is `phase`, whatever marks it makes."""
        self.mark("logging")
        self._quiet = True
        try:
            yield
        finally:
            self._quiet = False
            self.mark(phase)

    def inside(self, phase: str, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Calls `function` and gives its time to `phase` instead of the phase around it; by the host's clock."""
        if self._quiet:
            return function(*args, **kwargs)
        began = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds = time.perf_counter() - began
            self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds
            self._last += seconds

    def timed(self, function: Callable[P, R], phase: str, before: str) -> Callable[P, R]:
        """`function`, whose time is `phase`, and the time up to its call `before`: for the calls of a schedule."""

        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            self.mark(before)
            out = function(*args, **kwargs)
            self.mark(phase)
            return out

        return call

    def take(self) -> dict[str, float]:
        """Seconds of every phase since the last `take`; the device must have done the step.

        On an accelerator the phases of the step itself are missing unless it was `shown`; the wait for data is always
        the host's.
        """
        found, self._seconds = self._seconds, {}
        if self._device is None:
            return found
        on_host = {name: value for name, value in found.items() if name in ("data_wait", *BETWEEN)}
        on_device: dict[str, float] = {}
        for (_, start), (phase, end) in zip(self._events, self._events[1:], strict=False):
            if phase != "data_wait":
                on_device[phase] = on_device.get(phase, 0.0) + start.elapsed_time(end) / 1000
        self._recording = False
        self._events.clear()
        return on_host | on_device
