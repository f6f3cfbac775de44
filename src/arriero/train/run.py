"""A run: its checks, its processes, and what each of them does."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from arriero.checkpoint.directory import MANIFEST
from arriero.checkpoint.find import candidates, committed, save_number
from arriero.checkpoint.lock import RunLock
from arriero.common.device import device_count, device_type
from arriero.common.errors import EXIT_CHECK_FAILED, EXIT_OK, EXIT_STOPPED, UserError, join_problems
from arriero.common.text import escape, escape_message
from arriero.distributed.launch.config import LaunchConfig, resolve_launch_env
from arriero.distributed.launch.launcher import ProcessFailed, run_processes
from arriero.distributed.launch.rank_info import RankInfo, is_launched_externally, restart_count
from arriero.distributed.launch.secret import Secret
from arriero.distributed.launch.worker import exit_after_peers, exit_worker, run_in_process_group
from arriero.distributed.parallel.mesh import Ranks
from arriero.train.config import RunOptions
from arriero.train.directory import prepare_run_directory
from arriero.train.facts import file_sample, run_facts
from arriero.train.loop import ResumePlan, train
from arriero.train.preflight import compile_machine_problems, preflight
from arriero.train.recipe import Recipe
from arriero.train.verify_layout import verify_layout


@dataclass(frozen=True)
class RunSpec:
    """What every process of a run receives."""

    recipe: Recipe
    device_kind: str
    plan: ResumePlan
    facts: dict[str, str]
    """What all processes must agree on (distributed/launch/agreement.py)."""
    ignore_saves_up_to: float = -1.0
    """Saves up to this number were made before this start: a restart does not resume from them."""


def pretrain(recipe: Recipe, options: RunOptions) -> int:
    """Checks a recipe, starts its processes unless they are there, and trains. Returns the exit code.

    Raises:
        UserError: what is wrong with the recipe, its inputs or this machine, all together.
    """
    launch = resolve_launch_env(options.launch, os.environ)
    kind = device_type(recipe.device)
    local = process_count(recipe, launch, kind)
    world = local * max(1, launch.nodes)
    if options.verify_layout:
        return check_layout(recipe, world)
    spec = prepare_run(recipe, options, kind, local=local, world=world, first_node=launch.node_rank == 0)
    return run_workers(spec, launch, local=local, world=world)


def prepare_run(
    recipe: Recipe, options: RunOptions, kind: str, *, local: int, world: int, first_node: bool
) -> RunSpec:  # fmt: skip
    """Finds the checkpoints to resume from and checks all that can be checked before a process is started.

    Args:
        recipe, options: the run.
        kind: of device.
        local: processes on this machine.
        world: processes of the run.
        first_node: whether rank 0 is on this machine.
    """
    paths = candidates(Path(options.resume)) if options.resume else []
    joining = not first_node or RankInfo.from_environment().rank > 0
    notices = preflight(
        recipe, world, paths, kind=kind, joining=joining, allowed=options.allow_change,
        local_processes=1 if is_launched_externally() else local,
    )  # fmt: skip
    ignored = -1.0
    if paths == [Path(options.resume)]:  # one checkpoint, by its name: what was saved after it is of another run
        ignored = max(map(save_number, committed(Path(recipe.out) / "checkpoints")), default=-1.0)
    plan = ResumePlan(tuple(paths), tuple(notices), duration(options.stop_after))
    return RunSpec(recipe, kind, plan, run_facts(recipe) if world > 1 else {}, ignored)


def run_workers(spec: RunSpec, launch: LaunchConfig, *, local: int, world: int) -> int:
    """Trains in this process where it is the only one or was started as a worker, else in `local` new ones.

    Returns the exit code: 0 where the run is complete.
    """
    secret = Secret.find(launch.secret_file, os.environ, Path(spec.recipe.out or "arriero"))
    if world == 1 and not launch.max_restarts:
        complete = run_in_process_group(run_worker, spec, saves=True)
    elif is_launched_externally():
        try:
            complete = run_in_process_group(
                run_worker, spec, facts=worker_facts, saves=True, join_seconds=launch.join_timeout,
                collective_seconds=launch.collective_timeout, secret=secret,
            )  # fmt: skip
            if not complete:
                return exit_after_peers(EXIT_STOPPED)
        except BaseException as error:
            exit_worker(error)
    else:
        try:
            complete = all(
                run_processes(run_worker, spec, local, launch=launch, facts=worker_facts, saves=True, secret=secret)
            )
        except ProcessFailed as error:
            print(escape_message(f"arriero: {error}"), file=sys.stderr)
            return EXIT_CHECK_FAILED
    return EXIT_OK if complete else EXIT_STOPPED


def process_count(recipe: Recipe, launch: LaunchConfig, kind: str) -> int:
    """Processes on this machine, or in all where they were started externally.

    Raises:
        UserError: more than there are devices.
    """
    if is_launched_externally():
        return RankInfo.from_environment().world_size
    wanted, devices = launch.nproc_per_node, device_count(kind)
    if kind != "cpu" and wanted > devices:
        raise UserError(f"--nproc-per-node is {wanted}, and this machine has {devices} {kind} devices", "give fewer")
    share = -(-recipe.parallel.model_parallel // max(1, launch.nodes))
    return wanted or (share if kind == "cpu" else devices)


def check_layout(recipe: Recipe, processes: int) -> int:
    """`--verify-layout`: checks that the layout is possible, then that it gives one process's numbers."""
    problems = recipe.layout_problems(processes)
    if is_launched_externally():
        fix = "leave torchrun or srun out: --nproc-per-node N gives the number of processes"
        problems.append(UserError("--verify-layout starts its own processes, on one machine", fix))
    if recipe.train.compile:
        problems += compile_machine_problems("cpu")
    if problems:
        raise join_problems(problems)
    return verify_layout(recipe, processes)


