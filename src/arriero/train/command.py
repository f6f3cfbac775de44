"""The verb `pretrain`: read the recipe, check everything, start the processes."""

from __future__ import annotations

import dataclasses
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from arriero.agreement import file_sample, run_facts
from arriero.checkpoint.layout import MANIFEST, committed
from arriero.checkpoint.load import find_checkpoint
from arriero.data.check import check_data_against
from arriero.data.tokenizer import load_tokenizer
from arriero.device import device_count, device_type
from arriero.errors import EXIT_CHECK_FAILED, EXIT_OK, UserError, join_problems
from arriero.launch import (
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
from arriero.model.config import LlamaConfig
from arriero.parallel.mesh import Ranks
from arriero.recipe import (
    Recipe,
    Setting,
    command_line_settings,
    field_types,
    file_settings,
    find_bundled,
    parse,
    to_toml,
)  # fmt: skip
from arriero.train.loop import train
from arriero.train.trainer import open_batches
from arriero.train.verify import verify_layout


@dataclass(frozen=True)
class Start:
    """How this start of the run differs from another start of the same run."""

    resume: str = ""
    """A run directory to continue from its newest checkpoint; its own recipe is used where none is named."""
    verify_layout: bool = False
    """Train nothing: prove on the CPU, at reduced width in float64, that the layout gives one process's numbers."""
    launch: Annotated[LaunchConfig, tyro.conf.arg(name="")] = field(default_factory=LaunchConfig)


@dataclass(frozen=True)
class Job:
    """What every process of the run is handed."""

    recipe: Recipe
    device_kind: str
    checkpoint: Path | None
    facts: dict[str, str]
    """What all processes must agree on; see agreement.py."""


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
    checkpoint = find_checkpoint(Path(start.resume)) if start.resume else None
    check(recipe, world, checkpoint, kind=kind, joining=launch.node_rank > 0 or Place.from_environment().rank > 0)
    job = Job(recipe, kind, checkpoint, run_facts(recipe) if world > 1 else {})
    seconds = {"join_seconds": launch.join_timeout, "collective_seconds": launch.collective_timeout}
    if world == 1 and not launch.max_restarts:
        in_process_group(work, job)
    elif started_by_another():
        try:
            in_process_group(work, job, facts=facts, **seconds)
        except BaseException as error:
            leave(error)
    else:
        try:
            run_processes(work, job, here, launch=launch, facts=facts)
        except ProcessFailed as error:
            print(f"arriero: {error}", file=sys.stderr)
            return EXIT_CHECK_FAILED
    return EXIT_OK


def read_command(words: list[str]) -> tuple[Recipe, Start]:
    """The recipe and how it is started, from the words after `pretrain`."""
    named, words = (words[0], words[1:]) if words and not words[0].startswith("-") else ("", words)
    given = command_line_settings(words)
    launch_keys = set(field_types(LaunchConfig))
    start_keys = {"resume", "verify_layout", *launch_keys}
    start_settings = [s for s in given if s.key in start_keys]
    launch = parse(LaunchConfig, [s for s in start_settings if s.key in launch_keys], prog="arriero pretrain")
    resume = next((" ".join(s.words) for s in start_settings if s.key == "resume"), "")
    verifying = any(s.key == "verify_layout" for s in start_settings)
    settings: list[Setting] = []
    if resume:
        find_checkpoint(Path(resume))  # a wrong directory is named before its missing recipe is
    if resume and not named:
        named = str(Path(resume) / "recipe.toml")
    if named:
        settings += file_settings(find_bundled("", named, ".toml"))
    elif not given:
        raise UserError(
            "no recipe named", "arriero pretrain RECIPE, such as: arriero pretrain my.toml --out runs/first"
        )
    settings += [s for s in given if s.key not in start_keys]
    if resume:
        settings.append(Setting("out", [resume], "--resume"))
    return parse(Recipe, settings, prog="arriero pretrain"), Start(resume, verifying, launch)


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
    if problems:
        raise join_problems(problems)
    return verify_layout(recipe, processes)


def check(recipe: Recipe, processes: int, checkpoint: Path | None, *, kind: str = "cpu", joining: bool = False) -> None:
    """Refuses what cannot work, all problems together, before any process is started.

    `joining`: this is not the machine of rank 0, so it may come back to a run that has begun.

    Raises:
        UserError: what is wrong, each with its fix.
    """
    problems = recipe.problems(processes)
    if recipe.optim.offload and kind == "cpu":
        problems.append(UserError("optim.offload has no effect on the CPU", "leave it out"))
    if not problems:
        problems += _input_problems(recipe, checkpoint)
    if recipe.out and not joining and checkpoint is None and committed(Path(recipe.out) / "checkpoints"):
        fix = f"continue it with --resume {recipe.out}, or write elsewhere with --out"
        problems.append(UserError(f"out: {recipe.out} already holds a run", fix))
    if problems:
        raise join_problems(problems)


def _input_problems(recipe: Recipe, checkpoint: Path | None) -> list[UserError]:
    """Data, tokenizer and checkpoint against the model."""
    found: list[UserError] = []
    model = recipe.model_config()
    if checkpoint is not None:
        saved = LlamaConfig.from_json(checkpoint)
        differing = [f.name for f in dataclasses.fields(model) if getattr(model, f.name) != getattr(saved, f.name)]
        if differing:
            fix = "resume with the model that the run began with"
            found.append(UserError(f"{checkpoint}: its model differs in {', '.join(differing)}", fix))
    try:
        tokenizer = load_tokenizer(Path(recipe.tokenizer)) if recipe.tokenizer else None
        for split in ("train", *(["valid"] if recipe.train.eval_every else [])):
            open_batches(recipe, split)
        check_data_against(recipe.data, model.vocab_size, tokenizer.fingerprint if tokenizer else None)
    except UserError as error:
        found.append(error)
    return found


def prepare_run_directory(recipe: Recipe) -> None:
    """Writes the resolved recipe and the tokenizer into the run directory."""
    out = Path(recipe.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "recipe.toml").write_text(to_toml(recipe), encoding="utf-8")
    if recipe.tokenizer:
        load_tokenizer(Path(recipe.tokenizer)).save_to(out / "tokenizer")


def present_checkpoint(job: Job) -> Path | None:
    """Where this start begins: after a loss, from the newest checkpoint that the run has written."""
    newest = committed(Path(job.recipe.out) / "checkpoints") if start_number() > 0 else []
    return newest[-1] if newest else job.checkpoint


def facts(job: Job) -> dict[str, str]:
    """What all processes must agree on at this start."""
    path = present_checkpoint(job)
    return job.facts | {"checkpoint": f"{path.name}, {file_sample(path / MANIFEST)}" if path else "none"}


def work(job: Job) -> None:
    """What each process does."""
    place, checkpoint = Place.from_environment(), present_checkpoint(job)
    if place.rank == 0:
        prepare_run_directory(job.recipe)
    ranks = Ranks.build(job.recipe.parallel, job.device_kind)
    train(job.recipe, ranks, local_rank=place.local_rank, device_kind=job.device_kind, checkpoint=checkpoint)


def print_help() -> None:
    """Every key of the recipe with its default and its meaning, as tyro prints it."""

    @dataclass(frozen=True)
    class Pretrain:
        start: Annotated[Start, tyro.conf.arg(name="")] = field(default_factory=Start)
        recipe: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)

    print("usage: arriero pretrain [RECIPE] [--key.sub value ...]\n")
    try:
        tyro.cli(Pretrain, prog="arriero pretrain [RECIPE]", args=["--help"], config=(tyro.conf.FlagConversionOff,))
    except SystemExit:
        sys.stdout.flush()
