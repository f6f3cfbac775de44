"""How a run's model and batches are spread over processes, and what is impossible about it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.metadata import version
from typing import Annotated, Literal

from annotated_types import Interval, Len

from arriero.common.errors import UserError
from arriero.common.ranges import range_problems
from arriero.model.config import LlamaConfig

Schedule = Literal[
    "1F1B", "GPipe", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"
]
LOOPED = ("Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble")  # several stages a rank, rank r has r, r + P, ...
V_SHAPED = ("ZBVZeroBubble", "DualPipeV")  # two stages a rank, rank r has r and 2P - 1 - r
ZERO_BUBBLE = ("InterleavedZeroBubble", *V_SHAPED)  # the backward pass is split: inputs first, weights later


@dataclass(frozen=True)
class ParallelConfig:
    """How the model is spread over the processes. The data-parallel degree is what remains of their number."""

    tensor_parallel: Annotated[int, Interval(ge=1, le=65_536)] = 1
    """Processes that share each matrix; it must divide the heads, the key-value heads and the feed-forward width."""
    sequence_parallel: bool = False
    """Tensor-parallel processes also share the positions between the matrices: less memory, the same traffic."""
    pipeline_parallel: Annotated[int, Interval(ge=1, le=65_536)] = 1
    """Groups of processes that hold consecutive layers; micro-batches flow through them."""
    pipeline_schedule: Schedule = "1F1B"
    """The order of forward and backward passes. 1F1B and GPipe have one stage a rank; Interleaved1F1B, LoopedBFS and
    InterleavedZeroBubble `virtual_stages`; ZBVZeroBubble and DualPipeV two."""
    virtual_stages: Annotated[int, Interval(ge=1, le=1000)] = 1
    """Stages that each pipeline rank holds, for the schedules that interleave."""
    pipeline_layers: Annotated[tuple[Annotated[int, Interval(ge=1, le=1000)], ...], Len(0, 1000)] = ()
    """Layers of each stage in order; empty divides them as evenly as possible, more to the earlier stages."""
    context_parallel: Annotated[int, Interval(ge=1, le=65_536)] = 1
    """Processes that share each sequence's positions."""
    context_method: Literal["all-gather", "ulysses"] = "all-gather"
    """all-gather: keys and values are gathered, positions balanced in a zigzag; ulysses: heads are exchanged for
    positions, so the degree must divide the key-value heads of a tensor-parallel rank."""
    zero_stage: Literal[1, 2, 3] = 2
    """What data-parallel ranks share: 1 optimizer state, 2 gradients too, 3 parameters too. One rank shares nothing."""
    zero_group: Annotated[int, Interval(ge=0, le=65_536)] = 0
    """Data-parallel ranks that share one copy (hybrid sharding); 0 means all of them."""

    @property
    def model_parallel(self) -> int:
        """Processes that together hold one copy of the model and work on one micro-batch."""
        return max(1, self.tensor_parallel * self.pipeline_parallel * self.context_parallel)

    @property
    def stages_per_rank(self) -> int:
        """Pipeline stages that each rank holds."""
        return 2 if self.pipeline_schedule in V_SHAPED else self.virtual_stages

    @property
    def stages(self) -> int:
        """Pipeline stages in all."""
        return self.pipeline_parallel * self.stages_per_rank

    def problems(
        self, model: LlamaConfig, processes: int, *, sequence_length: int, micro_batches: int
    ) -> list[UserError]:
        """All that is impossible about this layout of `model` on `processes`, with `micro_batches` a step and rank."""
        if found := range_problems(self, "parallel.{}".format):
            return found
        found = _tensor_problems(self, model) + _pipeline_problems(self, model, processes, micro_batches)
        found += _context_problems(self, model, sequence_length)
        unit = self.model_parallel
        if processes % unit:
            near = max(unit, processes // unit * unit)
            parts = (
                f"tensor {self.tensor_parallel} x pipeline {self.pipeline_parallel} x context {self.context_parallel}"
            )
            fix = f"start a multiple of {unit}, such as --nproc-per-node {near}"
            found.append(UserError(f"{processes} processes do not divide into groups of {unit} ({parts})", fix))
        elif self.zero_group < 0 or (self.zero_group and (processes // unit) % self.zero_group):
            data = processes // unit
            fix = f"use one of {', '.join(map(str, divisors(data)))}, or 0 for all"
            found.append(UserError(f"parallel.zero_group {self.zero_group} does not divide {data} data ranks", fix))
        return found


def divisors(number: int) -> list[int]:
    """All whole numbers that divide it, ascending."""
    low = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return low + [number // n for n in reversed(low) if n * n != number]


def _tensor_problems(config: ParallelConfig, model: LlamaConfig) -> list[UserError]:
    widths = {
        "attention heads": model.num_attention_heads,
        "key-value heads": model.num_key_value_heads,
        "feed-forward columns": model.intermediate_size,
    }
    possible = divisors(math.gcd(*widths.values()))
    fix = f"use one of {', '.join(map(str, possible))}"
    found = [
        UserError(f"parallel.tensor_parallel {config.tensor_parallel} does not divide the {width} {what}", fix)
        for what, width in widths.items()
        if width % config.tensor_parallel
    ]
    if config.sequence_parallel and config.tensor_parallel == 1:
        fix = "set parallel.tensor_parallel above 1, or leave sequence_parallel out"
        found.append(UserError("parallel.sequence_parallel has no effect without tensor parallelism", fix))
    return found


def _pipeline_problems(
    config: ParallelConfig, model: LlamaConfig, processes: int, micro_batches: int
) -> list[UserError]:
    schedule, ranks, found = config.pipeline_schedule, config.pipeline_parallel, []
    if ranks == 1:
        if config.virtual_stages > 1 or config.pipeline_layers or schedule != "1F1B":
            fix = "set parallel.pipeline_parallel above 1, or leave the others out"
            what = "parallel.pipeline_schedule, virtual_stages and pipeline_layers"
            found.append(UserError(f"{what} have no effect without a pipeline", fix))
        return found
    if config.virtual_stages > 1 and schedule not in LOOPED:
        fix = f"leave virtual_stages out, or use one of {', '.join(LOOPED)}"
        found.append(UserError(f"parallel.virtual_stages has no effect with the schedule {schedule}", fix))
    if schedule in LOOPED and config.virtual_stages == 1:
        fix = "set parallel.virtual_stages to 2 or more, or use 1F1B"
        found.append(UserError(f"the schedule {schedule} needs several stages a rank", fix))
    if config.stages > model.num_hidden_layers:
        fix = f"use at most {model.num_hidden_layers} stages"
        found.append(UserError(f"{config.stages} stages for {model.num_hidden_layers} layers", fix))
    layers = config.pipeline_layers
    if layers and (len(layers) != config.stages or sum(layers) != model.num_hidden_layers or min(layers) < 1):
        fix = f"give {config.stages} positive numbers that sum to {model.num_hidden_layers}"
        found.append(UserError(f"parallel.pipeline_layers {list(layers)} does not fit", fix))
    if schedule in ZERO_BUBBLE and config.zero_stage == 3 and processes > config.model_parallel:
        # torch frees the parameters between the two halves of the backward pass: gradients come out wrong, silently
        found.append(UserError(f"{schedule} with parallel.zero_stage 3 loses gradients", "use zero_stage 1 or 2"))
    if schedule in ZERO_BUBBLE and torch_version() < (2, 13):
        # its split backward pass stumbles over operators written in Python, such as the head with its loss
        fix = "use 1F1B or Interleaved1F1B, or a newer torch"
        found.append(UserError(f"{schedule} needs torch 2.13 or newer", fix))
    least = config.stages if schedule in ("1F1B", "DualPipeV") else 1
    rounds = max(1, micro_batches // ranks) if schedule in ("Interleaved1F1B", "InterleavedZeroBubble") else 1
    if micro_batches < least or micro_batches % rounds:
        need = f"at least {least}" if micro_batches < least else f"a multiple of {rounds}"
        fix = f"make global_batch / (micro_batch x data ranks) {need}"
        found.append(UserError(f"the schedule {schedule} cannot run {micro_batches} micro-batches", fix))
    return found


def torch_version() -> tuple[int, ...]:
    """Major and minor number of the torch that is installed, which need not be imported for this."""
    return tuple(int(n) for n in version("torch").split(".")[:2])


def _context_problems(config: ParallelConfig, model: LlamaConfig, length: int) -> list[UserError]:
    found, degree = [], config.context_parallel
    if degree == 1 and config.context_method != "all-gather":
        fix = "set parallel.context_parallel above 1, or leave context_method out"
        found.append(UserError("parallel.context_method has no effect without context parallelism", fix))
    pieces = 2 * degree if config.context_method == "all-gather" else degree
    if degree > 1 and length % pieces:
        fix = f"use {length // pieces * pieces or pieces}"
        found.append(UserError(f"train.sequence_length {length} does not divide into {pieces} pieces", fix))
    if config.sequence_parallel and (length // degree) % config.tensor_parallel:
        fix = f"make it a multiple of {config.tensor_parallel * degree}"
        found.append(UserError(f"train.sequence_length {length} does not divide for sequence_parallel", fix))
    if degree > 1 and config.context_method == "ulysses":
        heads = model.num_key_value_heads // config.tensor_parallel
        if heads % degree:
            fix = 'use context_method "all-gather", or a degree that divides them'
            found.append(UserError(f"parallel.context_parallel {degree} does not divide {heads} key-value heads", fix))
    if degree > 1 and model.rope_scaling.rope_type == "dynamic":
        found.append(UserError("context parallelism with dynamic rope_scaling is not supported", "use another layout"))
    return found


Float8Recipe = Literal["none", "tensorwise", "rowwise", "rowwise_with_gw_hp"]


@dataclass(frozen=True)
class RecomputeConfig:
    """Which layers compute their activations twice to save memory."""

    mode: Literal["none", "selective", "full", "first"] = "none"
    """none; full: every layer; first: the first layers of each stage, see first_layers; selective: in every layer all
    but the operators in `keep`."""
    first_layers: Annotated[tuple[Annotated[int, Interval(ge=0, le=1000)], ...], Len(0, 1000)] = ()
    """first only: recomputed layers of each stage in order, such as 3 2 1 0; one number holds for every stage."""
    keep: tuple[Literal["matmul", "attention"], ...] = ("matmul", "attention")
    """selective only: operators whose results are kept."""

    def layers(self, parallel: ParallelConfig, layers: int) -> int:
        """How many of the model's `layers` are recomputed, all stages together."""
        if self.mode != "first":
            return 0 if self.mode == "none" else layers
        stages = [len(stage) for stage in stage_layers(parallel, layers)]
        counts = self.first_layers * (len(stages) if len(self.first_layers) == 1 else 1)
        return sum(min(pair) for pair in zip(counts, stages, strict=True))

    @property
    def kept(self) -> tuple[str, ...]:
        """The operators whose results a recomputed layer keeps."""
        return self.keep if self.mode == "selective" else ()

    def problems(self, parallel: ParallelConfig) -> list[UserError]:
        """All that is impossible, or without effect, under this layout."""
        found = []
        if (self.mode == "first") != bool(self.first_layers):
            fix = 'set both: mode = "first" and first_layers = [3, 2, 1, 0]'
            found.append(UserError("recompute.first_layers and recompute.mode do not fit", fix))
        elif self.first_layers and len(self.first_layers) not in (1, parallel.stages):
            fix = f"give one number, or {parallel.stages}"
            found.append(UserError(f"recompute.first_layers has {len(self.first_layers)} numbers", fix))
        if self.mode == "selective" and not self.keep:
            found.append(UserError("recompute.keep is empty", 'name operators to keep, or use mode = "full"'))
        if self.mode == "selective" and parallel.pipeline_parallel > 1 and parallel.pipeline_schedule in ZERO_BUBBLE:
            what = f"selective recomputation does not work with {parallel.pipeline_schedule}"
            found.append(UserError(what, 'use recompute.mode "full" or another schedule'))
        return found


def stage_layers(config: ParallelConfig, layers: int) -> list[range]:
    """The layers of each stage, in order."""
    counts = list(config.pipeline_layers)
    if not counts:
        each, more = divmod(layers, config.stages)
        counts = [each + (i < more) for i in range(config.stages)]
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]
