"""From a recipe to a trainer: the one place that reads the whole recipe and builds the parts of a run from it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import torch

from arriero.checkpoint.formats.huggingface import open_huggingface
from arriero.checkpoint.save import Saver
from arriero.common.device import select_device
from arriero.common.toml import to_toml
from arriero.distributed.parallel.apply import WeightSource, build_model_parts
from arriero.distributed.parallel.mesh import Ranks
from arriero.distributed.parallel.pipeline import Pipeline
from arriero.distributed.parallel.zero import time_collectives
from arriero.model.config import LlamaConfig
from arriero.model.init import InitialWeights
from arriero.observe.step_time import StepClock
from arriero.train.facts import input_digests
from arriero.train.guard import SpikeDetector
from arriero.train.loader import MicroBatchLoader
from arriero.train.model_parts import ModelParts
from arriero.train.optim import build_optimizer
from arriero.train.precision import LossScale, in_compute_dtype, store_dtype
from arriero.train.recipe import Recipe
from arriero.train.schedule import learning_rate
from arriero.train.trainer import RunRecord, Trainer


def build_trainer(recipe: Recipe, ranks: Ranks, *, local_rank: int, device_kind: str) -> Trainer:
    """Builds model, optimizer, batches and checkpoint writer of one process; `Trainer.load` comes next.

    Args:
        recipe: the run.
        ranks: this process's place in the layout.
        local_rank: the number of its device on this machine.
        device_kind: cpu, cuda or npu.
    """
    train, device, clock = recipe.train, select_device(device_kind, local_rank), StepClock(device_kind)
    model = build_model(recipe, ranks, device, clock)
    half = train.dtype == "float16"
    return Trainer(
        model=model,
        optimizer=build_optimizer(model.parts, recipe.optim, ranks),
        learning_rate=partial(learning_rate, recipe.schedule, steps=train.steps),
        loss_scale=LossScale(
            train.initial_loss_scale if half else 1.0, train.loss_scale_window, train.loss_scale_hysteresis
        ),
        spikes=SpikeDetector(train.spike_factor),
        loader=MicroBatchLoader(recipe, ranks, device, vocab_size=model.config.vocab_size),
        saver=Saver(Path(recipe.out) / "checkpoints", recipe.checkpoint, ranks),
        initial_weights=partial(initial_weights, recipe, model.config),
        record=run_record(recipe, model.config, ranks),
        train=train,
        log_every=recipe.log.every,
    )


def build_model(recipe: Recipe, ranks: Ranks, device: torch.device, clock: StepClock) -> ModelParts:
    """The model's parts on this process with arbitrary values, and the pipeline over them where there is one."""
    config, train, compute = recipe.model_config(), recipe.train, getattr(torch, recipe.train.dtype)
    parts = build_model_parts(
        config, recipe.parallel, recipe.recompute, ranks, length=train.sequence_length, device=device,
        store=store_dtype(compute), compute=compute, float8=train.float8, compiled=train.compile,
    )  # fmt: skip
    forwards = [in_compute_dtype(part, compute) for part in parts]
    pipeline = None
    if recipe.parallel.pipeline_parallel > 1:
        pipeline = Pipeline(
            parts, forwards, config=recipe.parallel, ranks=ranks, device=device,
            micro_batches=train.accumulation(ranks.data), rows=train.micro_batch, length=train.sequence_length,
            compute=compute,
        )  # fmt: skip
        pipeline.time_phases(clock.timed)
    if device.type == "cpu":  # elsewhere they overlap with the computation, and their own time means little
        for part in parts:
            time_collectives(part, partial(clock.inside, "communication"))
    return ModelParts(config, parts, forwards[0], pipeline, recipe.parallel.zero_stage, ranks, device, clock)


def initial_weights(recipe: Recipe, config: LlamaConfig) -> WeightSource:
    """The weights that a new run begins with: those of `init`, or drawn from the seed."""
    return open_huggingface(Path(recipe.init)) if recipe.init else InitialWeights(config, recipe.seed)


def run_record(recipe: Recipe, config: LlamaConfig, ranks: Ranks) -> RunRecord:
    """What each checkpoint of the run repeats of it."""
    texts = {"config.json": json.dumps(config.to_json(), indent=1), "recipe.toml": to_toml(recipe)}
    state = {"seed": recipe.seed, "processes": ranks.world}
    return RunRecord(texts, state, partial(input_digests, recipe) if ranks.first else dict)
