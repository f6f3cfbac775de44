"""SLURM: what srun tells its tasks, and the batch file that `arriero launch slurm` prints."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

from annotated_types import Interval

from arriero.common.errors import EXIT_OK, EXIT_STOPPED, UserError, nearest
from arriero.common.files import why
from arriero.common.ranges import PathText
from arriero.common.text import printable, shown


@dataclass(frozen=True)
class SlurmArgs:
    """`arriero launch slurm RECIPE --nodes N [--key.sub value ...]`."""

    nodes: Annotated[int, Interval(ge=1, le=65_536)] = 1
    """Machines."""
    gpus_per_node: Annotated[int, Interval(ge=0, le=4096)] = 8
    """Devices of each machine, one process each; 0 for a run on the CPU."""
    tasks_per_node: Annotated[int, Interval(ge=0, le=4096)] = 0
    """Processes of each machine where that is not the number of devices."""
    time: str = "1-00:00:00"
    """Time limit, in SLURM's form days-hours:minutes:seconds."""
    partition: str = ""
    """Where to queue; empty leaves it to the cluster."""
    run: Annotated[str, PathText] = ""
    """Run directory; it replaces the recipe's `out`."""
    out: Annotated[str, PathText] = ""
    """Where to write the batch file; empty prints it."""


def run(words: list[str]) -> int:
    """Prints or writes the batch file, once the recipe is known to fit the machines."""
    if not words or words[0] != "slurm" or {"-h", "--help"} & set(words):
        return _help(words)
    text, file = batch_file(words[1:])
    if file:
        try:
            Path(file).write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"--out {shown(file)}: {why(error)}", "name a file that can be written") from None
        print(printable(f"wrote {file}; queue it with: sbatch {shlex.quote(file)}"))
    else:
        print(text, end="")
    return EXIT_OK


def _help(words: list[str]) -> int:
    if words and words[0] not in ("slurm", "-h", "--help"):
        raise UserError(f"launch: unknown kind {words[0]!r}", nearest(words[0], ["slurm"]))
    from arriero.recipe import show_flags

    show_flags(SlurmArgs, "arriero launch slurm RECIPE")
    return EXIT_OK


def batch_file(words: list[str]) -> tuple[str, str]:
    """The text of the batch file, and where it shall be written.

    Raises:
        UserError: the recipe is wrong, or it does not fit so many processes.
    """
    from arriero.common.errors import join_problems
    from arriero.recipe import command_line_settings, parse
    from arriero.train.command import read_command

    named = [words[0]] if words and not words[0].startswith("-") else []
    if not named:
        raise UserError("no recipe named", "arriero launch slurm RECIPE --nodes N")
    given = command_line_settings(words[1:])
    own = {f.name for f in fields(SlurmArgs)}
    args = parse(SlurmArgs, [s for s in given if s.key in own], prog="arriero launch slurm")
    for key, form in (("time", "[0-9:-]+"), ("partition", "[A-Za-z0-9_.,-]*")):  # a line end would add to the file
        if not re.fullmatch(form, getattr(args, key)):
            raise UserError(f"--{key} is '{shown(getattr(args, key))}'", "give it in SLURM's form")
    passed = [w for s in given if s.key not in own for w in (f"--{s.key}", *s.words)]
    passed += ["--out", args.run] if args.run else []
    recipe, _ = read_command(named + passed)
    tasks = args.tasks_per_node or args.gpus_per_node
    if tasks < 1:
        raise UserError(
            f"{args.nodes} nodes of {tasks} processes", "give --nodes and --gpus-per-node (or --tasks-per-node) from 1"
        )
    problems = recipe.problems(args.nodes * tasks)
    if problems:
        raise join_problems(problems)
    return _text(args, tasks, recipe.out, shlex.join(named + passed)), args.out


def _text(args: SlurmArgs, tasks: int, out: str, pretrain: str) -> str:
    beside = Path(sys.executable).with_name("arriero")
    program = shlex.quote(str(beside)) if beside.is_file() else f"{shlex.quote(sys.executable)} -m arriero"
    options = [f"--job-name={re.sub(r'[^A-Za-z0-9._-]', '-', Path(out).name)}", f"--nodes={args.nodes}"]
    options += [f"--ntasks-per-node={tasks}"]
    options += [f"--gpus-per-node={args.gpus_per_node}"] if args.gpus_per_node else []
    options += [f"--time={args.time}"] + ([f"--partition={args.partition}"] if args.partition else [])
    head = "\n".join(f"#SBATCH {option}" for option in options)
    return f"""#!/bin/bash
# {args.nodes} nodes of {tasks} processes. The run directory and the data must be seen by every node.
{head}
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
# After preemption or the loss of a node SLURM starts this file again; then it goes on from the newest checkpoint.
#SBATCH --requeue
# Two minutes before the time limit or preemption SIGUSR1 reaches every process: they save and exit with {EXIT_STOPPED}.
#SBATCH --signal=USR1@120

srun --kill-on-bad-exit=1 {program} pretrain {pretrain} --resume auto
status=$?
if [ "$status" = {EXIT_STOPPED} ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"
"""


def expand_hosts(text: str) -> list[str]:
    """SLURM's host list: "a,n[01-03,7]-ib" -> a, n01-ib, n02-ib, n03-ib, n7-ib."""
    hosts: list[str] = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        names = [""]
        for literal, inside in re.findall(r"([^\[]+)|\[([^\]]*)\]", part):
            pieces = [literal] if literal else [n for span in inside.split(",") for n in _numbers(span)]
            names = [name + piece for name in names for piece in pieces]
        hosts += names
    return hosts


def _numbers(span: str) -> list[str]:
    first, dash, last = span.partition("-")
    return [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)] if dash else [first]


def expand_counts(text: str) -> list[int]:
    """SLURM's tasks per node: "2(x3),1" -> 2, 2, 2, 1."""
    return [int(n) for n, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text) for _ in range(int(times or 1))]


def in_step(environment: Mapping[str, str]) -> bool:
    """Whether srun started this process as one of several; the batch file itself and a lone task are not."""
    return int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in environment


def master(environment: Mapping[str, str]) -> tuple[str, int]:
    """The first host of the step, and a port that follows from job and step: every task finds the same."""
    job, step = int(environment.get("SLURM_JOB_ID", "0")), environment.get("SLURM_STEP_ID", "0")
    port = 10000 + job % 2000 * 10 + int(step if step.isdigit() else 0) % 10
    return expand_hosts(environment["SLURM_STEP_NODELIST"])[0], port


def task_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would have set, for a task of srun that is one process of the run."""
    address, port = master(environment)
    counts = expand_counts(environment["SLURM_STEP_TASKS_PER_NODE"])
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(counts[int(environment["SLURM_NODEID"])]),
        "MASTER_ADDR": environment.get("MASTER_ADDR", address),
        "MASTER_PORT": environment.get("MASTER_PORT", str(port)),
    }
