"""What `state.json` may hold: the type and the range of each of its values, checked before use."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from arriero.checkpoint.directory import read_json
from arriero.common.checkpoint_names import DAMAGED, STATE, step_of
from arriero.common.errors import UserError
from arriero.common.text import escape
from arriero.common.untrusted import schema_problem

MAX_COUNT = 1 << 53
"""Steps, samples and tokens are below it: a float holds each of them exactly."""
MAX_WINDOWS = 10_000
SCALE = {"scale": float, "window": int, "hysteresis": int, "clean": int, "patience": int}
SCHEMA: dict[str, Any] = {
    "step": int, "updates": int, "save": int, "seed": int, "processes": int, "consumed_samples": int,
    "consumed_tokens": int, "ordered_samples": int, "loss_scale": SCALE, "inputs": {str: str}, "versions": {str: str},
    "skipped_windows": [[int]], "skipped_samples": [[int]], "recent_losses": [float],
}  # fmt: skip
"""The schema of each key of this version. Other keys are not checked."""


def state_problem(directory: Path, needed: dict[str, Any] | None = None) -> str:
    """What is wrong with a checkpoint's state.json; empty if nothing is.

    Args:
        directory: the checkpoint.
        needed: keys that must be there, with their schema.

    Raises:
        UserError: it cannot be read, or is not a JSON object.
    """
    state = read_json(directory / STATE)
    known = {key: schema for key, schema in SCHEMA.items() if key in state}
    wrong = schema_problem(state, {"step": int, **(needed or {})}) or schema_problem(state, known) or _range(state)
    if not wrong and 0 <= step_of(directory) != state["step"]:
        wrong = f"step is {state['step']}, and the directory is named after another"
    return f"{directory / STATE}: {escape(wrong)}" if wrong else ""


def _range(state: dict[str, Any]) -> str:
    """The first value that no run writes."""
    for key in ("step", "updates", "save", "processes", "consumed_samples", "consumed_tokens", "ordered_samples"):
        if not 0 <= state.get(key, 0) < MAX_COUNT:
            return f"{key} is {state[key]}, not from 0 to 2^53"
    if state.get("updates", 0) > state["step"]:
        return f"updates is {state['updates']}, more than the {state['step']} steps"
    for key in ("skipped_windows", "skipped_samples"):
        pairs = state.get(key, [])
        if len(pairs) > MAX_WINDOWS or any(len(p) != 2 or not all(0 <= n < MAX_COUNT for n in p) for p in pairs):
            return f"{key} is not a list of at most {MAX_WINDOWS:,} pairs from 0 to 2^53"
    losses = state.get("recent_losses", [])
    if len(losses) > MAX_WINDOWS or not all(map(math.isfinite, losses)):
        return f"recent_losses is not a list of at most {MAX_WINDOWS:,} finite numbers"
    return _scale_range(state["loss_scale"]) if "loss_scale" in state else ""


def _scale_range(scale: dict[str, Any]) -> str:
    if unknown := scale.keys() - SCALE.keys():
        return f"loss_scale holds the unknown key {min(unknown)!r}"
    if not 0 < scale["scale"] < math.inf:
        return f"loss_scale.scale is {scale['scale']}, not a positive number"
    wrong = [key for key, schema in SCALE.items() if schema is int and not 0 <= scale[key] < MAX_COUNT]
    return f"loss_scale.{wrong[0]} is {scale[wrong[0]]}, not from 0 to 2^53" if wrong else ""


def load_state(directory: Path, schema: dict[str, Any]) -> dict[str, Any]:
    """The JSON part of a checkpoint, which must hold at least what `schema` gives, every value in its range.

    Raises:
        UserError: it does not.
    """
    if problem := state_problem(directory, schema):
        raise UserError(problem, DAMAGED)
    state: dict[str, Any] = read_json(directory / STATE)
    return state
