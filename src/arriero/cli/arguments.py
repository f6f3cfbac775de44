"""What verbs that take a recipe share: splitting `[RECIPE] [--key.sub value ...]`, and help by section."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, get_type_hints

import tyro

from arriero.common.errors import UserError, closest_match
from arriero.common.settings import Setting, command_line_settings, field_types, show_flags
from arriero.train.recipe import Recipe, bundled_directory


def split_command(words: list[str], *owners: type) -> tuple[str, list[list[Setting]], list[Setting]]:
    """Splits the words after a verb: `[RECIPE] [--key.sub value ...]`.

    Args:
        words: what follows the verb.
        owners: dataclasses of the verb's own flags; a bool among them may be given without a value.

    Returns:
        The recipe's name or "", the settings of each owner, and all others, which are the recipe's.
    """
    named, words = (words[0], words[1:]) if words and not words[0].startswith("-") else ("", words)
    rest, found = command_line_settings(words), []
    for owner in owners:
        kinds = {key: kind for key, kind in field_types(owner).items() if "." not in key}
        own = [s for s in rest if s.key in kinds]
        found.append([dataclasses.replace(s, words=s.words or ["True"]) if kinds[s.key] is bool else s for s in own])
        rest = [s for s in rest if s.key not in kinds]
    return named, found, rest


def wants_help(words: list[str]) -> bool:
    """Whether the words ask for help."""
    return not {"-h", "--help"}.isdisjoint(words)


def recipe_sections() -> dict[str, type]:
    """A recipe's sections by name: `recipe` for the keys outside all tables, then each table."""
    tables = [key for key, kind in get_type_hints(Recipe).items() if dataclasses.is_dataclass(kind)]
    return {"recipe": without(Recipe, set(tables))} | {key: only(Recipe, key) for key in tables}


def print_sections(words: list[str], *, usage: str, sections: dict[str, type], complete: tuple[type, ...]) -> None:
    """Prints the help of the section that follows --help, or of all.

    Args:
        words: what follows the verb; `--help parallel` asks for one section.
        usage: the command line, such as "arriero pretrain [RECIPE]".
        sections: the dataclass of each section.
        complete: the dataclasses that together have all sections.

    Raises:
        UserError: no such section.
    """
    at = next(i for i, word in enumerate(words) if word in ("-h", "--help"))
    named = next((word for word in words[at + 1 : at + 2] if not word.startswith("-")), "")
    verb = " ".join(word for word in usage.split() if word.islower())
    if not named:
        recipes = ", ".join(sorted(path.stem for path in bundled_directory().glob("*.toml")))
        print(f"usage: {usage} [--key.sub value ...]\n\nRecipes that come along: {recipes}.")
        print(f"{verb} --help SECTION shows one section of: {', '.join(sections)}.\n")
        fields: list[Any] = [
            (cls.__name__, Annotated[cls, tyro.conf.arg(name="")], dataclasses.field(default_factory=cls))
            for cls in complete
        ]
        show_flags(dataclasses.make_dataclass("Complete", fields, frozen=True), usage)
    elif named in sections:
        show_flags(sections[named], usage)
    else:
        raise UserError(f"--help has no section '{named}'", closest_match(named, sections))


def only(cls: Any, name: str) -> type:
    """A dataclass with one field shown in the help and the others hidden."""
    return without(cls, {f.name for f in dataclasses.fields(cls)} - {name})


def without(cls: Any, names: set[str]) -> type:
    """A dataclass with some fields hidden in the help."""
    hints = get_type_hints(cls, include_extras=True)
    space: dict[str, Any] = {"__module__": cls.__module__, "__doc__": cls.__doc__, "__annotations__": {}}
    for f in dataclasses.fields(cls):
        if f.name in names:
            space["__annotations__"][f.name] = Annotated[hints[f.name], tyro.conf.Suppress]
            space[f.name] = dataclasses.field(default=f.default, default_factory=f.default_factory)
    hidden = type(cls.__name__, (cls,), space)
    hidden.__qualname__ = cls.__qualname__  # by which tyro finds the docstring of each field
    return dataclasses.dataclass(frozen=True)(hidden)