def current_checkpoints(spec: RunSpec) -> tuple[Path, ...]:
    """The checkpoints to resume from now, the newest first: after a restart, those that the run itself has saved."""
    written = committed(Path(spec.recipe.out) / "checkpoints") if restart_count() > 0 else []
    return tuple(p for p in reversed(written) if save_number(p) > spec.ignore_saves_up_to) or spec.plan.checkpoints


def worker_facts(spec: RunSpec) -> dict[str, str]:
    """What all processes must agree on at this start: the run's facts, and the checkpoint."""
    path = next(iter(current_checkpoints(spec)), None)
    return spec.facts | {"checkpoint": f"{path.name}, {file_sample(path / MANIFEST)}" if path else "none"}


def run_worker(spec: RunSpec) -> bool:
    """Runs in every process: trains, and returns whether the run is complete. Rank 0 holds the run's lock meanwhile."""
    info, plan = RankInfo.from_environment(), replace(spec.plan, checkpoints=current_checkpoints(spec))
    with contextlib.ExitStack() as cleanup:
        if info.rank == 0:
            lock = RunLock(Path(spec.recipe.out))
            cleanup.callback(lock.release)
            if lock.stale:
                plan = replace(plan, notices=(f" the last job was cut off: {lock.stale}", *plan.notices))
            prepare_run_directory(spec.recipe)
        ranks = Ranks.build(spec.recipe.parallel, spec.device_kind)
        return train(spec.recipe, ranks, local_rank=info.local_rank, device_kind=spec.device_kind, plan=plan)


def duration(text: str) -> float:
    """Seconds of "90s", "55m", "11.5h" or "1d"; 0 of nothing.

    Raises:
        UserError: it is not a duration.
    """
    if not text:
        return 0.0
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smhd])", text)
    if not match or not float(match[1]):
        raise UserError(f"--stop-after is '{escape(text)}'", "give a number and s, m, h or d, such as 55m")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]
