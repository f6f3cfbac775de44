"""A tracker of one's own: every record of a run is also written to RUN/losses.csv.

    ARRIERO_PLUGINS=tracker arriero pretrain RECIPE --out runs/a

A tracker is any class with `write(record)` and `close()`; one line adds it. It runs on the first process, between two
steps. If it raises an exception, the run goes on without it. In place of the file this could be the client of a
tracking service, such as wandb.init(dir=out) here, wandb.log(record, step=record["iteration"]) in `write`, and
wandb.finish() in `close`.
"""

from __future__ import annotations

from pathlib import Path

from arriero.observe.metrics import Record
from arriero.observe.sinks import SINKS


class LossTable:
    """Appends iteration, kind and loss as CSV."""

    def __init__(self, out: Path) -> None:
        self._file = (out / "losses.csv").open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        """Called with each record of metrics.jsonl; docs/metrics.md lists the keys."""
        if "lm_loss" in record:  # training steps and validations
            print(record["iteration"], record["kind"], record["lm_loss"], sep=",", file=self._file, flush=True)

    def close(self) -> None:
        """Called once, at the end of the run."""
        self._file.close()


SINKS["loss table"] = LossTable
