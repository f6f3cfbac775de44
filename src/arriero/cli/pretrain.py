"""The verb `pretrain`: read the recipe, check everything, start the processes."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from arriero.checkpoint.find import committed, find_checkpoint, run_of
from arriero.cli.arguments import print_sections, recipe_sections, split_command, wants_help, without
from arriero.common.errors import EXIT_OK, UserError
from arriero.common.ranges import flag, path_problem
from arriero.common.settings import Setting, parse
from arriero.common.text import escape
from arriero.common.toml import file_settings
from arriero.distributed.launch.config import LaunchConfig
from arriero.train.config import RunOptions
from arriero.train.recipe import Recipe, find_bundled

USAGE = "arriero pretrain [RECIPE]"


@dataclass(frozen=True)
class PretrainArgs:
    """`arriero pretrain [RECIPE] [--key.sub value ...] [--resume RUN] [--nproc-per-node N]`."""

    OWNERS: ClassVar = (RunOptions, LaunchConfig, Recipe)
    """The dataclasses whose fields are flags of this verb."""
    recipe: Recipe
    start: RunOptions

    @classmethod
    def from_words(cls, words: list[str]) -> PretrainArgs:
        """Reads the recipe and the flags; --help prints them, or one section of them, and raises SystemExit."""
        if wants_help(words):
            sections = {"start": without(RunOptions, {"launch"}), "launch": LaunchConfig, **recipe_sections()}
            print_sections(words, usage=USAGE, sections=sections, complete=(RunOptions, Recipe))
            raise SystemExit(EXIT_OK)
        return cls(*read_command(words))


def run(args: PretrainArgs) -> int:
    """Checks everything, starts the processes and trains; returns the exit code."""
    from arriero.train.run import pretrain

    return pretrain(args.recipe, args.start)


def read_command(words: list[str]) -> tuple[Recipe, RunOptions]:
    """The recipe and how it is started, from the words after `pretrain`."""
    named, (started, launched), given = split_command(words, RunOptions, LaunchConfig)
    given = [replace(s, key="log.profile") if s.key == "profile" else s for s in given]
    launch = parse(LaunchConfig, launched, prog="arriero pretrain")
    for s in started:
        if not all(s.words or [""]):
            raise UserError(f"{flag(s.key)} is empty", "give it a value, or leave it out")
    start = replace(parse(RunOptions, started, prog="arriero pretrain"), launch=launch)
    resume = start.resume
    settings: list[Setting] = []
    if resume == "auto":
        resume = _existing_run(named, given)
    if resume and (wrong := path_problem(resume)):
        raise UserError(f"--resume {wrong}", "name a run directory, or one of its checkpoints")
    if resume:
        find_checkpoint(Path(resume))  # reports a wrong directory before its missing recipe
    if resume and not named:
        named = str(_recipe_in(Path(resume)))
    if named:
        settings += file_settings(find_bundled("", named, ".toml"))
    elif not words:
        raise UserError(
            "no recipe named", "arriero pretrain RECIPE, such as: arriero pretrain my.toml --out runs/first"
        )
    settings += given
    if resume and not any(s.key == "out" for s in given):
        settings += _continued(Path(resume), settings)
    changes = tuple(key.replace("-", "_") for key in start.allow_change)
    start = replace(start, resume=resume, allow_change=changes)
    if start.allow_change and not resume:
        raise UserError(
            "--allow-change without --resume has no effect", "leave it out, or name what is resumed with --resume"
        )
    return parse(Recipe, settings, prog="arriero pretrain"), start


def _recipe_in(resume: Path) -> Path:
    """The run's own recipe; its checkpoint's where that is not whole."""
    own = resume / "recipe.toml"
    return own if os.path.isfile(own) and os.path.getsize(own) else find_checkpoint(resume) / "recipe.toml"


def _continued(resume: Path, settings: list[Setting]) -> list[Setting]:
    """The run directory of a resumed run, as a setting of `out`; a checkpoint outside one needs another."""
    run = run_of(resume)
    if run is not None:
        return [Setting("out", [str(run)], "--resume")]
    if any(s.key == "out" and not s.origin.startswith(str(resume)) for s in settings):
        return []  # a recipe that the user has named
    fix = "name the run directory to write: --out runs/again"
    raise UserError(f"--resume {escape(resume)}: is a checkpoint that lies in no run directory", fix)


def _existing_run(named: str, given: list[Setting]) -> str:
    """The run directory that these settings name if it holds a checkpoint, else ""."""
    settings = file_settings(find_bundled("", named, ".toml")) if named else []
    out = next((" ".join(s.words) for s in reversed([*settings, *given]) if s.key == "out"), "")
    if path_problem(out):
        return ""  # the recipe's own check names it
    return out if out and committed(Path(out) / "checkpoints") else ""
