"""Where the processes of a run are started: from the command line, or from torchrun's and srun's environment."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import Annotated

from annotated_types import Interval

from arriero.common.environment import environment_number
from arriero.common.errors import UserError, join_problems
from arriero.common.ranges import flag, range_problems
from arriero.distributed.launch import slurm
from arriero.distributed.launch.rank_info import RankInfo, uses_agent_store


@dataclass(frozen=True)
class LaunchConfig:
    """Where the processes of this run are started; nothing about what they compute."""

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
    """Seconds within which all machines and processes must arrive, at the start and after a restart."""
    stop_timeout: Annotated[float, Interval(gt=0, le=1e6)] = 120.0
    """Seconds within which the processes must save and exit after a signal; then they are killed."""
    collective_timeout: Annotated[float, Interval(gt=0, le=1e6)] = 600.0
    """Seconds that a process waits for the others in a collective before the job ends."""


def resolve(config: LaunchConfig, environment: Mapping[str, str]) -> LaunchConfig:
    """Fills flags that were not given from MASTER_ADDR, MASTER_PORT, NNODES and NODE_RANK, or from srun.

    Raises:
        UserError: all invalid values, each with its fix.
    """
    problems: list[UserError] = []

    def number(name: str, default: int, most: int) -> int:
        try:
            return environment_number(environment, name, 0, most, fix="a whole number is wanted", default=default)
        except UserError as error:
            problems.append(error)
            return default

    if slurm.is_step_task(environment):  # one task per node, which starts --nproc-per-node processes
        address, port = slurm.master_address(environment)
        rank, tasks = slurm.task_rank(environment)
        derived = {"MASTER_ADDR": address, "MASTER_PORT": str(port), "NNODES": str(tasks), "NODE_RANK": str(rank)}
        environment = derived | {name: value for name, value in environment.items() if value.strip()}
    counted = config.nodes or number("NNODES", 0, slurm.MAX_NODES)
    nodes = counted or 1
    rank = config.node_rank if config.node_rank >= 0 else number("NODE_RANK", -1, slurm.MAX_NODES)
    default_address = environment.get("MASTER_ADDR", "").strip() if nodes > 1 else "127.0.0.1"
    found = replace(
        config, nodes=nodes, node_rank=max(rank, 0) if nodes == 1 and not config.node_rank > 0 else rank,
        master_addr=config.master_addr.strip() or default_address,
        master_port=config.master_port or (number("MASTER_PORT", 29500, 2**16 - 1) if nodes > 1 else 0),
    )  # fmt: skip
    problems += launch_problems(found, counted=bool(counted), given=config)
    if problems:
        raise join_problems(problems)
    return found if nodes > 1 else replace(found, node_rank=0, master_addr="127.0.0.1", master_port=0)


def launch_problems(config: LaunchConfig, *, counted: bool, given: LaunchConfig) -> list[UserError]:
    """All invalid values of a resolved configuration.

    Args:
        config: resolved.
        counted: whether the number of nodes was given at all.
        given: the flags of the command line.
    """
    found: list[UserError] = []
    flags = _given_flags(given, ["node_rank", "master_addr", "master_port", "secret_file"])
    if flags and not counted:
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
        name = "--master-port" if given.master_port else "MASTER_PORT"
        found.append(UserError(f"{name} is {config.master_port}", "give a port from 1024 to 65535"))
    return found + range_problems(config, flag)


def _given_flags(config: LaunchConfig, names: list[str]) -> str:
    """Those of the named fields that differ from their defaults, as flags."""
    return ", ".join(flag(name) for name in names if getattr(config, name) != getattr(LaunchConfig(), name))


def resolve_launch_env(config: LaunchConfig, environment: MutableMapping[str, str]) -> LaunchConfig:
    """Determines who starts the processes. Called once, before all else; sets RANK and the like for a task of srun.

    Raises:
        UserError: invalid values, or flags that have no effect because the processes are started already.
    """
    if "RANK" not in environment and slurm.is_step_task(environment) and not config.nproc_per_node:
        environment.update(slurm.task_environment(environment))
    if not ("RANK" in environment or "WORLD_SIZE" in environment):
        return resolve(config, environment)
    names = ["nproc_per_node", "nodes", "node_rank", "master_addr", "master_port", "max_restarts"]
    names += ["secret_file"] if uses_agent_store(environment) else []  # torchrun's store uses no secret
    if flags := _given_flags(config, names):
        fix = "leave them out, or start arriero without torchrun, once on each machine"
        raise UserError(f"{flags}: no effect, RANK says that the processes are started already", fix)
    RankInfo.from_environment(environment)
    return config
