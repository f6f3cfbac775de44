"""What the numerics guard and the watch cost a step: CPU seconds, on three copies of one model (three processes).

    python benchmarks/guard_cost.py

Each part is timed on its own on the first process, in turns with whole training steps; medians of five rounds.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from arriero.common.settings import Setting, parse
from arriero.data.indexed import IndexedWriter
from arriero.distributed.launch.launcher import run_processes
from arriero.distributed.parallel.mesh import Ranks
from arriero.observe.events import Events
from arriero.train.build import build_trainer
from arriero.train.recipe import Recipe
from arriero.train.watch import StragglerDetector, Watchdog

SETTINGS = {
    "model": "demo", "train.steps": 100, "train.sequence_length": 256, "train.global_batch": 12, "train.micro_batch": 4,
    "train.dtype": "float32", "parallel.zero_group": 1, "watch.every": 1, "data.split": "90,10,0",
}  # fmt: skip


def cpu_seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def measure(root: Path) -> None:
    settings = {**SETTINGS, "data.prefix": root / "tokens", "out": root / "run"}
    recipe: Recipe = parse(Recipe, [Setting(k, [str(v)], "") for k, v in settings.items()], prog="guard_cost")
    ranks = Ranks.build(recipe.parallel, "cpu")
    trainer = build_trainer(recipe, ranks, local_rank=0, device_kind="cpu")
    trainer.load(None)
    events = Events(root, first=True, since_start=0.0)
    watchdog = Watchdog(root, ranks, recipe.watch, print)
    comparison = StragglerDetector(ranks, recipe.watch, trainer.device)

    def watch() -> None:
        watchdog.start_step(1)
        watchdog.end_step()
        events.note("step", step=1, seconds=1.0, data=0.0)

    parts: dict[str, tuple[Callable[[], object], float]] = {  # and steps between two of them, by default
        "step": (trainer.step, 1), "accept, each step": (lambda: trainer._agree_on_step(1.0, 1.0, stop=False), 1),
        "watchdog and events, each step": (watch, 1), "own time, every 10 steps": (lambda: comparison.step(0.0), 10),
        "replicas, every 100 steps": (trainer.check_replicas, 100),
    }  # fmt: skip
    trainer.step()
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(5):
        for name, (work, _) in parts.items():
            ranks.barrier()
            seconds[name].append(cpu_seconds(work))
    if ranks.first:
        step = statistics.median(seconds["step"])
        for name, (_, every) in parts.items():
            median = statistics.median(seconds[name])
            print(f"{name:34} {1000 * median:10.3f} ms  {100 * median / every / step:8.3f}% of a step")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        writer = IndexedWriter(Path(folder) / "tokens", np.dtype(np.uint16))
        for _ in range(400):
            writer.add(np.random.default_rng(0).integers(3, 500, 300).astype(np.uint16))
            writer.end_document()
        writer.close()
        run_processes(measure, Path(folder), 3)
