"""The verb `pretrain`: read the recipe, check everything, start the processes."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from arriero.checkpoint.find import committed, find_checkpoint, run_of
from arriero.common.errors import EXIT_OK, UserError
from arriero.common.ranges import path_problem
from arriero.common.text import escape
from arriero.distributed.launch.config import LaunchConfig
from arriero.train.config import RunOptions
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


def run(words: list[str]) -> int:
    """`arriero pretrain [RECIPE] [--key.sub value ...] [--resume RUN] [--nproc-per-node N]`."""
    if {"-h", "--help"} & set(words):
        print_help()
        return EXIT_OK
    recipe, start = read_command(words)
    from arriero.train.run import pretrain

    return pretrain(recipe, start)


def read_command(words: list[str]) -> tuple[Recipe, RunOptions]:
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
    start = RunOptions(
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
        raise UserError(f"--{name} is {escape(text)!r}", "give it alone, or with true or false")
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
    raise UserError(f"--resume {escape(resume)}: is a checkpoint that lies in no run directory", fix)


def _begun(named: str, given: list[Setting]) -> str:
    """The run directory that these settings name, if it holds a checkpoint already; else nothing."""
    settings = file_settings(find_bundled("", named, ".toml")) if named else []
    out = next((" ".join(s.words) for s in reversed([*settings, *given]) if s.key == "out"), "")
    if path_problem(out):
        return ""  # the recipe's own check names it
    return out if out and committed(Path(out) / "checkpoints") else ""


def print_help() -> None:
    """Every key of the recipe with its default and its meaning, as tyro prints it."""

    @dataclass(frozen=True)
    class Pretrain:
        start: Annotated[RunOptions, tyro.conf.arg(name="")] = field(default_factory=RunOptions)
        recipe: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)

    print("usage: arriero pretrain [RECIPE] [--key.sub value ...]\n")
    show_flags(Pretrain, "arriero pretrain [RECIPE]")
