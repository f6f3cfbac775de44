"""Tables of named parts that packages outside arriero can extend: optimizers, learning-rate schedules, model families.
Data formats, file types and metric sinks are plain dictionaries that plugins extend likewise.

A plugin is a module that registers its parts when it is imported. Two ways name one:

- an entry point of the installed package: `[project.entry-points."arriero.plugins"]` with `my-name = "my_module"`;
- the environment variable ARRIERO_PLUGINS, modules separated by commas, for a file that is not installed.

A recipe or checkpoint cannot name code: both are files that may come from strangers.
"""

from __future__ import annotations

import functools
import importlib
import os
from importlib.metadata import entry_points
from typing import Generic, TypeVar, cast

from arriero.common.errors import UserError, closest_match
from arriero.common.text import escape

T = TypeVar("T")
VARIABLE, GROUP = "ARRIERO_PLUGINS", "arriero.plugins"


class Registry(Generic[T]):
    """Parts of one kind by name.

    Args:
        key: the recipe's key that selects one, for messages.
        builtin: arriero's own: texts, such as the names of back ends, or "module:attribute", imported when asked for.
        words: what the key takes beside the names of parts, such as "auto".
    """

    def __init__(self, key: str, builtin: dict[str, str] | None = None, *, words: tuple[str, ...] = ()) -> None:
        self.key, self.words = key, words
        self._parts: dict[str, T | str] = dict(builtin or {})

    def register(self, name: str, part: T) -> None:
        """Adds a part under a new name. Raises ValueError where the name is taken by another."""
        if self._parts.get(name, part) is not part:
            raise ValueError(f"{self.key} {name} is registered already")
        self._parts[name] = part

    def names(self) -> list[str]:
        """All names that a recipe may use, those of plugins included."""
        load_plugins()
        return [*self.words, *self._parts]

    def __contains__(self, name: str) -> bool:
        return name in self.words or name in self._parts or name in self.names()

    def items(self) -> list[tuple[str, T]]:
        """All parts, in the order in which they were registered."""
        load_plugins()
        return [(name, self.get(name)) for name in self._parts]

    def get(self, name: str) -> T:
        """The part of that name; built-in ones are imported now. Raises UserError for an unknown name."""
        if name in self.words or name not in self:
            raise UserError(f"{self.key} '{escape(name)}' is not known", closest_match(name, self.names()))
        part = self._parts[name]
        if isinstance(part, str) and ":" in part:
            module, _, attribute = part.partition(":")
            part = self._parts[name] = getattr(importlib.import_module(module), attribute)
        return cast(T, part)


@functools.cache
def load_plugins() -> None:
    """Imports every plugin, once a process.

    Raises:
        UserError: one cannot be imported.
    """
    modules = [point.module for point in entry_points(group=GROUP)]
    modules += [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UserError(
                f"the plugin {module} cannot be imported: {error}",
                f"put its folder on PYTHONPATH, or remove it from {VARIABLE} or uninstall it",
            ) from None
