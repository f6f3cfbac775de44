"""All checks of a recipe against this machine, before any process is started; every verb that trains calls them."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from sys import version_info

from arriero.common.device import supports_float8_casts
from arriero.common.errors import UserError, join_problems
from arriero.data.check import batch_notices, check_data_against, size_notices
from arriero.data.tokenizer import load_tokenizer
from arriero.train.directory import disk_space_problems, out_problems, recipe_text_problems
from arriero.train.loader import open_batches
from arriero.train.memory import memory_problems
from arriero.train.recipe import Recipe
from arriero.train.resume import check_changes, first_readable


def machine_problems(
    recipe: Recipe, kind: str, *, processes: int, local_processes: int, check_memory: bool = True
) -> tuple[list[UserError], list[str]]:
    """What this machine cannot do for a recipe on devices of this kind.

    Args:
        recipe: what shall be run.
        kind: of device: cpu, cuda or npu.
        processes: of the whole run.
        local_processes: those on this machine.
        check_memory: whether memory is looked at; on the CPU only.

    Returns:
        Settings that have no effect or do not work here, and too little memory; a notice where memory is scarce.
    """
    problems: list[UserError] = []
    if recipe.optim.offload and kind == "cpu":
        problems.append(UserError("optim.offload has no effect on the CPU", "leave it out"))
    if recipe.train.float8 != "none" and not supports_float8_casts(kind):
        problems.append(UserError(f"train.float8 does not work on {kind}", "use train.float8 none"))
    if recipe.train.compile:
        problems += compile_machine_problems(kind)
    if problems or kind != "cpu" or not check_memory:
        return problems, []
    return memory_problems(recipe, processes, local_processes)


def step_problems(
    recipe: Recipe, processes: int, *, kind: str, local_processes: int, check_memory: bool = True
) -> list[UserError]:
    """What keeps this machine from running the recipe's steps, whatever its data and `out` are.

    Args:
        recipe: what shall be run.
        processes: on how many.
        kind: of device: cpu, cuda or npu.
        local_processes: those on this machine.
        check_memory: whether to estimate if the CPU's memory suffices.
    """
    problems = recipe.layout_problems(processes)
    for part in (recipe.optim, recipe.schedule, recipe.log):
        problems += part.problems()
    check_memory = check_memory and not problems
    return (
        problems
        + machine_problems(
            recipe, kind, processes=processes, local_processes=local_processes, check_memory=check_memory
        )[0]
    )


def compile_machine_problems(kind: str) -> list[UserError]:
    """What this machine lacks for compilation on a device of this kind."""
    if kind == "npu":
        return [UserError("train.compile has not been tried on npu", "leave it out")]
    lacking = {
        "a C++ compiler (install g++, or name it in CXX)" if kind == "cpu" else "a C compiler (install gcc)":
            compiler(kind),
        f"Python's headers (install python{version_info.major}.{version_info.minor}-dev)":
            (Path(sysconfig.get_path("include")) / "Python.h").exists(),
        "Triton (pip install triton)": kind == "cpu" or importlib.util.find_spec("triton"),
    }  # fmt: skip
    needed = [what for what, there in lacking.items() if not there]
    fix = "fix that, or leave train.compile out"
    return [UserError(f"train.compile needs {', '.join(needed)}", fix)] if needed else []


def compiler(kind: str) -> str:
    """The program that torch.compile builds kernels with on this kind of device; empty where there is none.

    On the CPU that is CXX, else g++; on CUDA, Triton builds its launchers with CC, gcc or clang. No check may use
    the device: processes are forked later.
    """
    names = (os.environ.get("CXX", "g++"),) if kind == "cpu" else (os.environ.get("CC", ""), "gcc", "clang")
    return next((found for name in names if name and (found := shutil.which(name))), "")


def preflight(
    recipe: Recipe, processes: int, checkpoints: Sequence[Path], *, kind: str = "cpu", joining: bool = False,
    allowed: Sequence[str] = (), local_processes: int = 0,
) -> list[str]:  # fmt: skip
    """Refuses what cannot work, all problems together, before any process is started.

    Args:
        recipe: what shall be run.
        processes: on how many.
        checkpoints: from which it may go on.
        kind: of device.
        joining: this is not the machine of rank 0, so it may come back to a run that has begun.
        allowed: changed keys that are meant.
        local_processes: how many run on this machine; 0 for all of them.

    Returns:
        Notices: scarce memory, changes since the checkpoint, oddities of the inputs.

    Raises:
        UserError: what is wrong, each with its fix.
    """
    problems = recipe_text_problems(recipe) or recipe.problems(processes)
    changed: list[str] = []
    notices: list[str] = []
    wrong, scarce = machine_problems(
        recipe, kind, processes=processes, local_processes=local_processes or processes, check_memory=not problems
    )
    problems += wrong
    if not problems:
        wrong, notices = _check_inputs(recipe)
        problems += wrong
    if not problems and checkpoints:
        changed, problems = check_changes(recipe, first_readable(checkpoints), allowed)
    if recipe.out and not joining and not recipe_text_problems(recipe):
        problems += out_problems(Path(recipe.out), checkpoints)
        if not problems:
            warnings, problems = disk_space_problems(Path(recipe.out), recipe)
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
