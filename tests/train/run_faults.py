"""Runs cases on several processes in one launch, each with a fault on one rank: `python run_faults.py JOB.json`.

Every process appends a line of JSON: the case, its rank, which steps it skipped, and the check that failed, if one did.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch

from arriero.common.errors import CheckFailed
from arriero.common.settings import Setting, parse
from arriero.distributed.launch.launcher import run_processes
from arriero.distributed.parallel.mesh import Ranks
from arriero.distributed.parallel.shards import local
from arriero.train.loop import ResumePlan, train
from arriero.train.optim import Optimizer
from arriero.train.recipe import Recipe
from arriero.train.trainer import Trainer
from arriero.train.watch import HostBusyTime, Watchdog

STEP, BATCH, GRADIENTS = Trainer.step, Trainer.next_batch, Optimizer.collect_gradients
SUMMARY = Watchdog._stack_summary
NAME = "model.norm.weight"


def oversleep(log: Path) -> None:
    """Until the watchdog has reported the step; this function's name is looked for in the stacks."""
    while "WATCHDOG: step 3 takes longer" not in log.read_text():
        time.sleep(0.05)


def stacks_of_all(self: Watchdog) -> list[str]:
    """What `_stack_summary` returns once every process has written its stacks, however busy the machine is."""
    files = [self._folder / f"rank-{rank:05d}.txt" for rank in range(self._world)]
    while not all(file.exists() and f"step {self._step} " in file.read_text() for file in files):
        time.sleep(0.05)
    return SUMMARY(self)


def spin(seconds: float) -> None:
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def install(fault: str, here: bool, skipped: list[int], out: Path) -> None:
    """Makes the third step, or every one where the fault is slowness, go wrong on this process."""
    steps = [0]

    def step(self: Trainer, *arguments: Any) -> Any:
        steps[0] = self.done + 1
        result = STEP(self, *arguments)
        skipped.extend([result.iteration] if result.skipped else [])
        if here and fault == "flip" and result.iteration == 3:
            raw = local(self.parts[0].get_parameter(NAME)).detach().view(torch.int32)
            raw[0] ^= 1  # the last bit of one float32
        return result

    def batch(self: Trainer) -> Any:
        micro = BATCH(self)
        if here and fault == "sleep" and steps[0] == 3:
            oversleep(out / "log.txt")
        return micro

    def gradients(self: Optimizer) -> None:
        GRADIENTS(self)
        if here and fault == "slow":
            spin(0.2)
        if here and fault == "nan" and steps[0] == 3:
            held = self.gradients[NAME]
            assert held is not None
            held.view(-1)[0] = math.nan

    Trainer.step, Trainer.next_batch, Optimizer.collect_gradients = step, batch, gradients  # type: ignore[method-assign]
    Watchdog._stack_summary = stacks_of_all if fault == "sleep" else SUMMARY  # type: ignore[method-assign]
    # Without the wait for a processor, which on a busy machine may be longer on any other process.
    HostBusyTime._now = lambda self: time.thread_time()  # type: ignore[method-assign]


def run_job(job: dict[str, Any]) -> None:
    for case in job["cases"]:
        settings = [Setting(key, [str(value)], "case") for key, value in case["settings"].items()]
        recipe: Recipe = parse(Recipe, settings, prog="case")
        ranks = Ranks.build(recipe.parallel, "cpu")
        skipped: list[int] = []
        install(case["fault"], ranks.rank == case["rank"], skipped, Path(recipe.out))
        failed = ""
        try:
            train(recipe, ranks, local_rank=0, device_kind="cpu", plan=ResumePlan())
        except CheckFailed as error:
            failed = str(error)
        with open(job["results"], "a", encoding="utf-8") as file:
            told = {"case": case["name"], "rank": ranks.rank, "skipped": skipped, "failed": failed}
            file.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    run_processes(run_job, job, job["processes"])
