"""The verb `pretrain`: read the recipe, check everything, start the processes."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from arriero.checkpoint.layout import MANIFEST, committed, run_of, save_number
from arriero.checkpoint.load import candidates, find_checkpoint
from arriero.checkpoint.lock import RunLock
from arriero.common.device import device_count, device_type
from arriero.common.errors import EXIT_CHECK_FAILED, EXIT_OK, EXIT_STOPPED, UserError, join_problems
from arriero.common.ranges import path_problem
from arriero.common.text import printable, shown
from arriero.data.check import batch_notices, check_data_against, size_notices
from arriero.data.tokenizer import load_tokenizer
from arriero.distributed.launch.launcher import (
    LaunchConfig,
    Place,
    ProcessFailed,
    in_process_group,
    leave,
    run_processes,
    start_number,
    started_by_another,
    take_place,
)  # fmt: skip
from arriero.distributed.launch.secret import Secret
from arriero.distributed.launch.worker import leave_last
from arriero.distributed.parallel.mesh import Ranks
from arriero.train.directory import out_problems, prepare_run_directory, record_problems, room
from arriero.train.facts import file_sample, run_facts
from arriero.train.loop import Continuation, train
from arriero.train.memory import memory_problems
from arriero.train.preflight import compile_machine_problems, machine_problems
from arriero.train.recipe import (
    Recipe,
    Setting,
    command_line_settings,
    field_types,
    file_settings,
    find_bundled,
    parse,
    show_flags,
)  # fmt: skip
from arriero.train.resume import check_changes, readable
from arriero.train.trainer import open_batches
from arriero.train.verify_layout import verify_layout


@dataclass(frozen=True)
class Start:
    """How this start of the run differs from another start of the same run."""

    resume: str = ""
    """A run directory to continue from its newest checkpoint that is whole, or one of its checkpoints; the run's own
    recipe is used where none is named. "auto" continues `out` where it holds a checkpoint, and begins it otherwise."""
    allow_change: tuple[str, ...] = ()
    """On resume: keys that may differ from the run that is continued although they make it another run."""
    stop_after: str = ""
    """Save and stop after this long, such as 55m, 90s or 11.5h; the exit code is then 75."""
    verify_layout: bool = False
    """Train nothing: prove on the CPU, at reduced width in float64, that the layout gives one process's numbers."""
    launch: Annotated[LaunchConfig, tyro.conf.arg(name="")] = field(default_factory=LaunchConfig)


@dataclass(frozen=True)
class Job:
    """What every process of the run is handed."""

    recipe: Recipe
    device_kind: str
    start: Continuation
    facts: dict[str, str]
    """What all processes must agree on; see agreement.py."""
    earlier: float = -1.0
    """Saves up to this number are not of this job: a restart does not go on from them."""


def run(words: list[str]) -> int:
    """`arriero pretrain [RECIPE] [--key.sub value ...] [--resume RUN] [--nproc-per-node N]`."""
    if {"-h", "--help"} & set(words):
        print_help()
        return EXIT_OK
    recipe, start = read_command(words)
    launch = take_place(start.launch, os.environ)
    kind = device_type(recipe.device)
    here = process_count(recipe, launch, kind)
    world = here * max(1, launch.nodes)
    if start.verify_layout:
        return verify(recipe, world)
    paths = candidates(Path(start.resume)) if start.resume else []
    joining = launch.node_rank > 0 or Place.from_environment().rank > 0
    local = 1 if started_by_another() else here
    changed = check(recipe, world, paths, kind=kind, joining=joining, allowed=start.allow_change, here=local)
    continuation = Continuation(tuple(paths), tuple(changed), duration(start.stop_after))
    earlier = -1.0
    if paths == [Path(start.resume)]:  # one checkpoint, by its name: what was saved after it is another course
        earlier = max(map(save_number, committed(Path(recipe.out) / "checkpoints")), default=-1.0)
    job = Job(recipe, kind, continuation, run_facts(recipe) if world > 1 else {}, earlier)
    secret = Secret.find(launch.secret_file, os.environ, Path(recipe.out or "arriero"))
    joining_in: dict[str, Any] = {
        "join_seconds": launch.join_timeout, "collective_seconds": launch.collective_timeout, "secret": secret,
    }  # fmt: skip
    if world == 1 and not launch.max_restarts:
        complete = in_process_group(work, job, saves=True)
    elif started_by_another():
        try:
            complete = in_process_group(work, job, facts=facts, saves=True, **joining_in)
            if not complete:
                return leave_last(EXIT_STOPPED)
        except BaseException as error:
            leave(error)
    else:
        try:
            complete = all(run_processes(work, job, here, launch=launch, facts=facts, saves=True, secret=secret))
        except ProcessFailed as error:
            print(printable(f"arriero: {error}"), file=sys.stderr)
            return EXIT_CHECK_FAILED
    return EXIT_OK if complete else EXIT_STOPPED


