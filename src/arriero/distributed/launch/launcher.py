"""Starting the processes of a run: one a device, by torch's own elastic agent, forked after torch is imported.

Under torchrun, or as tasks of srun, the processes are there already and nothing is started. In every case they first
agree on what they run (agreement.py), and a process that fails says so before the others are ended.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from annotated_types import Interval

from arriero.common.environment import environment_number
from arriero.common.errors import EXIT_USAGE, UserError, join_problems
from arriero.common.ranges import flag, range_problems
from arriero.distributed.launch import slurm
from arriero.distributed.launch.secret import Secret
from arriero.distributed.launch.worker import (
    ROUND,
    Place,
    in_process_group,
    leave,
    shares_agent_store,
    start_number,
    started_by_another,
)
from arriero.distributed.launch.worker_monitor import STOPPED_AFTER, Children

if TYPE_CHECKING:
    from arriero.distributed.launch.rendezvous import Meeting

__all__ = ["LaunchConfig", "Place", "ProcessFailed", "in_process_group", "leave", "run_processes", "start_number",
           "started_by_another", "take_place"]  # fmt: skip

T = TypeVar("T")


@dataclass(frozen=True)
class LaunchConfig:
    """Where the processes of this run are started; it says nothing about what they compute."""

    nproc_per_node: Annotated[int, Interval(ge=0, le=4096)] = 0
    """Processes on this machine; 0 means one a device, and on the CPU one a model-parallel rank."""
    nodes: Annotated[int, Interval(ge=0, le=65_536)] = 0
    """Machines; 0 takes NNODES, or 1."""
    node_rank: Annotated[int, Interval(ge=-1, lt=65_536)] = -1
    """This machine's number, from 0; -1 takes NODE_RANK. Node 0 is where --master-addr leads."""
    master_addr: str = ""
    """Address of node 0; empty takes MASTER_ADDR."""
    master_port: Annotated[int, Interval(ge=0, lt=65_536)] = 0
    """Port on node 0; 0 takes MASTER_PORT, or 29500."""
    secret_file: str = ""
    """File with the secret that all machines share, at least 16 bytes; empty takes ARRIERO_SECRET, or a file that node
    0 makes beside the run directory and removes at the end."""
    max_restarts: Annotated[int, Interval(ge=0, le=1_000_000)] = 0
    """How often the job starts again from its newest checkpoint after a process or a machine was lost."""
    join_timeout: Annotated[float, Interval(gt=0, le=1e6)] = 30.0
    """Seconds in which all machines and processes must have come, at the start and after a restart."""
    stop_timeout: Annotated[float, Interval(gt=0, le=1e6)] = 120.0
    """Seconds in which the processes must have saved and left after a signal asked them to; then they are ended."""
    collective_timeout: Annotated[float, Interval(gt=0, le=1e6)] = 600.0
    """Seconds that a process waits for the others in a collective before the job ends."""


class ProcessFailed(RuntimeError):  # noqa: N818 - what happened, not a fault of the caller
    """A process of the run failed; the text names it and holds its traceback."""


def resolve(config: LaunchConfig, environment: Mapping[str, str]) -> LaunchConfig:
    """Fills what was not given from MASTER_ADDR, MASTER_PORT, NNODES and NODE_RANK, or from srun.

    Raises:
        UserError: all impossible values, each with its fix.
    """
    problems: list[UserError] = []

    def number(name: str, default: int, most: int) -> int:
        try:
            return environment_number(environment, name, 0, most, fix="a whole number is wanted", default=default)
        except UserError as error:
            problems.append(error)
            return default

    if slurm.in_step(environment):  # one task a node, each of which starts processes: --nproc-per-node says so
        address, port = slurm.master(environment)
        number_here, tasks = slurm.place_in_step(environment)
        given = {"NNODES": str(tasks), "NODE_RANK": str(number_here)}
        told = {name: value for name, value in environment.items() if value}
        environment = {"MASTER_ADDR": address, "MASTER_PORT": str(port), **given, **told}
    counted = config.nodes or number("NNODES", 0, slurm.MOST_NODES)
    nodes = counted or 1
    rank = config.node_rank if config.node_rank >= 0 else number("NODE_RANK", -1, slurm.MOST_NODES)
    found = replace(
        config, nodes=nodes, node_rank=max(rank, 0) if nodes == 1 and not config.node_rank > 0 else rank,
        master_addr=config.master_addr or (environment.get("MASTER_ADDR", "") if nodes > 1 else "127.0.0.1"),
        master_port=config.master_port or (number("MASTER_PORT", 29500, 2**16 - 1) if nodes > 1 else 0),
    )  # fmt: skip
    problems += launch_problems(found, counted=bool(counted), given=config)
    if problems:
        raise join_problems(problems)
    return found if nodes > 1 else replace(found, node_rank=0, master_addr="127.0.0.1", master_port=0)


