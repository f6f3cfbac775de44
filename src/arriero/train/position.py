"""A run's position in its data, counted in samples, so that a changed global batch neither repeats nor skips one.

A step reads the samples [first, first + global batch) of the run's order, where `first` is the number of samples that
the steps before it have read, plus those that rewinds have left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from arriero.common.errors import UserError
from arriero.common.untrusted import schema_problem

if TYPE_CHECKING:
    from arriero.train.recipe import Recipe

_OPTIONAL = {
    "consumed_samples": int, "consumed_tokens": int, "ordered_samples": int, "skipped_samples": [[int]],
    "skipped_windows": [[int]],
}  # fmt: skip
"""What state.json may hold of it. Older checkpoints have `skipped_windows`, in steps and batches, for
`skipped_samples`, and no `consumed_tokens`; the oldest have no `consumed_samples`."""


@dataclass
class SkippedSamples:
    """Which samples a step reads, once rewinds have left some out: (consumed, count) means that after so many consumed
    samples the run reads `count` further on."""

    windows: list[tuple[int, int]] = field(default_factory=list)

    def next_sample(self, consumed: int) -> int:
        """The sample that is read next after so many consumed ones."""
        return consumed + sum(count for at, count in self.windows if at <= consumed)

    def skip_range(self, first: int, end: int) -> tuple[int, int]:
        """Skips the samples that were read after `first` consumed ones, up to but not with sample `end` of the
        order; returns the numbers of the first and the last."""
        start = self.next_sample(first)
        kept = [(at, count) for at, count in self.windows if at <= first]
        self.windows = [*kept, (first, end - start)]
        return start, end - 1


@dataclass
class Position:
    """What a run has read."""

    step: int = 0
    """Steps completed."""
    samples: int = 0
    """Samples that they read; what rewinds have left out does not count."""
    tokens: int = 0
    """Tokens in them; not a multiple of the sequence length where that has changed."""
    skipped: SkippedSamples = field(default_factory=SkippedSamples)
    ordered: int = 0
    """`data.order = "megatron"` alone, whose order depends on the length of the run: the number of samples that the
    order was made for when the run began. It stays, so that another length or batch moves no sample. 0: not made."""

    @property
    def next_sample(self) -> int:
        """The first sample of the order that the next step reads."""
        return self.skipped.next_sample(self.samples)

    def advance(self, batch: int, length: int) -> None:
        """Advances by a step over `batch` samples of `length` tokens."""
        self.step, self.samples, self.tokens = self.step + 1, self.samples + batch, self.tokens + batch * length

    def step_starts(self, steps: int, batch: int) -> range:
        """For each step from here to the last of `steps`, the first sample of the order that it reads."""
        return range(self.next_sample, self.next_sample + max(0, steps - self.step) * batch, batch)

    def to_state(self) -> dict[str, Any]:
        """Its part of state.json, `step` excepted."""
        state: dict[str, Any] = {"consumed_samples": self.samples, "consumed_tokens": self.tokens}
        if self.ordered:
            state["ordered_samples"] = self.ordered
        if self.skipped.windows:
            state["skipped_samples"] = self.skipped.windows
        return state


def position_from_state(state: dict[str, Any], *, recipe: Callable[[], Recipe], where: str, fix: str) -> Position:
    """The position that a checkpoint holds.

    Args:
        state: of its state.json, with `step`.
        recipe: reads the checkpoint's own recipe, by which older checkpoints are understood.
        where, fix: for the message.

    Raises:
        UserError: a value that no run writes.
    """
    for key, form in _OPTIONAL.items():
        if key in state and (wrong := schema_problem(state[key], form, key) or _negative(state[key], key)):
            raise UserError(f"{where}: {wrong}", fix)
    for key in ("skipped_samples", "skipped_windows"):
        if any(len(pair) != 2 for pair in state.get(key, [])):
            raise UserError(f"{where}: {key} holds something else than pairs", fix)
    step = state["step"]
    if state.keys() >= {"consumed_samples", "consumed_tokens"}:
        windows = [(at, count) for at, count in state.get("skipped_samples", [])]
        samples, tokens = state["consumed_samples"], state["consumed_tokens"]
        return Position(step, samples, tokens, SkippedSamples(windows), state.get("ordered_samples", 0))
    # Before the position was kept in samples, every step of a run was taken to have the batch of its own recipe.
    then = recipe()
    batch, length = then.train.global_batch, then.train.sequence_length
    windows = [(at * batch, count * batch) for at, count in state.get("skipped_windows", [])]
    ordered = then.train.steps * batch if then.data.order == "megatron" else 0
    return Position(step, step * batch, step * batch * length, SkippedSamples(windows), ordered)


def _negative(value: Any, at: str) -> str:
    """What is wrong with a count below 0, in a number or nested lists of them; empty if nothing is."""
    if isinstance(value, list):
        return next((wrong for one in value if (wrong := _negative(one, at))), "")
    return f"{at} holds {value}, which is below 0" if value < 0 else ""
