from __future__ import annotations

import math
from dataclasses import replace
from datetime import datetime

from arriero.observe.logline import arriero_line, megatron_line, validation_line
from arriero.observe.metrics import StepMetrics, ValidationMetrics

STEP = StepMetrics(
    iteration=3, iterations=50000, consumed_samples=768, consumed_tokens=1572864, elapsed_ms=33818.0,
    learning_rate=1.40625e-7, global_batch=256, lm_loss=12.0082, loss_scale=1.0, grad_norm=9.216, sequence_length=2048,
    skipped_iterations=0, nan_iterations=0, samples_per_second=7.57, tokens_per_second_per_device=484.5, tflops=107.09,
    mfu=0.342, data_wait_ms=0.4, eta_seconds=1690798.5,
)  # fmt: skip
ASCENDSPEED = (
    " iteration        3/   50000 | consumed samples:          768 | consumed tokens:      1572864 |"
    " elapsed time per iteration (ms): 33818.0 | learning rate: 1.406E-07 | global batch size:   256 |"
    " lm loss: 1.200820E+01 | loss scale: 1.0 | grad norm: 9.216 | actual seqlen:  2048 |"
    " number of skipped iterations:   0 | number of nan iterations:   0 | samples per second: 7.570 | TFLOPs: 107.09 |"
)
MEGATRON = (
    " [2026-08-22 15:22:22.123456] iteration        3/   50000 | consumed samples:          768 |"
    " elapsed time per iteration (ms): 33818.0 | throughput per GPU (TFLOP/s/GPU): 107.1 |"
    " learning rate: 1.406250E-07 | global batch size:   256 | lm loss: 1.200820E+01 |"
    " loss scale: 1.0 | grad norm: 9.216 | number of skipped iterations:   0 | number of nan iterations:   0 |"
)


def test_arriero_line_begins_as_ascendspeed_s_byte_for_byte() -> None:
    line = arriero_line(STEP)
    assert line.startswith(ASCENDSPEED)
    assert line == f"{ASCENDSPEED} tokens/s/device: 484 | MFU: 34.2% | data wait (ms): 0.4 | ETA: 19 days, 13:39:58 |"


def test_hfu_stands_beside_mfu_when_something_is_recomputed() -> None:
    assert " | MFU: 34.2% | HFU: 45.6% | data wait" in arriero_line(replace(STEP, hfu=0.456))


def test_mfu_is_absent_where_no_peak_is_known() -> None:
    assert "MFU" not in arriero_line(replace(STEP, mfu=None))


def test_megatron_line_byte_for_byte() -> None:
    assert megatron_line(STEP, datetime(2026, 8, 22, 15, 22, 22, 123456)) == MEGATRON


def test_megatron_line_keeps_microseconds_that_are_zero() -> None:
    assert megatron_line(STEP, datetime(2026, 8, 22)).startswith(" [2026-08-22 00:00:00.000000] iteration ")


def test_a_non_finite_loss_is_printed() -> None:
    bad = replace(STEP, lm_loss=math.nan, grad_norm=math.inf, nan_iterations=1, eta_seconds=math.inf)
    for line in (arriero_line(bad), megatron_line(bad, datetime(2026, 8, 22))):
        assert " lm loss: nan | loss scale: 1.0 | grad norm: inf |" in line
        assert "number of nan iterations:   1 |" in line
    assert arriero_line(bad).endswith("ETA: - |")


def test_validation_line_is_megatron_s() -> None:
    measured = ValidationMetrics(iteration=100, lm_loss=2.5, perplexity=12.18249396)
    line = " validation loss at iteration 100 | lm loss value: 2.500000E+00 | lm loss PPL: 1.218249E+01 | "
    assert validation_line(measured) == line.rstrip()
    assert validation_line(measured, framed=True).split("\n") == ["-" * (len(line) + 1), line, "-" * (len(line) + 1)]
