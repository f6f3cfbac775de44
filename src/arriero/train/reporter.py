"""What a run prints and writes: log lines, log.txt, metrics.jsonl, env.json and the figure.

It does nothing on all processes but the first.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from collections import deque
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from arriero.checkpoint.save import SaveResult
from arriero.common.errors import UserError
from arriero.common.files import make_directory, os_error_text, write_atomic
from arriero.common.output import new_write_failures
from arriero.common.text import escape, escape_message
from arriero.common.version import __version__
from arriero.model.config import LlamaConfig
from arriero.observe.figure import loss_figure
from arriero.observe.line_file import LineFile, WriteErrors
from arriero.observe.logline import arriero_line, megatron_line, validation_line
from arriero.observe.metrics import RankMetrics, StepMeasurement, StepMetrics, ValidationMetrics
from arriero.observe.sinks import MetricsOutput
from arriero.observe.step_time import BETWEEN, IN_STEP
from arriero.observe.throughput import peak_flops, throughput
from arriero.train.config import LogConfig, TrainConfig
from arriero.train.watch import SlowestRank


@dataclass(frozen=True, kw_only=True)
class StepResult(StepMeasurement):
    """What a step returns: its measurement, whether the update was skipped and why, and its times."""

    skipped: bool
    """Whether the update was skipped, on all processes."""
    seconds: float
    phases: dict[str, float]
    """Seconds of each phase (observe/step_time.py), those since the step before included."""
    attended_length: float
    """Tokens of context: the sequence length, or under document masks sum of squared lengths over their sum."""
    spike: bool = False
    """Whether it was skipped for a loss spike, not for a non-finite loss."""
    unlabelled: bool = False
    """Whether it was skipped because no label of the batch carries a loss; `lm_loss` is NaN then."""
    stop: bool = False
    """Whether some process was asked to stop."""


class Reporter:
    """Turns step results into lines and files."""

    def __init__(
        self, out: Path, log: LogConfig, train: TrainConfig, model: LlamaConfig, *, devices: int, device_name: str,
        first: bool, recomputed: int = 0, keep: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        self.settings, self.train, self.first, self.out, self.devices = log, train, first, out, devices
        self.model, self._recomputed, self._keep_results = model, recomputed, keep
        peak = log.peak_tflops or (peak_flops(device_name, train.dtype) or 0.0) / 1e12
        self._peak = peak or None
        self._recent: deque[float] = deque(maxlen=20)
        self._skipped = self._nan = 0
        self.trouble = WriteErrors()
        """Problems of the run's files that cannot be written."""
        self._text: LineFile | None = None
        self._metrics: MetricsOutput | None = None
        if first:
            make_directory(out, "name a directory that can be written with --out")
            self._text = LineFile(out / "log.txt", self.trouble, whole_lines=False)
            self._metrics = MetricsOutput(out, self.trouble, self.log)
            environment = {
                "arriero": __version__, "torch": torch.__version__, "python": platform.python_version(),
                "devices": devices, "device": device_name, "host": platform.node(), "threads": torch.get_num_threads(),
                "started": datetime.now().astimezone().isoformat(timespec="seconds"), "command": sys.argv,
            }  # fmt: skip
            if problem := keep_environment(out, environment):
                self.log(f" NOTICE: {problem}")

    def log(self, text: str) -> None:
        """Prints a line and writes it to log.txt, control characters escaped (common/text.py)."""
        if self._text is not None:
            print(escape_message(text), flush=True)
            for line in (text, *(f" NOTICE: {note}" for note in new_write_failures())):
                self._text.write(escape_message(line).encode())

    def log_saves(self, results: list[SaveResult]) -> None:
        """Logs the results of finished saves."""
        for one in results:
            if one.problem:
                self.log(f" CHECKPOINT of step {one.step} NOT written: {one.problem}; the run goes on without it")
            else:
                times = f"held up {one.blocked:.2f} s, on disk in {one.seconds:.2f} s"
                self.log(f" saved checkpoint: {escape(one.path)} ({times})")
            if one.notice:
                self.log(f" NOTICE: {one.notice}")

    def truncate_metrics_after(self, step: int) -> None:
        """Drops the metrics of steps after `step`, which will be run again."""
        if self._metrics is not None:
            bad = self._metrics.truncate_after(step)
            for line in [*bad[:4], *([f"and {len(bad) - 4} lines more"] if len(bad) > 4 else [])]:
                self.log(f" NOTICE: {line}; it is passed over")

    def log_step(self, result: StepResult) -> None:
        """Writes the metrics of a step, and a log line when it is due."""
        if self._metrics is None:
            return
        train, seconds = self.train, max(result.seconds, 1e-9)
        self._recent.append(seconds)
        self._skipped += result.skipped
        self._nan += not math.isfinite(result.lm_loss) and not result.unlabelled
        rate = train.global_batch * train.sequence_length / seconds / self.devices
        figures = throughput(
            self.model,
            rate,
            result.attended_length,
            peak_tflops=self._peak,
            layers=self._recomputed,
            keep=self._keep_results,
        )
        times: dict[str, Any] = {f"{name}_ms": 1000 * result.phases.get(name, 0.0) for name in BETWEEN}
        times |= {f"{name}_ms": 1000 * result.phases[name] for name in IN_STEP if name in result.phases}
        measured = {field.name: getattr(result, field.name) for field in fields(StepMeasurement)}
        metrics = StepMetrics(
            **measured,
            iterations=train.steps,
            elapsed_ms=seconds * 1000,
            global_batch=train.global_batch,
            sequence_length=train.sequence_length,
            skipped_iterations=self._skipped,
            nan_iterations=self._nan,
            samples_per_second=train.global_batch / seconds,
            tokens_per_second_per_device=rate,
            tflops=figures.tflops,
            mfu=figures.mfu,
            eta_seconds=(train.steps - result.iteration) * sum(self._recent) / len(self._recent),
            mfu_full=figures.mfu_full,
            hfu=figures.hfu,
            **times,
        )
        self._metrics.write(metrics)
        if result.iteration % self.settings.every == 0 or result.iteration == train.steps:
            self.log(
                megatron_line(metrics, datetime.now()) if self.settings.style == "megatron" else arriero_line(metrics)
            )
            self._skipped = self._nan = 0

    def log_slowest_rank(self, step: int, found: SlowestRank | None, factor: float) -> None:
        """Writes the metrics of the slowest process, and a log line where it is slower than the median by `factor`."""
        if found is None:
            return
        if self._metrics is not None:
            metrics = RankMetrics(step, found.rank, found.seconds * 1000, found.median * 1000, found.ratio)
            self._metrics.write(metrics)
        if found.ratio > factor:
            times = (
                f"{found.seconds:.3f} s of its own a step, {found.ratio:.1f} times the median of {found.median:.3f} s"
            )
            self.log(f" SLOW: rank {found.rank} takes {times}")

    def log_validation(self, step: int, loss: float) -> None:
        """Writes the metrics and the log line of a validation."""
        if self._metrics is not None:
            perplexity = math.exp(min(loss, 20.0)) if math.isfinite(loss) else math.nan  # as Megatron caps it
            metrics = ValidationMetrics(iteration=step, lm_loss=loss, perplexity=perplexity)
            self._metrics.write(metrics)
            self.log(validation_line(metrics, framed=self.settings.style == "megatron"))

    def finish(self) -> None:
        """Draws the figure and closes the files."""
        if self._metrics is not None and self._text is not None:
            self._metrics.close()
            picture = self.out / "loss.png"
            try:
                loss_figure(self.out / "metrics.jsonl", picture)
                self.log(f" figure: {escape(picture)}")
            except (OSError, UserError) as error:
                reason = error.problem if isinstance(error, UserError) else os_error_text(error)
                self.log(f" NO figure: {escape(picture)}: {reason}")
            self._text.close()


def keep_environment(out: Path, environment: dict[str, Any]) -> str:
    """Writes env.json at the first start of a run, env-2.json at its second, and so on; why it could not be written."""
    number, path = 1, out / "env.json"
    while os.path.lexists(path):
        number += 1
        path = out / f"env-{number}.json"
    try:
        write_atomic(path, json.dumps(environment, indent=1) + "\n")
    except OSError as error:
        return f"{escape(path)} cannot be written: {os_error_text(error)}"
    return ""
