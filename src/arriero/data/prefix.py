"""The names in `data.prefix`: one data set, or a blend of several, and the files that belong to each.

Both the reader and the digests of the files that were read use these functions, so that they never differ.
"""

from __future__ import annotations

import math
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from arriero.common.errors import UserError
from arriero.common.text import escape
from arriero.data.indexed import bin_path, idx_path

FIX = 'write one prefix, or several, with a weight before each of them or before none: "0.7 A 0.3 B"'


@dataclass(frozen=True)
class Blend:
    """The data sets of a run."""

    prefixes: tuple[str, ...]
    weights: tuple[float, ...] | None
    """As given, in any scale; None where none is given: then each set counts by its length."""


def is_file(path: Path) -> bool:
    """Whether a regular file is there; no name, however odd or long, is an error."""
    return os.path.isfile(path)


def is_instruction(prefix: str) -> bool:
    """Whether PREFIX names an instruction set: the three sets PREFIX_packed_*_document."""
    return is_file(idx_path(f"{prefix}_packed_{INSTRUCTION_FIELDS[0]}_document"))


def indexed_sets(prefix: str) -> dict[str, str]:
    """The indexed data sets that are read for one prefix: what follows the prefix -> the whole name."""
    ends = [f"_packed_{field}_document" for field in INSTRUCTION_FIELDS] if is_instruction(prefix) else [""]
    return {end: prefix + end for end in ends}


def data_files(text: str) -> dict[str, Path]:
    """Every file that is read for a `data.prefix`, under a name that does not depend on where it lies: data[0].bin is
    the .bin of the first set. Raises UserError."""
    found = {}
    for number, prefix in enumerate(parse_prefix(text).prefixes):
        for end, name in indexed_sets(prefix).items():
            for path in (idx_path(name), bin_path(name)):
                found[f"data[{number}]{end}{path.suffix}"] = path
    return found


def dataset_exists(prefix: str) -> bool:
    """Whether a data set has this name."""
    return is_instruction(prefix) or is_file(idx_path(prefix))


def parse_prefix(text: str) -> Blend:
    """Reads "A", "0.7 A 0.3 B" or "A B".

    A data set whose name is the whole text is that one set, whatever characters the name has. Otherwise the text is
    split into words as a shell does, so that a name with blanks can be quoted; what is a weight is decided as
    Megatron-LM decides it (`get_blend_from_list`): an odd number of words has none.

    Raises:
        UserError: no text, or neither.
    """
    if not text.strip():
        raise UserError("data.prefix is empty", FIX)
    if dataset_exists(text):
        return Blend((text,), None)
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"data.prefix {escape(text)!r} is no blend ({error})", FIX) from None
    numbers = [_number(word) for word in words]
    if len(words) % 2 == 0 and all(n is not None for n in numbers[::2]):
        weights = [n for n in numbers[::2] if n is not None]
        if not all(0 < w < math.inf for w in weights) or not math.isfinite(sum(weights)):
            raise UserError(f"data.prefix {escape(text)!r}: every prefix needs a weight above 0", FIX)
        return Blend(tuple(words[1::2]), tuple(weights))
    if missing := [w for w, n in zip(words, numbers, strict=True) if n is not None and not dataset_exists(w)]:
        why = f"{escape(missing[0])} is no data set, and every prefix needs a weight if one has it"
        raise UserError(f"data.prefix {escape(text)!r} is no blend: {why}", FIX)
    return Blend(tuple(words), None)


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def suggest_prefix(prefix: str) -> str:
    """A fix that lists the data sets whose names begin alike."""
    here = Path(prefix)
    names: list[str] = []
    try:
        names = [p.name for p in here.parent.iterdir() if p.name.startswith(here.name[:3])]
    except (OSError, ValueError):
        names = []
    found = sorted(name.removesuffix(".idx") for name in names if name.endswith(".idx"))
    if not found:
        return "give the prefix that `arriero prepare` printed"
    return f"there is: {', '.join(map(escape, found[:5]))}"


INSTRUCTION_FIELDS = ("input_ids", "attention_mask", "labels")
