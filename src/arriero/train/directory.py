"""The run directory before the first step: checks that it can be written, and writes its first files."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from arriero.checkpoint.find import committed, run_of
from arriero.checkpoint.size import checkpoint_bytes, directory_bytes, disk_usage, format_bytes
from arriero.common.checkpoint_names import enclosing_checkpoint, inside_checkpoints_of_run
from arriero.common.errors import UserError
from arriero.common.files import make_directory, open_regular, os_error_text, write_atomic
from arriero.common.text import escape
from arriero.common.toml import MAX_BYTES, to_toml
from arriero.common.untrusted import read_bytes, require_inside
from arriero.data.tokenizer import load_tokenizer
from arriero.data.tokenizer_files import GENERATION_CONFIG
from arriero.train.facts import flat
from arriero.train.recipe import Recipe


def out_problems(out: Path, checkpoints: Sequence[Path]) -> list[UserError]:
    """Why no run may be written to `out`, going on from these checkpoints: another one is there, or a checkpoint."""
    if holder := enclosing_checkpoint(out):
        fix = f"write elsewhere with --out, or go on from it with --resume {escape(holder)}"
        return [UserError(f"out: {escape(out)} is or lies in the checkpoint {escape(holder)}, which is only read", fix)]
    if holder := inside_checkpoints_of_run(out):
        problem = f"out: {escape(out)} lies in {escape(holder)}, where only a run's checkpoints belong"
        return [UserError(problem, "write elsewhere with --out")]
    try:
        elsewhere = out.resolve() not in {run.resolve() for path in checkpoints if (run := run_of(path))}
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error) if isinstance(error, RuntimeError) else os_error_text(error)
        return [UserError(f"out: {escape(out)}: {escape(reason)}", "write elsewhere with --out")]
    if elsewhere and committed(out / "checkpoints"):
        fix = f"continue it with --resume {escape(out)}, or write elsewhere with --out"
        return [UserError(f"out: {escape(out)} already holds a run", fix)]
    return []


def recipe_text_problems(recipe: Recipe) -> list[UserError]:
    """Why the recipe could not be read back from the run and its checkpoints."""
    found = []
    for key, value in flat(recipe).items():
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, str) and not _is_text(one):
                fix = "use a name of whole characters (UTF-8)"
                found.append(UserError(f"{key}: {escape(one)} is not text that a recipe can hold", fix))
    if not found and len(to_toml(recipe).encode()) > MAX_BYTES:
        fix = "use shorter names, such as relative paths"
        found.append(UserError(f"the recipe is longer than the {MAX_BYTES:,} bytes that are read back", fix))
    return found


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:  # a lone surrogate: a byte of a path that is not UTF-8
        return False
    return True


def disk_space_problems(out: Path, recipe: Recipe) -> tuple[list[str], list[UserError]]:
    """Warnings where the disk lacks space for the run's checkpoints; an error where it can never hold one."""
    policy, steps = recipe.checkpoint, recipe.train.steps
    size, there = checkpoint_bytes(recipe.model_config(), recipe.train.dtype), disk_usage(out)
    if there is None:
        return [], []
    total, free = there
    need, where = f"a checkpoint of this model takes {format_bytes(size)}", escape(out)
    if size > total:
        problem = f"out: {need}, and the disk of {where} has {format_bytes(total)} in all"
        return [], [UserError(problem, "write elsewhere with --out")]
    if size > free:
        return [
            f" WARNING: {need}, and {format_bytes(free)} are free in {where}: make room before the first is due"
        ], []
    saves = 1 + (steps // policy.every if policy.every else 0)
    most = saves if not policy.keep else min(
        saves, policy.keep + 1 + (steps // policy.keep_every if policy.keep_every else 0)
    )  # fmt: skip
    held = sum(directory_bytes(path) for path in committed(out / "checkpoints"))
    if size * most > free + held:
        return [f" WARNING: {need}, up to {most} are there at a time, and {format_bytes(free)} are free in {where}"], []
    return [], []


def prepare_run_directory(recipe: Recipe) -> None:
    """Writes the resolved recipe and the tokenizer into the run directory, where they are not there yet.

    With them goes the generation_config.json of the model that the run starts from, or else the tokenizer's.

    Raises:
        UserError: a file or a directory cannot be written, or is a link.
    """
    out, fix = Path(recipe.out), "make room or repair it, or write elsewhere with --out"
    make_directory(out, fix)
    make_directory(out / "checkpoints", fix, follow=False)
    try:
        write_if_changed(out / "recipe.toml", to_toml(recipe).encode())
        files: dict[str, bytes] = {}
        if recipe.tokenizer:
            with tempfile.TemporaryDirectory(prefix="arriero-tokenizer-") as made:
                load_tokenizer(Path(recipe.tokenizer)).save_to(Path(made))
                for path in sorted(path for path in Path(made).rglob("*") if path.is_file()):
                    files[str(path.relative_to(made))] = path.read_bytes()
        if recipe.init and (Path(recipe.init) / GENERATION_CONFIG).is_file():
            source = require_inside(Path(recipe.init), Path(recipe.init) / GENERATION_CONFIG)
            files[GENERATION_CONFIG] = read_bytes(source, "restore the file, or remove it")
        for name, data in files.items():
            for folder in (out / "tokenizer", (out / "tokenizer" / name).parent):
                make_directory(folder, fix, follow=False)
            write_if_changed(out / "tokenizer" / name, data)
    except OSError as error:
        where = escape(error.filename2 or error.filename or out)
        raise UserError(f"{where}: cannot be written ({os_error_text(error)})", fix) from None


def write_if_changed(path: Path, data: bytes) -> None:
    """Writes a file unless it has this content already, so that a full disk does not matter then.

    Raises:
        OSError: it cannot be written.
    """
    try:
        with open(open_regular(path), "rb") as file:
            if file.read(len(data) + 1) == data:
                return
    except OSError:
        pass  # not there, or not what is to be there: it is replaced
    write_atomic(path, data, durable=True)
