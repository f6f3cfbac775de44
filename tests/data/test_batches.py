from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from arriero.common.errors import UserError
from arriero.data.batches import Batches
from arriero.data.check import check_data_against, size_notices
from arriero.data.config import DataConfig
from arriero.data.indexed import IndexedWriter
from arriero.data.tokenizer import load_tokenizer

LENGTH = 16


def make_set(prefix: Path, *, documents: int = 60, seed: int = 0, first: int = 3) -> str:
    random = np.random.default_rng(seed)
    with IndexedWriter(prefix, np.dtype(np.uint16)) as writer:
        for n in range(documents):
            writer.add(np.full(random.integers(1, 40), first + n))
            writer.end_document()
    return str(prefix)


def make(
    config: DataConfig, *, global_batch: int = 4, seed: int = 7, split: str = "train", samples: int | None = None
) -> Batches:
    return Batches(config, sequence_length=LENGTH, global_batch=global_batch, seed=seed, split=split, samples=samples)


@pytest.mark.parametrize("order", ["stable", "megatron"])
@pytest.mark.parametrize("attention", ["window", "document"])
def test_rows_do_not_depend_on_how_a_batch_is_divided(tmp_path: Path, order: str, attention: str) -> None:
    a, b = make_set(tmp_path / "a"), make_set(tmp_path / "b", seed=1, first=200)
    for prefix in (a, f"0.7 {a} 0.3 {b}"):
        config = DataConfig(prefix=prefix, order=order, attention=attention, split="1,0,0")
        batches = make(config, samples=120)
        for step in (0, 5, 29):
            whole = batches.batch(step, 0, 4)
            again = [make(config, samples=120).batch(step, row, 1) for row in range(4)]
            for column in range(4):
                if whole[column] is not None:
                    assert np.array_equal(whole[column], np.concatenate([one[column] for one in again]))


def test_labels_are_the_next_tokens_and_an_epoch_shows_every_label_once(tmp_path: Path) -> None:
    config = DataConfig(prefix=make_set(tmp_path / "a"), split="1,0,0")
    batches = make(config, global_batch=1)
    labels = []
    for step in range(batches.samples_per_epoch):
        batch = batches.batch(step, 0, 1)
        assert np.array_equal(batch.tokens[0, 1:], batch.labels[0, :-1])
        assert batch.tokens.dtype == batch.labels.dtype == np.int64
        labels += batch.labels[0].tolist()
    tokens = np.fromfile(tmp_path / "a.bin", np.uint16)
    missing = np.bincount(tokens, minlength=80) - np.bincount(labels, minlength=80)
    assert missing.min() >= 0
    assert 1 <= missing.sum() <= LENGTH  # the first token of the stream, and its tail


def test_extending_a_run_changes_nothing(tmp_path: Path) -> None:
    config = DataConfig(prefix=make_set(tmp_path / "a"))
    batches = make(config)
    early = [batches.batch(step, 0, 4).tokens for step in range(6)]
    far = batches.batch(500, 0, 4)  # many epochs on
    assert batches.epoch_of(500) > 5
    assert far.tokens.shape == (4, LENGTH)
    assert all(np.array_equal(batches.batch(step, 0, 4).tokens, tokens) for step, tokens in enumerate(early))


def test_splits_are_disjoint(tmp_path: Path) -> None:
    config = DataConfig(prefix=make_set(tmp_path / "a"), split="6,2,2")
    seen = []
    for split in ("train", "valid", "test"):
        batches = make(config, global_batch=1, split=split)
        rows = [batches.batch(step, 0, 1).tokens for step in range(batches.samples_per_epoch)]
        seen.append(set(np.concatenate(rows).ravel().tolist()))
    assert not seen[0] & seen[1]
    assert not seen[0] & seen[2]
    assert not seen[1] & seen[2]


def test_document_attention_starts_positions_over_and_takes_the_loss_off_the_border(tmp_path: Path) -> None:
    config = DataConfig(prefix=make_set(tmp_path / "a"), split="1,0,0", attention="document")
    batch = make(config, global_batch=8).batch(0, 0, 8)
    assert batch.positions is not None
    assert batch.documents is not None
    for row in range(8):
        tokens, documents = batch.tokens[row], batch.documents[row]  # every document of this set repeats its own number
        same = tokens[1:] == tokens[:-1]
        assert np.array_equal(documents[1:] == documents[:-1], same)
        assert np.array_equal(batch.positions[row, 1:], np.where(same, batch.positions[row, :-1] + 1, 0))
        assert np.array_equal(batch.labels[row, :-1], np.where(same, tokens[1:], -100))


