"""A progress bar on a terminal; nothing elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TextIO


class ProgressBar:
    """A bar with the rate and the time left. A context manager; its methods may be called from any thread.

    Args:
        label: what is being done.
        total_bytes: what `advance` counts towards; None for a bar that `update` moves.
        stream: where to draw it; stderr by default. If it is no terminal, nothing is drawn.
    """

    def __init__(self, label: str, total_bytes: int | None = None, *, stream: TextIO | None = None) -> None:
        stream = stream or sys.stderr
        self._bar = None
        if stream.isatty():
            from rich import progress
            from rich.console import Console

            middle: tuple[progress.ProgressColumn, ...] = (progress.DownloadColumn(), progress.TransferSpeedColumn())
            if total_bytes is None:
                middle = (progress.TaskProgressColumn(), progress.TextColumn("{task.fields[rate]}"))
            columns = (progress.TextColumn(label), progress.BarColumn(), *middle, progress.TimeRemainingColumn())
            self._bar = progress.Progress(*columns, console=Console(file=stream))
            self._task = self._bar.add_task("", total=1.0 if total_bytes is None else total_bytes, rate="")

    def advance(self, count: int) -> None:
        """Adds `count` bytes to those that are done."""
        if self._bar is not None:
            self._bar.advance(self._task, count)

    def update(self, fraction: float, rate: str) -> None:
        """Sets the fraction that is done, from 0 to 1, and the text for the rate."""
        if self._bar is not None:
            self._bar.update(self._task, completed=fraction, rate=rate)

    def __enter__(self) -> ProgressBar:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
