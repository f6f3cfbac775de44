"""What was read of a run: one value a quantity and iteration, under the names that arriero uses."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from arriero.common.errors import UserError
from arriero.common.text import escape

Columns = dict[str, dict[int, float]]

MAX_ITERATIONS = 5_000_000
"""Iterations of one log at most: some 100 bytes of memory each and quantity."""
MAX_NAMES = 10_000
"""Different quantities of one log at most."""

VALIDATION = "validation_loss"
OTHER_NAMES = {
    "lm_loss": ("loss", "train_loss", "training_loss", "loss_train", "train_lm_loss", "loss_metrics_global_avg_loss",
                "global_avg_loss"),
    "grad_norm": ("gradient_norm", "gradnorm", "gnorm", "train_grad_norm", "train_gradient_norm"),
    "learning_rate": ("lr", "train_learning_rate", "train_lr", "lr_adamw"),
    VALIDATION: ("val_loss", "eval_loss", "valid_loss", "loss_val", "val_lm_loss", "lm_loss_validation",
                 "validation_lm_loss", "validation_metrics_loss", "loss_metrics_val_loss"),
}  # fmt: skip
"""The names of arriero's quantities elsewhere, as `normalize_name` writes them; the first that a log has is taken."""
_CANONICAL = {other: name for name, others in OTHER_NAMES.items() for other in others}
_NUMBER = re.compile(r"[+-]?(?:(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|nan|inf(?:inity)?)", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class Curves:
    """What one run measured: `columns["lm_loss"][3]` is the loss of iteration 3."""

    path: Path
    columns: Columns
    kind: str
    """What the file was read as, such as `CSV` or `torchtitan's log`."""
    steps: frozenset[int] | None = None
    """Every iteration that has a training value; None: those of all columns but the validation's."""
    other_names: frozenset[str] = frozenset()
    """Quantities that the file has and that were not kept."""
    counted_lines: bool = False
    """True if the lines name no iteration, so that they were counted: 1, 2, 3 and so on."""
    first_line_is_step_one: bool = False
    """Where they are numbered: whether the first line is of step 1, whatever the steps between the others."""
    notes: tuple[str, ...] = ()
    """What a reader should know of how it was read, one sentence each."""

    @property
    def iterations(self) -> Collection[int]:
        """Every iteration that has at least one training value."""
        if self.steps is not None:
            return self.steps
        return {i for name, column in self.columns.items() if name != VALIDATION for i in column}

    @property
    def names(self) -> list[str]:
        """Every quantity that the file has."""
        return sorted({*self.columns, *self.other_names})


class CurvesBuilder:
    """Takes values in the order of a file and gives `Curves`; where an iteration comes twice, the later value counts.

    Args:
        path: the file, for messages.
        only: the quantities to keep, so that memory does not grow with the others; None keeps all.
    """

    def __init__(self, path: Path, only: Collection[str] | None = None) -> None:
        self.path = path
        self.values: Columns = {}
        self.dropped: set[str] = set()
        self.steps: set[int] = set()
        wanted = None if only is None else {normalize_name(name) for name in only}
        self.wanted = wanted and wanted | {other for name in wanted for other in OTHER_NAMES.get(name, ())}

    def add(self, iteration: int, fields: dict[str, float], *, training: bool = True) -> None:
        """Adds the values of one line, under names as `normalize_name` writes them.

        Raises:
            UserError: more iterations or quantities than any log has.
        """
        if training:
            self.steps.add(iteration)
        for name, value in fields.items():
            if self.wanted is not None and name not in self.wanted:
                self.dropped.add(name)
                continue
            self.values.setdefault(name, {})[iteration] = value
        if len(self.steps) > MAX_ITERATIONS or len(self.values) + len(self.dropped) > MAX_NAMES:
            what = f"{MAX_ITERATIONS:,} iterations" if len(self.steps) > MAX_ITERATIONS else f"{MAX_NAMES:,} quantities"
            raise UserError(f"{escape(self.path)}: more than {what}", "compare a part of it")

    def curves(self, kind: str, **more: object) -> Curves:
        """The result; `more` are further fields of Curves. Other systems' names become arriero's here."""
        columns = {name: column for name, column in self.values.items() if column}
        for name, others in OTHER_NAMES.items():
            there = [other for other in others if other in columns]
            if name not in columns and there:
                columns[name] = columns.pop(there[0])
        return Curves(self.path, columns, kind, frozenset(self.steps), frozenset(self.dropped - columns.keys()), **more)  # type: ignore[arg-type]


@lru_cache(maxsize=2 * MAX_NAMES)
def normalize_name(name: str) -> str:
    """A quantity's name in lower case with underscores: `lm loss`, `train/loss` and `Grad-Norm` become one form.

    The prefix `train_` is left out of names that stand for nothing else: `train/epoch` is `epoch`. Characters that
    are no letters, digits or underscores, such as a terminal's, do not remain.
    """
    plain = re.sub(r"\W+", "_", name[:500].lower()).strip("_")
    if plain in _CANONICAL:
        return plain
    return plain.removeprefix("train_") or plain


def canonical_name(name: str) -> str:
    """The name that arriero uses for a quantity: `train/loss` and `loss` are `lm_loss`."""
    plain = normalize_name(name)
    return _CANONICAL.get(plain, plain)


def first_duplicate(names: Iterable[str]) -> str:
    """The first name that occurs twice, or empty."""
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), "")  # type: ignore[func-returns-value]


def parse_number(text: str) -> float | None:
    """A number as programs print it, or None: no blanks or underscores inside, digits of ASCII only."""
    text = text.strip()
    return float(text) if len(text) < 400 and _NUMBER.fullmatch(text) else None


def require_number(text: str, where: str, name: str) -> float:
    """As `parse_number`. Raises UserError, which names the place, where it is none."""
    value = parse_number(text)
    if value is None:
        raise UserError(
            f"{where}: {name} is {escape(text.strip(), 80)!r}", "give a number; nan and inf are numbers here"
        )
    return value


def parse_iteration(value: object) -> int | None:
    """An iteration's number, from a JSON value or a CSV cell, or None: 0 to 10^15, and whole."""
    if isinstance(value, str):  # ms-swift writes 5/100: of 100 steps the fifth
        value = parse_number(value.partition("/")[0])
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e15:  # NaN is not
        return None
    return int(value) if value == int(value) else None
