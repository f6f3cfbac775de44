"""`metrics.jsonl`: one JSON object a line, appended and flushed, so that a killed run loses at most its last line.

Non-finite numbers are the strings "NaN", "Infinity" and "-Infinity": plain JSON has no other way to hold them.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from arriero.common.errors import UserError
from arriero.common.files import make_directory, open_regular, os_error_text, write_atomic
from arriero.common.text import escape
from arriero.common.untrusted import parse_json, schema_problem
from arriero.observe.line_file import LineFile, WriteErrors

RECORD_SCHEMA = {"iteration": int}
FIX = "remove the line, or restore the file"
MAX_BYTES, MAX_LINE = 2 << 30, 1 << 20
VALUE_SCHEMA = {str: (float, str, bool, None, list, dict)}
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass(frozen=True, kw_only=True)
class StepMeasurement:
    """What training itself knows of a step."""

    iteration: int
    """Steps completed, this one included: the first step is 1."""
    consumed_samples: int
    """Samples read since the run began, resumed parts included."""
    consumed_tokens: int
    """Tokens read since the run began, resumed parts included."""
    learning_rate: float
    """The rate that this step's update used (AscendSpeed prints the next step's)."""
    lm_loss: float
    """Mean cross-entropy over the step's valid tokens, nats; may be non-finite."""
    loss_scale: float
    """fp16's dynamic loss scale; 1.0 without one."""
    grad_norm: float
    """Global L2 norm of the gradient before clipping."""


@dataclass(frozen=True, kw_only=True)
class StepMetrics(StepMeasurement):
    """A measurement with what follows from it: rates, times, utilisation; the keys of a `"kind": "step"` line."""

    iterations: int
    """Steps that the whole run has."""
    elapsed_ms: float
    """Wall-clock time of this step, milliseconds; validation and checkpoints are not in it."""
    global_batch: int
    """Samples in this step, over all devices."""
    sequence_length: int
    """Tokens of a sample."""
    skipped_iterations: int
    """Updates skipped for a non-finite gradient since the previous printed line: 0 or 1 when every step is."""
    nan_iterations: int
    """Steps whose loss was non-finite since the previous printed line."""
    samples_per_second: float
    """Samples a second, the whole job."""
    tokens_per_second_per_device: float
    """Tokens a second on each device."""
    tflops: float
    """Model TFLOP/s per device, attention counted causally (`throughput.flops_per_token`)."""
    mfu: float | None
    """tflops over the device's peak, 0 to 1; None where no peak is known."""
    data_wait_ms: float
    """Time that the step waited for its batch, milliseconds."""
    eta_seconds: float
    """Time left at this run's pace, seconds."""
    mfu_full: float | None = None
    """MFU with the whole score matrix counted."""
    hfu: float | None = None
    """FLOPs executed over the peak, where activations are recomputed and a peak is known."""
    forward_ms: float | None = None
    """Forward passes of the step's micro-batches, loss included; None on an accelerator in a step without a line."""
    backward_ms: float | None = None
    """Their backward passes, recomputation included."""
    communication_ms: float | None = None
    """Waiting for other processes, as far as it can be measured (docs/metrics.md)."""
    optimizer_ms: float | None = None
    """Gradient norm, clipping, update."""
    checkpoint_ms: float = 0.0
    """Between the end of the step before and the start of this one: a checkpoint, as far as the run waited for it."""
    validation_ms: float = 0.0
    """Between the two: a validation."""
    logging_ms: float = 0.0
    """Between the two: everything else, such as this file."""

    kind = "step"


@dataclass(frozen=True)
class ValidationMetrics:
    """What a validation found; the keys of a `"kind": "validation"` line."""

    iteration: int
    """Steps completed when it was measured."""
    lm_loss: float
    """Mean cross-entropy over the validation tokens, nats."""
    perplexity: float
    """exp(lm_loss)."""

    kind = "validation"


@dataclass(frozen=True)
class RankMetrics:
    """Which process needs most time of its own for a step; the keys of a `"kind": "ranks"` line."""

    iteration: int
    """Steps completed when it was measured, over the last `watch.every` of them."""
    slowest_rank: int
    """The process's number."""
    slowest_ms: float
    """Its own time a step, without waiting for others, milliseconds."""
    median_ms: float
    """The median of the other processes'."""
    slowest_ratio: float
    """The one over the other."""

    kind = "ranks"


_FIRST_KEYS = (
    "iteration", "iterations", "consumed_samples", "consumed_tokens", "elapsed_ms", "learning_rate", "global_batch",
    "lm_loss", "loss_scale", "grad_norm", "sequence_length", "skipped_iterations", "nan_iterations",
)  # fmt: skip
Metrics = StepMetrics | ValidationMetrics | RankMetrics
Record = dict[str, Any]
"""One line of metrics.jsonl: "kind" ("step", "validation" or "ranks"), "iteration", and the fields of its class."""


