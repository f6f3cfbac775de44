"""The batches of a run: which samples a step reads, cut into this process's micro-batches and made ahead of time."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch

from arriero.data.batches import Batches
from arriero.data.prefetch import Prefetch
from arriero.distributed.parallel.mesh import Ranks
from arriero.distributed.parallel.microbatch import MicroBatch, micro_batch
from arriero.train.position import Position

if TYPE_CHECKING:
    from arriero.train.recipe import Recipe


def open_batches(
    recipe: Recipe, split: str, position: Position | None = None, *, vocab_size: int | None = None
) -> Batches:
    """The batches of one split; the validation split is read from its start at every validation.

    The number of samples matters to `data.order = "megatron"` alone, and is Megatron's: what a run of this recipe draws
    in all, or what the order was made for when the run that is at `position` began. With `vocab_size` ids that the
    model has no row for are refused as they are read.
    """
    train, at = recipe.train, position or Position()
    validations = train.steps // train.eval_every + 1 if train.eval_every else 1
    count = (train.steps if split == "train" else validations * train.eval_batches) * train.global_batch
    return Batches(
        recipe.data, sequence_length=train.sequence_length, global_batch=train.global_batch, seed=recipe.seed,
        split=split, samples=at.ordered if at.ordered and split == "train" else count, vocab_size=vocab_size,
    )  # fmt: skip


class MicroBatchLoader:
    """This process's micro-batches of each step, and of a validation.

    Args:
        recipe: whose data, batch sizes and length are read.
        ranks: this process's place in the layout.
        device: where the batches are copied to.
        vocab_size: of the model; larger ids are refused.
    """

    def __init__(self, recipe: Recipe, ranks: Ranks, device: torch.device, *, vocab_size: int) -> None:
        self.recipe, self.ranks, self.device, self.vocab_size = recipe, ranks, device, vocab_size
        self.batches = self._open("train", self.initial_position())
        self._prefetch: Prefetch[list[MicroBatch]] | None = None

    def _open(self, split: str, position: Position | None = None) -> Batches:
        return open_batches(self.recipe, split, position, vocab_size=self.vocab_size)

    @cached_property
    def _validation(self) -> Batches:
        return self._open("valid")

    def initial_position(self) -> Position:
        """Where a new run of the recipe begins."""
        train = self.recipe.train
        return Position(ordered=train.steps * train.global_batch if self.recipe.data.order == "megatron" else 0)

    def resume_at(self, position: Position) -> Position:
        """Reads on from `position`, in the order that the run began with; returns the position with that order."""
        planned = self.initial_position().ordered
        position = replace(position, ordered=(position.ordered or planned) if planned else 0)
        if position.ordered != planned:  # the run began with another length: its order stays
            self.batches = self._open("train", position)
        return position

    def order_notice(self, position: Position) -> str:
        """A notice where Megatron's order was made for fewer samples than the run now reads; else empty."""
        train, made_for = self.recipe.train, position.ordered
        needed = position.samples + (train.steps - position.step) * train.global_batch
        if not made_for or needed <= made_for:
            return ""
        return (
            f"data.order megatron: the order stays as it was made for {made_for} samples when the run began; the run "
            f"now reads {needed}, and starts the order over where it ends (Megatron-LM would make another order, and "
            "read some samples again and others never)"
        )

    def micro_batches(self, batches: Batches, first_sample: int) -> list[MicroBatch]:
        """This process's part of the global batch that begins at sample `first_sample`, cut into micro-batches."""
        train = self.recipe.train
        per_rank = train.global_batch // self.ranks.data
        first = first_sample + self.ranks.data_rank * per_rank
        return [
            micro_batch(
                *batches.samples(start, train.micro_batch), config=self.recipe.parallel, ranks=self.ranks,
                device=self.device,
            )
            for start in range(first, first + per_rank, train.micro_batch)
        ]  # fmt: skip

    def next(self, position: Position) -> list[MicroBatch]:
        """The micro-batches of the step after `position`; those of the next steps are made on another thread."""
        if self._prefetch is None:
            first_samples = position.step_starts(self.recipe.train.steps, self.recipe.train.global_batch)
            self._prefetch = Prefetch(partial(self.micro_batches, self.batches), first_samples)
        return next(self._prefetch)

    def validation(self, number: int) -> list[MicroBatch]:
        """The micro-batches of the validation's global batch `number`."""
        return self.micro_batches(self._validation, number * self.recipe.train.global_batch)

    def close(self) -> None:
        """Drops the batches that were made ahead, and ends their thread, which would keep this object alive."""
        if self._prefetch is not None:
            self._prefetch.close()
            self._prefetch = None
