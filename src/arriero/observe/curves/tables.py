"""Tables and JSON: CSV of any origin, JSON lines (arriero's metrics, LLaMA-Factory's log), Trainer's state."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from arriero.common.errors import UserError
from arriero.common.text import escape
from arriero.common.untrusted import parse_json, read_json
from arriero.observe.curves.curve import (
    VALIDATION,
    Curves,
    CurvesBuilder,
    canonical_name,
    first_duplicate,
    normalize_name,
    parse_iteration,
    parse_number,
    require_number,
)
from arriero.observe.curves.text_lines import MAX_LINE, TextLine

MAX_FIELD_CHARACTERS = 131_072

ITERATION = ("iteration", "iterations", "iter", "global_step", "trainer_global_step", "global_step_max_steps",
             "current_steps", "step", "steps", "_step")  # fmt: skip
"""Names of the column or key that counts steps, the one that is taken first."""
FIX = "remove the line, or restore the file"
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_COMPARED = ("lm_loss", "grad_norm", VALIDATION)


def read_table(path: Path, lines: Iterable[TextLine], only: Collection[str] | None) -> Curves:
    """Reads CSV with a header that names the iteration; comma, semicolon or tab between the cells.

    Understands what wandb exports of a chart (`RUN - train/loss`, `__MIN` and `__MAX` beside it) and of a history
    (`_step`), and what TensorBoard does (`Wall time,Step,Value`, the quantity in the file's name).

    Raises:
        UserError: no such header, a quantity that has two columns, a row of another length, a loss, gradient norm or
            iteration that is no number; named by file and line.
    """
    source = _Rows(path, lines)
    first = next(source, "")
    names = header(first)
    if names is None:
        fix = "begin with a header such as: iteration,lm_loss,grad_norm"
        raise UserError(f"{escape(path)}, line 1: no column named iteration", fix)
    at = _iteration_at(names)
    columns = _quantities(path, names, at)
    found = CurvesBuilder(path, only)
    try:
        csv.field_size_limit(MAX_FIELD_CHARACTERS)  # of the whole process: reading CSV as data raises it
        for row in csv.reader(source, delimiter=_delimiter(first)):
            where = f"{escape(path)}, line {source.number}"
            if not row:
                continue
            if len(row) != len(names):
                fix = "give each column a value, or none: ,,"
                raise UserError(f"{where}: {len(row)} values under {len(names)} columns", fix)
            require_number(row[at], where, names[at])
            iteration = parse_iteration(row[at])
            if iteration is None:
                raise UserError(f"{where}: {names[at]} is {escape(row[at].strip(), 80)!r}", "give a whole number")
            _add_row(found, iteration, {name: row[i] for i, name in columns.items() if row[i].strip()}, where)
    except csv.Error as error:
        raise UserError(f"{escape(path)}, line {source.number}: {error}", "repair the file") from None
    return found.curves("CSV")


class _Rows(Iterator[str]):
    """The lines' text for the csv module, and the number of the newest."""

    def __init__(self, path: Path, lines: Iterable[TextLine]) -> None:
        self.path, self.lines, self.number = path, iter(lines), 0

    def __next__(self) -> str:
        line = next(self.lines)
        self.number = line.number
        if line.cut:
            raise too_long(self.path, line)
        return line.text.replace("\0", "") + "\n"


def too_long(path: Path, line: TextLine) -> UserError:
    """The error for a line of more than MAX_LINE bytes."""
    return UserError(f"{escape(path)}, line {line.number}: is longer than {MAX_LINE:,} bytes", FIX)


def header(line: str) -> list[str] | None:
    """The column names in lower case with underscores, or None where none of them is the iteration."""
    try:
        row = next(csv.reader([line], delimiter=_delimiter(line)), [])
    except csv.Error:
        return None
    names = [_name(cell) for cell in row]
    return names if any(name in ITERATION for name in names) else None


def _name(cell: str) -> str:
    cell = cell.strip()
    if re.fullmatch(r"_step", cell):
        return "_step"
    extreme = re.search(r"__(?:MIN|MAX)$", cell)
    _, _, quantity = cell.rpartition(" - ")  # wandb: the run's name in front
    return "" if extreme else normalize_name(quantity)


def _iteration_at(names: list[str]) -> int:
    return min((i for i, name in enumerate(names) if name in ITERATION), key=lambda i: ITERATION.index(names[i]))


def _quantities(path: Path, names: list[str], at: int) -> dict[int, str]:
    """Index -> name of each column that is a quantity: not the iterations, not an index without a name."""
    kept = {i: name for i, name in enumerate(names) if i != at and name and name not in ITERATION}
    if names == ["wall_time", "step", "value"]:  # TensorBoard: run-NAME-tag-train_loss.csv
        tag = path.stem.rpartition("-tag-")[2] if "-tag-" in path.stem else "lm_loss"
        return {2: normalize_name(tag)}
    if again := first_duplicate(kept.values()):
        fix = "export one run alone, or give each column its own name"
        raise UserError(f"{escape(path)}, line 1: two columns are {again}", fix)
    return kept


def _add_row(found: CurvesBuilder, iteration: int, cells: dict[str, str], where: str) -> None:
    fields = {}
    for name, cell in cells.items():
        value = require_number(cell, where, name) if canonical_name(name) in _COMPARED else parse_number(cell)
        if value is not None:  # else a time stamp, a name: nothing that is compared
            fields[name] = value
    training = any(canonical_name(name) != VALIDATION for name in fields)
    found.add(iteration, fields, training=training or not fields)


def _delimiter(header: str) -> str:
    return "\t" if "\t" in header else ";" if ";" in header else ","


def read_json_lines(path: Path, lines: Iterable[TextLine], only: Collection[str] | None) -> Curves:
    """Reads JSON objects, one a line: arriero's metrics.jsonl, LLaMA-Factory's trainer_log.jsonl, others alike.

    A last line that is half written, as a kill leaves it, is left out, and so are objects that name no step.

    Raises:
        UserError: a line that is no JSON object, or a metrics record without its iteration, named by file and line.
    """
    found, ours = CurvesBuilder(path, only), False
    for line in lines:
        if line.cut:
            raise too_long(path, line)
        if not line.text.strip():
            continue
        where = f"{escape(path)}, line {line.number}"
        try:
            record = parse_json(line.text, where, FIX, {}, unique_keys=True)
        except UserError:
            if not line.whole:
                continue  # cut off by a kill
            raise
        ours |= "kind" in record and "iteration" in record
        _add_record(found, record, where)
    return found.curves("arriero's metrics" if ours else "JSON lines")


def read_trainer_state(path: Path, only: Collection[str] | None) -> Curves:
    """Reads Hugging Face's trainer_state.json, or its `log_history` alone.

    Raises:
        UserError: not JSON, or without a log_history.
    """
    fix = "give trainer_state.json as the Trainer wrote it"
    state = read_json(path, fix, ({"log_history": [{}]}, [{}]), unique_keys=True)
    found = CurvesBuilder(path, only)
    for i, record in enumerate(state if isinstance(state, list) else state["log_history"]):
        _add_record(found, record, f"{escape(path)}, log_history[{i}]")
    return found.curves("Hugging Face's trainer state")


def _add_record(found: CurvesBuilder, record: dict[str, Any], where: str) -> None:
    """One JSON object; evaluations hold their own quantities, and the Trainer's summary at the end none of a step."""
    if "train_runtime" in record:
        return
    names = {key: "_step" if key == "_step" else normalize_name(key) for key in record}
    key = min((k for k in record if names[k] in ITERATION), key=lambda k: ITERATION.index(names[k]), default=None)
    iteration = None if key is None else parse_iteration(record[key])
    if iteration is None:
        if "kind" in record or key is not None:
            problem = "lacks 'iteration'" if key is None else f"{escape(key, 60)} is {escape(record[key], 60)}"
            raise UserError(f"{where}: {problem}", f"give a whole number there, or {FIX}")
        return
    values = {k: one for k, value in record.items() if names[k] not in ITERATION and (one := _value(value)) is not None}
    if record.get("kind") == "validation":
        loss = values.get("lm_loss")
        found.add(iteration, {} if loss is None else {VALIDATION: loss}, training=False)
        return
    evaluation = {k: v for k, v in values.items() if names[k].startswith(("eval_", "predict_", "test_"))}
    if any(canonical_name(names[k]) == "lm_loss" for k in values):
        evaluation = {}  # one object with all that a step has
    fields = {names[k]: v for k, v in (evaluation or values).items()}
    training = not evaluation and any(canonical_name(name) != VALIDATION for name in fields)
    found.add(iteration, fields, training=training)


def _value(value: object) -> float | None:
    if isinstance(value, str):
        return _NON_FINITE.get(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:
        return None  # an integer that no float holds
