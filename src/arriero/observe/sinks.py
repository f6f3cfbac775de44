"""Where the metrics of a run go: metrics.jsonl, and what plugins add."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from arriero.common.registry import load_plugins
from arriero.common.text import escape
from arriero.observe.line_file import WriteErrors
from arriero.observe.metrics import Metrics, MetricsWriter, Record, as_record


class Sink(Protocol):
    """Receives the records of a run on its first process, in order. A record of an iteration may come again after a
    resume from an earlier checkpoint."""

    def write(self, record: Record) -> None:
        """Takes one record; it is called between two steps, so it should not take long."""

    def close(self) -> None:
        """The run ends."""


SINKS: dict[str, Callable[[Path], Sink]] = {}
"""Further sinks beside metrics.jsonl: a name, and a function that makes one for a run's directory. A plugin
(common/registry.py) adds its own with one line, `SINKS["name"] = function`."""


class MetricsOutput:
    """metrics.jsonl and every sink of SINKS. One that raises an exception is closed and left out from then on.

    Args:
        out: the run's directory.
        errors: logs what cannot be written.
        log: takes a line about a sink that failed.
    """

    def __init__(self, out: Path, errors: WriteErrors | None, log: Callable[[str], None]) -> None:
        self.file, self._log = MetricsWriter(out / "metrics.jsonl", errors), log
        self._sinks: dict[str, Sink] = {}
        load_plugins()
        for name, make in SINKS.items():
            with self._failures(name):
                self._sinks[name] = make(out)

    @contextmanager
    def _failures(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a tracker raises, the run goes on
            self._sinks.pop(name, None)
            self._log(f" NOTICE: the sink {escape(name)} failed, and gets no more metrics: {escape(error)}")

    def write(self, metrics: Metrics) -> None:
        """Passes metrics to every sink."""
        record = as_record(metrics)
        self.file.write(record)
        for name, sink in list(self._sinks.items()):
            with self._failures(name):
                sink.write(dict(record))

    def truncate_after(self, iteration: int) -> list[str]:
        """See `MetricsWriter`; the other sinks keep what they have."""
        return self.file.truncate_after(iteration)

    def close(self) -> None:
        """Closes every sink."""
        self.file.close()
        for name, sink in list(self._sinks.items()):
            with self._failures(name):
                sink.close()
