"""What this machine cannot do for a recipe: asked before any process is started, by every verb that trains."""

from __future__ import annotations

from arriero.common.device import float8_casts
from arriero.common.errors import UserError
from arriero.distributed.parallel.compiled import compile_machine_problems
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
