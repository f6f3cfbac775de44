"""Aligns two runs by iteration and compares them: |b - a| / |a| at most the limit, at every common iteration."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from itertools import pairwise

from arriero.common.errors import UserError, closest_match
from arriero.common.text import escape
from arriero.observe.curves.curve import Curves, canonical_name

DEFAULT_QUANTITIES = ("lm_loss", "grad_norm")


@dataclass(frozen=True)
class QuantityComparison:
    """How far one quantity of two runs is apart, over their common iterations."""

    quantity: str
    iterations: list[int]
    """The iterations where both values are finite, ascending."""
    a: list[float]
    """A's values there; A is the reference."""
    b: list[float]
    """B's values there."""
    relative: list[float]
    """|b - a| / |a| there; 0 where both are 0, infinite where only a is."""
    one_sided: list[int]
    """Iterations where the two are not finite alike: each is a failure."""
    both_non_finite: list[int]
    """Iterations where both are NaN, or the same infinity: they agree, and count for no error."""
    limit: float
    """The greatest relative error allowed."""

    @property
    def passed(self) -> bool:
        """True if at least one step could be compared and none is beyond the limit."""
        return bool(self.iterations) and not self.one_sided and max(self.relative) <= self.limit

    @property
    def absolute(self) -> list[float]:
        """|b - a| at `iterations`."""
        return [abs(b - a) for a, b in zip(self.a, self.b, strict=True)]

    def worst(self, count: int) -> list[int]:
        """Positions in `iterations` of the largest relative errors, largest first."""
        return sorted(range(len(self.relative)), key=lambda i: -self.relative[i])[:count]


@dataclass(frozen=True)
class Comparison:
    """The whole comparison."""

    a: Curves
    b: Curves
    agreements: list[QuantityComparison]
    notes: list[str]
    """What a reader should know before trusting the numbers, one sentence each."""

    @property
    def passed(self) -> bool:
        """True if every quantity passed."""
        return all(x.passed for x in self.agreements)


def compare_runs(
    a: Curves, b: Curves, *, quantities: tuple[str, ...] = (), max_rel: float = 0.02, logging_steps: int = 0
) -> Comparison:
    """Compares `quantities` of two runs; none named means loss and gradient norm, as far as both have them.

    Args:
        a: the reference.
        b: the run to compare with it.
        quantities: arriero's names or the logs' own.
        max_rel: the greatest relative error allowed.
        logging_steps: steps between two lines of a log that names no step; 0 where that is not known.

    Raises:
        UserError: no common iteration, a named quantity that one of them lacks, a limit that is no limit, a log
            without steps against one with steps.
    """
    if not (math.isfinite(max_rel) and max_rel >= 0):
        raise UserError(f"--max-rel {max_rel} is no limit", "give a number from 0 (bit for bit) up, such as 0.02")
    a, b = _align_steps(a, b, logging_steps)
    if not set(a.iterations) & set(b.iterations):
        raise UserError(
            f"no common iterations: {escape(a.path)} has {_range(a.iterations)}, "
            f"{escape(b.path)} has {_range(b.iterations)}",
            "compare runs that log the same steps",
        )
    notes = [*a.notes, *(note for note in b.notes if note not in a.notes), *_notes(a, b)]
    chosen = list(dict.fromkeys(canonical_name(name) for name in quantities) if quantities else DEFAULT_QUANTITIES)
    for quantity in list(chosen):
        for curves in (a, b):
            if curves.columns.get(quantity):
                continue
            if quantities or quantity == "lm_loss":
                raise UserError(
                    f"{escape(curves.path)}: no {quantity} in it", closest_match(quantity, curves.names[:50])
                )
            notes.append(f"{escape(curves.path)} has no {quantity}: not compared.")
            if quantity in chosen:
                chosen.remove(quantity)
    return Comparison(a, b, [_agreement(a, b, quantity, max_rel) for quantity in chosen], notes)


