"""Reading untrusted files: JSON of a bounded size and a known schema, and no path out of a directory.

A file that is wrong in any way ends in a UserError which names it; nothing in it is ever run. docs/security.md lists
what is checked where.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from arriero.common.errors import UserError
from arriero.common.files import open_regular, os_error_text
from arriero.common.text import escape

MAX_JSON_BYTES = 100_000_000  # what safetensors allows its header; a vocabulary of 256,000 entries takes a third of it
_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", dict: "an object"}


def read_json(path: Path, fix: str, schema: Any = object, *, unique_keys: bool = False) -> Any:
    """Reads a JSON file that fits `schema` (see `schema_problem`).

    Raises:
        UserError: no regular file there, larger than MAX_JSON_BYTES, not UTF-8, not JSON, nested too deep to be read,
            or of another schema; names the file and, in the last case, the place in it.
    """
    return parse_json(read_text(path, fix), str(path), fix, schema, unique_keys=unique_keys)


def read_text(path: Path, fix: str, most: int = MAX_JSON_BYTES) -> str:
    """The text of a regular UTF-8 file of at most `most` bytes. Raises UserError."""
    try:
        return read_bytes(path, fix, most).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 (byte {error.start})", fix) from None


def read_bytes(path: Path, fix: str, most: int = MAX_JSON_BYTES) -> bytes:
    """The bytes of a regular file, at most `most` of them. Raises UserError."""
    try:
        with open(open_regular(path, follow=True), "rb") as file:
            raw = file.read(most + 1)
    except FileNotFoundError:
        raise UserError(f"{escape(path)}: no such file", fix) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{escape(path)}: cannot be read ({os_error_text(error)})", fix) from None
    if len(raw) > most:
        raise UserError(f"{path}: is larger than {most:,} bytes, which no file of its kind is", fix)
    return raw


def parse_json(
    text: str | bytes, where: str, fix: str, schema: Any = object, *, unique_keys: bool = False
) -> Any:  # fmt: skip
    """Decodes JSON of a known schema. Raises UserError, as `read_json` does, with `where` for the file.

    `unique_keys`: also refuses an object in which a key stands twice with different values.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique_object if unique_keys else None)
    except RecursionError:
        raise UserError(f"{where}: not JSON that can be read: it is nested too deep", fix) from None
    except _RepeatedKeyError as error:
        raise UserError(f"{where}: {error}", fix) from None
    except ValueError as error:  # broken, or a number of more digits than Python reads
        raise UserError(f"{where}: not JSON ({error})", fix) from None
    if wrong := schema_problem(value, schema):
        raise UserError(f"{where}: {wrong}", fix)
    return value


class _RepeatedKeyError(ValueError):
    """A key stands twice in a JSON object, with different values."""


def _unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        for key, value in pairs:
            if repr(found[key]) != repr(value):  # repr: NaN differs from itself
                raise _RepeatedKeyError(f"key {escape(key, 80)!r} stands twice, with different values")
    return found


def schema_problem(value: Any, schema: Any, at: str = "") -> str:  # noqa: PLR0911 - one a kind of schema
    """Where and how decoded JSON differs from `schema`: one sentence, or empty when it fits.

    Args:
        value: decoded JSON.
        schema: object (anything), int (of 64 bits, no bool), float (any number), str, bool, dict, None (null); {"key":
            schema, ...} for an object that has at least these keys; {str: schema} for one whose values are all alike;
            [schema] for a list; a tuple of schemas for any of them.
        at: the place, for the message.
    """
    if schema is object:
        return ""
    if isinstance(schema, tuple):
        return "" if any(not schema_problem(value, one) for one in schema) else schema_problem(value, schema[0], at)
    name = at or "the whole"
    if isinstance(schema, list):
        if not isinstance(value, list):
            return f"{name} is {_show(value)}, not a list"
        return next(
            (wrong for i, one in enumerate(value) if (wrong := schema_problem(one, schema[0], f"{at}[{i}]"))), ""
        )
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return f"{name} is {_show(value)}, not an object"
        if lacking := [key for key in schema if key is not str and key not in value]:
            return f"{name} lacks {lacking[0]!r}"
        wanted = dict.fromkeys(value, schema[str]) if str in schema else schema
        return next(
            (w for key, one in wanted.items() if (w := schema_problem(value[key], one, f"{at}.{key}"[not at :]))), ""
        )
    if schema is None:
        fits = value is None
    elif schema is int:
        fits = type(value) is int and -(2**63) <= value < 2**63
    elif schema is float:
        fits = type(value) is float or (type(value) is int and abs(value) < 2**63)
    else:
        fits = isinstance(value, schema)
    return "" if fits else f"{name} is {_show(value)}, not {_WORDS.get(schema, 'null')}"


def _show(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    return json.dumps(value)[:60]


def require_inside(directory: Path, path: Path) -> Path:
    """`path`, which lies in `directory`, unless a symbolic link leads out of it.

    The links of Hugging Face's cache, from `snapshots/REVISION` into the `blobs` beside it, are followed.

    Raises:
        UserError: the link leads elsewhere.
    """
    home, real = Path(directory).resolve(), Path(path).resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not (real.is_relative_to(home) or real.is_relative_to(blobs)):
        fix = "put the file itself there, if you trust it"
        raise UserError(f"{path}: is a link out of its directory, to {real}", fix)
    return path


def require_file_name(name: Any, where: str) -> str:
    """`name`, which a file gives for a file beside it. Raises UserError for anything but a bare file name."""
    if isinstance(name, str) and Path(name).name == name and name not in ("", ".", "..") and "\0" not in name:
        return name
    fix = "do not trust what this file came with"
    raise UserError(f"{where}: names a file outside its directory: {str(name)[:80]!r}", fix)