class MetricsWriter:
    """The first `Sink`: appends to `path`; a half-written last line, as a kill leaves it, is removed first.

    A resumed run calls `truncate_after(iteration)` with the iteration of its checkpoint, so that none appears twice.
    Use it as a context manager, or call `close`. A file that cannot be written stops nothing: see line_file.py.
    """

    def __init__(self, path: Path, errors: WriteErrors | None = None) -> None:
        self.path = path
        make_directory(path.parent, "name a directory that can be written")
        self._errors = errors or WriteErrors()
        self._file = LineFile(path, self._errors)

    def write(self, record: Record | Metrics) -> None:
        """Appends one line and passes it to the operating system at once."""
        if not isinstance(record, dict):
            record = as_record(record)
        self._file.write(json.dumps({key: _json_value(value) for key, value in record.items()}).encode())

    def truncate_after(self, iteration: int) -> list[str]:
        """Removes every line of a later iteration; a kill in between harms nothing.

        Returns:
            A sentence for each line that is no metrics record; such a line stays where it is.
        """
        self._file.discard(lambda line: json.loads(line)["iteration"] > iteration)
        self._file.release()
        try:
            return self._truncate(iteration)
        except (OSError, UserError) as error:
            return [] if self._errors.is_failing(self.path) else [str(error)]

    def _truncate(self, iteration: int) -> list[str]:
        end, bad, later = 0, [], []
        for line in _parse_lines(self.path):
            if isinstance(line.found, dict) and line.found["iteration"] > iteration:
                later.append(line.start)
                continue
            if isinstance(line.found, UserError):
                bad.append(line.found.problem)
            end = line.end
        if later and later[0] >= end:  # nothing that stays comes after it: needs no room on the disk
            handle = open_regular(self.path, os.O_RDWR)
            try:
                os.ftruncate(handle, later[0])
                os.fsync(handle)
            finally:
                os.close(handle)
        elif later:
            unwanted = set(later)
            kept = (raw for start, raw in _raw_lines(self.path) if start not in unwanted)
            write_atomic(self.path, kept, durable=True)
        return bad

    def close(self) -> None:
        """Closes the file; every line is on its way already."""
        self._file.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def as_record(metrics: Metrics) -> Record:
    """Metrics as a record: their kind, and every field, in the documented order."""
    fields = asdict(metrics)
    return {"kind": metrics.kind} | {key: fields[key] for key in _FIRST_KEYS if key in fields} | fields


def _raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Each line with the byte at which it begins."""
    with open(open_regular(path), "rb") as file:
        start = 0
        for raw in file:
            yield start, raw
            start += len(raw)


def read_metrics(path: Path, *, skipped: list[str] | None = None) -> list[Record]:
    """All records of `metrics.jsonl`, see `iterate_metrics`."""
    return list(iterate_metrics(path, skipped=skipped))


def iterate_metrics(path: Path, *, skipped: list[str] | None = None) -> Iterator[Record]:
    """Reads `metrics.jsonl` in file order, one record at a time, non-finite numbers as floats.

    A half-written last line is left out.

    Args:
        path: the file.
        skipped: takes a sentence for each line that is no metrics record; without it such a line is an error.

    Raises:
        UserError: no such file, or a line that is not a metrics record, named by its number.
    """
    for line in _parse_lines(path):
        if not isinstance(line.found, UserError):
            yield line.found
        elif skipped is None:
            raise line.found
        else:
            skipped.append(line.found.problem)


class _ParsedLine(NamedTuple):
    start: int
    end: int
    found: dict[str, Any] | UserError


def _parse_lines(path: Path) -> Iterator[_ParsedLine]:
    """Each whole line: its place in the file, and its record or what is wrong with it."""
    try:
        handle = open_regular(path, follow=True)
    except FileNotFoundError:
        fix = "name a run directory that has trained at least one step"
        raise UserError(f"{escape(path)}: no such file", fix) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{escape(path)}: cannot be read ({os_error_text(error)})", FIX) from None
    with open(handle, "rb") as file:
        if os.fstat(file.fileno()).st_size > MAX_BYTES:
            raise UserError(f"{escape(path)}: is larger than {MAX_BYTES:,} bytes", FIX)
        start = number = 0
        while raw := file.readline(MAX_LINE):
            number, end = number + 1, start + len(raw)
            long = not raw.endswith(b"\n") and len(raw) == MAX_LINE
            while long and (rest := file.readline(MAX_LINE)):
                end += len(rest)
                raw = rest
                if rest.endswith(b"\n"):
                    break
            if not raw.endswith(b"\n"):
                return  # cut off by a kill
            where = f"{escape(path)}, line {number}"
            yield _ParsedLine(
                start, end, UserError(f"{where}: longer than {MAX_LINE:,} bytes", FIX) if long else _record(raw, where)
            )
            start = end


def _record(line: bytes, where: str) -> dict[str, Any] | UserError:
    try:
        record = parse_json(line, where, FIX, RECORD_SCHEMA, unique_keys=True)
    except UserError as error:
        return error
    if wrong := schema_problem(record, VALUE_SCHEMA):
        return UserError(f"{where}: {escape(wrong)}", FIX)
    return {k: _NON_FINITE.get(v, v) if isinstance(v, str) else v for k, v in record.items()}


def _json_value(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