def _agreement(a: Curves, b: Curves, quantity: str, limit: float) -> QuantityComparison:
    mine, theirs = a.columns[quantity], b.columns[quantity]
    common = sorted(mine.keys() & theirs.keys())
    if not common:
        fix = "compare runs that log the same steps"
        raise UserError(f"no common iterations of {quantity} in {escape(a.path)} and {escape(b.path)}", fix)
    finite = [i for i in common if math.isfinite(mine[i]) and math.isfinite(theirs[i])]
    alike = [i for i in common if not math.isfinite(mine[i]) and repr(mine[i]) == repr(theirs[i])]
    return QuantityComparison(
        quantity=quantity,
        iterations=finite,
        a=[mine[i] for i in finite],
        b=[theirs[i] for i in finite],
        relative=[_relative(mine[i], theirs[i]) for i in finite],
        one_sided=sorted(set(common) - set(finite) - set(alike)),
        both_non_finite=alike,
        limit=limit,
    )


def _relative(a: float, b: float) -> float:
    if a == b:
        return 0.0
    return abs(b - a) / abs(a) if a else math.inf


def _align_steps(a: Curves, b: Curves, logging_steps: int) -> tuple[Curves, Curves]:
    """The two with iterations that mean the same: counted lines become steps where their distance is known."""
    if not (a.counted_lines or b.counted_lines):
        if logging_steps:
            raise UserError("--logging-steps has no effect: both logs name their steps", "leave it out")
        return a, b
    if not logging_steps and a.counted_lines != b.counted_lines:
        alone = a if a.counted_lines else b
        fix = "give trainer_state.json instead, or the Trainer's logging_steps as --logging-steps N"
        raise UserError(f"{escape(alone.path)}: its lines name no step, and the other log's do", fix)
    return _counted_to_steps(a, logging_steps), _counted_to_steps(b, logging_steps)


def _counted_to_steps(curves: Curves, logging_steps: int) -> Curves:
    if not curves.counted_lines:
        return curves
    if not logging_steps:
        note = (
            f"{escape(curves.path)}: its lines name no step; an iteration here is a line, counted from its beginning."
        )
        return replace(curves, notes=(*curves.notes, note))

    def step(line: int) -> int:
        if curves.first_line_is_step_one:  # logging_first_step
            return max(1, (line - 1) * logging_steps)
        return line * logging_steps

    columns = {name: {step(i): value for i, value in column.items()} for name, column in curves.columns.items()}
    note = f"{escape(curves.path)}: its lines name no step; they are taken as every {logging_steps}th from the first."
    steps = frozenset(step(i) for i in curves.iterations)
    return replace(curves, columns=columns, steps=steps, notes=(*curves.notes, note))


def _notes(a: Curves, b: Curves) -> list[str]:
    notes = []
    for one, other in ((a, b), (b, a)):
        mine, path = set(one.iterations), escape(one.path)
        if alone := mine - set(other.iterations):
            notes.append(f"{len(alone)} of the iterations are in {path} alone ({_range(alone)}): not compared.")
        loss = one.columns.get("lm_loss", {})
        if loss and (skipped := mine - loss.keys()):
            notes.append(f"{path} has no loss at {len(skipped)} iterations ({_range(skipped)}): skipped steps.")
    strides = [_stride(x.iterations) for x in (a, b)]
    if strides[0] != strides[1]:
        notes.append(
            f"The first logs every {strides[0]} iterations, the second every {strides[1]}: Megatron, MindSpeed, "
            "AscendSpeed and Hugging Face's Trainer print the mean loss since their previous line, so that the two are "
            "not the same quantity."
        )
    return notes


def _stride(iterations: Collection[int]) -> int:
    """The usual distance between logged iterations."""
    ordered = sorted(iterations)
    steps = sorted(y - x for x, y in pairwise(ordered))
    return steps[len(steps) // 2] if steps else 1


def _range(iterations: Collection[int]) -> str:
    low, high = min(iterations), max(iterations)
    return str(low) if low == high else f"{low} to {high}"
