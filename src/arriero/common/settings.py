"""Settings: words of a command line or a file -> a frozen dataclass, all problems at once.

tyro reads the words; what each key means stands below its field, and its range beside it (common/ranges.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import operator
import re
import sys
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro
from annotated_types import Interval, Len
from tyro.constructors import PrimitiveConstructorSpec

from arriero.common.errors import UserError, join_problems
from arriero.common.ranges import (
    annotation,
    field_ranges,
    flag,
    interval_words,
    plain,
    range_problems,
    read_number,
    wanted,
)
from arriero.common.suggest import suggestion
from arriero.common.text import escape

T = TypeVar("T")
MAX_WORDS = 10_000
"""Values that one key may have: more are no list of settings."""


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
        built: Any = _build(cls, list(last.values()), prog)
    except UserError as error:
        found = [problem for setting in last.values() for problem in _alone(cls, setting, prog)]
        raise join_problems(problems + (found or [error])) from None
    problems += range_problems(built, lambda key: _named(last[key]) if key in last else key)
    if problems:
        raise join_problems(problems)
    return built


def _alone(cls: type, setting: Setting, prog: str) -> list[UserError]:
    """What is wrong with one setting."""
    try:
        built: Any = _build(cls, [setting], prog)
    except UserError as error:
        return [error]
    return range_problems(built, lambda key: _named(setting), {setting.key})


def _named(setting: Setting) -> str:
    """How a message names a setting: the flag of a command, or the key with its line in a file."""
    if setting.origin.startswith("--"):
        return setting.key if "." in setting.key else flag(setting.key)
    return f"{setting.origin}: {setting.key}"


def parse_verb(cls: type[T], words: list[str], *, prog: str, description: str) -> T:
    """Builds a verb's arguments from its words; --help prints them and raises SystemExit.

    Raises:
        UserError: what is wrong, with its fix.
    """
    # Both words of a flag are shown, --bos and --no-bos: its description and its default are those of the first one.
    if {"-h", "--help"} & set(words):
        tyro.cli(_for_tyro(cls), prog=prog, description=description, args=words)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            built: Any = tyro.cli(_for_tyro(cls), prog=prog, description=description, args=words)
    except SystemExit:
        raise UserError(f"{prog}: {_first_sentence(printed.getvalue())}", _verb_fix(cls, words, prog)) from None
    hints = get_type_hints(cls, include_extras=True)
    result = _as(cls, built)
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
    try:
        tyro.cli(_for_tyro(cls), prog=prog, args=["--help"], config=(tyro.conf.FlagConversionOff,))
    except SystemExit:
        sys.stdout.flush()


def _build(cls: type[T], settings: list[Setting], prog: str) -> T:
    kinds = field_types(cls)
    words = []
    for s in settings:
        if len(s.words) > MAX_WORDS:
            raise UserError(f"{_named(s)} has {len(s.words):,} values", f"give {wanted(field_ranges(cls)[s.key])}")
        values = s.words
        if kinds.get(s.key) is bool:
            values = [w.capitalize() if w in ("true", "false") else w for w in s.words]
        # A value that begins with dashes is no flag: it stays with its key.
        words += [f"--{s.key}={values[0]}"] if len(values) == 1 else [f"--{s.key}", *values]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            return _as(cls, tyro.cli(_for_tyro(cls), prog=prog, args=words, config=(tyro.conf.FlagConversionOff,)))
    except SystemExit:
        said = _first_sentence(printed.getvalue())
        if len(settings) != 1:
            raise UserError(f"{prog}: {said}") from None
        (one,) = settings
        choice = said.startswith("invalid choice")  # the fix lists what there is to choose from
        problem = f"{_named(one)} is '{escape(' '.join(one.words), 60)}'" if choice else f"{_named(one)}: {said}"
        raise UserError(problem, f"give {wanted(field_ranges(cls)[one.key])}") from None


def _first_sentence(box: str) -> str:
    """What tyro says between the title of its box and the help text, on one line."""
    lines = [re.sub(r"[^\x20-\x7e]", "", line).strip() for line in box.splitlines()]
    rules = [i for i, line in enumerate(lines) if line and not line.strip("-")] + [len(lines)]
    start, end = (rules[0] + 1, rules[1]) if len(rules) > 2 else (1, rules[0])
    return escape(" ".join(line for line in lines[start:end] if line) or "cannot be read", 300)


def field_types(cls: type) -> dict[str, Any]:
    """Every key that `cls` knows, dotted, with its type."""
    return {key: plain(kind) for key, kind in field_ranges(cls).items()}


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


_derived: dict[Any, Any] = {}


def _for_tyro(cls: Any) -> Any:
    """The same dataclass for tyro: its numbers are read strictly, and the help shows their ranges."""
    if cls in _derived:
        return _derived[cls]
    hints = get_type_hints(cls, include_extras=True)
    space: dict[str, Any] = {"__module__": cls.__module__, "__annotations__": {}}
    if cls.__doc__ and not cls.__doc__.startswith(f"{cls.__name__}("):  # which the decorator makes of nothing
        space["__doc__"] = cls.__doc__
    for f in dataclasses.fields(cls):
        space["__annotations__"][f.name] = _strict(hints[f.name])
        if dataclasses.is_dataclass(inner := plain(hints[f.name])):
            space[f.name] = dataclasses.field(default_factory=_for_tyro(inner))
        elif f.default is not dataclasses.MISSING:
            space[f.name] = f.default
    derived = type(cls.__name__, (cls,), space)
    derived.__qualname__ = cls.__qualname__  # where tyro finds the text below each field
    _derived[cls] = dataclass(frozen=True)(derived)
    return _derived[cls]


def _strict(kind: Any) -> Any:
    """The type with a rule for tyro beside each int and float of it."""
    base, notes = plain(kind), get_args(kind)[1:] if get_origin(kind) is Annotated else ()
    if dataclasses.is_dataclass(base):
        base = _for_tyro(base)
    elif base in (int, float):
        notes = (*notes, _number_rule(base, annotation(kind, Interval)))
    elif get_args(base) and get_origin(base) is not Literal:
        parts: Any = tuple(one if one is ... else _strict(one) for one in get_args(base))
        base = tuple[parts] if get_origin(base) is tuple else functools.reduce(operator.or_, parts)
    notes = tuple(note for note in notes if not isinstance(note, (Interval, Len)))
    return Annotated[(base, *notes)] if notes else base


def _number_rule(base: type, interval: Interval | None) -> Any:
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=base.__name__.upper() + interval_words(interval),
        instance_from_str=lambda words: read_number(base, words[0]),
        is_instance=lambda value: isinstance(value, (int, float) if base is float else int),
        str_from_instance=lambda value: [str(value)],
    )


def _as(cls: type[T], built: Any) -> T:
    """The instance of tyro's class as one of `cls`."""
    values = {}
    hints = get_type_hints(cls)
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        item = getattr(built, f.name)
        values[f.name] = _as(hints[f.name], item) if dataclasses.is_dataclass(item) else item
    return cls(**values)
