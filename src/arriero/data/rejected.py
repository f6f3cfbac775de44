"""Records that cannot be used: counted, and written to a file with line and reason."""

from __future__ import annotations

import io
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from arriero.common.errors import UserError
from arriero.common.text import escape
from arriero.data.output import create_file
from arriero.data.pipeline import EncodedChunk, RejectedRecord


@dataclass
class Counts:
    """Counts of one run."""

    records: int = 0
    documents: int = 0
    rejected: int = 0
    """Records that could not be used, the empty ones included."""
    empty: int = 0
    text_bytes: int = 0
    largest_id: int = -1
    first_rejected: list[str] = field(default_factory=list)
    """File, line and reason of the first three."""

    def add(self, chunk: EncodedChunk) -> None:
        """Counts a chunk, but for its rejected records (see `RejectedFile.add`)."""
        self.records += chunk.documents + len(chunk.rejected)
        self.documents += chunk.documents
        self.text_bytes += chunk.text_bytes
        self.largest_id = max(self.largest_id, chunk.largest_id)

    def check(self, max_bad: float) -> None:
        """Raises UserError when nothing, or too little of the input could be used."""
        bad = self.rejected - self.empty
        examples = "\n".join(f"    {line}" for line in self.first_rejected)
        if self.documents == 0:
            problem = f"no usable record among {self.records:,}"
            raise UserError(f"{problem}, for example\n{examples}" if examples else problem, "check --format and --keys")
        if bad > max_bad * self.records:
            problem = f"{bad:,} of {self.records:,} records cannot be used, more than --max-bad {max_bad:g} allows:"
            fix = "correct them, or allow a larger share with --max-bad; nothing was written"
            raise UserError(f"{problem}\n{examples}", fix)


class RejectedFile:
    """OUT.quarantine.jsonl: every record that was not used, with file, line and reason."""

    def __init__(self, out: str, files: list[Path]) -> None:
        self.path = Path(f"{out}.quarantine.jsonl")
        self._partial = self.path.with_name(self.path.name + ".partial")
        self._files = files
        self._file: TextIO | None = None

    def add(self, found: list[RejectedRecord], counts: Counts, *, strict: bool) -> None:
        """Writes rejected records and counts them. Raises UserError at the first one if `strict`."""
        for one in found:
            source = str(self._files[one.location.file])
            where = f"{source}:{one.location.number}"
            if strict:
                fix = "correct the record, or run without --strict to set such records aside"
                raise UserError(f"{where}: {one.reason}", fix)
            counts.rejected += 1
            counts.empty += one.reason.endswith((" is empty", " is blank"))
            if len(counts.first_rejected) < 3:
                counts.first_rejected.append(escape(f"{where}: {one.reason}", 500))
            self._file = self._file or io.TextIOWrapper(create_file(self._partial), encoding="utf-8")
            line = {"file": source, "line": one.location.number, "reason": one.reason, "record": one.raw}
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def publish(self) -> None:
        """Gives the file its name, or removes that of an earlier run when nothing was rejected."""
        if self._file is None:
            self.path.unlink(missing_ok=True)
        else:
            self._file.close()
            os.replace(self._partial, self.path)

    def abort(self) -> None:
        """Removes what was written."""
        if self._file is not None:
            self._file.close()
        self._partial.unlink(missing_ok=True)
