from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset as Megatron
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from arriero.common.errors import UserError
from arriero.data.indexed import IndexedDataset, IndexedWriter, best_dtype

GOLDEN_IDX = (
    "4d4d4944494458000001000000000000000402000000000000000300000000000000030000000200000000000000000000"
    "000c00000000000000000000000000000001000000000000000200000000000000"
)


def write(prefix: Path, documents: list[list[int]], dtype: type = np.int32) -> Path:
    with IndexedWriter(prefix, np.dtype(dtype)) as writer:
        for document in documents:
            writer.add(document)
            writer.end_document()
    return prefix


def test_golden_bytes(tmp_path: Path) -> None:
    write(tmp_path / "x", [[1, 2, 3], [4, 5]])
    assert (tmp_path / "x.bin").read_bytes().hex() == "0100000002000000030000000400000005000000"
    assert (tmp_path / "x.idx").read_bytes().hex() == GOLDEN_IDX


def test_several_sequences_in_a_document(tmp_path: Path) -> None:
    writer = IndexedWriter(tmp_path / "x", np.dtype(np.uint16))
    for document in ([[1, 2, 3], [4, 5]], [[7, 8]], [[9]]):
        for sequence in document:
            writer.add(sequence)
        writer.end_document()
    summary = writer.close()
    found = IndexedDataset(tmp_path / "x")
    assert (tmp_path / "x.idx").stat().st_size == 114
    assert found.sizes.tolist() == [3, 2, 2, 1]
    assert found.starts.tolist() == [0, 3, 5, 7]
    assert found.documents.tolist() == [0, 2, 3, 4]
    assert (summary["tokens"], summary["documents"], summary["sequences"]) == (8, 3, 4)


@given(st.lists(st.lists(st.integers(0, 65535), max_size=9), max_size=9), st.sampled_from([np.uint16, np.int32]))
@settings(max_examples=40, deadline=None)
def test_bytes_are_megatrons_both_ways(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], dtype: type
) -> None:
    import torch

    here = tmp_path_factory.mktemp("set")
    write(here / "ours", documents, dtype)
    builder = IndexedDatasetBuilder(str(here / "theirs.bin"), dtype=dtype)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(here / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (here / f"ours{suffix}").read_bytes() == (here / f"theirs{suffix}").read_bytes()
    found = IndexedDataset(here / "theirs")
    assert [found[i].tolist() for i in range(len(found))] == documents
    if any(documents):  # their reader maps the .bin, and a map of nothing fails
        theirs = Megatron(str(here / "ours"))
        assert [theirs[i].tolist() for i in range(len(theirs))] == documents


def test_dtype_threshold_is_exact() -> None:
    assert best_dtype(65499) == np.uint16
    assert best_dtype(65500) == np.int32


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises((OverflowError, ValueError, TypeError)),
        IndexedWriter(tmp_path / "x", np.dtype(np.uint16)) as writer,
    ):
        writer.add(["no number"])
    assert list(tmp_path.iterdir()) == []


def test_a_bin_cut_short_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "x", [[1, 2, 3], [4, 5]])
    (tmp_path / "x.bin").write_bytes((tmp_path / "x.bin").read_bytes()[:-4])
    with pytest.raises(UserError, match=r"sequence 1 has 2 tokens from byte 12, but .* has 16 bytes"):
        IndexedDataset(tmp_path / "x")


@pytest.mark.parametrize(("at", "value"), [(34 + 8, 9999), (34 + 8, -4), (34 + 8, 2)])
def test_pointers_that_leave_the_bin_are_refused(tmp_path: Path, at: int, value: int) -> None:
    write(tmp_path / "x", [[1, 2, 3], [4, 5]])
    raw = bytearray((tmp_path / "x.idx").read_bytes())
    raw[at : at + 8] = value.to_bytes(8, "little", signed=True)
    (tmp_path / "x.idx").write_bytes(raw)
    with pytest.raises(UserError, match="sequence 0"):
        IndexedDataset(tmp_path / "x")


@pytest.mark.parametrize(
    ("cut", "message"),
    [(slice(0, 20), "not an index"), (slice(0, -1), "header asks for"), (slice(1, None), "not a Megatron index")],
)
def test_a_damaged_index_is_refused(tmp_path: Path, cut: slice, message: str) -> None:
    write(tmp_path / "x", [[1, 2, 3], [4, 5]])
    (tmp_path / "x.idx").write_bytes((tmp_path / "x.idx").read_bytes()[cut])
    with pytest.raises(UserError, match=message):
        IndexedDataset(tmp_path / "x")


def test_a_missing_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.idx is missing"):
        IndexedDataset(tmp_path / "none")
