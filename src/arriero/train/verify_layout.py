"""`arriero pretrain RECIPE --verify-layout`: the recipe's own layout against one process, at reduced width, in float64.

What is kept: the layers, the heads, every parallel degree, the schedule, recomputation. What shrinks: head width,
feed-forward, vocabulary, sequence and batch. The data is random. It runs on the CPU, with as many processes as the run.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from arriero.checkpoint.find import find_checkpoint
from arriero.checkpoint.load import CheckpointReader
from arriero.common.errors import EXIT_CHECK_FAILED, EXIT_OK
from arriero.data.config import DataConfig
from arriero.data.indexed import IndexedWriter
from arriero.distributed.launch.launcher import run_processes
from arriero.distributed.launch.worker import run_in_process_group
from arriero.distributed.parallel.config import ParallelConfig, RecomputeConfig
from arriero.distributed.parallel.mesh import Ranks
from arriero.train.recipe import Recipe
from arriero.train.trainer import Trainer

STEPS = 3
LIMIT = 1e-10  # relative, in float64


@dataclass(frozen=True)
class Measurement:
    """A run to make, and where its numbers go."""

    recipe: Recipe
    results: Path
    device_kind: str = "cpu"


def verify_layout(recipe: Recipe, processes: int) -> int:
    """Runs both, prints the comparison; 0 if they are the same run to 1e-10, else 1."""
    root = Path(tempfile.mkdtemp(prefix="arriero-verify-"))
    try:
        laid_out = reduced(recipe, processes, root)
        plain = replace(laid_out.train, compile=False)
        one = replace(
            laid_out, parallel=ParallelConfig(), recompute=RecomputeConfig(), train=plain, out=str(root / "one")
        )
        runs = [Measurement(r, Path(r.out + ".json")) for r in (one, laid_out)]
        print(f"one process, then {processes}: {describe(recipe.parallel, processes)}", flush=True)
        run_processes(measure, runs[0], 1)  # in a process of its own: a process that has computed must not be forked
        if processes == 1:
            run_in_process_group(measure, runs[1])
        else:
            run_processes(measure, runs[1], processes)
        worst = differences(*runs)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    for name, value in worst.items():
        print(f"{name:40} {value:9.2e}  {'ok' if value <= LIMIT else 'DIFFERS'}")
    passed = all(value <= LIMIT for value in worst.values())
    print(f"{'the same run' if passed else 'NOT the same run'}: {STEPS} steps in float64, limit {LIMIT:g} relative")
    return EXIT_OK if passed else EXIT_CHECK_FAILED


def describe(parallel: ParallelConfig, processes: int) -> str:
    """The layout in a line."""
    data = processes // parallel.model_parallel
    parts = {"pipeline": parallel.pipeline_parallel, "data": data, "context": parallel.context_parallel}
    parts["tensor"] = parallel.tensor_parallel
    line = " x ".join(f"{name} {degree}" for name, degree in parts.items() if degree > 1) or "one process"
    return f"{line}, ZeRO-{parallel.zero_stage}" if data > 1 else line


def reduced(recipe: Recipe, processes: int, root: Path) -> Recipe:
    """The recipe at reduced width, with a model and random data of its own below `root`."""
    parallel, whole = recipe.parallel, recipe.model_config()
    width = whole.num_attention_heads * 4
    model = replace(
        whole, hidden_size=width, head_dim=4, vocab_size=min(whole.vocab_size, 251),
        intermediate_size=math.lcm(8, parallel.tensor_parallel) * 4,
    )  # fmt: skip
    (root / "config.json").write_text(json.dumps(model.to_json()))
    length = 4 * parallel.context_parallel * parallel.tensor_parallel * 2
    micro = max(2, parallel.stages if parallel.pipeline_parallel > 1 else 2)
    batch = micro * (processes // parallel.model_parallel)
    write_random_data(root / "random", model.vocab_size, tokens=(STEPS + 1) * batch * length + 1000)
    train = replace(
        recipe.train, steps=STEPS, dtype="float64", float8="none", sequence_length=length, micro_batch=1,
        global_batch=batch, eval_every=0, eval_batches=1,
    )  # fmt: skip
    schedule = replace(recipe.schedule, lr=1e-3, min_lr=1e-4, warmup_steps=0, warmup_fraction=0.0, decay_steps=0)
    return replace(
        recipe, model=str(root / "config.json"), init="", tokenizer="", out=str(root / "laid-out"), device="cpu",
        data=DataConfig(prefix=str(root / "random"), split="1,0,0", attention=recipe.data.attention), train=train,
        schedule=schedule,
    )  # fmt: skip


def write_random_data(prefix: Path, vocabulary: int, *, tokens: int, longest: int = 60) -> None:
    """Documents of random tokens and lengths, the same ones every time."""
    dtype = np.dtype(np.uint16 if vocabulary <= 2**16 else np.int32)
    random, writer = np.random.default_rng(0), IndexedWriter(prefix, dtype)
    written = 0
    while written < tokens:
        ids = random.integers(0, vocabulary, int(random.integers(5, longest)))
        writer.add(ids.astype(dtype))
        writer.end_document()
        written += len(ids)
    writer.close()


def measure(run: Measurement) -> None:
    """Trains the steps, saves the last, and leaves losses and gradient norms in the results file."""
    ranks = Ranks.build(run.recipe.parallel, run.device_kind)
    trainer = Trainer(run.recipe, ranks, local_rank=0, device_kind=run.device_kind)
    trainer.start(None)
    steps = [trainer.step() for _ in range(STEPS)]
    trainer.save()
    if ranks.first:
        found = {"loss": [s.loss for s in steps], "gradient norm": [s.grad_norm for s in steps]}
        run.results.write_text(json.dumps(found))


def differences(one: Measurement, other: Measurement) -> dict[str, float]:
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
