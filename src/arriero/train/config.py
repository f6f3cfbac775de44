"""The recipe's sections on training: batch, optimizer, schedule, log, watchdog; and the options of one start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro
from annotated_types import Interval

from arriero.common.errors import UserError
from arriero.common.ranges import range_problems
from arriero.common.registry import Registry
from arriero.distributed.launch.config import LaunchConfig
from arriero.distributed.parallel.config import Float8Recipe

MIN_WATCH_SECONDS = 0.1
"""A shorter limit of a step's time would write stacks at every step."""

OPTIMIZERS: Registry[Any] = Registry("optim.name", {"adamw": "arriero.train.optim:AdamW"})
"""Optimizers by name: subclasses of train/optim.py's Optimizer."""
SCHEDULES: Registry[Callable[[ScheduleConfig, int, int, int], float]] = Registry(
    "schedule.shape", {name: f"arriero.train.schedule:{name}" for name in ("cosine", "linear", "constant", "wsd")}
)
"""Learning-rate schedules by name: see train/schedule.py."""
DType = Literal["float32", "bfloat16", "float16", "float64"]


@dataclass(frozen=True)
class TrainConfig:
    """How long, how much at a time, in which precision."""

    steps: Annotated[int, Interval(ge=1, le=1_000_000_000)] = 1000
    """Optimizer steps of the whole run. Raising it on resume changes no earlier sample."""
    sequence_length: Annotated[int, Interval(ge=1, le=2**24)] = 2048
    """Tokens of a sample."""
    global_batch: Annotated[int, Interval(ge=1, le=2**20)] = 64
    """Samples a step, over all processes and micro-batches."""
    micro_batch: Annotated[int, Interval(ge=1, le=2**20)] = 8
    """Samples in one forward pass of one data-parallel rank; the rest of the batch is accumulated."""
    dtype: DType = "bfloat16"
    """float32; bfloat16 or float16: parameters in flight, over float32 masters, float16 with a dynamic loss scale;
    float64 for proofs."""
    float8: Float8Recipe = "none"
    """bfloat16 only: the decoder layers' matmuls in 8-bit floats, by torchao's recipe of that name. It is faster on
    GPUs that have units for it; elsewhere it is emulated, slower, with the same rounding."""
    compile: bool = False
    """Compile each decoder layer with torch.compile: fewer and larger kernels. The first step and the first validation
    then take longer, by 10 s to a minute; all layers share the result, and a later start finds it in torch's cache. It
    pays on a GPU; on a CPU arriero's own operators are faster: arriero bench --sweep says how much. The numbers agree
    with those of a run without it to rounding, as a changed layout's do."""
    grad_clip: Annotated[float, Interval(ge=0, le=1e6)] = 1.0
    """The gradient's global L2 norm is cut down to this; 0 clips nothing."""
    on_nonfinite: Literal["skip", "stop", "rewind"] = "skip"
    """A non-finite loss or gradient: skip that update on all processes; save and stop the run; or go back to the last
    checkpoint and leave out the batches since. float16 always skips: its loss scale needs overflows."""
    on_spike: Literal["ignore", "skip", "stop", "rewind"] = "ignore"
    """Likewise a loss that stands out from the last 100."""
    spike_factor: Annotated[float, Interval(gt=0, le=1e6)] = 10.0
    """A loss stands out above the running median by so many robust standard deviations."""
    check_replicas_every: Annotated[int, Interval(ge=0, le=1_000_000_000)] = 100
    """Steps between two comparisons of what several processes hold alike; a difference stops the run. 0: none."""
    initial_loss_scale: Annotated[float, Interval(ge=1, le=2**64)] = 65536.0
    """float16 only: the first loss scale."""
    loss_scale_window: Annotated[int, Interval(ge=1, le=1_000_000_000)] = 1000
    """float16 only: clean steps before the scale doubles."""
    loss_scale_hysteresis: Annotated[int, Interval(ge=1, le=1_000_000)] = 2
    """float16 only: overflows before the scale halves."""
    eval_every: Annotated[int, Interval(ge=0, le=1_000_000_000)] = 0
    """Steps between validations; 0 for none. The last step is always validated when this is set."""
    eval_batches: Annotated[int, Interval(ge=1, le=1_000_000)] = 10
    """Global batches of the validation split that one validation reads, always the same ones."""

    def problems(self, data_parallel: int) -> list[UserError]:
        """All that is impossible, `data_parallel` ranks given."""
        if found := range_problems(self, "train.{}".format):
            return found
        unit = self.micro_batch * data_parallel
        if self.global_batch % unit:
            below, above = self.global_batch // unit * unit, -(-self.global_batch // unit) * unit
            fits = f"{below} or {above}" if below else str(above)
            found.append(
                UserError(
                    f"train.global_batch {self.global_batch} is not a multiple of micro_batch {self.micro_batch} x "
                    f"{data_parallel} data-parallel ranks",
                    f"use train.global_batch {fits}, or another micro_batch",
                )
            )
        return found

    def accumulation(self, data_parallel: int) -> int:
        """Micro-batches a step on each data-parallel rank."""
        return self.global_batch // max(1, self.micro_batch * data_parallel)


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its constants."""

    name: Annotated[str, OPTIMIZERS] = "adamw"
    """The update rule: adamw, or one that a plugin registers."""
    betas: tuple[Annotated[float, Interval(ge=0, lt=1)], Annotated[float, Interval(ge=0, lt=1)]] = (0.9, 0.95)
    """Decay of the first and the second moment."""
    eps: Annotated[float, Interval(ge=1e-30, le=1)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Interval(ge=0, le=10)] = 0.1
    """Decoupled decay of matrices; norms and biases are exempt."""
    offload: bool = False
    """Keep moments and masters in the CPU's memory and update there: slower, and room for a larger model."""

    def problems(self) -> list[UserError]:
        """All that is impossible about it."""
        return range_problems(self, "optim.{}".format)


