"""Settings: words of a command line or a file -> a frozen dataclass, all problems reported at once.

tyro reads the words. A field's docstring is its help text, its annotation its range (common/ranges.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import operator
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro
from annotated_types import Interval, Len
from tyro.constructors import PrimitiveConstructorSpec

from arriero.common.errors import UserError, join_problems
from arriero.common.ranges import (
    bare_type,
    expected_values,
    field_ranges,
    find_annotation,
    flag,
    format_interval,
    parse_number,
    range_problems,
    value_problem,
)
from arriero.common.registry import Registry
from arriero.common.suggest import suggestion
from arriero.common.text import escape

T = TypeVar("T")
MAX_WORDS = 10_000
"""The most values that one key may have."""


@dataclass(frozen=True)
class Setting:
    """One key with its values as words, and where it was given."""

    key: str
    words: list[str]
    origin: str


def parse(cls: type[T], settings: list[Setting], *, prog: str) -> T:
    """Builds `cls` from settings, the later of two with one key winning.

    Raises:
        UserError: every unknown key with the nearest name, every value of the wrong type and every one out of range.
    """
    known = field_ranges(cls)
    problems = []
    for setting in settings:
        if setting.key not in known:
            problem = f"{escape(setting.origin)}: unknown key '{escape(setting.key)}'"
            problems.append(UserError(problem, suggestion(setting.key, known)))
    last = {setting.key: setting for setting in settings if setting.key in known}
    try:
        built = _convert(cls, _read_settings(_tyro_class(cls), list(last.values()), known, prog))
    except UserError as error:
        found = [one for s in last.values() if (one := _setting_problem(s, known[s.key], prog))]
        raise join_problems(problems + (found or [error])) from None
    problems += range_problems(built, lambda key: _location(last[key]) if key in last else key)
    if problems:
        raise join_problems(problems)
    return built


def _setting_problem(setting: Setting, kind: Any, prog: str) -> UserError | None:
    """What is wrong with one setting, read as the only field of a class: reading a recipe's 80 fields takes 50 ms."""
    alone: Any = Annotated[_tyro_type(kind), tyro.conf.arg(name=setting.key)]
    try:
        cls = dataclasses.make_dataclass("Single", [("value", alone)])
        value = _read_settings(cls, [setting], {setting.key: kind}, prog).value
    except UserError as error:
        return error
    wrong = value_problem(value, kind)
    return UserError(f"{_location(setting)} {wrong}", f"give {expected_values(kind)}") if wrong else None


def _location(setting: Setting) -> str:
    """How a message names a setting: the flag of a command, or the key with its line in a file."""
    if setting.origin.startswith("--"):
        return setting.key if "." in setting.key else flag(setting.key)
    return f"{setting.origin}: {setting.key}"


def _read_settings(cls: Any, settings: list[Setting], kinds: dict[str, Any], prog: str) -> Any:
    """The instance of `cls`, a class made for tyro, that the settings give.

    Raises:
        UserError: the first problem that tyro finds.
    """
    words = []
    for s in settings:
        if len(s.words) > MAX_WORDS:
            raise UserError(f"{_location(s)} has {len(s.words):,} values", f"give {expected_values(kinds[s.key])}")
        values = s.words
        if bare_type(kinds[s.key]) is bool:
            values = [w.capitalize() if w in ("true", "false") else w for w in s.words]
        # `=` keeps a value that begins with dashes from being read as a flag.
        words += [f"--{s.key}={values[0]}"] if len(values) == 1 else [f"--{s.key}", *values]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            return tyro.cli(cls, prog=prog, args=words, config=(tyro.conf.FlagConversionOff,))
    except SystemExit:
        message = _tyro_message(printed.getvalue())
        if len(settings) != 1:
            raise UserError(f"{prog}: {message}") from None
        (one,) = settings
        choice = message.startswith("invalid choice")  # the fix lists the choices
        problem = (
            f"{_location(one)} is '{escape(' '.join(one.words), 60)}'" if choice else f"{_location(one)}: {message}"
        )
        raise UserError(problem, f"give {expected_values(kinds[one.key])}") from None


def parse_verb(cls: type[T], words: list[str], *, prog: str, description: str) -> T:
    """Builds a verb's arguments from its words; --help prints them and raises SystemExit.

    Raises:
        UserError: what is wrong, with its fix.
    """
    for_tyro = _tyro_class(cls, flags=True)
    if {"-h", "--help"} & set(words):
        print_help(lambda: tyro.cli(for_tyro, prog=prog, description=description, args=["--help"]))
        raise SystemExit(0)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            built: Any = tyro.cli(for_tyro, prog=prog, description=description, args=words)
    except SystemExit:
        raise UserError(f"{prog}: {_tyro_message(printed.getvalue())}", _verb_fix(cls, words, prog)) from None
    hints = get_type_hints(cls, include_extras=True)
    result = _convert(cls, built)
    problems = range_problems(result, lambda key: key if tyro.conf.Positional in get_args(hints[key]) else flag(key))
    if problems:
        raise join_problems(problems)
    return result


