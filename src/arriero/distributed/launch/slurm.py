"""SLURM: ranks and addresses from the environment that srun sets for its tasks."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

from arriero.common.environment import environment_number
from arriero.common.errors import UserError
from arriero.common.text import escape
from arriero.distributed.launch.rank_info import MAX_PROCESSES

FIX = "srun sets the variables SLURM_*; where it has not started this, unset SLURM_STEP_NUM_TASKS"
PORTS = range(10_000, 32_768)
MAX_NODES = 100_000
_NUMBERS = r"[0-9]{1,15}(?:-[0-9]{1,15})?"
_PART = rf"(?:[A-Za-z0-9._:-]+|\[{_NUMBERS}(?:,{_NUMBERS})*\])+"
_COUNT = r"([0-9]{1,9})(?:\(x([0-9]{1,9})\))?"


def expand_hosts(text: str) -> list[str]:
    """SLURM's host list: "a,n[01-03,7]-ib" -> a, n01-ib, n02-ib, n03-ib, n7-ib.

    Raises:
        UserError: it is no such list, or names more than MAX_NODES hosts.
    """
    if not re.fullmatch(rf"{_PART}(?:,{_PART})*", text):
        raise UserError(f"SLURM_STEP_NODELIST is {escape(repr(text), 80)}, which is no host list", FIX)
    hosts: list[str] = []
    for part in re.findall(_PART, text):
        names = [""]
        for literal, inside in re.findall(r"([^\[]+)|\[([^\]]*)\]", part):
            spans = [_span(span) for span in inside.split(",")] if inside else []
            if len(hosts) + len(names) * sum(len(numbers) for _, numbers in spans) > MAX_NODES:
                raise UserError(f"SLURM_STEP_NODELIST names more than {MAX_NODES} hosts", FIX)
            pieces = [literal] if literal else [str(n).zfill(width) for width, numbers in spans for n in numbers]
            names = [name + piece for name in names for piece in pieces]
        hosts += names
    return hosts


def _span(text: str) -> tuple[int, range]:
    """Digits to pad to, and the numbers, of "07" or "07-12"."""
    first, _, last = text.partition("-")
    numbers = range(int(first), int(last or first) + 1)
    if not numbers:
        raise UserError(f"SLURM_STEP_NODELIST holds [{escape(text)}], which runs backwards", FIX)
    return len(first), numbers


def expand_counts(text: str) -> list[int]:
    """SLURM's tasks per node: "2(x3),1" -> 2, 2, 2, 1.

    Raises:
        UserError: it is no such list, gives a node no task, or names more than MAX_NODES nodes.
    """
    if not re.fullmatch(rf"{_COUNT}(?:,{_COUNT})*", text):
        raise UserError(f"SLURM_STEP_TASKS_PER_NODE is {escape(repr(text), 80)}, which is no list of counts", FIX)
    groups = [(int(n), int(times or 1)) for n, times in re.findall(_COUNT, text)]
    if not all(n for n, _ in groups):
        raise UserError(f"SLURM_STEP_TASKS_PER_NODE is {escape(repr(text), 80)}, which gives a node 0 tasks", FIX)
    if sum(times for _, times in groups) > MAX_NODES:
        raise UserError(f"SLURM_STEP_TASKS_PER_NODE is about more than {MAX_NODES} nodes", FIX)
    return [n for n, times in groups for _ in range(times)]


def is_step_task(environment: Mapping[str, str]) -> bool:
    """Whether srun started this process as one of several; the batch file itself and a lone task are not.

    Raises:
        UserError: the number of tasks is not a number.
    """
    return _number(environment, "SLURM_STEP_NUM_TASKS", 1, MAX_PROCESSES, default=1) > 1


def task_rank(environment: Mapping[str, str]) -> tuple[int, int]:
    """The number of this task of srun, and how many there are. Raises UserError where they do not fit."""
    tasks = _number(environment, "SLURM_STEP_NUM_TASKS", 1, MAX_PROCESSES)
    return _number(environment, "SLURM_PROCID", 0, tasks - 1), tasks


def master_address(environment: Mapping[str, str]) -> tuple[str, int]:
    """The first host of the step, and a port computed from job and step, so that every task has the same.

    The port lies below those that Linux gives to outgoing connections (32768 and up). Two jobs that run on one machine
    at the same time have the same one in 1 of 22,768 cases.

    Raises:
        UserError: the variables from which it is computed are missing or invalid.
    """
    job, step = (_number(environment, f"SLURM_{name}_ID", 0, 2**63 - 1) for name in ("JOB", "STEP"))
    digest = hashlib.sha256(f"{job}.{step}".encode()).digest()
    port = PORTS[int.from_bytes(digest[:8], "big") % len(PORTS)]
    return expand_hosts(_required(environment, "SLURM_STEP_NODELIST"))[0], port


def task_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would have set, for a task of srun that is one process of the run.

    Raises:
        UserError: a variable is missing, no number, or does not fit the others; names it.
    """
    rank, tasks = task_rank(environment)
    address, port = master_address(environment)
    hosts = expand_hosts(_required(environment, "SLURM_STEP_NODELIST"))
    counts = expand_counts(_required(environment, "SLURM_STEP_TASKS_PER_NODE"))
    if sum(counts) != tasks or len(counts) != len(hosts):
        text = f"{sum(counts)} tasks on {len(counts)} nodes in SLURM_STEP_TASKS_PER_NODE"
        other = f"SLURM_STEP_NUM_TASKS is {tasks} and SLURM_STEP_NODELIST names {len(hosts)} hosts"
        raise UserError(f"{text}, but {other}", FIX)
    here = counts[_number(environment, "SLURM_NODEID", 0, len(counts) - 1)]
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": str(_number(environment, "SLURM_LOCALID", 0, here - 1)),
        "LOCAL_WORLD_SIZE": str(here),
        "MASTER_ADDR": environment.get("MASTER_ADDR", "").strip() or address,
        "MASTER_PORT": environment.get("MASTER_PORT") or str(port),
    }


def _number(environment: Mapping[str, str], name: str, low: int, high: int, default: int | None = None) -> int:
    return environment_number(environment, name, low, high, fix=FIX, default=default)


def _required(environment: Mapping[str, str], name: str) -> str:
    if not environment.get(name, "").strip():
        raise UserError(f"{name} is missing in the environment", FIX)
    return environment[name]
