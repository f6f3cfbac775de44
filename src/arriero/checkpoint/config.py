"""When a run is saved, and what is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Interval

from arriero.common.errors import UserError
from arriero.common.ranges import range_problems


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and what to keep."""

    every: Annotated[int, Interval(ge=0, le=1_000_000_000)] = 1000
    """Steps between checkpoints; 0 saves only the last step."""
    keep: Annotated[int, Interval(ge=0, le=1_000_000)] = 2
    """Newest checkpoints to keep; 0 keeps all."""
    keep_every: Annotated[int, Interval(ge=0, le=1_000_000_000)] = 0
    """Checkpoints of steps that are a multiple of this are kept for good; 0 for none."""
    asynchronous: bool = True
    """Write while training goes on, from a copy in the CPU's memory as large as the state; false holds the step up."""
    retries: Annotated[int, Interval(ge=0, le=1000)] = 2
    """How often a save that failed is tried again before the run goes on without it."""

    def problems(self) -> list[UserError]:
        """All that is impossible about it."""
        found = range_problems(self, "checkpoint.{}".format)
        if self.keep_every and not self.keep:
            found.append(UserError("checkpoint.keep_every has no effect: keep 0 keeps all", "leave one of them out"))
        return found