def _verb_fix(cls: type, words: list[str], prog: str) -> str:
    """The option that was probably meant, if there is one that the verb does not have."""
    known = [flag(f.name) for f in dataclasses.fields(cls)]
    given = [word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--")]
    strange = [word for word in given if word not in known]
    found = suggestion(strange[0], known) if strange else ""
    return found if found.startswith("did") else f"{prog} --help lists every option"


def show_flags(cls: type, prog: str) -> None:
    """Prints every flag of a dataclass with its range, its default and its meaning, as tyro does."""
    for_tyro = _tyro_class(cls)
    print_help(lambda: tyro.cli(for_tyro, prog=prog, args=["--help"], config=(tyro.conf.FlagConversionOff,)))


def print_help(tyro_help: Callable[[], object]) -> None:
    """Prints tyro's help; in a pipe or file without boxes, which tyro draws only where the encoding is UTF-8."""
    printed = io.StringIO()  # has no encoding
    capture = contextlib.nullcontext() if sys.stdout.isatty() else contextlib.redirect_stdout(printed)
    with contextlib.suppress(SystemExit), capture:
        tyro_help()
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in printed.getvalue().splitlines()))
    sys.stdout.flush()


def _tyro_message(box: str) -> str:
    """The text between the title of tyro's error box and its help text, on one line."""
    lines = [re.sub(r"[^\x20-\x7e]", "", line).strip() for line in box.splitlines()]
    rules = [i for i, line in enumerate(lines) if line and not line.strip("-")] + [len(lines)]
    start, end = (rules[0] + 1, rules[1]) if len(rules) > 2 else (1, rules[0])
    return escape(" ".join(line for line in lines[start:end] if line) or "cannot be read", 300)


def field_types(cls: type) -> dict[str, Any]:
    """Every key of `cls`, dotted, with its type."""
    return {key: bare_type(kind) for key, kind in field_ranges(cls).items()}


def command_line_settings(words: list[str]) -> list[Setting]:
    """Reads `--key.sub value ...` and `--key.sub=value`; dashes in a key are underscores."""
    settings: list[Setting] = []
    for word in words:
        if re.match(r"--[A-Za-z]", word):
            flag, equals, value = word[2:].partition("=")
            key = flag.replace("-", "_")
            settings.append(Setting(key, [value] if equals else [], f"--{flag}"))
        elif settings:
            settings[-1].words.append(word)
        else:
            raise UserError(f"unexpected argument '{escape(word)}'", "give one recipe, then --key value pairs")
    return settings


_tyro_classes: dict[tuple[Any, bool], Any] = {}


def _tyro_class(cls: Any, *, flags: bool = False) -> Any:
    """The same dataclass for tyro: its numbers are read strictly, and the help shows their ranges.

    Args:
        cls: the dataclass.
        flags: whether a bool is a pair of flags, --name and --no-name, whose help says what the default is.
    """
    if (cls, flags) in _tyro_classes:
        return _tyro_classes[cls, flags]
    hints = get_type_hints(cls, include_extras=True)
    space: dict[str, Any] = {"__module__": cls.__module__, "__annotations__": {}}
    if cls.__doc__ and not cls.__doc__.startswith(f"{cls.__name__}("):  # the signature that dataclass() puts there
        space["__doc__"] = cls.__doc__
    for f in dataclasses.fields(cls):
        kind = _tyro_type(hints[f.name])
        if flags and kind is bool:
            default = (
                f"(on by default; --no-{f.name.replace('_', '-')} turns it off)" if f.default else "(off by default)"
            )
            kind = Annotated[bool, tyro.conf.arg(help_behavior_hint=default)]
        space["__annotations__"][f.name] = kind
        if dataclasses.is_dataclass(inner := bare_type(hints[f.name])):
            space[f.name] = dataclasses.field(default_factory=_tyro_class(inner))
        elif f.default is not dataclasses.MISSING:
            space[f.name] = f.default
    derived = type(cls.__name__, (cls,), space)
    derived.__qualname__ = cls.__qualname__  # by which tyro finds the docstring of each field
    _tyro_classes[cls, flags] = dataclass(frozen=True)(derived)
    return _tyro_classes[cls, flags]


def _tyro_type(kind: Any) -> Any:
    """The type with a rule for tyro beside each int and float of it."""
    base, notes = bare_type(kind), get_args(kind)[1:] if get_origin(kind) is Annotated else ()
    if dataclasses.is_dataclass(base):
        base = _tyro_class(base)
    elif base in (int, float):
        notes = (*notes, _number_rule(base, find_annotation(kind, Interval)))
    elif get_args(base) and get_origin(base) is not Literal:
        parts: Any = tuple(one if one is ... else _tyro_type(one) for one in get_args(base))
        base = tuple[parts] if get_origin(base) is tuple else functools.reduce(operator.or_, parts)
    if registry := find_annotation(kind, Registry):
        notes = (*notes, tyro.conf.arg(metavar=f"{{{','.join(registry.names())}}}"))
    notes = tuple(note for note in notes if not isinstance(note, (Interval, Len, Registry)))
    return Annotated[(base, *notes)] if notes else base


def _number_rule(base: type, interval: Interval | None) -> Any:
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=base.__name__.upper() + format_interval(interval),
        instance_from_str=lambda words: parse_number(base, words[0]),
        is_instance=lambda value: isinstance(value, (int, float) if base is float else int),
        str_from_instance=lambda value: [str(value)],
    )


def _convert(cls: type[T], built: Any) -> T:
    """The instance of a class made by `_tyro_class`, as one of `cls`."""
    values = {}
    hints = get_type_hints(cls)
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        item = getattr(built, f.name)
        values[f.name] = _convert(hints[f.name], item) if dataclasses.is_dataclass(item) else item
    return cls(**values)
