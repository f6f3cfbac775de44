"""A progress bar of bytes on a terminal; nothing elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType


class Progress:
    """GB/s and time left while a conversion runs."""

    def __init__(self, label: str, total_bytes: int) -> None:
        self._bar = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn(label), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            self._bar = Bar(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("", total=total_bytes)

    def advance(self, count: int) -> None:
        """Counts more bytes; may be called from any thread."""
        if self._bar is not None:
            self._bar.advance(self._task, count)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
