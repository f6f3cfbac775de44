"""`order = "megatron"` against megatron-core itself: the same samples in the same order."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arriero.common.errors import UserError
from arriero.data.batches import Batches
from arriero.data.check import batch_notices
from arriero.data.config import DataConfig, parse_split
from arriero.data.indexed import IndexedWriter
from arriero.data.order import MegatronBlend, choose_documents
from arriero.data.prefix import parse_prefix

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


@pytest.mark.parametrize(
    ("text", "prefixes", "weights"),
    [
        ("A", ("A",), None), ("1.0 A", ("A",), (1.0,)), ("A B", ("A", "B"), None), ("A B C", ("A", "B", "C"), None),
        ("30 A 70 B", ("A", "B"), (30.0, 70.0)), (" A  B ", ("A", "B"), None),
        ("1e-3 A 2 'B C'", ("A", "B C"), (1e-3, 2)),
    ],
)  # fmt: skip
def test_words_are_read_as_megatron_reads_them(text: str, prefixes: tuple[str, ...], weights: Any) -> None:
    from megatron.core.datasets.utils import get_blend_from_list

    found = parse_prefix(text)
    assert (found.prefixes, found.weights) == (prefixes, weights)
    theirs = get_blend_from_list(shlex.split(text))
    assert theirs is not None
    assert (tuple(theirs[0]), theirs[1]) == (prefixes, None if weights is None else list(weights))


def blended_by_megatron(weights: list[float], samples: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """What BlendedMegatronDatasetBuilder and BlendedDataset make of client-given weights, by their own functions."""
    from megatron.core.datasets import helpers
    from megatron.core.datasets.blended_megatron_dataset_builder import _get_size_per_split_per_dataset
    from megatron.core.datasets.utils import normalize

    once = normalize(weights)
    size = sum(one[0] for one in _get_size_per_split_per_dataset(once, [samples]))
    drawn = [one[0] for one in _get_size_per_split_per_dataset(once, [samples], surplus=0.005)]
    which, within = np.zeros(size, np.int16), np.zeros(size, np.int64)
    helpers.build_blending_indices(which, within, normalize(once), len(weights), size, False)
    return which, within, drawn


def random_weights(random: np.random.Generator) -> list[float]:
    """As people write them: one or two decimals, whole per cents, whole numbers, thirds, or anything."""
    n = int(random.integers(1, 12))
    kinds = [
        random.integers(1, 10, n) / 10, random.integers(1, 100, n) / 100, random.integers(1, 100, n).astype(float),
        random.integers(1, 4, n) / 3, random.uniform(1e-3, 1, n), np.full(n, 0.1), 10 ** random.uniform(-4, 4, n),
    ]  # fmt: skip
    chosen: list[float] = kinds[random.integers(len(kinds))].tolist()
    return chosen


def test_blends_are_megatrons_bit_for_bit() -> None:
    random = np.random.default_rng(0)
    cases = [([0.4, 0.3, 0.2, 0.1], 5000), ([0.1] * 9, 900), ([1e-5, 1.0], 300)]
    cases += [(random_weights(random), int(random.integers(1, 250))) for _ in range(3000)]
    for weights, samples in cases:
        blend = MegatronBlend(weights, samples)
        blend.assign([10**6] * len(weights))
        which, within, drawn = blended_by_megatron(weights, samples)
        found = blend.lookup(np.arange(len(which)))
        assert np.array_equal(found[0], which), (weights, samples)
        assert np.array_equal(found[1], within)
        assert found[0].dtype == which.dtype
        assert blend.drawn == drawn


def test_splits_are_megatrons_bit_for_bit() -> None:
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )

    random = np.random.default_rng(1)
    texts = ["7,2,1", "70,20,10", "969,30,1", "1,1,1", "1,0,0", "0,1,0", "98,2", "949,50,1", "8/1/1", "0.7,0.2,0.1"]
    texts += [",".join(map(str, random.integers(0, 1000, 3))) for _ in range(300)]
    texts += [",".join(f"{x:.2f}" for x in random.uniform(0.01, 1, 3)) for _ in range(300)]
    for text in texts:
        if not any(parse_split(text)):
            continue
        matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(text))
        counts = range(1, 3000, 7) if text in texts[:10] else random.integers(1, 10**6, 20).tolist()
        for count in counts:
            for which, bounds in enumerate(matrix):
                found = choose_documents(count, parse_split(text), which, by="order")
                begin, end = (round(b * float(count)) for b in bounds) if bounds else (0, 0)
                assert len(found) == end - begin, (text, count)
                assert not len(found) or (found[0], found[-1], found.dtype) == (begin, end - 1, np.int32)


KINDS: list[tuple[list[float] | None, list[int], int]] = [
    ([1.0], [200], 334),  # a blend of one: half a percent more samples, and so another epoch
    ([1.0], [200], 366),
    (None, [200, 50], 300),  # without weights each set counts by its length
    (None, [200, 50, 20], 400),
    (None, [200, 50], 4000),  # never more than one pass
    ([0.4, 0.3, 0.2, 0.1], [100, 100, 100, 100], 1000),
]
SHORT: list[tuple[list[float] | None, list[int], int]] = [  # whole: their parts would have no tokens
    ([0.5, 0.5], [200, 1], 400),  # a set shorter than a sample repeats
    ([0.3, 0.3, 0.4], [3, 2, 1], 90),
]


@pytest.mark.parametrize(
    ("weights", "documents", "samples", "split"),
    [*((*one, "1,0,0") for one in KINDS + SHORT), *((*one, "7,2,1") for one in KINDS)],
)
def test_every_kind_of_blend(
    tmp_path: Path, weights: list[float] | None, documents: list[int], samples: int, split: str
) -> None:  # fmt: skip
    prefixes = [make_set(tmp_path / f"s{i}", seed=i, documents=n, shortest=9) for i, n in enumerate(documents)]
    counts = [samples, 20, 0] if split == "7,2,1" else [samples, 0, 0]
    theirs = megatrons(prefixes, weights, counts, seed=11, split=split)
    text = " ".join(prefixes if weights is None else [f"{w} {p}" for w, p in zip(weights, prefixes, strict=True)])
    for which, name in ((0, "train"), (1, "valid")):
        if theirs[which] is not None:
            config = DataConfig(prefix=text, split=split, order="megatron")
            count = min(counts[which], len(theirs[which]))
            ours = Batches(
                config, sequence_length=LENGTH, global_batch=count, seed=11, split=name, samples=counts[which]
            )
            assert_same(ours, theirs[which], count)
            assert bool(batch_notices(ours)) == (len(theirs[which]) < counts[which])


def test_random_sets_as_a_whole(tmp_path: Path) -> None:
    """Sets, weights, splits, lengths of the run: everything drawn, against Megatron's builder."""
    random = np.random.default_rng(5)
    for i in range(25):
        weights = random_weights(random)[:5] if i % 3 else None
        n = len(weights) if weights else int(random.integers(1, 4))
        names = [tmp_path / f"{i}-{k}" for k in range(n)]
        prefixes = [make_set(p, seed=i, documents=int(random.integers(30, 90)), shortest=10) for p in names]
        split = ",".join(map(str, random.integers(2, 9, 3)))
        samples = int(random.integers(1, 400))
        try:
            theirs = megatrons(prefixes, weights, [samples, 5, 5], seed=i, split=split)[0]
        except IndexError:  # "oversamples the contributing datasets": Megatron refuses such a blend
            continue
        text = " ".join(prefixes if weights is None else [f"{w!r} {p}" for w, p in zip(weights, prefixes, strict=True)])
        config = DataConfig(prefix=text, split=split, order="megatron")
        ours = Batches(config, sequence_length=LENGTH, global_batch=1, seed=i, samples=samples)
        assert_same(ours, theirs, min(samples, len(theirs)))


def test_a_set_that_megatron_does_not_survive_is_refused(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "one", np.dtype(np.uint16)) as writer:
        writer.add([5])
        writer.end_document()
    config = DataConfig(prefix=str(tmp_path / "one"), split="1,0,0", order="megatron")
    with pytest.raises(UserError, match="has no two tokens"):
        Batches(config, sequence_length=LENGTH, global_batch=4, seed=1, samples=8)