def launch_problems(config: LaunchConfig, *, counted: bool, given: LaunchConfig) -> list[UserError]:
    """All that is impossible about a resolved configuration; `given` is what stood on the command line."""
    found: list[UserError] = []
    idle = [
        f
        for f in ("node_rank", "master_addr", "master_port", "secret_file")
        if getattr(given, f) != getattr(LaunchConfig(), f)
    ]
    if idle and not counted:
        flags = ", ".join(map(flag, idle))
        found.append(UserError(f"{flags} without --nodes has no effect", "give --nodes N, the number of machines"))
    elif config.nodes < 1:
        found.append(UserError(f"--nodes is {config.nodes}", "give a whole number from 1"))
    elif config.nodes > 1 and config.node_rank < 0:
        found.append(UserError(f"--nodes {config.nodes} without --node-rank", "number the machines from 0"))
    elif config.node_rank >= config.nodes:
        fix = f"number the {config.nodes} machines from 0 to {config.nodes - 1}"
        found.append(UserError(f"--node-rank is {config.node_rank} of --nodes {config.nodes}", fix))
    if config.nodes > 1 and not config.master_addr:
        fix = "give every machine the address of node 0: --master-addr HOST, or MASTER_ADDR"
        found.append(UserError(f"--nodes {config.nodes} without --master-addr", fix))
    if 0 < config.master_port < 1024:
        found.append(UserError(f"--master-port is {config.master_port}", "give a port from 1024 to 65535"))
    return found + range_problems(config, flag)


def take_place(config: LaunchConfig, environment: MutableMapping[str, str]) -> LaunchConfig:
    """Finds out who starts the processes. Called once, first of all; a task of srun gets RANK and its kin here.

    Raises:
        UserError: impossible values, or flags that have no effect because the processes are there already.
    """
    if "RANK" not in environment and slurm.in_step(environment) and not config.nproc_per_node:
        environment.update(slurm.task_environment(environment))
    if not ("RANK" in environment or "WORLD_SIZE" in environment):
        return resolve(config, environment)
    names = ["nproc_per_node", "nodes", "node_rank", "master_addr", "master_port", "max_restarts"]
    names += ["secret_file"] if shares_agent_store(environment) else []  # torchrun's, which asks for none
    idle = [f for f in names if getattr(config, f) != getattr(LaunchConfig(), f)]
    if idle:
        flags = ", ".join("--" + f.replace("_", "-") for f in idle)
        fix = "leave them out, or start arriero without torchrun, once on each machine"
        raise UserError(f"{flags}: no effect, RANK says that the processes are started already", fix)
    Place.read(environment)
    return config


