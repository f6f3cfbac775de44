"""Records that cannot be used: counted, written to a file with line and reason, and judged at the end."""

from __future__ import annotations

import io
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from arriero.common.errors import UserError
from arriero.common.text import escape
from arriero.data.output import create
from arriero.data.pipeline import Rejected


@dataclass
class Tally:
    """Counts of one run."""

    records: int = 0
    documents: int = 0
    rejected: int = 0
    empty: int = 0
    text_bytes: int = 0
    largest: int = -1
    first_bad: list[str] = field(default_factory=list)


class Quarantine:
    """OUT.quarantine.jsonl: every record that was not used, with file, line and reason."""

    def __init__(self, out: str, files: list[Path], *, strict: bool) -> None:
        self.path = Path(f"{out}.quarantine.jsonl")
        self._scratch = self.path.with_name(self.path.name + ".partial")
        self._files, self._strict = files, strict
        self._file: TextIO | None = None

    def add(self, found: list[Rejected], tally: Tally) -> None:
        """Writes rejected records and counts them. Raises UserError at the first one with --strict."""
        for one in found:
            where = f"{self._files[one.place.file]}:{one.place.number}"
            if self._strict:
                raise UserError(
                    f"{where}: {one.reason}", "mend the record, or run without --strict to set such records aside"
                )
            tally.rejected += 1
            tally.empty += one.reason.endswith((" is empty", " is blank"))
            if len(tally.first_bad) < 3:
                tally.first_bad.append(escape(f"{where}: {one.reason}", 500))
            self._file = self._file or io.TextIOWrapper(create(self._scratch), encoding="utf-8")
            line = {
                "file": str(self._files[one.place.file]),
                "line": one.place.number,
                "reason": one.reason,
                "record": one.raw,
            }
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def publish(self) -> None:
        """Gives the file its name, or removes that of an earlier run when nothing was rejected."""
        if self._file is None:
            self.path.unlink(missing_ok=True)
        else:
            self._file.close()
            os.replace(self._scratch, self.path)

    def abort(self) -> None:
        """Removes what was written."""
        if self._file is not None:
            self._file.close()
        self._scratch.unlink(missing_ok=True)


def judge(tally: Tally, max_bad: float) -> None:
    """Raises UserError when nothing, or too little, of the input could be used."""
    bad = tally.rejected - tally.empty
    seen = "\n".join(f"    {line}" for line in tally.first_bad)
    if tally.documents == 0:
        raise UserError(
            f"no usable record among {tally.records:,}" + (f", for example\n{seen}" if seen else ""),
            "check --format and --keys",
        )
    if bad > max_bad * tally.records:
        raise UserError(
            f"{bad:,} of {tally.records:,} records cannot be used, more than --max-bad {max_bad:g} allows:\n{seen}",
            "mend them, or allow a larger share with --max-bad; nothing was written",
        )
