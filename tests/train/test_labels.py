"""Batches in which no label carries a loss: left out and counted in the run, and told before it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import toy
from arriero.checkpoint.find import committed
from arriero.cli.main import dispatch
from arriero.common.errors import EXIT_OK, EXIT_USAGE, UserError
from arriero.common.settings import parse
from arriero.common.toml import file_settings
from arriero.data.batches import Batches
from arriero.data.check import batch_notices
from arriero.data.config import DataConfig
from arriero.data.indexed import IndexedWriter
from arriero.data.instruct import InstructionSet
from arriero.distributed.parallel.mesh import Ranks
from arriero.train.build import build_trainer
from arriero.train.loop import ResumePlan, train
from arriero.train.recipe import Recipe


def write_records(prefix: Path, records: list[tuple[int, int]]) -> str:
    """An instruction set of records of (tokens, first token that carries a loss; none if that lies beyond)."""
    fields = ("input_ids", "attention_mask", "labels")
    writers = {f: IndexedWriter(f"{prefix}_packed_{f}_document", np.dtype(np.int32)) for f in fields}
    for size, prompt in records:
        ids = np.arange(size, dtype=np.int32) % 250 + 3
        labels = np.where(np.arange(size) < prompt, -100, ids).astype(np.int32)
        for f, values in zip(fields, (ids, np.ones(size, np.int32), labels), strict=True):
            writers[f].add(values)
            writers[f].end_document()
    for writer in writers.values():
        writer.close()
    return str(prefix)


@pytest.mark.parametrize("packing", ["pad", "best-fit"])
@pytest.mark.parametrize("length", [4, 9, 17])
def test_the_samples_that_keep_no_label_are_counted_exactly(tmp_path: Path, packing: str, length: int) -> None:
    random = np.random.default_rng(length)
    records = [(int(n), int(random.integers(0, n + 3))) for n in random.integers(0, 40, 300)]
    config = DataConfig(prefix=write_records(tmp_path / "a", records), split="1,0,0", packing=packing)
    batches = Batches(config, sequence_length=length, global_batch=1, seed=3)
    count = batches.samples_per_epoch

    def without(length: int) -> int:
        one = Batches(config, sequence_length=length, global_batch=1, seed=3)
        return int((one.samples(0, count).labels == -100).all(1).sum())

    (one,) = batches.sets
    assert isinstance(one, InstructionSet)
    found = one.label_coverage()
    assert (found.samples, found.without_labels) == (count, without(length))
    if packing == "pad":
        assert without(found.sufficient_length) == found.never < without(found.sufficient_length - 1)
    few = one.label_coverage(most=1000)
    assert 0 < few.samples < found.samples


def test_a_set_of_which_some_keep_none_is_told_and_one_of_which_none_does_refused(tmp_path: Path) -> None:
    prefix = write_records(tmp_path / "a", [(30, 20)] * 3 + [(30, 2)] * 5 + [(9, 99)] * 2)
    *_, line = batch_notices(
        Batches(DataConfig(prefix=prefix, split="1,0,0"), sequence_length=8, global_batch=1, seed=1)
    )
    assert "5 of 10 train samples keep no label at train.sequence_length 8" in line
    assert "train.sequence_length 20 keeps one in each that has any; 2 have none at any length" in line
    prefix = write_records(tmp_path / "b", [(30, 20)] * 3)
    with pytest.raises(UserError, match=r"no sample of the train split .* 8: .*\n.* train.sequence_length 20 keeps"):
        batch_notices(Batches(DataConfig(prefix=prefix, split="1,0,0"), sequence_length=8, global_batch=1, seed=1))
    plain = toy.write_data(tmp_path)
    blend = DataConfig(prefix=f"0.5 {plain} 0.5 {tmp_path / 'a'}", split="1,0,0")
    lines = batch_notices(Batches(blend, sequence_length=8, global_batch=1, seed=1))
    assert sum("keep no label" in line for line in lines) == 1


def test_documents_of_one_token_have_no_label_within_them(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a", np.dtype(np.uint16)) as writer:
        writer.add_documents(np.arange(3, 200), np.ones(197, np.int32))
    config = DataConfig(prefix=str(tmp_path / "a"), split="1,0,0")
    Batches(config, sequence_length=8, global_batch=1, seed=1)
    with pytest.raises(UserError, match="no document of the train split has two tokens"):
        Batches(replace(config, attention="document"), sequence_length=8, global_batch=1, seed=1)


def recipe_of(directory: Path, **changes: Any) -> Recipe:
    recipe = parse(Recipe, file_settings(toy.write_recipe(directory)), prog="test")
    data = replace(recipe.data, prefix=str(toy.write_few_labels(directory)))
    changed = replace(recipe.train, eval_every=6, eval_batches=1, **changes)
    return replace(recipe, data=data, train=changed, checkpoint=replace(recipe.checkpoint, every=1, keep=0))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_step_without_a_label_is_left_out_and_counted(tmp_path: Path, dtype: str) -> None:
    recipe = recipe_of(tmp_path, dtype=dtype, on_nonfinite="stop", on_spike="stop")
    assert train(recipe, Ranks(), local_rank=0, device_kind="cpu", plan=ResumePlan())
    out = Path(recipe.out)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    left_out = [r["iteration"] for r in records if r["lm_loss"] == "NaN"]
    assert 0 < len(left_out) < 6
    assert [r["iteration"] for r in records if r["skipped_iterations"]] == left_out
    assert all(r["kind"] == "step" and r["nan_iterations"] == 0 for r in records)
    log = (out / "log.txt").read_text()
    assert all(f"SKIPPED step {step}: no label of its 8 samples carries a loss" in log for step in left_out)
    assert "no validation after step 6: no label of its batches carries a loss" in log
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    found = [(e["step"], e["reason"]) for e in events if e["event"] == "skipped"]
    assert found == [(step, "no label") for step in left_out]
    states = [json.loads((path / "state.json").read_text()) for path in committed(out / "checkpoints")]
    assert [state["updates"] for state in states] == [
        step - sum(one <= step for one in left_out) for step in range(1, 7)
    ]
    assert len({state["loss_scale"]["scale"] for state in states}) == 1


def test_a_step_without_a_label_changes_nothing(tmp_path: Path) -> None:
    trainer = build_trainer(recipe_of(tmp_path), Ranks(), local_rank=0, device_kind="cpu")
    trainer.load(None)
    for _ in range(6):
        before = [p.clone() for part in trainer.parts for p in part.parameters()]
        result = trainer.step()
        now = [p for part in trainer.parts for p in part.parameters()]
        assert all(bool((a == b).all()) for a, b in zip(before, now, strict=True)) == result.unlabelled
        assert math.isnan(result.lm_loss) == result.unlabelled == result.skipped
        assert not result.spike
    trainer.close()


def test_before_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = toy.write_recipe(tmp_path)
    prefix = write_records(tmp_path / "a", [(40, 33)] * 20 + [(40, 10)] * 20)
    words = ["pretrain", str(recipe), "--data.prefix", prefix, "--data.split", "1,0,0"]
    assert dispatch([*words, "--train.sequence-length", "8", "--out", str(tmp_path / "none")]) == EXIT_USAGE
    assert "no sample of the train split keeps a label" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    assert dispatch(words) == EXIT_OK
    assert "20 of 40 train samples keep no label at train.sequence_length 32" in capsys.readouterr().out
