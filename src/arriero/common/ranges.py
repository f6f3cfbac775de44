"""The range of every number that a user or a file may set: an annotation of the field, checked by one function.

`steps: Annotated[int, Interval(ge=1, le=1_000_000)] = 1000` is a field with its range; `Len` bounds a list's length.
The annotations are those of the library annotated-types. NaN and the infinities are outside every range. A text that
carries a Registry must be one of its names.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Interval, Len

from arriero.common.errors import UserError
from arriero.common.registry import Registry
from arriero.common.text import escape

MAX_NAME_BYTES, MAX_PATH_BYTES = 255, 4095  # Linux's limits of one part of a path and of all of it
MAX_DIGITS = 40
_INTEGER = re.compile(rf"[+-]?[0-9]{{1,{MAX_DIGITS}}}")
_FLOAT = re.compile(r"[+-]?(?:([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]{1,9})?|inf|infinity|nan)", re.IGNORECASE)


class PathText:
    """Annotation of a text that names a file or directory."""


def parse_number(kind: type, text: str) -> Any:
    """The int or float written in `text` in ASCII digits; int() would also take `1_000`, blanks and other digits.

    Any other text is returned unchanged, so that `range_problems` reports it with all other problems.
    """
    return kind(text) if (_INTEGER if kind is int else _FLOAT).fullmatch(text) else text


def range_problems(value: Any, name: Callable[[str], str] = lambda key: key) -> list[UserError]:
    """All values of a dataclass, and of those within it, that are outside their field's range.

    Args:
        value: an instance of a dataclass.
        name: makes the first words of a message from a dotted key.

    Returns:
        One error a field: "train.grad_clip is nan", with the fix "give a number from 0 to 1e6".
    """
    found = []
    for key, kind, item in leaves(value):
        if wrong := value_problem(item, kind):
            found.append(UserError(f"{name(key)} {wrong}", f"give {expected_values(kind)}"))
    return found


def field_ranges(cls: type, prefix: str = "") -> dict[str, Any]:
    """Every key of a dataclass, dotted, with its type and range."""
    found: dict[str, Any] = {}
    hints = get_type_hints(cls, include_extras=True)
    for f in dataclasses.fields(cls):
        kind = hints[f.name]
        inner = bare_type(kind)
        if dataclasses.is_dataclass(inner):
            found |= field_ranges(inner, f"{prefix}{f.name}.")  # type: ignore[arg-type]
        else:
            found[prefix + f.name] = kind
    return found


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every dotted key of a dataclass instance and of those within it, with its annotated type and its value."""
    hints = get_type_hints(type(value), include_extras=True)
    for f in dataclasses.fields(value):
        item = getattr(value, f.name)
        if dataclasses.is_dataclass(item):
            yield from leaves(item, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, hints[f.name], item


def bare_type(kind: Any) -> Any:
    """A type without its annotations."""
    return bare_type(get_args(kind)[0]) if get_origin(kind) is Annotated else kind


def flag(key: str) -> str:
    """The command-line option of a key."""
    return "--" + key.replace("_", "-")


def find_annotation(kind: Any, cls: type) -> Any:
    """The annotation of this class that a type carries, or None."""
    notes = get_args(kind)[1:] if get_origin(kind) is Annotated else ()
    return next((note for note in notes if isinstance(note, cls) or note is cls), None)


def element_type(kind: Any, index: int = 0) -> Any:
    """The type of a tuple's element, with its range: tuple[int, ...] has one for all."""
    inner = get_args(bare_type(kind))
    return inner[0] if inner[1:] == (...,) else inner[min(index, len(inner) - 1)]


def value_problem(value: Any, kind: Any) -> str:
    """What is wrong with a value of this type and range, as the end of a message: "is nan"; empty if it is valid."""
    base = bare_type(kind)
    origin = get_origin(base)
    wrong = ""
    if origin in (Union, types.UnionType):
        choices = [one for one in get_args(base) if one is not type(None)]
        many = isinstance(value, tuple)
        choice = next((one for one in choices if (get_origin(bare_type(one)) is tuple) == many), choices[0])
        wrong = "" if value is None else value_problem(value, choice)
    elif origin is tuple and isinstance(value, tuple):
        if (bound := find_annotation(kind, Len)) and len(value) > (bound.max_length or math.inf):
            return f"has {len(value):,} values"
        bad = next((one for i, one in enumerate(value) if value_problem(one, element_type(kind, i))), None)
        wrong = "" if bad is None else f"holds {_format_value(bad)}"
    elif base in (int, float):
        wrong = "" if _in_interval(value, base, find_annotation(kind, Interval)) else f"is {_format_value(value)}"
    elif base is str and isinstance(value, str) and ("\0" in value or not _is_encodable(value)):
        wrong = f"is {_format_value(value)}, which is not text"
    elif registry := find_annotation(kind, Registry):
        wrong = "" if value in registry else f"is {_format_value(value)}"
    elif base is Path or find_annotation(kind, PathText):
        wrong = path_problem(os.fspath(value))
    return wrong


def path_problem(path: str) -> str:
    """Why no file can have this name, as the end of a message; empty if it is valid."""
    raw = os.fsencode(path) if _is_encodable(path, "surrogateescape") else b"\0"
    if b"\0" in raw:
        return f"is {_format_value(path)}, which no file can be named"
    if len(raw) > MAX_PATH_BYTES or max(map(len, raw.split(b"/"))) > MAX_NAME_BYTES:
        return f"is {escape(path, 60)}: {len(raw):,} bytes long, and no file can have so long a name"
    return ""


def _is_encodable(text: str, errors: str = "strict") -> bool:
    try:
        text.encode("utf-8", errors)
    except UnicodeEncodeError:
        return False
    return True


def _in_interval(value: Any, base: type, interval: Interval | None) -> bool:
    if isinstance(value, bool) or not isinstance(value, int if base is int else (int, float)):
        return False
    if not isinstance(value, int) and not math.isfinite(value):
        return False
    if interval is None:
        return True
    low = (interval.ge is None or value >= interval.ge) and (interval.gt is None or value > interval.gt)  # type: ignore[operator]
    return low and (interval.le is None or value <= interval.le) and (interval.lt is None or value < interval.lt)  # type: ignore[operator]


def _format_value(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**MAX_DIGITS:
        return f"a number of more than {MAX_DIGITS} digits"
    return f"'{escape(value, 60)}'" if isinstance(value, str) else escape(value, 60)


def expected_values(kind: Any) -> str:
    """A type and its range in words: "a whole number from 1 to 1,000"."""
    base = bare_type(kind)
    origin = get_origin(base)
    if origin in (Union, types.UnionType):
        return expected_values(next(one for one in get_args(base) if one is not type(None)))
    if origin is Literal:
        return "one of " + ", ".join(map(str, get_args(base)))
    if registry := find_annotation(kind, Registry):
        return "one of " + ", ".join(registry.names())
    if origin is tuple:
        parts = get_args(base)
        bound = find_annotation(kind, Len)
        if parts[1:] != (...,):
            count = f"{len(parts)} values"
        else:
            count = f"at most {bound.max_length:,} values" if bound else "values"
        return f"{count}, each {expected_values(element_type(kind))}"
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", Path: "a path"}
    if base is str and find_annotation(kind, PathText):
        return "a path"
    limits = format_interval(find_annotation(kind, Interval)) if base in (int, float) else ""
    return names.get(base, str(base)) + limits


def format_interval(interval: Interval | None) -> str:
    """A range in words, with a blank before it: " from 0 to below 1"; empty for none."""
    if interval is None:
        return ""
    low = f" from {_number(interval.ge)}" if interval.ge is not None else ""
    low = f" above {_number(interval.gt)}" if interval.gt is not None else low
    high = f" to {_number(interval.le)}" if interval.le is not None else ""
    high = f" to below {_number(interval.lt)}" if interval.lt is not None else high
    if interval.gt is not None:  # "above 0, up to 1"
        high = high.replace(" to ", ", up to ", 1).replace("up to below", "below")
    return low + high


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else re.sub(r"e([+-]?)\+?0*", r"e\1", f"{value:g}").replace("e+", "e")
