"""Reads the curves of a run: a run directory, `metrics.jsonl`, a Megatron, MindSpeed or AscendSpeed log, or a CSV.

Where an iteration appears twice, as after a resume, the later line counts.
"""

from __future__ import annotations

import csv
import math
import re
from dataclasses import dataclass
from pathlib import Path

from arriero.common.errors import UserError
from arriero.common.untrusted import read_bytes
from arriero.observe.metrics import read_metrics

MAX_BYTES = 2 << 30
Columns = dict[str, dict[int, float]]

LOG_FORMATS = (
    "lines such as ` iteration 3/ 500 | ... | elapsed time per iteration (ms): 9.1 | ... | lm loss: 1.2E+00 |`"
)
# One pattern for all: Megatron has a time stamp in front, AscendSpeed none, MindSpeed's FSDP2 a colon and no total,
# and a launcher may put `[default0]:` before everything.
_STEP = re.compile(r"\biteration:?\s+([0-9]{1,15})\s*(?:/\s*\d+\s*)?\|(.*)")
_VALIDATION = re.compile(r"validation loss at iteration ([0-9]{1,15}) \| lm loss value: (\S+)")
_ITERATION_NAMES = ("iteration", "iter", "step", "steps", "iterations")
_ALIASES = {"loss": "lm_loss", "train_loss": "lm_loss", "gradient_norm": "grad_norm"}


@dataclass(frozen=True)
class Curves:
    """What one run measured: `columns["lm_loss"][3]` is the loss of iteration 3."""

    path: Path
    columns: Columns
    kind: str
    """What the file was taken for: metrics, log or csv."""

    @property
    def iterations(self) -> set[int]:
        """Every iteration that has at least one training value."""
        return {i for name, column in self.columns.items() if name != "validation_loss" for i in column}


def read_curves(path: Path) -> Curves:
    """Reads whatever `path` is; the kind is told from the suffix, else from the first line.

    Raises:
        UserError: no such file, nothing to compare in it, or a value that is no number, named by file and line.
    """
    if path.is_dir():
        file = path / "metrics.jsonl"
        if not file.exists():
            raise UserError(f"{path}: no metrics.jsonl in it", "name a run directory, a metrics file, a log or a CSV")
        path = file
    raw = read_bytes(path, "check the path and its permissions", MAX_BYTES)
    text = raw.decode("utf-8", "replace").replace("\r\n", "\n").replace("\r", "\n")
    try:
        kind = _kind(path, text)
        read = {"metrics": _read_metrics, "csv": _read_csv, "log": _read_log}[kind]
        curves = Curves(path, read(path, text), kind)
    except csv.Error as error:
        raise UserError(f"{path}: {error}", "repair the file") from None
    if not curves.iterations:
        fix = {
            "metrics": "train at least one step",
            "csv": "add rows below the header",
            "log": f"expected {LOG_FORMATS}",
        }
        raise UserError(f"{path}: no training step in it (read as {kind})", fix[kind])
    return curves


def _kind(path: Path, text: str) -> str:
    if path.suffix == ".jsonl":
        return "metrics"
    if path.suffix in (".csv", ".tsv"):
        return "csv"
    first = text.lstrip().partition("\n")[0]
    if first.startswith("{"):
        return "metrics"
    return "csv" if _header(first) and "|" not in first else "log"


def _read_metrics(path: Path, text: str) -> Columns:
    columns: Columns = {}
    for record in read_metrics(path):
        validation = record.get("kind") == "validation"
        for key, value in record.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and key != "iteration":
                if validation and key != "lm_loss":
                    continue
                columns.setdefault("validation_loss" if validation else key, {})[record["iteration"]] = float(value)
    return columns


def _read_log(path: Path, text: str) -> Columns:
    """Takes every `key: value |` of the step lines, under the key with underscores (`grad norm` is grad_norm)."""
    columns: Columns = {}
    lines = text.split("\n")
    if not lines[-1].endswith("|"):
        lines.pop()  # empty, or cut off by a kill, and then so may be its last number
    for number, line in enumerate(lines, 1):
        if found := _VALIDATION.search(line):
            where = f"{path}, line {number}"
            columns.setdefault("validation_loss", {})[int(found[1])] = _number(found[2], where, "lm loss value")
        elif (found := _STEP.search(line)) and "elapsed time per iteration" in line:
            for key, value in _step_fields(found[2], f"{path}, line {number}").items():
                columns.setdefault(key, {})[int(found[1])] = value
    return columns


def _step_fields(text: str, where: str) -> dict[str, float]:
    """The numbers of one step line; a loss that is missing though the step was not skipped was not a number."""
    fields: dict[str, float] = {}
    for field in text.split("|"):
        key, colon, value = field.partition(":")
        key = re.sub(r"\W+", "_", key.strip()).strip("_").lower()
        if not colon or not key:
            continue
        if key in ("lm_loss", "grad_norm"):
            fields[key] = _number(value, where, key.replace("_", " "))
            continue
        try:
            fields[key] = float(value)
        except ValueError:
            continue  # a duration, a percentage: nothing that is compared
    if "lm_loss" not in fields and not fields.get("number_of_skipped_iterations"):
        fields["lm_loss"] = (
            math.nan
        )  # Megatron and AscendSpeed print a loss only if it is above zero, so a NaN vanishes
    return fields


def _read_csv(path: Path, text: str) -> Columns:
    lines = text.split("\n")
    names = _header(lines[0])
    if names is None:
        fix = "begin with a header such as: iteration,lm_loss,grad_norm"
        raise UserError(f"{path}, line 1: no column named iteration", fix)
    at = next(i for i, name in enumerate(names) if name in _ITERATION_NAMES)
    columns: Columns = {_ALIASES.get(name, name): {} for i, name in enumerate(names) if i != at}
    for number, row in enumerate(csv.reader(lines[1:], delimiter=_delimiter(lines[0])), 2):
        where = f"{path}, line {number}"
        if not row:
            continue
        if len(row) != len(names):
            raise UserError(
                f"{where}: {len(row)} values under {len(names)} columns", "give each column a value, or none: ,,"
            )
        iteration = _number(row[at], where, names[at])
        if not abs(iteration) < 1e15 or iteration != int(iteration):
            raise UserError(f"{where}: iteration is {row[at].strip()!r}", "give a whole number")
        for i, name in enumerate(names):
            if i != at and row[i].strip():
                columns[_ALIASES.get(name, name)][int(iteration)] = _number(row[i], where, name)
    return columns


def _header(line: str) -> list[str] | None:
    """The column names in lower case with underscores, or None where none of them is the iteration."""
    row = next(csv.reader([line], delimiter=_delimiter(line)), [])
    names = [re.sub(r"\W+", "_", name.strip().lstrip("\ufeff").lower()) for name in row]
    return names if any(name in _ITERATION_NAMES for name in names) else None


def _delimiter(header: str) -> str:
    return "\t" if "\t" in header else ";" if ";" in header else ","


def _number(text: str, where: str, name: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{where}: {name} is {text.strip()!r}", "give a number; nan and inf are numbers here") from None
