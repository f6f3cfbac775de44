"""`order = "megatron"` against megatron-core itself: the same samples in the same order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arriero.data.batches import Batches, DataConfig
from arriero.data.indexed import IndexedWriter

LENGTH = 16


class FakeTokenizer:
    vocab_size, eod, eos, pad = 1000, 2, 2, 0
    unique_identifiers: dict[str, Any] = {}  # noqa: RUF012
    special_tokens_dict: dict[str, int] = {}  # noqa: RUF012


def make_set(prefix: Path, *, seed: int, documents: int = 200, shortest: int = 1) -> str:
    random = np.random.default_rng(seed)
    with IndexedWriter(prefix, np.dtype(np.uint16)) as writer:
        for size in random.integers(shortest, 60, documents):
            writer.add(random.integers(3, 900, size))
            writer.end_document()
    return str(prefix)


def megatrons(
    prefixes: list[str], weights: list[float] | None, counts: list[int], *, seed: int, split: str
) -> list[Any]:
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    config = GPTDatasetConfig(
        random_seed=seed, sequence_length=LENGTH, blend=(prefixes, weights), split=split, tokenizer=FakeTokenizer(),
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
    )  # fmt: skip
    return BlendedMegatronDatasetBuilder(GPTDataset, counts, lambda: True, config).build()


def assert_same(ours: Batches, theirs: Any, count: int) -> None:
    batch = ours.batch(0, 0, count)
    for i in range(count):
        assert np.array_equal(batch.tokens[i], theirs[i]["tokens"].numpy())
        assert np.array_equal(batch.labels[i], theirs[i]["labels"].numpy())


@pytest.mark.parametrize(
    ("samples", "seed", "split", "shortest"),
    [
        (100, 1, "90,10,0", 1),  # part of one epoch
        (334, 1234, "90,10,0", 1),  # a little of a second epoch: shuffled on its own
        (620, 7, "90,10,0", 1),  # most of a second epoch: shuffled with the first
        (2000, 7, "95,5,0", 1),
        (400, 3, "1,1,0", 0),  # documents without tokens
    ],
)
def test_one_set(tmp_path: Path, samples: int, seed: int, split: str, shortest: int) -> None:
    prefix = make_set(tmp_path / "a", seed=seed, shortest=shortest)
    theirs = megatrons([prefix], None, [samples, 20, 0], seed=seed, split=split)
    for which, name in ((0, "train"), (1, "valid")):
        count = (samples, 10)[which]
        config = DataConfig(prefix=prefix, split=split, order="megatron")
        ours = Batches(
            config, sequence_length=LENGTH, global_batch=count, seed=seed, split=name, samples=(samples, 20)[which]
        )
        assert_same(ours, theirs[which], count)


def test_indices_are_equal_bit_for_bit(tmp_path: Path) -> None:
    prefix = make_set(tmp_path / "a", seed=5)
    theirs = megatrons([prefix], None, [700, 0, 0], seed=99, split="1,0,0")[0]
    config = DataConfig(prefix=prefix, split="1,0,0", order="megatron")
    windows = Batches(config, sequence_length=LENGTH, global_batch=1, seed=99, samples=700).sets[0].order.windows(0)  # type: ignore[union-attr]
    assert np.array_equal(windows.documents, theirs.document_index)
    assert windows.documents.dtype == theirs.document_index.dtype
    assert np.array_equal(windows.first, theirs.sample_index[:, 0])
    assert np.array_equal(windows.offset, theirs.sample_index[:, 1])
    assert np.array_equal(windows.shuffle, theirs.shuffle_index)
    assert windows.shuffle.dtype == theirs.shuffle_index.dtype


@pytest.mark.parametrize("weights", [[0.7, 0.3], [1.0, 1.0], [0.2, 0.5, 0.3]])
def test_a_blend(tmp_path: Path, weights: list[float]) -> None:
    prefixes = [make_set(tmp_path / name, seed=n) for n, name in enumerate("abc"[: len(weights)])]
    theirs = megatrons(prefixes, weights, [500, 0, 0], seed=11, split="90,10,0")[0]
    blend = " ".join(f"{w} {p}" for w, p in zip(weights, prefixes, strict=True))
    config = DataConfig(prefix=blend, split="90,10,0", order="megatron")
    assert_same(Batches(config, sequence_length=LENGTH, global_batch=500, seed=11, samples=500), theirs, 500)