def run_processes(
    function: Callable[[Any], T], argument: Any, processes: int, *, launch: LaunchConfig | None = None,
    facts: Callable[[Any], dict[str, str]] | None = None, saves: bool = False, secret: Secret | None = None,
) -> list[T]:  # fmt: skip
    """Calls `function(argument)` in each of `processes` new processes of this machine; their results by local rank.

    The first failure ends the others, or starts them all again where `launch.max_restarts` allows. A UserError in a
    process is raised here as itself.

    Args:
        function: what each process does, within the group of all.
        argument: handed to it.
        processes: how many on this machine.
        launch: resolved; by default one machine.
        facts: of `argument`, what all processes must agree on.
        saves: whether `function` saves and returns when `signals.stop_wanted`; else a signal ends the processes.
        secret: what the machines share; by default what Secret.find finds for the working directory.

    Raises:
        UserError: a process raised one, or the machines did not come together.
        ProcessFailed: a process failed otherwise; the text names it and holds its traceback.
        Interrupted: a signal has ended the processes.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import rendezvous_handler_registry
    from torch.distributed.launcher.api import LaunchConfig as ElasticConfig
    from torch.distributed.launcher.api import elastic_launch

    from arriero.distributed.launch.error_files import ErrorFiles
    from arriero.distributed.launch.rendezvous import JobEnded, Meeting

    launch = launch or resolve(LaunchConfig(), {})
    meeting = Meeting(
        nodes=launch.nodes, node_rank=launch.node_rank, address=launch.master_addr, port=launch.master_port,
        processes=processes, join_seconds=launch.join_timeout, restarts=launch.max_restarts,
        secret=secret or Secret.find(launch.secret_file, os.environ, Path("arriero")),
    )  # fmt: skip
    rendezvous_handler_registry.register(meeting.name, lambda _: meeting)
    error_files = ErrorFiles()
    config = ElasticConfig(
        min_nodes=launch.nodes, max_nodes=launch.nodes, nproc_per_node=processes, run_id="arriero",
        rdzv_backend=meeting.name, max_restarts=launch.max_restarts, monitor_interval=0.1, start_method="fork",
        signals_to_handle="SIGQUIT",  # Children takes the others
        logs_specs=error_files,
    )  # fmt: skip
    children = Children(processes, launch.stop_timeout, saves=saves)
    hush_agent()

    def begin() -> None:
        children.here()
        os.environ[ROUND] = str(meeting.round)

    try:
        try:
            results = elastic_launch(config, _entry)(function, argument, launch, facts, begin)
            return [results[rank] for rank in sorted(results)]
        except ChildFailedError as error:
            if children.ended_by:
                raise SignalException("ended", signal.Signals(children.ended_by)) from None
            raise _failure(error, children, meeting) from None
        except JobEnded as error:
            meeting.end(str(error))
            raise ProcessFailed(str(error)) from None
        except UserError as error:
            meeting.end(str(error), user=True)
            raise
    except SignalException as error:
        meeting.end(f"node {launch.node_rank} ({socket.gethostname()}) was ended by {error.sigval.name}")
        raise children.outcome(error.sigval) from None
    finally:
        children.stop()
        meeting.close()
        error_files.remove()


def hush_agent() -> None:
    """Silences the agent's own log, which says at length what is said in one line here; LOGLEVEL brings it back."""
    if "LOGLEVEL" not in os.environ:
        for name in list(logging.root.manager.loggerDict):
            if name.startswith(("torch.distributed.elastic", "torch.multiprocessing")):
                logging.getLogger(name).setLevel(logging.CRITICAL)


def _failure(error: Any, children: Children, meeting: Meeting) -> Exception:
    """What failed first, in this node or in another, as an exception for the user."""
    rank, failure = error.get_first_failure()
    if failure.error_file_data.get("lost_touch") and (reason := meeting.reason(5.0)):
        return reason  # the cause is elsewhere, and it was told
    where = f"process {rank}" + (f" on {socket.gethostname()}, node {meeting.node_rank}," if meeting.nodes > 1 else "")
    if failure.exitcode == EXIT_USAGE:
        meeting.end(failure.message, user=True)
        return UserError(failure.message)
    if failure.pid in children.ended:
        text = f"{where} stood still (stopped by a signal) for {STOPPED_AFTER} s and was ended"
    elif failure.exitcode < 0:
        hint = "; the kernel does that when memory runs out" if failure.exitcode == -signal.SIGKILL else ""
        text = f"{where} was killed by {failure.signal_name()}{hint}"
    else:
        silent = "it left no message; LOGLEVEL=INFO shows the log of torch's agent"
        said = failure.message if failure.error_file_data.get("message") else silent
        text = f"{where} failed (exit {failure.exitcode}):\n{said}"
    meeting.end(text)
    return ProcessFailed(text)


def _entry(
    function: Callable[[Any], T], argument: Any, launch: LaunchConfig, facts: Callable[[Any], dict[str, str]] | None,
    begin: Callable[[], None],
) -> T:  # fmt: skip
    """What a started process runs; it is forked, so its arguments need not be pickled."""
    from arriero.distributed.launch.store import die_with_parent

    begin()
    die_with_parent()  # no orphan trains on when the agent is killed
    try:
        return in_process_group(
            function, argument, facts=facts, join_seconds=launch.join_timeout,
            collective_seconds=launch.collective_timeout, towards=launch.master_addr,
        )  # fmt: skip
    except BaseException as error:
        leave(error)
