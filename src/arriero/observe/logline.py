"""The step as one line of text. `arriero` begins exactly as AscendSpeed's line; `megatron` is Megatron-LM's own.

Both are for people and for old scripts; a program reads `metrics.jsonl`. A non-finite loss is printed as nan or inf,
where AscendSpeed and Megatron drop the field.
"""

from __future__ import annotations

import math
from datetime import datetime, timedelta

from arriero.observe.metrics import StepMetrics, ValidationMetrics


def arriero_line(m: StepMetrics) -> str:
    """AscendSpeed's line (fields, widths, separators), then tokens/s/device, MFU, HFU, data wait, ETA."""
    fields = [
        f" iteration {m.iteration:8d}/{m.iterations:8d}",
        f"consumed samples: {m.consumed_samples:12d}",
        f"consumed tokens: {m.consumed_tokens:12d}",
        f"elapsed time per iteration (ms): {m.elapsed_ms:.1f}",
        f"learning rate: {m.learning_rate:.3E}",
        f"global batch size: {m.global_batch:5d}",
        f"lm loss: {_number(m.lm_loss, '.6E')}",
        f"loss scale: {m.loss_scale:.1f}",
        f"grad norm: {_number(m.grad_norm, '.3f')}",
        f"actual seqlen: {m.sequence_length:5d}",
        f"number of skipped iterations: {m.skipped_iterations:3d}",
        f"number of nan iterations: {m.nan_iterations:3d}",
        f"samples per second: {m.samples_per_second:.3f}",
        f"TFLOPs: {m.tflops:.2f}",
        f"tokens/s/device: {m.tokens_per_second_per_device:.0f}",
    ]
    if m.mfu is not None:
        fields.append(f"MFU: {m.mfu:.1%}")
    if m.hfu is not None:
        fields.append(f"HFU: {m.hfu:.1%}")
    fields += [f"data wait (ms): {m.data_wait_ms:.1f}", f"ETA: {_duration(m.eta_seconds)} |"]
    return " | ".join(fields)


def megatron_line(m: StepMetrics, now: datetime) -> str:
    """Megatron-LM's line of 2026 with its throughput field, for scripts that parse it."""
    return (
        f" [{now:%Y-%m-%d %H:%M:%S.%f}] iteration {m.iteration:8d}/{m.iterations:8d} |"
        f" consumed samples: {m.consumed_samples:12d} |"
        f" elapsed time per iteration (ms): {m.elapsed_ms:.1f} |"
        f" throughput per GPU (TFLOP/s/GPU): {m.tflops:.1f} |"
        f" learning rate: {m.learning_rate:.6E} |"
        f" global batch size: {m.global_batch:5d} |"
        f" lm loss: {_number(m.lm_loss, '.6E')} |"
        f" loss scale: {m.loss_scale:.1f} |"
        f" grad norm: {_number(m.grad_norm, '.3f')} |"
        f" number of skipped iterations: {m.skipped_iterations:3d} |"
        f" number of nan iterations: {m.nan_iterations:3d} |"
    )


def validation_line(v: ValidationMetrics, *, framed: bool = False) -> str:
    """Megatron-LM's validation line; `framed` puts it between two rules of dashes, as Megatron prints it."""
    line = (
        f" validation loss at iteration {v.iteration} | lm loss value: {_number(v.lm_loss, '.6E')}"
        f" | lm loss PPL: {_number(v.perplexity, '.6E')} | "
    )
    rule = "-" * (len(line) + 1)
    return f"{rule}\n{line}\n{rule}" if framed else line.rstrip()


def _number(value: float, spec: str) -> str:
    """Python's `E` format would shout NAN; `float` reads either, people look for nan."""
    return format(value, spec) if math.isfinite(value) else str(value)


def _duration(seconds: float) -> str:
    """Hours, minutes and seconds, with days in front where there are any; - where it is not known."""
    return str(timedelta(seconds=round(seconds))) if math.isfinite(seconds) else "-"
