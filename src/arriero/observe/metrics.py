"""`metrics.jsonl`: one JSON object a line, appended and flushed, so that a killed run loses at most its last line.

Non-finite numbers are the strings "NaN", "Infinity" and "-Infinity": plain JSON has no other way to hold them.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from arriero.common.errors import UserError
from arriero.common.untrusted import misfit, parse_json, read_bytes

FORM = {"iteration": int}
FIX = "remove the line, or restore the file"
VALUES = {str: (float, str, bool, None, list, dict)}
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass(frozen=True)
class StepMetrics:
    """What one training step is known by; the keys of a `"kind": "step"` line."""

    iteration: int
    """Steps completed, this one included: the first step is 1."""
    iterations: int
    """Steps that the whole run has."""
    consumed_samples: int
    """Samples read since the run began, resumed parts included."""
    consumed_tokens: int
    """Tokens read since the run began, resumed parts included."""
    elapsed_ms: float
    """Wall-clock time of this step, milliseconds; validation and checkpoints are not in it."""
    learning_rate: float
    """The rate that this step's update used (AscendSpeed prints the next step's)."""
    global_batch: int
    """Samples in this step, over all devices."""
    lm_loss: float
    """Mean cross-entropy over the step's valid tokens, nats; may be non-finite."""
    loss_scale: float
    """fp16's dynamic loss scale; 1.0 without one."""
    grad_norm: float
    """Global L2 norm of the gradient before clipping."""
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
    """Waiting for other processes, as far as it can be told apart (docs/metrics.md)."""
    optimizer_ms: float | None = None
    """Gradient norm, clipping, update."""
    checkpoint_ms: float = 0.0
    """Between the end of the step before and the start of this one: the run stood still for a checkpoint."""
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


class MetricsWriter:
    """Appends metrics to `path`; a half-written last line, as a kill leaves it, is cut off first.

    A resumed run calls `truncate_after(iteration)` with the iteration of its checkpoint, so that none appears twice.
    Use it as a context manager, or call `close`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut_half_line(path)
        self._file: BinaryIO = path.open("ab")

    def write(self, metrics: StepMetrics | ValidationMetrics | RankMetrics) -> None:
        """Appends one line and hands it to the operating system at once."""
        record = {"kind": metrics.kind} | {k: _encode(v) for k, v in asdict(metrics).items()}
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()

    def truncate_after(self, iteration: int) -> None:
        """Removes every line of a later iteration; the file is replaced whole, so a kill in between harms nothing."""
        self._file.close()
        kept = [line for line, record in _lines(self.path) if record["iteration"] <= iteration]
        beside = self.path.with_name(self.path.name + ".tmp")
        with open(beside, "wb") as file:
            file.writelines(line + b"\n" for line in kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, self.path)
        self._file = self.path.open("ab")

    def close(self) -> None:
        """Closes the file; every line is on its way already."""
        self._file.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads `metrics.jsonl` in file order, non-finite numbers as floats; a half-written last line is left out.

    Raises:
        UserError: no such file, or a line that is not a metrics record, named by its number.
    """
    return [record for _, record in _lines(path)]


def _lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Each whole line with its decoded record."""
    if not path.exists():
        raise UserError(f"{path}: no such file", "name a run directory that has trained at least one step")
    whole, _, _ = read_bytes(path, FIX, 2 << 30).rpartition(b"\n")
    found = []
    for number, line in enumerate(whole.split(b"\n") if whole else [], 1):
        record = parse_json(line, f"{path}, line {number}", FIX, FORM)
        if wrong := misfit(record, VALUES):
            raise UserError(f"{path}, line {number}: {wrong}", FIX)
        found.append((line, {k: _NON_FINITE.get(v, v) if isinstance(v, str) else v for k, v in record.items()}))
    return found


def _encode(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _cut_half_line(path: Path) -> None:
    """Shortens the file to its last newline; whatever follows it was cut off by a kill."""
    if not path.exists():
        return
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)
