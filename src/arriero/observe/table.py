"""`metrics.jsonl` as a table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from arriero.observe.metrics import read_metrics

if TYPE_CHECKING:
    import pyarrow


def metrics_table(run: Path, kind: str = "step") -> pyarrow.Table:
    """The lines of one kind, a column for each key; docs/metrics.md lists them.

    Args:
        run: a run directory, or a `metrics.jsonl`.
        kind: step, validation or ranks.

    Raises:
        UserError: no such file, or a line in it that is no metrics record.
    """
    import pyarrow

    path = run if run.is_file() else run / "metrics.jsonl"
    records = [record for record in read_metrics(path) if record.get("kind") == kind]
    names = dict.fromkeys(name for record in records for name in record if name != "kind")
    columns: dict[str, list[Any]] = {name: [record.get(name) for record in records] for name in names}
    return pyarrow.table(columns)
