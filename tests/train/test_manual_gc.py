"""Garbage is collected between steps, at every hundredth, and as before once the loop is over."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import toy
from arriero.common.settings import parse
from arriero.common.toml import file_settings
from arriero.distributed.parallel.mesh import Ranks
from arriero.train import loop
from arriero.train import manual_gc as manual_gc_module
from arriero.train.manual_gc import manual_gc
from arriero.train.recipe import Recipe
from arriero.train.trainer import Trainer


class Node:
    """An object that holds itself."""

    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def collector() -> Iterator[None]:
    assert gc.isenabled()
    yield
    assert gc.isenabled(), "a test left the collector off"
    assert gc.get_freeze_count() == 0


def test_only_every_hundredth_step_collects() -> None:
    with manual_gc() as collect:
        assert not gc.isenabled()
        alive = weakref.ref(Node())
        collected = []
        for step in range(1, 301):
            collect(step)
            if alive() is None:
                collected.append(step)
                alive = weakref.ref(Node())
    assert collected == [100, 200, 300]


def test_what_was_there_before_is_frozen_only_within() -> None:
    with manual_gc():
        assert gc.get_freeze_count() > 1000
    assert gc.get_freeze_count() == 0


def test_garbage_from_before_is_not_frozen_but_collected() -> None:
    lost = weakref.ref(Node())
    with manual_gc():
        assert lost() is None


def test_an_exception_turns_the_collector_on_again() -> None:
    with pytest.raises(ValueError, match="in a step"), manual_gc():
        raise ValueError("in a step")
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with manual_gc():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_the_loop_collects_after_a_step_that_was_rewound_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 3 finds no number and the run goes back to step 2: each start of a step passes the collector."""
    recipe = parse(Recipe, file_settings(toy.write_recipe(tmp_path)), prog="test")
    train = replace(recipe.train, steps=4, eval_every=0, on_nonfinite="rewind")
    recipe = replace(recipe, train=train, checkpoint=replace(recipe.checkpoint, every=2))
    original, calls, at = Trainer.forward_backward, [0], []

    def forward_backward(self: Trainer, micro: Any, *, train: bool) -> Any:
        calls[0] += 1
        return original(self, micro, train=train) * (float("nan") if calls[0] == 3 else 1.0)

    class Collector:
        """Takes note of calls in place of `gc`."""

        def __getattr__(self, name: str) -> Any:
            return getattr(gc, name)

        def collect(self) -> None:
            at.append(calls[0])

    monkeypatch.setattr(Trainer, "forward_backward", forward_backward)
    monkeypatch.setattr(manual_gc_module, "gc", Collector())
    monkeypatch.setattr(manual_gc_module, "STEPS_BETWEEN", 2)
    assert loop.train(recipe, Ranks(), local_rank=0, device_kind="cpu", plan=loop.ResumePlan())
    # Before the first step twice (entering, and step 0), at step 2, and at step 2 again after going back.
    assert at == [0, 0, 2, 3]
