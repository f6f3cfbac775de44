"""What the environment variables of torchrun and of arriero's launcher give: ranks, and the number of restarts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from arriero.common.environment import environment_number
from arriero.common.errors import UserError

ROUND_VARIABLE = "ARRIERO_ROUND"
"""Set in workers of arriero's own launcher: the rendezvous round, 0 at first, more after each restart of the job."""
MAX_PROCESSES = 1_000_000


@dataclass(frozen=True)
class RankInfo:
    """The rank of a process among all, as torchrun's environment variables give it."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1

    @property
    def single_node(self) -> bool:
        """Whether all processes of the run are known to be on this machine."""
        return self.local_world_size == self.world_size and "LOCAL_WORLD_SIZE" in os.environ

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> RankInfo:
        """Reads RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; without the first two, the only process.

        Raises:
            UserError: one is missing, not a number, or inconsistent with the others.
        """
        if not is_launched_externally(environment):
            return cls()
        fix = "torchrun sets RANK, WORLD_SIZE and the like; if nothing has started several processes, unset them all"
        number = partial(environment_number, environment, fix=fix)
        world_size = number("WORLD_SIZE", 1, MAX_PROCESSES)
        local_world_size = number("LOCAL_WORLD_SIZE", 1, world_size, default=world_size)
        local_default = 0 if world_size == 1 else None
        rank = number("RANK", 0, world_size - 1)
        local_rank = number("LOCAL_RANK", 0, local_world_size - 1, default=local_default)
        if world_size > 1:
            number("MASTER_PORT", 1, 2**16 - 1)
            if not environment.get("MASTER_ADDR", "").strip():
                raise UserError("MASTER_ADDR is missing in the environment", fix)
        return cls(rank, local_rank, world_size, local_world_size)


def is_launched_externally(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun or a similar launcher has started this process as one of several."""
    return "RANK" in environment or "WORLD_SIZE" in environment


def uses_agent_store(environment: Mapping[str, str]) -> bool:
    """Whether arriero's launcher or torchrun has opened the store already."""
    return environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def restart_count() -> int:
    """0 in the first start of a job, more after each restart that a loss made necessary."""
    count = environment_number(os.environ, ROUND_VARIABLE, 0, 10**9, fix=f"unset {ROUND_VARIABLE}", default=-1)
    return count if count >= 0 else elastic_variable("RESTART_COUNT")


def elastic_variable(name: str) -> int:
    """The number in TORCHELASTIC_`name`; 0 where torch's agent has not set it."""
    full = f"TORCHELASTIC_{name}"
    return environment_number(os.environ, full, 0, 10**9, fix=f"torchrun sets it; elsewhere unset {full}", default=0)
