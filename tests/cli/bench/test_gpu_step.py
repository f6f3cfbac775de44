"""The benchmark for one accelerator, small and on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "gpu_step.py"


def run(*words: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--device", "cpu", *words],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


def test_both_contenders_on_a_cpu(tmp_path: Path) -> None:
    printed = run("--tiny", "--json", str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert json.loads(printed[printed.index("\n{") :]) == found
    assert {r["contender"] for r in found["rows"]} >= {"arriero", "transformers"}
    assert {r["length"] for r in found["rows"]} == {64, 128}
    for row in found["rows"]:
        assert row["first_loss"] == pytest.approx(row["log_vocabulary"], rel=0.02)  # random weights, random tokens
        assert row["tokens_per_second"] == pytest.approx(256 / row["seconds_per_step"])
        assert row["mfu"] == pytest.approx(row["tflops"] / found["matmul_tflops_before"])
        assert row["mfu"] < row["mfu_full"]
        assert row["peak_memory_gb"] > 0
    assert printed.startswith("| shape | tokens |")


def test_what_the_budget_does_not_allow_is_named() -> None:
    assert run("--tiny", "--budget", "0").count("not run: the 0 s were spent") >= 4


def test_full_size_wants_an_accelerator() -> None:
    assert "add --tiny" in run(code=1)
