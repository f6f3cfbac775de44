"""What the training loop is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Interval

from arriero.common.errors import UserError
from arriero.common.ranges import range_problems
from arriero.distributed.parallel.float8 import Float8Recipe

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
