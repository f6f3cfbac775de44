"""Where a run stands in its data: a changed global batch neither repeats nor skips a sample, whatever the order."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import toy
from arriero.checkpoint.find import committed
from arriero.common.errors import UserError
from arriero.common.settings import parse
from arriero.common.toml import file_settings
from arriero.data.batch import Batch
from arriero.data.batches import Batches
from arriero.distributed.parallel.mesh import Ranks
from arriero.train.build import build_trainer
from arriero.train.loop import ResumePlan, train
from arriero.train.position import Position, SkippedSamples, position_from_state
from arriero.train.recipe import Recipe
from arriero.train.reporter import StepResult

STATE = {"step": 6, "updates": 6, "loss_scale": {}}


def test_left_out_samples_add_up() -> None:
    skipped = SkippedSamples()
    assert skipped.skip_range(24, 40) == (24, 39)
    assert [skipped.next_sample(consumed) for consumed in (0, 16, 24, 32)] == [0, 16, 40, 48]
    assert skipped.skip_range(24, 48) == (40, 47)  # again from the same checkpoint
    assert skipped.skip_range(72, 112) == (96, 111)
    assert [skipped.next_sample(consumed) for consumed in (16, 24, 64, 72)] == [16, 48, 88, 112]
    assert skipped.skip_range(48, 120) == (72, 119)  # the newer checkpoints were damaged
    assert [skipped.next_sample(consumed) for consumed in (40, 48, 56)] == [64, 120, 128]


STEPS = st.lists(
    st.tuples(st.integers(1, 9), st.integers(1, 4), st.sampled_from(["run", "kill", "rewind"])), max_size=8
)


@given(STEPS)
def test_every_sample_is_read_once_or_left_out(legs: list[tuple[int, int, str]]) -> None:
    """Legs of (batch, steps, what ends them); a killed or rewound leg starts again from where it began."""
    position, read, left_out = Position(), [], set[int]()
    for batch, steps, end in legs:
        saved, before = position.to_state() | {"step": position.step}, len(read)
        for place in position.step_starts(position.step + steps, batch):
            assert place == position.next_sample
            read += range(place, place + batch)
            position.advance(batch, 16)
        if end == "run":
            continue
        stop, skipped = position.next_sample, position.skipped
        position = position_from_state(json.loads(json.dumps(saved)), recipe=pytest.fail, where="state.json", fix="")
        if end == "rewind":
            position.skipped = skipped
            first, last = skipped.skip_range(position.samples, stop)
            left_out |= set(range(first, last + 1))
        del read[before:]
    assert sorted([*read, *left_out]) == list(range(position.next_sample))
    assert read == sorted(read)
    assert (position.samples, position.tokens) == (len(read), 16 * len(read))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """Every row that a run reads of its training split, in order."""
    original, found = Batches.samples, list[Batch]()

    def samples(self: Batches, first: int, count: int) -> Batch:
        batch = original(self, first, count)
        found.append(batch)
        return batch

    monkeypatch.setattr(Batches, "samples", samples)
    return found


def recipe_in(directory: Path, batch: int, **data: Any) -> Recipe:
    recipe = parse(Recipe, file_settings(toy.write_recipe(directory)), prog="test")
    changed = replace(recipe.train, steps=9, global_batch=batch, micro_batch=2, sequence_length=16)
    return replace(recipe, data=replace(recipe.data, **data), train=changed)


def trained(recipe: Recipe, steps: int, checkpoint: Path | None = None) -> tuple[Path, list[StepResult]]:
    """Does so many steps from a checkpoint, and saves."""
    trainer = build_trainer(recipe, Ranks(), local_rank=0, device_kind="cpu")
    trainer.load(checkpoint)
    results = [trainer.step() for _ in range(steps)]
    path = trainer.save()
    trainer.close()
    return path, results


@pytest.mark.parametrize("batch", [4, 16])
@pytest.mark.parametrize("kind", ["stable", "megatron", "blend", "megatron blend", "best-fit"])
def test_a_changed_batch_goes_on_with_the_next_sample(tmp_path: Path, read: list[Batch], batch: int, kind: str) -> None:
    data: dict[str, Any] = {"order": "megatron" if kind.startswith("megatron") else "stable"}
    if kind == "best-fit":
        data |= {"prefix": str(toy.write_instructions(tmp_path)), "packing": "best-fit"}
    if (
        "blend" in kind
    ):  # the few documents of set b are read several times, so that Megatron's order hangs on the length
        data["prefix"] = f"0.7 {toy.write_data(tmp_path / 'a')} 0.3 {toy.write_data(tmp_path / 'b', 20)}"
    recipe = recipe_in(tmp_path, 8, **data)
    as_it_began = Batches(recipe.data, sequence_length=16, global_batch=8, seed=recipe.seed, samples=72)
    checkpoint, results = trained(recipe, 6)
    rows = [one.tokens for one in read[:24]]  # what was made ahead does not count
    read.clear()
    changed = replace(recipe, train=replace(recipe.train, global_batch=batch), out=str(tmp_path / "changed"))
    results += trained(changed, 3, checkpoint)[1]
    rows += [one.tokens for one in read]
    assert np.array_equal(np.concatenate(rows), as_it_began.samples(0, 48 + 3 * batch).tokens)
    assert [r.consumed_samples for r in results] == [*range(8, 49, 8), *(48 + batch * i for i in (1, 2, 3))]
    assert all(r.consumed_tokens == 16 * r.consumed_samples for r in results)


def test_a_run_that_was_changed_before_goes_on_from_its_position(tmp_path: Path, read: list[Batch]) -> None:
    recipe = recipe_in(tmp_path, 8)
    recipe = replace(recipe, train=replace(recipe.train, steps=3))
    for steps, batch in ((3, 8), (6, 4), (7, 10)):
        changed = replace(recipe.train, steps=steps, global_batch=batch)
        start = ResumePlan(tuple(committed(Path(recipe.out) / "checkpoints")[-1:]))
        train(replace(recipe, train=changed), Ranks(), local_rank=0, device_kind="cpu", plan=start)
    rows = np.concatenate([one.tokens for one in read])
    batches = Batches(recipe.data, sequence_length=16, global_batch=8, seed=recipe.seed)
    assert np.array_equal(rows, batches.samples(0, 24 + 12 + 10).tokens)
    state = json.loads((committed(Path(recipe.out) / "checkpoints")[-1] / "state.json").read_text())
    assert (state["consumed_samples"], state["consumed_tokens"]) == (46, 46 * 16)
    lines = [json.loads(line) for line in (Path(recipe.out) / "metrics.jsonl").read_text().splitlines()]
    assert [line["consumed_samples"] for line in lines] == [8, 16, 24, 28, 32, 36, 46]
    assert "goes on with sample 36, 10 a step" in (Path(recipe.out) / "log.txt").read_text()


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ({}, (48, 48 * 32, [], 0)),
        ({"consumed_samples": 48}, (48, 48 * 32, [], 0)),
        ({"consumed_samples": 48, "skipped_windows": [[3, 2]]}, (48, 48 * 32, [(24, 16)], 0)),
        ({"consumed_samples": 40, "consumed_tokens": 1280, "skipped_samples": [[24, 16]]}, (40, 1280, [(24, 16)], 0)),
        ({"consumed_samples": 40, "consumed_tokens": 1280, "ordered_samples": 64}, (40, 1280, [], 64)),
    ],
)
def test_older_checkpoints_are_understood_by_their_own_recipe(
    tmp_path: Path, state: dict[str, Any], expected: tuple[Any, ...]
) -> None:  # fmt: skip
    own: Callable[[], Recipe] = lambda: parse(Recipe, file_settings(toy.write_recipe(tmp_path)), prog="test")  # noqa: E731
    found = position_from_state(STATE | state, recipe=own, where="state.json", fix="")
    assert found.step == 6
    assert (found.samples, found.tokens, found.skipped.windows, found.ordered) == expected


@pytest.mark.parametrize(
    "state",
    [
        {"consumed_samples": -1}, {"consumed_samples": 1.5}, {"consumed_samples": 2**70}, {"consumed_tokens": "many"},
        {"skipped_samples": 3}, {"skipped_samples": [3]}, {"skipped_samples": [[1]]}, {"skipped_samples": [[1, 2, 3]]},
        {"skipped_samples": [[0, -8]]}, {"skipped_windows": [[True, 1]]}, {"ordered_samples": -5},
        {"ordered_samples": None},
    ],
)  # fmt: skip
def test_a_forged_position_is_refused_by_name(state: dict[str, Any]) -> None:
    whole = STATE | {"consumed_samples": 48, "consumed_tokens": 48 * 32} | state
    with pytest.raises(UserError, match=rf"x/state.json: .*{next(iter(state))}"):
        position_from_state(whole, recipe=pytest.fail, where="x/state.json", fix="restore it")


def test_megatrons_order_stays_when_the_run_becomes_longer(tmp_path: Path, read: list[Batch]) -> None:
    recipe = recipe_in(tmp_path, 8, order="megatron", prefix=str(toy.write_data(tmp_path / "few", 10)))
    as_it_began = Batches(recipe.data, sequence_length=16, global_batch=8, seed=recipe.seed, samples=72)
    checkpoint, _ = trained(recipe, 6)
    rows = [one.tokens for one in read[:24]]
    for steps in (9, 20):
        read.clear()
        longer = replace(recipe, train=replace(recipe.train, steps=steps), out=str(tmp_path / str(steps)))
        trainer = build_trainer(longer, Ranks(), local_rank=0, device_kind="cpu")
        trainer.load(checkpoint)
        assert ("made for 72 samples" in trainer.loader.order_notice(trainer.position)) == (steps == 20)
        for _ in range(3):
            trainer.step()
        trainer.close()
        found = np.concatenate([*rows, *(one.tokens for one in read[:12])])
        assert np.array_equal(found, as_it_began.samples(0, 72).tokens)
