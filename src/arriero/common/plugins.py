"""What installed packages add to arriero: objects that they name as entry points."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from arriero.common.errors import UserError
from arriero.common.text import escape


def load_plugins(group: str) -> dict[str, Any]:
    """The objects that installed packages name in an entry-point group, by the entry's name.

    Raises:
        UserError: one cannot be imported.
    """
    found = {}
    for entry in entry_points(group=group):
        try:
            found[entry.name] = entry.load()
        except Exception as error:
            problem = f"the plugin {escape(entry.name)} of {group} ({escape(entry.value)}): {escape(error)}"
            raise UserError(problem, "mend or uninstall the package that it comes from") from error
    return found
