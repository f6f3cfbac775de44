"""The table of layouts that must be the same run, and how a case of it is written down."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

RUNNER = Path(__file__).with_name("run_layouts.py")


def settings(**given: Any) -> dict[str, Any]:
    """Settings of the parallel table, by their short names."""
    tables = {"first_layers": "recompute", "mode": "recompute", "keep": "recompute", "micro_batch": "train"}
    return {f"{tables.get(key, 'parallel')}.{key}": value for key, value in given.items()}


def pipe(degree: int, schedule: str = "1F1B", virtual: int = 1, **more: Any) -> dict[str, Any]:
    extra = {"virtual_stages": virtual} if virtual > 1 else {}
    return settings(pipeline_parallel=degree, pipeline_schedule=schedule, **extra, **more)


# name -> (processes, settings). Four layers, four heads, two key-value heads, 259 entries: nothing divides too well.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "zero-1, data 2": (2, settings(zero_stage=1)),
    "zero-2, data 2": (2, settings(zero_stage=2)),
    "zero-3, data 2": (2, settings(zero_stage=3)),
    "tensor 2": (2, settings(tensor_parallel=2)),
    "tensor 2, sequence": (2, settings(tensor_parallel=2, sequence_parallel=True)),
    "context 2, all-gather": (2, settings(context_parallel=2)),
    "context 2, ulysses": (2, settings(context_parallel=2, context_method="ulysses")),
    "pipeline 2, 1F1B": (2, pipe(2)),
    "pipeline 2, GPipe": (2, pipe(2, "GPipe")),
    "pipeline 2, Interleaved1F1B": (2, pipe(2, "Interleaved1F1B", 2)),
    "pipeline 2, LoopedBFS": (2, pipe(2, "LoopedBFS", 2)),
    "pipeline 2, InterleavedZeroBubble": (2, pipe(2, "InterleavedZeroBubble", 2)),
    "pipeline 2, ZBVZeroBubble": (2, pipe(2, "ZBVZeroBubble")),
    "pipeline 2, DualPipeV": (2, pipe(2, "DualPipeV")),
    "data 2, recompute full": (2, settings(mode="full", zero_stage=3)),
    "tensor 2, recompute selective": (2, settings(mode="selective", tensor_parallel=2)),
    "pipeline 2, recompute first 2 1": (2, pipe(2, mode="first", first_layers=[2, 1])),
    "hybrid: 2 copies of 2": (4, settings(zero_group=2, zero_stage=3)),
    "zero-1, data 2 x tensor 2": (4, settings(tensor_parallel=2, zero_stage=1)),
    "zero-3, data 2 x tensor 2, sequence": (4, settings(tensor_parallel=2, sequence_parallel=True, zero_stage=3)),
    "pipeline 2 x zero-1 data 2": (4, pipe(2, zero_stage=1, micro_batch=1)),
    "pipeline 2 x zero-3 data 2": (4, pipe(2, zero_stage=3, micro_batch=1)),
    "pipeline 2 x tensor 2, sequence": (4, pipe(2, tensor_parallel=2, sequence_parallel=True)),
    "context 2 x tensor 2": (4, settings(context_parallel=2, tensor_parallel=2)),
    "context 2 x zero-3 data 2": (4, settings(context_parallel=2, zero_stage=3)),
    "pipeline 2 InterleavedZeroBubble x data 2": (4, pipe(2, "InterleavedZeroBubble", 2, micro_batch=1)),
    "pipeline 2 ZBVZeroBubble x data 2": (4, pipe(2, "ZBVZeroBubble", micro_batch=1)),
    "pipeline 2 DualPipeV x tensor 2": (4, pipe(2, "DualPipeV", tensor_parallel=2)),
    "pipeline 4": (4, pipe(4)),
    "pipeline 2, layers 1 3, x data 2": (4, pipe(2, pipeline_layers=[1, 3], micro_batch=1)),
    "pipeline 2 x data 2 x tensor 2, sequence": (8, pipe(2, tensor_parallel=2, sequence_parallel=True, micro_batch=1)),
    "pipeline 2 x context 2 x tensor 2": (8, pipe(2, tensor_parallel=2, context_parallel=2)),
    "pipeline 4 x hybrid 2 copies of 1": (8, pipe(4, zero_group=1, micro_batch=1)),
    "zero-3, 2 copies of 2 x tensor 2": (8, settings(zero_group=2, zero_stage=3, tensor_parallel=2)),
    "context 2 ulysses x data 4": (8, settings(context_parallel=2, context_method="ulysses")),
}  # fmt: skip
# A smaller table for what need not be tried everywhere.
SOME = (
    "zero-3, data 2", "tensor 2, sequence", "context 2, all-gather", "context 2, ulysses", "pipeline 2, 1F1B",
    "pipeline 2 x tensor 2, sequence", "context 2 x zero-3 data 2", "pipeline 2 x context 2 x tensor 2",
)  # fmt: skip


def case(root: Path, name: str, *, shape: str = "plain", dtype: str = "float64", **given: Any) -> dict[str, Any]:
    """One case; `given` are settings whose dots are written as double underscores."""
    base = {
        "model": str(root / shape / "config.json"), "out": str(root / "runs" / name), "seed": 7,
        "data.prefix": str(root / "data" / "toy_text_document"), "data.split": "90,10,0",
        "train.steps": 5, "train.sequence_length": 32, "train.global_batch": 8, "train.micro_batch": 2,
        "train.dtype": dtype, "train.eval_batches": 1, "schedule.lr": 1e-2, "schedule.min_lr": 1e-3,
        "schedule.warmup_steps": 2,
    }  # fmt: skip
    return {"name": name, "settings": base | {key.replace("__", "."): value for key, value in given.items()}}


def launch(root: Path, processes: int, cases: list[dict[str, Any]], timeout: int = 1500) -> dict[str, dict[str, Any]]:
    """Runs cases in one launch of real processes; returns each one's results by name."""
    results, job = root / f"results-{processes}.jsonl", root / f"job-{processes}.json"
    results.unlink(missing_ok=True)
    job.write_text(json.dumps({"processes": processes, "cases": cases, "results": str(results)}))
    done = subprocess.run(
        [sys.executable, str(RUNNER), str(job)], capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {r["name"]: r for r in map(json.loads, results.read_text().splitlines())}
