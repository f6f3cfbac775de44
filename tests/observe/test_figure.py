from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from arriero.common.errors import UserError
from arriero.observe.figure import _tokens_of, loss_figure
from arriero.observe.metrics import MetricsWriter, StepMetrics, ValidationMetrics

STEP = StepMetrics(
    iteration=1, iterations=300, consumed_samples=8, consumed_tokens=4096, elapsed_ms=200.0, learning_rate=1e-3,
    global_batch=8, lm_loss=8.0, loss_scale=1.0, grad_norm=1.0, sequence_length=512, skipped_iterations=0,
    nan_iterations=0, samples_per_second=40.0, tokens_per_second_per_device=20480.0, tflops=0.2, mfu=None,
    data_wait_ms=0.1, eta_seconds=60.0,
)  # fmt: skip
PNG = b"\x89PNG\r\n\x1a\n"


def draw(directory: Path, losses: list[float], validations: int) -> bytes:
    path = directory / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        for i, loss in enumerate(losses, 1):
            writer.write(replace(STEP, iteration=i, consumed_tokens=4096 * i, lm_loss=loss))
        for i in range(1, validations + 1):
            writer.write(ValidationMetrics(iteration=i, lm_loss=8.0 - i, perplexity=math.exp(8.0 - i)))
    loss_figure(path, directory / "plots" / "loss.png", title="a run")
    assert [p.name for p in (directory / "plots").iterdir()] == ["loss.png"]
    return (directory / "plots" / "loss.png").read_bytes()


@pytest.mark.parametrize(
    ("losses", "validations"),
    [([8.0], 0), ([8.0 - 0.01 * i for i in range(200)], 3), ([8.0, math.nan, math.inf, 7.0], 1), ([math.nan] * 3, 0)],
)
def test_a_png_is_drawn(tmp_path: Path, losses: list[float], validations: int) -> None:
    assert draw(tmp_path, losses, validations).startswith(PNG)


def test_validations_change_the_picture(tmp_path: Path) -> None:
    assert draw(tmp_path / "a", [8.0, 7.0, 6.0], 0) != draw(tmp_path / "b", [8.0, 7.0, 6.0], 2)


def test_the_tokens_of_a_run_whose_batch_was_changed(tmp_path: Path) -> None:
    tokens = [100, 200, 300, 700, 1100]
    steps = [
        {"iteration": i, "consumed_tokens": t, "global_batch": 1 if i < 4 else 4, "sequence_length": 100}
        for i, t in enumerate(tokens, 1)
    ]
    there, back = _tokens_of(steps, 100.0)
    assert [float(there(i)) for i in (0, 1, 3, 4, 5, 6)] == [0, 1, 3, 7, 11, 15]
    assert [float(back(t)) for t in (0, 3, 7, 15)] == [0, 3, 4, 6]
    there, back = _tokens_of(steps[:3], 100.0)
    assert (there(2.5), back(2.5)) == (2.5, 2.5)
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        for step in steps:
            writer.write(replace(STEP, **step))
    loss_figure(path, tmp_path / "loss.png")


def test_no_step_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "validation", "iteration": 1, "lm_loss": 1.0, "perplexity": 2.7}\n')
    with pytest.raises(UserError, match="no training step"):
        loss_figure(path, tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_importing_costs_no_matplotlib() -> None:
    code = "import sys, arriero.observe.figure, arriero.observe.logline; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
