"""Columns of a record: which are text, which are filled, and which a format would lose."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Record = dict[str, Any]


class UnusableRecordError(ValueError):
    """A record that cannot be used; the message says why."""


CONTENT_COLUMNS = (
    "system", "history", "input", "context", "tools", "functions", "documents", "images", "image", "videos", "video",
    "audios", "audio", "tool_calls", "tool_call_id", "function_call", "reasoning", "reasoning_content", "thinking",
)  # fmt: skip
"""Columns, and keys of a turn, that are part of what a model shall read or answer. A format that has no place for one
refuses the record in which it is filled: without it the record would teach something else."""
LOSS_WEIGHT_KEYS = ("weight", "loss", "train", "training")
"""Keys of a turn by which OpenAI's files, ms-swift's and axolotl's give the weight of its loss."""


def text_column(record: Record, key: str) -> str:
    """A column's string. Raises BadRecordError when it is not there, null or not a string."""
    if key not in record:
        raise UnusableRecordError(f"no column {key!r} (columns: {', '.join(map(str, list(record)[:8])) or 'none'})")
    value = record[key]
    if value is None:
        raise UnusableRecordError(f"{key} is null")
    if not isinstance(value, str):
        raise UnusableRecordError(f"{key} is {type(value).__name__}, not a string")
    return value


def required_text(record: Record, key: str) -> str:
    """A column's string, which is neither empty nor blank. Raises BadRecordError."""
    value = text_column(record, key)
    if not value or value.isspace():
        raise UnusableRecordError(f"{key} is {'blank' if value else 'empty'}")
    return value


def optional_text(record: Record, key: str) -> str:
    """A column's string, or an empty one where it is missing, null or blank. Raises BadRecordError for no string."""
    if record.get(key) is None:
        return ""
    value = text_column(record, key)
    return "" if value.isspace() else value


def is_filled(record: Record, key: str) -> bool:
    """Whether a column holds anything: no null, no blank text, no list or object of such."""
    return _has_content(record.get(key))


def _has_content(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value) and not value.isspace()
    if isinstance(value, (list, tuple)):
        return any(map(_has_content, value))
    if isinstance(value, dict):
        return any(map(_has_content, value.values()))
    return value is not None


def reject_unused_content(record: Record, used: Iterable[str], where: str) -> None:
    """Raises BadRecordError when a column of CONTENT other than `used` is filled.

    Args:
        record: a record, or one turn of it.
        used: the columns that the format takes.
        where: the format's name, for the message.
    """
    for key in record:
        if key not in used and str(key).strip().lower() in CONTENT_COLUMNS and is_filled(record, key):
            raise UnusableRecordError(f"{key} is filled, and {where} has no place for it")


def first_filled(record: Record, keys: tuple[str, ...]) -> str | None:
    """The one of several names for the same column that is filled, or None. Raises BadRecordError for several."""
    found = [key for key in keys if is_filled(record, key)]
    if len(found) > 1 and record[found[0]] != record[found[1]]:
        raise UnusableRecordError(f"{found[0]} and {found[1]} are both filled, and differ")
    return found[0] if found else None
