"""Instruction records longer than a sample: cut, dropped or refused, as asked, and counted before the first step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from arriero.common.errors import UserError
from arriero.data.batches import Batches
from arriero.data.config import DataConfig
from arriero.data.indexed import IndexedWriter
from arriero.data.prefix import INSTRUCTION_FIELDS

LENGTH = 8
# (tokens, of which the last ones are learned): three fit, one loses 2 of its 3 answer tokens, one all 2, one 5 of 12
RECORDS = [(4, 2), (9, 8), (3, 1), (11, 3), (12, 2), (14, 12)]


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    for field in INSTRUCTION_FIELDS:
        with IndexedWriter(tmp_path / f"set_packed_{field}_document", np.dtype(np.int32)) as writer:
            for number, (size, learned) in enumerate(RECORDS):
                ids = np.full(size, number + 1, np.int32)
                labels = np.where(np.arange(size) >= size - learned, ids, -100)
                writer.add({"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": labels}[field])
                writer.end_document()
    return str(tmp_path / "set")


def batches(prefix: str, **options: object) -> Batches:
    config = DataConfig(prefix=prefix, split="1,0,0", **options)  # type: ignore[arg-type]
    assert config.problems() == []
    return Batches(config, sequence_length=LENGTH, global_batch=1, seed=0)


@pytest.mark.parametrize("packing", ["pad", "best-fit"])
def test_cut_drop_and_error(prefix: str, packing: str) -> None:
    cut = batches(prefix, packing=packing)
    (note,) = cut.notices()
    assert "3 of 6 records are longer than train.sequence_length 8 (the longest: 13 tokens)" in note
    assert "they are cut (data.too_long = cut): 53% of the tokens that they are to teach are lost" in note  # 9 of 17
    dropped = batches(prefix, packing=packing, too_long="drop")
    assert "3 of 6 records are longer" in dropped.notices()[0]
    seen = {int(t) for i in range(dropped.samples_per_epoch) for t in dropped.batch(i, 0, 1).tokens[0]}
    assert seen - {0} == {1, 2, 3}
    with pytest.raises(UserError, match=r"3 of 6 records are longer than train\.sequence_length 8"):
        batches(prefix, packing=packing, too_long="error")
    with pytest.raises(UserError, match=r"6 of 6 records are longer .* none is left"):
        Batches(DataConfig(prefix=prefix, split="1,0,0", too_long="drop"), sequence_length=1, global_batch=1, seed=0)
    fitting = Batches(
        DataConfig(prefix=prefix, split="1,0,0", too_long="error"), sequence_length=13, global_batch=1, seed=0
    )
    assert fitting.notices() == []


def test_the_counts_are_what_the_batches_lose(prefix: str) -> None:
    one = batches(prefix, packing="pad")
    kept = sum(int((one.batch(i, 0, 1).labels != -100).sum()) for i in range(one.samples_per_epoch))
    whole = sum(min(learned, size - 1) for size, learned in RECORDS)
    assert whole - kept == 9


def test_plain_text_is_never_cut(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "plain", np.dtype(np.int32)) as writer:
        writer.add([1, 2, 3])
        writer.end_document()
    (problem,) = DataConfig(prefix=str(tmp_path / "plain"), too_long="drop").problems()
    assert "data.too_long" in str(problem)
