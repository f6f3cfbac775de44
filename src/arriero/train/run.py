"""One run: its processes, and what each of them does."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
from arriero.train.preflight import check, compile_machine_problems
from arriero.train.recipe import (
    Recipe,
)  # fmt: skip
from arriero.train.verify_layout import verify_layout


@dataclass(frozen=True)
class Job:
    """What every process of the run is handed."""

    recipe: Recipe
    device_kind: str
    start: ResumePlan
    facts: dict[str, str]
    """What all processes must agree on; see agreement.py."""
    earlier: float = -1.0
    """Saves up to this number are not of this job: a restart does not go on from them."""


def pretrain(recipe: Recipe, start: RunOptions) -> int:
    """Checks a recipe, starts its processes unless they are there, and trains. Returns the exit code.

    Raises:
        UserError: what is wrong with the recipe, its inputs or this machine, all together.
    """
    launch = resolve_launch_env(start.launch, os.environ)
    kind = device_type(recipe.device)
    here = process_count(recipe, launch, kind)
    world = here * max(1, launch.nodes)
    if start.verify_layout:
        return verify(recipe, world)
    paths = candidates(Path(start.resume)) if start.resume else []
    joining = launch.node_rank > 0 or RankInfo.from_environment().rank > 0
    local = 1 if is_launched_externally() else here
    changed = check(recipe, world, paths, kind=kind, joining=joining, allowed=start.allow_change, here=local)
    continuation = ResumePlan(tuple(paths), tuple(changed), duration(start.stop_after))
    earlier = -1.0
    if paths == [Path(start.resume)]:  # one checkpoint, by its name: what was saved after it is another course
        earlier = max(map(save_number, committed(Path(recipe.out) / "checkpoints")), default=-1.0)
    job = Job(recipe, kind, continuation, run_facts(recipe) if world > 1 else {}, earlier)
    secret = Secret.find(launch.secret_file, os.environ, Path(recipe.out or "arriero"))
    joining_in: dict[str, Any] = {
        "join_seconds": launch.join_timeout, "collective_seconds": launch.collective_timeout, "secret": secret,
    }  # fmt: skip
    if world == 1 and not launch.max_restarts:
        complete = run_in_process_group(work, job, saves=True)
    elif is_launched_externally():
        try:
            complete = run_in_process_group(work, job, facts=facts, saves=True, **joining_in)
            if not complete:
                return exit_after_peers(EXIT_STOPPED)
        except BaseException as error:
            exit_worker(error)
    else:
        try:
            complete = all(run_processes(work, job, here, launch=launch, facts=facts, saves=True, secret=secret))
        except ProcessFailed as error:
            print(escape_message(f"arriero: {error}"), file=sys.stderr)
            return EXIT_CHECK_FAILED
    return EXIT_OK if complete else EXIT_STOPPED


def process_count(recipe: Recipe, launch: LaunchConfig, kind: str) -> int:
    """How many processes run here, or in all where another has started them.

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


def verify(recipe: Recipe, processes: int) -> int:
    """The proof of `--verify-layout`, once the recipe's layout is possible at all."""
    problems = recipe.layout_problems(processes)
    if is_launched_externally():
        fix = "leave torchrun or srun out: --nproc-per-node N gives the number of processes"
        problems.append(UserError("--verify-layout starts its own processes, on one machine", fix))
    if recipe.train.compile:
        problems += compile_machine_problems("cpu")
    if problems:
        raise join_problems(problems)
    return verify_layout(recipe, processes)


def present_checkpoints(job: Job) -> tuple[Path, ...]:
    """Where this start may begin: after a loss, from what the run itself has written."""
    written = committed(Path(job.recipe.out) / "checkpoints") if restart_count() > 0 else []
    return tuple(p for p in reversed(written) if save_number(p) > job.earlier) or job.start.checkpoints


def facts(job: Job) -> dict[str, str]:
    """What all processes must agree on at this start."""
    path = next(iter(present_checkpoints(job)), None)
    return job.facts | {"checkpoint": f"{path.name}, {file_sample(path / MANIFEST)}" if path else "none"}


def work(job: Job) -> bool:
    """What each process does; returns whether the run is complete."""
    info, start = RankInfo.from_environment(), replace(job.start, checkpoints=present_checkpoints(job))
    with contextlib.ExitStack() as held:
        if info.rank == 0:
            lock = RunLock(Path(job.recipe.out))
            held.callback(lock.release)
            if lock.stale:
                start = replace(start, notices=(f" the last job was cut off: {lock.stale}", *start.notices))
            prepare_run_directory(job.recipe)
        ranks = Ranks.build(job.recipe.parallel, job.device_kind)
        return train(job.recipe, ranks, local_rank=info.local_rank, device_kind=job.device_kind, start=start)


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