def duration(text: str) -> float:
    """Seconds of "90s", "55m", "11.5h" or "1d"; 0 of nothing.

    Raises:
        UserError: it is not a duration.
    """
    if not text:
        return 0.0
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smhd])", text)
    if not match or not float(match[1]):
        raise UserError(f"--stop-after is '{shown(text)}'", "give a number and s, m, h or d, such as 55m")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


def read_command(words: list[str]) -> tuple[Recipe, Start]:
    """The recipe and how it is started, from the words after `pretrain`."""
    named, words = (words[0], words[1:]) if words and not words[0].startswith("-") else ("", words)
    given = command_line_settings(words)
    given = [replace(s, key="log.profile") if s.key == "profile" else s for s in given]
    launch_keys = set(field_types(LaunchConfig))
    start_keys = {"resume", "verify_layout", "allow_change", "stop_after", *launch_keys}
    start_settings = [s for s in given if s.key in start_keys]
    words_of = {s.key: s.words for s in start_settings}
    launch = parse(LaunchConfig, [s for s in start_settings if s.key in launch_keys], prog="arriero pretrain")
    for key in ("resume", "stop_after", "allow_change"):
        if key in words_of and not all(words_of[key] or [""]):
            raise UserError(f"--{key.replace('_', '-')} is empty", "give it a value, or leave it out")
    resume = " ".join(words_of.get("resume", []))
    settings: list[Setting] = []
    if resume == "auto":
        resume = _begun(named, given)
    if resume and (wrong := path_problem(resume)):
        raise UserError(f"--resume {wrong}", "name a run directory, or one of its checkpoints")
    if resume:
        find_checkpoint(Path(resume))  # a wrong directory is named before its missing recipe is
    if resume and not named:
        named = str(_recipe_in(Path(resume)))
    if named:
        settings += file_settings(find_bundled("", named, ".toml"))
    elif not given:
        raise UserError(
            "no recipe named", "arriero pretrain RECIPE, such as: arriero pretrain my.toml --out runs/first"
        )
    settings += [s for s in given if s.key not in start_keys]
    if resume and not any(s.key == "out" for s in given):
        settings += _continued(Path(resume), settings)
    start = Start(
        resume=resume, verify_layout=_flag("verify-layout", words_of.get("verify_layout")),
        launch=launch, allow_change=tuple(w.replace("-", "_") for w in words_of.get("allow_change", [])),
        stop_after=" ".join(words_of.get("stop_after", [])),
    )  # fmt: skip
    if start.allow_change and not resume:
        raise UserError("--allow-change without --resume has no effect", "leave it out, or say what is resumed")
    return parse(Recipe, settings, prog="arriero pretrain"), start


def _flag(name: str, words: list[str] | None) -> bool:
    """Whether `--name` is given, without a word or with true."""
    text = "false" if words is None else " ".join(words).lower() or "true"
    if text not in ("true", "false"):
        raise UserError(f"--{name} is {shown(text)!r}", "give it alone, or with true or false")
    return text == "true"


def _recipe_in(resume: Path) -> Path:
    """The run's own recipe; its checkpoint's where that is not whole."""
    own = resume / "recipe.toml"
    return own if os.path.isfile(own) and os.path.getsize(own) else find_checkpoint(resume) / "recipe.toml"


def _continued(resume: Path, settings: list[Setting]) -> list[Setting]:
    """Where a run goes on: in its own directory. A checkpoint is only read."""
    run = run_of(resume)
    if run is not None:
        return [Setting("out", [str(run)], "--resume")]
    if any(s.key == "out" and not s.origin.startswith(str(resume)) for s in settings):
        return []  # a recipe that the user has named
    fix = "name the run directory to write: --out runs/again"
    raise UserError(f"--resume {shown(resume)}: is a checkpoint that lies in no run directory", fix)


def _begun(named: str, given: list[Setting]) -> str:
    """The run directory that these settings name, if it holds a checkpoint already; else nothing."""
    settings = file_settings(find_bundled("", named, ".toml")) if named else []
    out = next((" ".join(s.words) for s in reversed([*settings, *given]) if s.key == "out"), "")
    if path_problem(out):
        return ""  # the recipe's own check names it
    return out if out and committed(Path(out) / "checkpoints") else ""


