"""Compares a recipe with that of the checkpoint: lists changes, refuses those that make it another run."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arriero.checkpoint.state import load_state
from arriero.checkpoint.verify import verify_metadata
from arriero.common.errors import UserError, closest_match
from arriero.common.text import escape
from arriero.model.config import LlamaConfig
from arriero.train.facts import flat, input_changes
from arriero.train.recipe import Recipe, recipe_of_checkpoint

CHANGEABLE_KEYS = (
    "out", "device", "parallel.*", "recompute.*", "checkpoint.*", "log.*", "watch.*", "train.steps",
    "train.micro_batch", "train.compile", "train.eval_*", "train.on_*", "train.check_*", "train.spike_factor",
    "optim.offload",
)  # fmt: skip
"""Keys that may change: the run stays the same run. train.steps moves the end of the schedule, not a sample;
train.compile changes the numbers by their rounding alone, as another layout does."""
PATH_KEYS = ("model", "init", "tokenizer", "data.prefix")
"""Keys whose value is a path: what lies there is compared instead."""


def first_readable(paths: Sequence[Path]) -> Path:
    """The first checkpoint whose small files are whole; the first of all if none is, so that its error is reported."""
    return next((path for path in paths if not verify_metadata(path)), paths[0])


def recipe_changes(recipe: Recipe, checkpoint: Path) -> dict[str, tuple[Any, Any]]:
    """What differs from the run that wrote the checkpoint: key -> (then, now); paths by what lies there.

    Raises:
        UserError: the checkpoint's recipe or state cannot be read.
    """
    then = flat(recipe_of_checkpoint(checkpoint))
    now = flat(recipe)
    found = {k: (then[k], now[k]) for k in now if k not in PATH_KEYS and then.get(k) != now[k]}
    saved, model = LlamaConfig.from_json(checkpoint).to_json(), recipe.model_config().to_json()
    found |= {f"model {k}": (saved.get(k), model[k]) for k in model if saved.get(k) != model[k]}
    return found | input_changes(load_state(checkpoint, {}).get("inputs", {}), recipe)


def check_changes(recipe: Recipe, checkpoint: Path, allowed: Sequence[str]) -> tuple[list[str], list[UserError]]:
    """Lines that show what has changed, and what of it is refused.

    Args:
        recipe: what shall be run now.
        checkpoint: from which.
        allowed: the keys that `--allow-change` names.
    """
    found = recipe_changes(recipe, checkpoint)
    refused: list[UserError] = []
    lines = []
    for key, (then, now) in found.items():
        free = any(fnmatch.fnmatchcase(key, pattern) for pattern in CHANGEABLE_KEYS)
        fix = f"set it back, or say that you mean it: --allow-change {key}"
        if key.startswith("model "):
            fix = "resume with the model that the run began with"
        if not free and (key not in allowed or key.startswith("model ")):
            refused.append(UserError(f"{escape(key)} is {escape(now)}, and the run began with {escape(then)}", fix))
        elif key != "out":
            lines.append(f" changed since the checkpoint: {escape(key)}: {escape(then)} -> {escape(now)}")
    for key in allowed:
        if key not in found:
            known = [k for k in found if not any(fnmatch.fnmatchcase(k, p) for p in CHANGEABLE_KEYS)]
            hint = closest_match(key, known) if known else "nothing that needs it has changed: leave it out"
            refused.append(UserError(f"--allow-change {escape(key)}: it has not changed", hint))
    return lines, refused
