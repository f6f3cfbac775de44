"""Measures some iterations of a recipe in processes of its own, with random weights; no run is written.

Running out of memory is a result: an accelerator raises an error, and a CPU process that passes the limit ends itself
before the kernel kills another one.
"""

from __future__ import annotations

import json
import os
import threading
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from arriero.cli.bench.peak import matmul_peak
from arriero.common.device import device_description, device_name, peak_memory, resident_memory, synchronize
from arriero.common.errors import UserError
from arriero.data.config import DataConfig
from arriero.distributed.launch.config import LaunchConfig
from arriero.distributed.launch.launcher import ProcessFailed, run_processes
from arriero.distributed.launch.rank_info import is_launched_externally
from arriero.distributed.launch.worker import run_in_process_group
from arriero.distributed.parallel.mesh import Ranks
from arriero.distributed.parallel.shards import local
from arriero.model.config import LlamaConfig
from arriero.observe.throughput import peak_flops, throughput
from arriero.train.build import build_trainer
from arriero.train.recipe import Recipe
from arriero.train.reporter import StepResult
from arriero.train.synthetic import write_random_data
from arriero.train.trainer import Trainer
from arriero.train.verify_layout import describe_layout

OUT_OF_MEMORY = "out-of-memory"
"""The file that a process writes into the measurement's directory when it runs out of memory."""


@dataclass(frozen=True)
class Measurement:
    """What every process receives."""

    recipe: Recipe
    device_kind: str
    root: Path
    """A directory for random data and results; it is removed afterwards."""
    iterations: int
    warmup: int
    model: str
    """The shape's name."""
    data: str
    """Where the tokens come from, as text for the table."""
    memory_limit: float = 0.0
    """GB of one process; 0 for none."""
    peak: tuple[float, str] = (0.0, "")
    """TFLOP/s and where the figure comes from; 0 measures it."""


@dataclass(frozen=True)
class Result:
    """One row of the table. `p` is one process, which is one device."""

    device: str
    model: str
    layout: str
    processes: int
    dtype: str
    micro_batch: int
    global_batch: int
    sequence_length: int
    recompute: str
    data: str
    iterations: int
    seconds_per_step: float
    samples_per_second_per_device: float
    tokens_per_second_per_device: float
    tflops: float
    mfu: float | None
    mfu_full: float | None
    hfu: float | None
    peak_tflops: float
    peak_source: str
    first_step_seconds: float
    """The first step, with all that is done once."""
    peak_memory_gb: float
    """Of the process that used most: the device's allocations, or on the CPU the resident set."""
    last_loss: float
    """After the last iteration: near ln V for random weights and tokens, so a check that something was trained."""
    compiled: bool = False
    """Whether the layers were compiled (train.compile)."""


def new_measurement(
    recipe: Recipe, kind: str, root: Path, *, iterations: int, warmup: int, memory_limit: float = 0.0
) -> Measurement:
    """Prepares a recipe: its own data if present, else random tokens; without validation and without `init`."""
    config = recipe.model_config()
    (root / "config.json").write_text(json.dumps(config.to_json()))
    data, source = recipe.data, f"the recipe's data, {recipe.data.prefix}"
    if not data.prefix or data.problems():
        source = f"random tokens ({data.prefix} is not here)" if data.prefix else "random tokens"
        length = recipe.train.sequence_length
        write_random_data(root / "random", config.vocab_size, tokens=max(2**16, 16 * length), longest=2 * length)
        data = DataConfig(prefix=str(root / "random"), split="1,0,0", attention=data.attention)
    train = replace(recipe.train, steps=warmup + iterations, eval_every=0)
    schedule = replace(recipe.schedule, warmup_steps=0, warmup_fraction=0.0, decay_steps=0)
    name = Path(recipe.model or recipe.init)
    name = name.parent if name.name == "config.json" else name.with_suffix("") if name.suffix == ".json" else name
    fit = replace(
        recipe, model=str(root / "config.json"), init="", tokenizer="", data=data, train=train, schedule=schedule
    )
    peak = (recipe.log.peak_tflops, "given as log.peak_tflops") if recipe.log.peak_tflops else (0.0, "")
    return Measurement(fit, kind, root, iterations, warmup, name.name, source, memory_limit, peak)


def run_measurement(measurement: Measurement, processes: int, launch: LaunchConfig | None = None) -> Result | None:
    """Runs it in new processes, or in this one where it is one of several already; None where this is not rank 0.

    Raises:
        UserError: out of memory.
        ProcessFailed: a process failed for another reason.
    """
    for name in (OUT_OF_MEMORY, "result.json"):
        (measurement.root / name).unlink(missing_ok=True)
    try:
        if is_launched_externally():
            run_in_process_group(run_worker, measurement)
        else:
            run_processes(run_worker, measurement, processes, launch=launch)
    except ProcessFailed as error:
        if (note := measurement.root / OUT_OF_MEMORY).exists():
            raise UserError(note.read_text(), "lower train.micro_batch, or set recompute.mode") from None
        if "SIGKILL" in str(error):
            raise UserError(f"out of memory, it seems: {error}", "lower train.micro_batch") from None
        raise
    found = measurement.root / "result.json"
    return Result(**json.loads(found.read_text())) if found.exists() else None


def ran_out_of_memory(measurement: Measurement) -> bool:
    """Whether a process of the measurement ran out of memory."""
    return (measurement.root / OUT_OF_MEMORY).exists()


