"""`events.jsonl`: what a run spent its time on, over all its starts, and how much of it was productive.

Unlike metrics.jsonl nothing is ever removed from it: steps that a kill made the run do again stay, as lost time. Times
are seconds by the clock of the first process's machine.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from arriero.common.errors import UserError
from arriero.common.files import make_directory
from arriero.common.untrusted import read_bytes, schema_problem
from arriero.observe.line_file import LineFile, WriteErrors

FILE = "events.jsonl"
EVENT_SCHEMA = {"event": str, "at": float}
NUMBER_SCHEMA = {"at": float, "step": float, "seconds": float, "data": float}
MAX_LINE = 10_000
KINDS = ("productive", "checkpoint", "restart", "lost", "data wait", "other")


class Events:
    """Appends to a run's `events.jsonl`; a line costs 20 microseconds."""

    def __init__(self, out: Path, *, first: bool, since_start: float, errors: WriteErrors | None = None) -> None:
        """Records the start of this process, `since_start` seconds ago; only the `first` of all writes anything.

        `errors` logs what cannot be written."""
        self._file: LineFile | None = None
        if first:
            make_directory(out, "name a directory that can be written")
            self._file = LineFile(out / FILE, errors or WriteErrors())
            self.note("begin", at=time.time() - since_start)

    def note(self, event: str, *, at: float | None = None, **values: Any) -> None:
        """Appends one event; `begin`, `ready` (with the step it goes on from), `step`, `skipped` (with the reason for
        which its update was left out), `saved`, `rewind`, `end`."""
        if self._file is None:
            return
        record = {"event": event, "at": round(time.time() if at is None else at, 4)} | values
        self._file.write(json.dumps(record).encode())

    def close(self) -> None:
        """Notes the end."""
        self.note("end")
        if self._file is not None:
            self._file.close()


def read_events(out: Path) -> list[dict[str, Any]]:
    """A run's events in order; lines that a kill cut off, or that are none, are left out, and so is a file that cannot
    be read."""
    try:
        lines = read_bytes(out / FILE, "remove it", 2 << 30).split(b"\n")
    except UserError:
        return []
    found = []
    for line in lines:
        try:
            record: Any = json.loads(line) if len(line) < MAX_LINE else None
        except (ValueError, RecursionError):
            continue
        fits = not schema_problem(record, EVENT_SCHEMA) and not schema_problem(
            record, {key: NUMBER_SCHEMA.get(key, object) for key in record}
        )
        if fits and all(math.isfinite(record.get(key, 0)) for key in NUMBER_SCHEMA):
            found.append(record)
    return found


def goodput(events: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds by kind (KINDS), and `wall`, which is their sum: each start from its begin to its last event.

    productive: steps that were not run again, without waiting for data, which is a kind of its own. checkpoint: what
    saves held the run up. restart: from the start of the process to its first step, and from a loss to the restart by
    arriero itself. lost: steps that were run again after a kill or a rewind. other: validations, figures, and the rest.
    What came after the last event of a start, such as the step that a kill cut short, is in none of them.
    """
    found = dict.fromkeys(KINDS, 0.0)
    steps: list[tuple[int, float, float]] = []  # kept so far: number, seconds, of which data
    wall, begin, last = 0.0, None, 0.0
    for event in [*events, {"event": "begin", "at": 0.0}]:
        kind, at = event["event"], float(event["at"])
        if kind == "begin":
            if begin is not None:
                wall += max(0.0, last - begin)
            begin = at = max(at, last)  # a process that arriero restarts reports when the launcher began
        elif kind in ("ready", "rewind"):
            if kind == "ready" and begin is not None:
                found["restart"] += max(0.0, at - begin)
            again = [one for one in steps if one[0] > event.get("step", 0)]
            found["lost"] += sum(seconds for _, seconds, _ in again)
            steps = steps[: len(steps) - len(again)] if again else steps
        elif kind == "step":
            steps.append((event.get("step", 0), event.get("seconds", 0.0), event.get("data", 0.0)))
        elif kind == "saved":
            found["checkpoint"] += event.get("seconds", 0.0)
        last = at
    found["data wait"] = sum(data for *_, data in steps)
    found["productive"] = sum(seconds for _, seconds, _ in steps) - found["data wait"]
    found["other"] = max(0.0, wall - sum(found.values()))
    return found | {"wall": sum(found.values())}


def goodput_line(out: Path) -> str:
    """The shares in one line, largest first, which add up to 100%; empty where nothing was noted."""
    found = goodput(read_events(out))
    wall = found.pop("wall")
    if wall <= 0:
        return ""
    shares = ", ".join(f"{100 * v / wall:.1f}% {k}" for k, v in sorted(found.items(), key=lambda one: -one[1]))
    return f"{shares} of {wall:.1f} s"