@dataclass(frozen=True)
class ScheduleConfig:
    """Warm-up, then a shape that ends at `min_lr`."""

    shape: Annotated[str, SCHEDULES] = "cosine"
    """After warm-up: cosine or linear down to min_lr; constant; wsd: constant, then linear over the last part; or one
    that a plugin registers."""
    lr: Annotated[float, Interval(ge=0, le=10)] = 3e-4
    """The highest learning rate."""
    min_lr: Annotated[float, Interval(ge=0, le=10)] = 3e-5
    """The lowest, after the decay."""
    warmup_steps: Annotated[int, Interval(ge=0, le=1_000_000_000)] = 0
    """Steps of linear warm-up from 0; excludes warmup_fraction."""
    warmup_fraction: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Warm-up as a part of decay_steps, 0 to 1; excludes warmup_steps."""
    decay_steps: Annotated[int, Interval(ge=0, le=1_000_000_000)] = 0
    """The step at which min_lr is reached; 0 means the last step of the run."""
    wsd_decay_fraction: Annotated[float, Interval(gt=0, le=1)] = 0.1
    """wsd only: the part of decay_steps that the final decay takes."""

    def problems(self) -> list[UserError]:
        """All that is impossible about it."""
        found = range_problems(self, "schedule.{}".format)
        if self.warmup_steps and self.warmup_fraction:
            found.append(UserError("schedule.warmup_steps and schedule.warmup_fraction are both set", "keep one"))
        if self.min_lr > self.lr:
            fix = "give 0 <= min_lr <= lr"
            found.append(UserError(f"schedule.min_lr {self.min_lr} and schedule.lr {self.lr} do not fit", fix))
        return found


@dataclass(frozen=True)
class LogConfig:
    """What is printed."""

    style: Literal["arriero", "megatron"] = "arriero"
    """arriero: AscendSpeed's fields and more; megatron: Megatron-LM's exact line, for scripts that read it."""
    every: Annotated[int, Interval(ge=1, le=1_000_000_000)] = 1
    """Steps between printed lines; metrics.jsonl has every step."""
    peak_tflops: Annotated[float, Interval(ge=0, le=1e6)] = 0.0
    """Matmul peak of one device in TFLOP/s, for MFU; 0 takes the known value of the device, if any."""

    profile: str = ""
    """Steps to profile, first and last, from 1: "10:13" writes profile/rank-N.json (Chrome's format) into the run;
    --profile steps=10:13 is the same."""

    def problems(self) -> list[UserError]:
        """All that is impossible about it."""
        return range_problems(self, "log.{}".format)


@dataclass(frozen=True)
class WatchConfig:
    """When a step counts as stuck, and a process as slow."""

    seconds: Annotated[float, Interval(ge=0, le=1e6)] = 300.0
    """A step that takes longer has every process write its stacks to stacks/ in the run directory; 0 turns it off."""
    times: Annotated[float, Interval(ge=0, le=1e6)] = 20.0
    """Likewise a step that takes this many times the median of the last ones, and more than 30 seconds; 0: not."""
    every: Annotated[int, Interval(ge=0, le=1_000_000_000)] = 10
    """Steps between two comparisons of the processes' own time; 0 for none."""
    slow: Annotated[float, Interval(gt=1, le=1e6)] = 1.5
    """A process is called slow in the log when its own time is this many times the median's."""

    def problems(self) -> list[UserError]:
        """All that is impossible about it."""
        found = range_problems(self, "watch.{}".format)
        if not found and 0 < self.seconds < MIN_WATCH_SECONDS:
            fix = f"give a number from {MIN_WATCH_SECONDS:g} on, or 0 to turn it off"
            found.append(UserError(f"watch.seconds is {self.seconds:g}", fix))
        return found


@dataclass(frozen=True)
class RunOptions:
    """Options of one start of a run, which are not part of its recipe."""

    resume: str = ""
    """A run directory to continue from its newest checkpoint that is whole, or one of its checkpoints; the run's own
    recipe is used where none is named. "auto" continues `out` where it holds a checkpoint, and begins it otherwise."""
    allow_change: tuple[str, ...] = ()
    """On resume: keys that may differ from the run that is continued although they make it another run."""
    stop_after: str = ""
    """Save and stop after this long, such as 55m, 90s or 11.5h; the exit code is then 75."""
    verify_layout: bool = False
    """Train nothing: prove on the CPU, at reduced width in float64, that the layout gives one process's numbers."""
    launch: Annotated[LaunchConfig, tyro.conf.arg(name="")] = field(default_factory=LaunchConfig)
