"""`arriero launch slurm`: the batch file that starts a recipe on a SLURM cluster."""

from __future__ import annotations

import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from annotated_types import Interval

from arriero.cli.arguments import split_command, wants_help
from arriero.cli.pretrain import read_command
from arriero.common.errors import EXIT_OK, EXIT_STOPPED, UserError, closest_match, join_problems
from arriero.common.files import make_directory, open_regular, os_error_text
from arriero.common.ranges import PathText
from arriero.common.settings import parse, show_flags
from arriero.common.text import escape, escape_message
from arriero.distributed.launch.secret import SECRET_VARIABLE
from arriero.train.recipe import Recipe


@dataclass(frozen=True)
class SlurmArgs:
    """`arriero launch slurm RECIPE --nodes N [--key.sub value ...]`."""

    nodes: Annotated[int, Interval(ge=1, le=65_536)] = 1
    """Machines."""
    gpus_per_node: Annotated[int, Interval(ge=0, le=4096)] = 8
    """Devices of each machine, one process each; 0 for a run on the CPU."""
    tasks_per_node: Annotated[int, Interval(ge=0, le=4096)] = 0
    """Processes of each machine where that is not the number of devices."""
    cpus_per_task: Annotated[int, Interval(ge=0, le=65_536)] = 0
    """Cores of each process; 0 for its share of the cores of the machine that writes the file."""
    time: str = "1-00:00:00"
    """Time limit, in SLURM's form days-hours:minutes:seconds."""
    partition: str = ""
    """Partition to queue in; empty for the cluster's default."""
    run: Annotated[str, PathText] = ""
    """Run directory; it replaces the recipe's `out`."""
    out: Annotated[str, PathText] = ""
    """Where to write the batch file; empty prints it."""


@dataclass(frozen=True)
class LaunchArgs:
    """`arriero launch slurm RECIPE --nodes N [--key.sub value ...]`."""

    OWNERS: ClassVar = (SlurmArgs, Recipe)
    """The dataclasses whose fields are flags of this verb."""
    words: list[str]
    """What follows `slurm`."""

    @classmethod
    def from_words(cls, words: list[str]) -> LaunchArgs:
        """Checks the kind of launch; --help prints the flags and raises SystemExit."""
        if words and words[0] not in ("slurm", "-h", "--help"):
            raise UserError(f"launch: unknown kind '{escape(words[0])}'", closest_match(words[0], ["slurm"]))
        if not words or wants_help(words):
            show_flags(SlurmArgs, "arriero launch slurm RECIPE")
            raise SystemExit(EXIT_OK)
        return cls(words[1:])


def run(args: LaunchArgs) -> int:
    """Prints or writes the batch file, after checking that the recipe fits the machines."""
    text, file = batch_file(args.words)
    if file:
        make_directory(Path(file).parent, "name a file that can be written with --out")
        try:
            handle = open_regular(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, follow=True)
            with open(handle, "w", encoding="utf-8") as out:
                out.write(text)
        except OSError as error:
            raise UserError(
                f"--out {escape(file)}: {os_error_text(error)}", "name a file that can be written"
            ) from None
        print(escape_message(f"wrote {file}; queue it with: sbatch {shlex.quote(file)}"))
    else:
        print(text, end="")
    return EXIT_OK


def batch_file(words: list[str]) -> tuple[str, str]:
    """The text of the batch file, and the path to write it to; empty to print it.

    Raises:
        UserError: the recipe is invalid, or does not fit the number of processes.
    """
    named, (own,), given = split_command(words, SlurmArgs)
    if not named:
        raise UserError("no recipe named", "arriero launch slurm RECIPE --nodes N")
    args = parse(SlurmArgs, own, prog="arriero launch slurm")
    passed = [named, *(w for s in given for w in (f"--{s.key}", *s.words))]
    passed += ["--out", args.run] if args.run else []
    recipe, _ = read_command(passed)
    tasks = args.tasks_per_node or args.gpus_per_node
    if tasks < 1:
        raise UserError(
            f"{args.nodes} nodes of {tasks} processes", "give --nodes and --gpus-per-node (or --tasks-per-node) from 1"
        )
    problems = _problems(args) or recipe.problems(args.nodes * tasks)
    if problems:
        raise join_problems(problems)
    return _text(args, tasks, recipe.out, shlex.join(passed)), args.out


def _problems(args: SlurmArgs) -> list[UserError]:
    """Values that SLURM rejects, or that hold a line end, which would add a line to the file."""
    found = []
    if not re.fullmatch(r"[0-9]+(-[0-9]+)?(:[0-9]+){0,2}|UNLIMITED", args.time):
        found.append(
            UserError(f"--time is {escape(repr(args.time))}", "give days-hours:minutes:seconds, such as 1-12:00:00")
        )
    if not re.fullmatch(r"[\w.,+-]*", args.partition):
        found.append(UserError(f"--partition is {escape(repr(args.partition))}", "give the name of a partition: sinfo"))
    return found


def _text(args: SlurmArgs, tasks: int, out: str, pretrain: str) -> str:
    script = Path(sys.executable).with_name("arriero")
    program = shlex.quote(str(script)) if script.is_file() else f"{shlex.quote(sys.executable)} -m arriero"
    cores = args.cpus_per_task or max(1, (os.cpu_count() or 1) // tasks)
    name = re.sub(r"[^A-Za-z0-9._-]", "-", Path(out).name) or "arriero"
    options = [f"--job-name={name}", f"--nodes={args.nodes}"]
    options += [f"--ntasks-per-node={tasks}", f"--cpus-per-task={cores}"]
    options += [f"--gpus-per-node={args.gpus_per_node}"] if args.gpus_per_node else []
    options += [f"--time={args.time}"] + ([f"--partition={args.partition}"] if args.partition else [])
    head = "\n".join(f"#SBATCH {option}" for option in options)
    return f"""#!/bin/bash
# {args.nodes} nodes of {tasks} processes of {cores} cores. Every node needs access to the run directory and the data.
{head}
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
# After preemption or the loss of a node SLURM starts this file again; it resumes from the newest checkpoint.
#SBATCH --requeue
# Two minutes before the time limit or preemption all processes get SIGUSR1: they save and exit with {EXIT_STOPPED}.
#SBATCH --signal=USR1@120

# The processes authenticate each other with this secret.
export {SECRET_VARIABLE}=$(head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \\n')
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 {program} pretrain {pretrain} --resume auto
status=$?
if [ "$status" = {EXIT_STOPPED} ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"
"""
