"""Numbers from environment variables, set by torchrun, srun or a user."""

from __future__ import annotations

import re
from collections.abc import Mapping

from arriero.common.errors import UserError
from arriero.common.text import escape


def environment_number(
    environment: Mapping[str, str], name: str, low: int, high: int, *, fix: str, default: int | None = None
) -> int:
    """The whole number in a variable.

    Args:
        environment: such as os.environ.
        name: of the variable.
        low: the smallest valid number.
        high: the largest valid number.
        fix: what the user should do about an invalid one.
        default: for a variable that is missing or empty; None if it is required.

    Raises:
        UserError: missing, no number, or out of range; names the variable.
    """
    text = environment.get(name, "").strip()
    if not text:
        if default is not None:
            return default
        raise UserError(f"{name} is {'empty' if name in environment else 'missing'} in the environment", fix)
    if not re.fullmatch(r"[+-]?[0-9]{1,18}", text):
        raise UserError(f"{name} is {escape(repr(text), 60)} in the environment, not a whole number", fix)
    if not low <= int(text) <= high:
        raise UserError(f"{name} is {text} in the environment, not from {low} to {high}", fix)
    return int(text)
