"""Runs many layouts in one launch: `python run_layouts.py JOB.json`. Starting processes is what costs.

Each case trains five steps from the same weights or from a checkpoint, saves after the third and the fifth, and the
first process appends a line of JSON with its losses and gradient norms.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters
from torch.distributed import distributed_c10d

from arriero.common.settings import Setting, parse
from arriero.distributed.launch.launcher import run_processes
from arriero.distributed.launch.pickle_guard import PICKLE_FUNCTIONS
from arriero.distributed.launch.worker import run_in_process_group
from arriero.distributed.parallel.mesh import Ranks
from arriero.train.build import build_trainer
from arriero.train.recipe import Recipe

PICKLES: list[str] = []
"""What this process has pickled for another, or unpickled."""


def count_pickles() -> None:
    """Notes each call of torch that would send or receive an object, and each name that an unpickler looks up."""

    def counted(name: str, call: Any) -> Any:
        def noted(*given: Any, **keywords: Any) -> Any:
            PICKLES.append(name)
            return call(*given, **keywords)

        return noted

    for name in PICKLE_FUNCTIONS:
        setattr(distributed_c10d, name, counted(name, getattr(distributed_c10d, name)))
    sys.addaudithook(lambda event, given: PICKLES.append(str(given)) if event == "pickle.find_class" else None)


def run_case(case: dict[str, Any]) -> dict[str, Any] | None:
    PICKLES.clear()
    settings = [Setting(key, list(map(str, value)) if isinstance(value, list) else [str(value)], "case")
                for key, value in case["settings"].items()]  # fmt: skip
    recipe: Recipe = parse(Recipe, settings, prog="case")
    ranks = Ranks.build(recipe.parallel, "cpu")
    recipe = replace(recipe, checkpoint=replace(recipe.checkpoint, keep=0))
    trainer = build_trainer(recipe, ranks, local_rank=0, device_kind="cpu")
    trainer.load(Path(case["resume"]) if case.get("resume") else None)
    result: dict[str, Any] = {"name": case["name"], "loss": [], "grad_norm": [], "scale": [], "skipped": []}
    counters.clear()
    while trainer.done < min(5, recipe.train.steps):
        step = trainer.step()
        trainer.check_replicas()  # what several processes hold alike is alike, in every layout
        result["loss"].append(step.lm_loss)
        result["grad_norm"].append(step.grad_norm)
        result["scale"].append(step.loss_scale)
        result["skipped"].append(step.skipped)
        if trainer.done in (3, 5) and recipe.train.dtype == "float64" and not recipe.train.compile:
            trainer.save()
    result["valid"] = trainer.validate()
    result["compilations"] = counters["stats"]["unique_graphs"]
    result["pickles"] = ranks.gather_texts(" ".join(PICKLES))
    if recipe.train.compile:
        torch._dynamo.reset()  # the next case compiles its own
    return result if ranks.first else None


def run_job(job: dict[str, Any]) -> None:
    count_pickles()
    for case in job["cases"]:
        result = run_case(case)
        if result is not None:
            with open(job["results"], "a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    if job["processes"] == 1:
        run_in_process_group(run_job, job)
    else:
        run_processes(run_job, job, job["processes"])
