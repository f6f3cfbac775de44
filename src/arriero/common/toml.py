"""Dataclasses as TOML: a file read into settings (common/settings.py checks them), and an instance written back."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path
from typing import Any

from arriero.common.errors import UserError
from arriero.common.ranges import path_problem
from arriero.common.settings import Setting
from arriero.common.untrusted import read_text

MAX_BYTES, MAX_DEPTH = 100_000, 50
_DEEP_KEY = re.compile(
    rf"""(?<![\w-])(?:(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){{{MAX_DEPTH}}}"""
)  # tomllib's time grows with the square of a key's parts


def file_settings(path: Path) -> list[Setting]:
    """Reads a TOML file into settings, each with the line it stands on.

    Raises:
        UserError: no such file, or not TOML.
    """
    try:
        if wrong := path_problem(str(path)):
            raise UserError(f"the file {wrong}", "name a TOML file")
        if not path.is_file():
            raise UserError(f"{path}: no such file", "name a TOML file")
        text = read_text(path, "name a TOML file", MAX_BYTES)
        if deep := _DEEP_KEY.search(text):
            line = text.count("\n", 0, deep.start()) + 1
            raise UserError(f"{path}:{line}: a key of more than {MAX_DEPTH} parts", "no key has more than two")
        flat = _flatten(tomllib.loads(text))
    except RecursionError:
        raise UserError(f"{path}: not TOML that can be read: it is nested too deep", "correct it") from None
    except ValueError as error:  # TOMLDecodeError is one; so is a number of more digits than Python reads
        raise UserError(f"{path}: not TOML: {error}", "correct that line") from None
    lines = _key_lines(text)
    return [Setting(key, words, f"{path}:{lines.get(key, 1)}") for key, words in flat]


def _flatten(table: dict[str, Any], prefix: str = "") -> list[tuple[str, list[str]]]:
    """The dotted key and the words of each value; dashes in a key are underscores."""
    found = []
    for name, value in table.items():
        key = f"{prefix}{name}".replace("-", "_")
        if isinstance(value, dict):
            found += _flatten(value, f"{key}.")
        else:
            found.append((key, [str(v) for v in value] if isinstance(value, list) else [str(value)]))
    return found


def _key_lines(text: str) -> dict[str, int]:
    """The line number of each dotted key, which tomllib does not report."""
    found: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[\s*([\w.-]+)\s*\]", line):
            table = header[1] + "."
        elif key := re.match(r"\s*([\w.-]+)\s*=", line):
            found.setdefault((table + key[1]).replace("-", "_"), number)
    return found


def to_toml(value: Any) -> str:
    """A dataclass instance as TOML text, every key written out."""
    import tomli_w

    return tomli_w.dumps(dataclasses.asdict(value))