def run_worker(measurement: Measurement) -> None:
    """What each process does."""
    try:
        with (
            MemoryGuard(measurement) if measurement.memory_limit and measurement.device_kind == "cpu" else nullcontext()
        ):
            measure(measurement)
    except (RuntimeError, MemoryError) as error:
        cpu = "can't allocate memory" in str(error)
        if not (cpu or isinstance(error, (torch.OutOfMemoryError, MemoryError))):
            raise
        (measurement.root / OUT_OF_MEMORY).write_text("out of memory")
        raise UserError("out of memory", "lower train.micro_batch, or set recompute.mode") from None


def measure(measurement: Measurement) -> None:
    """Trains warm-up and measured iterations; the first process writes the result."""
    recipe, kind = measurement.recipe, measurement.device_kind
    ranks = Ranks.build(recipe.parallel, kind)
    trainer = build_trainer(recipe, ranks, local_rank=int(os.environ.get("LOCAL_RANK", "0")), device_kind=kind)
    initialize_randomly(trainer, recipe.seed)
    seconds: list[float] = []
    for step in range(measurement.warmup + measurement.iterations):
        if step == measurement.warmup:
            wait_for_all_ranks(ranks, kind)
            began = time.perf_counter()
        start = time.perf_counter()
        result = trainer.step()
        seconds.append(time.perf_counter() - start)
    synchronize(kind)
    each = (time.perf_counter() - began) / measurement.iterations
    memory = max_over_ranks(peak_memory(kind), ranks)
    config, device = trainer.config, trainer.device
    del trainer  # the peak's matrices need room
    peak = find_peak(measurement, device)
    if ranks.first:
        row = build_result(
            measurement, config, ranks, each, peak, first_step_seconds=seconds[0], memory=memory, last=result
        )
        (measurement.root / "result.json").write_text(json.dumps(asdict(row)))


def build_result(
    measurement: Measurement, config: LlamaConfig, ranks: Ranks, seconds: float, peak: tuple[float, str], *,
    first_step_seconds: float, memory: float, last: StepResult,
) -> Result:  # fmt: skip
    """The table row computed from the seconds of a step."""
    recipe, train, recompute = measurement.recipe, measurement.recipe.train, measurement.recipe.recompute
    samples = train.global_batch / seconds / ranks.world
    tokens = samples * train.sequence_length
    figures = throughput(
        config, tokens, last.attended_length, peak_tflops=peak[0] or None,
        layers=recompute.layers(recipe.parallel, config.num_hidden_layers), keep=recompute.kept,
    )  # fmt: skip
    return Result(
        device=device_description(measurement.device_kind), model=measurement.model,
        layout=describe_layout(recipe.parallel, ranks.world),
        processes=ranks.world, dtype=train.dtype, micro_batch=train.micro_batch, global_batch=train.global_batch,
        sequence_length=train.sequence_length, recompute=recompute.mode,
        data=measurement.data, iterations=measurement.iterations,
        seconds_per_step=seconds, samples_per_second_per_device=samples, tokens_per_second_per_device=tokens,
        tflops=figures.tflops, mfu=figures.mfu, mfu_full=figures.mfu_full, hfu=figures.hfu, peak_tflops=peak[0],
        peak_source=peak[1], first_step_seconds=first_step_seconds, peak_memory_gb=memory / 1e9, last_loss=last.lm_loss,
        compiled=train.compile,
    )  # fmt: skip


def find_peak(measurement: Measurement, device: torch.device) -> tuple[float, str]:
    """The device's peak as given, as its data sheet has it, or measured now by all processes at once."""
    dtype = measurement.recipe.train.dtype
    if measurement.peak[0]:
        return measurement.peak
    name = device_name(device.type)
    if sheet := peak_flops(name, dtype):
        return sheet / 1e12, f"the data sheet of {name}"
    if dtype == "float16" and device.type == "cpu":
        return 0.0, "float16 has no matmul worth measuring on a CPU"
    peak = matmul_peak(device, dtype)
    return peak.tflops, f"the fastest {dtype} matmul measured here, {peak.size} x {peak.size} by {peak.how}"


@torch.no_grad()
def initialize_randomly(trainer: Trainer, seed: int) -> None:
    """Normal weights drawn on the device: quicker than `InitialWeights`, but different in each layout."""
    torch.manual_seed(seed)
    for part in trainer.parts:
        for parameter in part.parameters():
            held = local(parameter)
            held.normal_(0.0, 0.02) if parameter.dim() > 1 else held.fill_(1.0)
    trainer.optimizer.load(None, updates=0)


def wait_for_all_ranks(ranks: Ranks, kind: str) -> None:
    """A barrier, so that no process's time includes another's start-up."""
    synchronize(kind)
    ranks.barrier()


def max_over_ranks(value: float, ranks: Ranks) -> float:
    """The largest `value` among the processes; through gloo, on the CPU."""
    tensor = torch.tensor(value, dtype=torch.float64)
    if ranks.mesh is not None:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.item()


class MemoryGuard:
    """Ends this process when its resident memory passes the measurement's limit; a thread checks every 20 ms."""

    def __init__(self, measurement: Measurement) -> None:
        self.measurement, self._done = measurement, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        limit = self.measurement.memory_limit * 1e9
        while not self._done.wait(0.02):
            if (used := resident_memory()) > limit:
                text = (
                    f"out of memory: a process held {used / 1e9:.2f} GB, more than {self.measurement.memory_limit:.2f}"
                )
                (self.measurement.root / OUT_OF_MEMORY).write_text(text)
                os._exit(1)

    def __enter__(self) -> MemoryGuard:
        self._thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()
