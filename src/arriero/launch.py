"""Starting the processes of a run: one a device, by torch's own elastic agent, forked after torch is imported.

Under torchrun or srun the processes are there already, and nothing is started.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from arriero.device import process_group_backend, share_cores, tune_allocator
from arriero.errors import EXIT_USAGE, UserError


@dataclass(frozen=True)
class LaunchConfig:
    """Where the processes of this run are started; it says nothing about what they compute."""

    nproc_per_node: int = 0
    """Processes on this machine; 0 means one a device, and on the CPU one a tensor-parallel rank."""


@dataclass(frozen=True)
class Place:
    """Where a process stands among all, as torchrun tells it."""

    rank: int = 0
    local_rank: int = 0
    world: int = 1
    local_world: int = 1

    @classmethod
    def from_environment(cls) -> Place:
        """Reads RANK and its kin; a lone process without them."""
        get = os.environ.get
        world = int(get("WORLD_SIZE", "1"))
        return cls(int(get("RANK", "0")), int(get("LOCAL_RANK", "0")), world, int(get("LOCAL_WORLD_SIZE", str(world))))


def started_by_another() -> bool:
    """Whether torchrun or its like has started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def run_processes(function: Callable[[Any], None], argument: Any, processes: int) -> None:
    """Calls `function(argument)` in each of `processes` new processes and waits for all.

    The first failure ends the others. A UserError in a process is raised here as itself.

    Raises:
        UserError: a process raised one.
        RuntimeError: a process failed otherwise; the text names it and holds its traceback.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig as ElasticConfig
    from torch.distributed.launcher.api import elastic_launch

    config = ElasticConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, run_id="arriero", rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=0, monitor_interval=0.1, start_method="fork",
    )  # fmt: skip
    try:
        elastic_launch(config, _entry)(function, argument)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        message = failure.message
        if failure.exitcode == EXIT_USAGE:
            raise UserError(message) from None
        signal = f", killed by {failure.signal_name()}" if failure.exitcode < 0 else ""
        raise RuntimeError(f"process {rank} failed (exit {failure.exitcode}{signal}):\n{message}") from None


def _entry(function: Callable[[Any], None], argument: Any) -> None:
    """What a started process runs: `function`, its error written where the agent finds it."""
    try:
        in_process_group(function, argument)
    except BaseException as error:
        user = isinstance(error, UserError)
        message = str(error) if user else traceback.format_exc()
        reply = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        file = os.environ.get("TORCHELASTIC_ERROR_FILE")
        if file:
            with open(file, "w", encoding="utf-8") as handle:
                json.dump({"message": reply}, handle)
        os._exit(EXIT_USAGE if user else 1)  # not sys.exit: the others may hang in a collective at clean-up


def in_process_group(function: Callable[[Any], None], argument: Any) -> None:
    """Calls `function(argument)` as the process that the environment says, within the group of all."""
    import torch.distributed as dist

    place = Place.from_environment()
    tune_allocator()
    share_cores(place.local_world)
    if place.world == 1:
        function(argument)
        return
    kind = getattr(argument, "device_kind", "cpu")
    dist.init_process_group(process_group_backend(kind), timeout=timedelta(minutes=10))
    try:
        function(argument)
        sys.stdout.flush()
    finally:
        dist.destroy_process_group()
