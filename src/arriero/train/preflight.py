"""What this machine cannot do for a recipe: asked before any process is started, by every verb that trains."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path
from sys import version_info

from arriero.common.device import float8_casts
from arriero.common.errors import UserError
from arriero.train.recipe import Recipe


def machine_problems(recipe: Recipe, kind: str) -> list[UserError]:
    """Settings that have no effect, or do not work, on devices of this kind on this machine.

    Args:
        recipe: what shall be run.
        kind: of device: cpu, cuda or npu.
    """
    problems: list[UserError] = []
    if recipe.optim.offload and kind == "cpu":
        problems.append(UserError("optim.offload has no effect on the CPU", "leave it out"))
    if recipe.train.float8 != "none" and not float8_casts(kind):
        problems.append(UserError(f"train.float8 does not work on {kind}", "use train.float8 none"))
    if recipe.train.compile:
        problems += compile_machine_problems(kind)
    return problems


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
    fix = "mend that, or leave train.compile out"
    return [UserError(f"train.compile needs {', '.join(needed)}", fix)] if needed else []


def compiler(kind: str) -> str:
    """The program that torch.compile builds kernels with on this kind of device; empty where there is none.

    On the CPU that is CXX, else g++; on CUDA, Triton builds its launchers with CC, gcc or clang. Nothing here may touch
    the device: processes are forked later.
    """
    names = (os.environ.get("CXX", "g++"),) if kind == "cpu" else (os.environ.get("CC", ""), "gcc", "clang")
    return next((found for name in names if name and (found := shutil.which(name))), "")
