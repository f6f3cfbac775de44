"""Progress of `prepare`: a bar on a terminal, plain lines every so many documents if asked for, nothing otherwise."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Bar


class Progress:
    """Documents/s, MB/s of text and time left.

    The share that is done comes from the readers: `meter(fraction)` is called with the read share of the file in hand.
    """

    def __init__(self, files: list[Path], log_interval: int) -> None:
        self._sizes = [path.stat().st_size for path in files]
        self._before = 0
        self._in_hand = 0
        self._fraction: Callable[[], float] = lambda: 0.0
        self._interval, self._next = log_interval, log_interval
        self._began = time.monotonic()
        self._bar: Bar | None = None

    def enter(self, n: int) -> None:
        """File n is read from now on."""
        self._before, self._in_hand = sum(self._sizes[:n]), self._sizes[n]
        self._fraction = lambda: 0.0

    def meter(self, fraction: Callable[[], float]) -> None:
        """Takes a function that says how much of the file in hand has been read, from 0 to 1."""
        self._fraction = fraction

    def done(self) -> float:
        """Share of all input bytes read so far."""
        return (self._before + self._in_hand * min(1.0, self._fraction())) / max(1, sum(self._sizes))

    def show(self, documents: int, text_bytes: int) -> None:
        """Reports the counts so far."""
        seconds = max(time.monotonic() - self._began, 1e-9)
        speed = f"{documents / seconds:,.0f} documents/s, {text_bytes / 1e6 / seconds:.1f} MB/s"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self.done(), speed=speed)
        elif self._interval and documents >= self._next:
            self._next = (documents // self._interval + 1) * self._interval
            left = seconds / max(self.done(), 1e-6) - seconds
            print(f"processed {documents:,} documents ({speed}, {self.done():.0%}, {left:.0f} s left)", flush=True)

    def __enter__(self) -> Progress:
        if not self._interval and sys.stdout.isatty():
            from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("tokenising"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[speed]}"),
                TimeRemainingColumn(),
            )
            self._bar.add_task("", total=1.0, speed="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
