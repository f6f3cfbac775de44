"""`arriero pretrain RECIPE --verify-layout`: the recipe's own layout against one process, at reduced width, in float64.

What is kept: the layers, the heads, every parallel degree, the schedule, recomputation. What shrinks: head width,
feed-forward, vocabulary, sequence and batch. The data is random. It runs on the CPU, with as many processes as the run.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from arriero.checkpoint.find import find_checkpoint
from arriero.checkpoint.load import CheckpointReader
from arriero.common.errors import EXIT_CHECK_FAILED, EXIT_OK
from arriero.distributed.launch.launcher import run_processes
from arriero.distributed.launch.worker import run_in_process_group
from arriero.distributed.parallel.config import ParallelConfig, RecomputeConfig
from arriero.distributed.parallel.mesh import Ranks
from arriero.train.build import build_trainer
from arriero.train.recipe import Recipe
from arriero.train.synthetic import reduced_recipe

STEPS = 3
MAX_RELATIVE_DIFFERENCE = 1e-10  # in float64


@dataclass(frozen=True)
class LayoutRun:
    """One of the two runs that are compared, and the file for its losses and gradient norms."""

    recipe: Recipe
    results: Path
    device_kind: str = "cpu"


def verify_layout(recipe: Recipe, processes: int) -> int:
    """Trains the recipe on one process and on `processes`, prints the differences; 0 if all are below 1e-10, else 1."""
    root = Path(tempfile.mkdtemp(prefix="arriero-verify-"))
    try:
        laid_out = reduced_recipe(recipe, processes, root, steps=STEPS)
        plain = replace(laid_out.train, compile=False)
        one = replace(
            laid_out, parallel=ParallelConfig(), recompute=RecomputeConfig(), train=plain, out=str(root / "one")
        )
        runs = [LayoutRun(r, Path(r.out + ".json")) for r in (one, laid_out)]
        print(f"one process, then {processes}: {describe_layout(recipe.parallel, processes)}", flush=True)
        run_processes(
            train_steps, runs[0], 1
        )  # in another process: one whose thread pools have started must not be forked
        if processes == 1:
            run_in_process_group(train_steps, runs[1])
        else:
            run_processes(train_steps, runs[1], processes)
        worst = differences(*runs)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    for name, value in worst.items():
        print(f"{name:40} {value:9.2e}  {'ok' if value <= MAX_RELATIVE_DIFFERENCE else 'DIFFERS'}")
    passed = all(value <= MAX_RELATIVE_DIFFERENCE for value in worst.values())
    result = "the same run" if passed else "NOT the same run"
    print(f"{result}: {STEPS} steps in float64, limit {MAX_RELATIVE_DIFFERENCE:g} relative")
    return EXIT_OK if passed else EXIT_CHECK_FAILED


def describe_layout(parallel: ParallelConfig, processes: int) -> str:
    """The layout in a line."""
    data = processes // parallel.model_parallel
    parts = {"pipeline": parallel.pipeline_parallel, "data": data, "context": parallel.context_parallel}
    parts["tensor"] = parallel.tensor_parallel
    line = " x ".join(f"{name} {degree}" for name, degree in parts.items() if degree > 1) or "one process"
    return f"{line}, ZeRO-{parallel.zero_stage}" if data > 1 else line


def train_steps(run: LayoutRun) -> None:
    """Trains STEPS steps, saves the last, and writes losses and gradient norms to the results file."""
    ranks = Ranks.build(run.recipe.parallel, run.device_kind)
    trainer = build_trainer(run.recipe, ranks, local_rank=0, device_kind=run.device_kind)
    trainer.load(None)
    steps = [trainer.step() for _ in range(STEPS)]
    trainer.save()
    if ranks.first:
        found = {"loss": [s.lm_loss for s in steps], "gradient norm": [s.grad_norm for s in steps]}
        run.results.write_text(json.dumps(found))


def differences(one: LayoutRun, other: LayoutRun) -> dict[str, float]:
    """The largest relative difference of each quantity."""
    a, b = (json.loads(run.results.read_text()) for run in (one, other))
    found: dict[str, Any] = {
        key: max(abs(y - x) / abs(x) for x, y in zip(a[key], b[key], strict=True)) for key in ("loss", "gradient norm")
    }
    readers = [CheckpointReader(find_checkpoint(Path(run.recipe.out))) for run in (one, other)]
    for key, prefix in (("weights", ""), ("first moments", "exp_avg."), ("second moments", "exp_avg_sq.")):
        worst = 0.0
        for name in readers[0].names():
            x, y = (reader.read(prefix + name) for reader in readers)
            worst = max(worst, ((x - y).norm() / x.norm().clamp_min(1e-300)).item())
        found[key] = worst
    return found