def process_count(recipe: Recipe, launch: LaunchConfig, kind: str) -> int:
    """How many processes run here, or in all where another has started them.

    Raises:
        UserError: more than there are devices.
    """
    if started_by_another():
        return Place.from_environment().world
    wanted, devices = launch.nproc_per_node, device_count(kind)
    if kind != "cpu" and wanted > devices:
        raise UserError(f"--nproc-per-node is {wanted}, and this machine has {devices} {kind} devices", "give fewer")
    share = -(-recipe.parallel.model_parallel // max(1, launch.nodes))
    return wanted or (share if kind == "cpu" else devices)


def verify(recipe: Recipe, processes: int) -> int:
    """The proof of `--verify-layout`, once the recipe's layout is possible at all."""
    problems = recipe.layout_problems(processes)
    if started_by_another():
        fix = "leave torchrun or srun out: --nproc-per-node N gives the number of processes"
        problems.append(UserError("--verify-layout starts its own processes, on one machine", fix))
    if recipe.train.compile:
        problems += compile_machine_problems("cpu")
    if problems:
        raise join_problems(problems)
    return verify_layout(recipe, processes)


def check(
    recipe: Recipe, processes: int, checkpoints: Sequence[Path], *, kind: str = "cpu", joining: bool = False,
    allowed: Sequence[str] = (), here: int = 0,
) -> list[str]:  # fmt: skip
    """Refuses what cannot work, all problems together, before any process is started.

    Args:
        recipe: what shall be run.
        processes: on how many.
        checkpoints: from which it may go on.
        kind: of device.
        joining: this is not the machine of rank 0, so it may come back to a run that has begun.
        allowed: changed keys that are meant.
        here: processes whose memory is this machine's; 0 for all of them.

    Returns:
        Lines that tell whether memory is scarce, what has changed since the checkpoint, and what is odd about the
        inputs.

    Raises:
        UserError: what is wrong, each with its fix.
    """
    problems = record_problems(recipe) or recipe.problems(processes)
    problems += machine_problems(recipe, kind)
    changed: list[str] = []
    scarce: list[str] = []
    notices: list[str] = []
    if not problems and kind == "cpu":
        problems, scarce = memory_problems(recipe, processes, here or processes)
    if not problems:
        wrong, notices = _check_inputs(recipe)
        problems += wrong
    if not problems and checkpoints:
        changed, problems = check_changes(recipe, readable(checkpoints), allowed)
    if recipe.out and not joining and not record_problems(recipe):
        problems += out_problems(Path(recipe.out), checkpoints)
        if not problems:
            warnings, problems = room(Path(recipe.out), recipe)
            changed += warnings
    if problems:
        raise join_problems(problems)
    return scarce + changed + notices


def _check_inputs(recipe: Recipe) -> tuple[list[UserError], list[str]]:
    """Data and tokenizer against the model: what is wrong, and lines about what is merely odd."""
    model, notices = recipe.model_config(), list[str]()
    try:
        tokenizer = load_tokenizer(Path(recipe.tokenizer)) if recipe.tokenizer else None
        notices += size_notices(
            model.vocab_size, model.max_position_embeddings, length=recipe.train.sequence_length,
            tokenizer_size=tokenizer.vocab_size if tokenizer else None, tokenizer=recipe.tokenizer,
        )  # fmt: skip
        for split in ("train", *(["valid"] if recipe.train.eval_every else [])):
            notices += batch_notices(open_batches(recipe, split))
        check_data_against(recipe.data, model.vocab_size, tokenizer.fingerprint if tokenizer else None)
    except UserError as error:
        return [error], []
    return [], notices


def present_checkpoints(job: Job) -> tuple[Path, ...]:
    """Where this start may begin: after a loss, from what the run itself has written."""
    written = committed(Path(job.recipe.out) / "checkpoints") if start_number() > 0 else []
    return tuple(p for p in reversed(written) if save_number(p) > job.earlier) or job.start.checkpoints


def facts(job: Job) -> dict[str, str]:
    """What all processes must agree on at this start."""
    path = next(iter(present_checkpoints(job)), None)
    return job.facts | {"checkpoint": f"{path.name}, {file_sample(path / MANIFEST)}" if path else "none"}


def work(job: Job) -> bool:
    """What each process does; returns whether the run is complete."""
    place, start = Place.from_environment(), replace(job.start, checkpoints=present_checkpoints(job))
    with contextlib.ExitStack() as held:
        if place.rank == 0:
            lock = RunLock(Path(job.recipe.out))
            held.callback(lock.release)
            if lock.stale:
                start = replace(start, notices=(f" the last job was cut off: {lock.stale}", *start.notices))
            prepare_run_directory(job.recipe)
        ranks = Ranks.build(job.recipe.parallel, job.device_kind)
        return train(job.recipe, ranks, local_rank=place.local_rank, device_kind=job.device_kind, start=start)


def print_help() -> None:
    """Every key of the recipe with its default and its meaning, as tyro prints it."""

    @dataclass(frozen=True)
    class Pretrain:
        start: Annotated[Start, tyro.conf.arg(name="")] = field(default_factory=Start)
        recipe: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)

    print("usage: arriero pretrain [RECIPE] [--key.sub value ...]\n")
    show_flags(Pretrain, "arriero pretrain [RECIPE]")