def test_a_split_that_is_too_short_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"test split .* is shorter than one sample of 16 tokens"):
        make(DataConfig(prefix=make_set(tmp_path / "a"), split="1,0,0"), split="test")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "9,x"}, "not three numbers"),
        ({"split": "1,2,3,4"}, "up to three shares"),
        ({"split": "-1,2,0"}, "none negative"),
        ({"prefix": ""}, "is empty"),
        ({"prefix": "gone"}, "no data set at gone"),
        ({"prefix": "half a 0.5 b"}, "is no blend"),
        ({"prefix": "0.5 a 0.5"}, "needs a weight"),
        ({"packing": "pad"}, "has no effect on plain text"),
    ],
)
def test_problems_name_the_key(tmp_path: Path, options: dict[str, str], message: str) -> None:
    prefix = make_set(tmp_path / "a")
    assert DataConfig(prefix=prefix).problems() == []
    (problem,) = DataConfig(**{"prefix": prefix, **options}).problems()  # type: ignore[arg-type]
    assert message in str(problem)
    assert "data." in str(problem)


def test_a_missing_set_is_answered_with_its_neighbours(tmp_path: Path) -> None:
    make_set(tmp_path / "alpaca_text_document")
    (problem,) = DataConfig(prefix=str(tmp_path / "alpaca")).problems()
    assert "there is: alpaca_text_document" in str(problem)


def test_data_that_does_not_fit_the_model_is_refused(
    tmp_path: Path, prepare: Callable[..., str], tokenizer_dir: Path
) -> None:
    source = tmp_path / "a.txt"
    source.write_text("some words\n" * 5)
    config = DataConfig(prefix=prepare(source) + "_text_document")
    fingerprint = load_tokenizer(tokenizer_dir).fingerprint
    check_data_against(config, 600, fingerprint)
    with pytest.raises(UserError, match=r"vocabulary of 600 entries .* the model's vocabulary has 260"):
        check_data_against(config, 260)
    with pytest.raises(UserError, match="made with another tokenizer"):
        check_data_against(config, 600, "0" * 64)
    foreign = DataConfig(prefix=make_set(tmp_path / "foreign"))
    check_data_against(foreign, 63)
    with pytest.raises(UserError, match="token id 62, the model's vocabulary has 62 entries"):
        check_data_against(foreign, 62)


def test_a_model_that_is_smaller_than_what_is_used_with_it_is_told() -> None:
    assert size_notices(300, 64, length=64, tokenizer_size=300, tokenizer="tokenizer") == []
    (line,) = size_notices(300, 64, length=65)
    assert "train.sequence_length 65 is above the model's max_position_embeddings 64" in line
    (line,) = size_notices(300, 64, length=64, tokenizer_size=301, tokenizer="a\x1bb")
    assert "a\\x1bb has 301 entries, the model 300 rows" in line


def test_without_weights_each_set_counts_by_its_length(tmp_path: Path) -> None:
    a, b = make_set(tmp_path / "a", documents=90), make_set(tmp_path / "b", seed=1, first=200, documents=30)
    batches = make(DataConfig(prefix=f"{a} {b}", split="1,0,0"), global_batch=1)
    count = batches.samples_per_epoch
    tokens = batches.samples(0, count).tokens
    of_b = int((tokens >= 200).any(1).sum())
    lengths = [one.samples_per_epoch for one in batches.sets]
    assert abs(of_b - lengths[1]) <= 1
    assert batches.weights == [n / count for n in lengths]


def test_samples_do_not_depend_on_the_batch_they_are_read_in(tmp_path: Path) -> None:
    a, b = make_set(tmp_path / "a"), make_set(tmp_path / "b", seed=1, first=200)
    for order in ("stable", "megatron"):
        config = DataConfig(prefix=f"0.7 {a} 0.3 {b}", split="1,0,0", order=order)
        whole = make(config, samples=200).samples(0, 200).tokens
        for batch in (1, 3, 8, 50):
            other = make(config, global_batch=batch, samples=200)
            assert np.array_equal(other.samples(17, 90).tokens, whole[17:107])
            assert np.array_equal(other.batch(2, 0, batch).tokens, whole[2 * batch : 3 * batch])
