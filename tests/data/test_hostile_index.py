"""Damaged and forged data sets: an error that names file and place, from every reader, before memory is taken."""

from __future__ import annotations

import os
import resource
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import toy
from arriero.cli.inspect.dataset import inspect
from arriero.cli.main import dispatch
from arriero.common.errors import EXIT_CHECK_FAILED, EXIT_USAGE, UserError
from arriero.data.batches import Batches
from arriero.data.check import check_data_against
from arriero.data.config import DataConfig
from arriero.data.indexed import IndexedDataset, IndexedWriter

SIZES = (34, 4 * 40, 8 * 40, 8 * 41)  # header, sizes, pointers, documents
AT_SIZES, AT_POINTERS, AT_DOCUMENTS = 34, 34 + 4 * 40, 34 + 12 * 40


def write(prefix: Path, dtype: type = np.int32) -> str:
    random = np.random.default_rng(0)
    with IndexedWriter(prefix, np.dtype(dtype)) as writer:
        for _ in range(40):
            writer.add(random.integers(0, 100, 30))
            writer.end_document()
    return str(prefix)


def put(form: str, at: int, *values: int) -> Callable[[bytearray], None]:
    """Overwrites numbers of the .idx."""
    return lambda raw: struct.pack_into(form, raw, at, *values)


@contextmanager
def little_memory(more: int = 1 << 30) -> Iterator[None]:
    """A limit on the address space, `more` bytes above what is in use."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


FORGED = {
    "a pointer whose end overflows": put("<q", AT_POINTERS + 8, 2**63 - 4),
    "a pointer at the limit": put("<q", AT_POINTERS, 2**63 - 8),
    "a pointer below 0": put("<q", AT_POINTERS, -(2**63)),
    "a pointer between two tokens": put("<q", AT_POINTERS, 2),
    "a size below 0": put("<i", AT_SIZES, -1),
    "the least size": put("<i", AT_SIZES, -(2**31)),
    "a size beyond the file": put("<i", AT_SIZES + 4, 2**31 - 1),
    "sizes that overlap": put("<40i", AT_SIZES, *[600] * 40),
    "all pointers at 0": put("<40q", AT_POINTERS, *[0] * 40),  # harmless: it stays within the file
    "more sequences": put("<Q", 18, 2**62),
    "all the sequences there can be": put("<Q", 18, 2**64 - 1),
    "counts that cancel out": put("<QQ", 18, 42, 38),
    "more documents": put("<Q", 26, 2**63),
    "boundaries that fall": put("<q", AT_DOCUMENTS + 8, 39),
    "boundaries whose differences overflow": put("<5q", AT_DOCUMENTS, 0, 2**62, 2**63 - 1, -(2**63), -(2**62)),
    "a last boundary beyond": put("<q", AT_DOCUMENTS + 8 * 40, 41),
    "a first boundary that is not 0": put("<q", AT_DOCUMENTS, 1),
    "floats": put("<B", 17, 6),
    "no dtype": put("<B", 17, 255),
    "wider ids": put("<B", 17, 5),
    "another version": put("<Q", 9, 2),
    "another magic": put("<B", 0, 0),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_index_is_named(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = write(tmp_path / "x")
    idx = Path(f"{prefix}.idx")
    raw = bytearray(idx.read_bytes())
    FORGED[name](raw)
    idx.write_bytes(raw)
    with little_memory():
        if name == "all pointers at 0":
            assert inspect(Path(prefix)) == 0
            return
        with pytest.raises(UserError, match=r"x\.idx"):
            IndexedDataset(prefix)
        with pytest.raises(UserError, match=r"x\.idx"):
            Batches(DataConfig(prefix=prefix, split="1,0,0"), sequence_length=8, global_batch=4, seed=1)
        assert inspect(Path(prefix)) == EXIT_CHECK_FAILED
    assert "WRONG" in capsys.readouterr().out


@pytest.mark.parametrize("cut", [1, 3, 4, 100, 4799, 4800])
@pytest.mark.parametrize("dtype", [np.int32, np.uint16])
def test_a_bin_of_any_shorter_length_is_refused(tmp_path: Path, cut: int, dtype: type) -> None:
    prefix = write(tmp_path / "x", dtype)
    path = Path(f"{prefix}.bin")
    os.truncate(path, max(0, path.stat().st_size - cut))
    with pytest.raises(UserError, match=r"x\.idx: sequence \d+ .*x\.bin has \d+ bytes"):
        IndexedDataset(prefix)


@pytest.mark.parametrize("kind", ["directory", "pipe", "socket", "gone", "loop", "unreadable"])
@pytest.mark.parametrize("suffix", [".idx", ".bin"])
def test_what_is_no_regular_file_is_no_data_set(tmp_path: Path, kind: str, suffix: str) -> None:
    prefix = write(tmp_path / "x")
    path = Path(f"{prefix}{suffix}")
    path.unlink()
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        os.mknod(path, 0o140600)
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "unreadable":
        path.symlink_to("/proc/self/mem")
    with pytest.raises(UserError, match="x"):
        IndexedDataset(prefix)


@given(st.lists(st.tuples(st.integers(0, sum(SIZES) - 1), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_ends_in_an_error_or_in_batches(tmp_path: Path, damage: list[tuple[int, bytes]]) -> None:
    prefix = write(tmp_path / "x")
    idx = Path(f"{prefix}.idx")
    raw = bytearray(idx.read_bytes())
    for at, what in damage:
        raw[at : at + len(what)] = what[: len(raw) - at]
    idx.write_bytes(raw)
    config = DataConfig(prefix=prefix, split="1,0,0")
    with little_memory():
        for order in ("stable", "megatron"):
            try:
                batches = Batches(
                    DataConfig(prefix=prefix, split="1,0,0", order=order), sequence_length=8, global_batch=4, seed=1,
                    samples=64, vocab_size=100,
                )  # fmt: skip
                batch = batches.samples(3, 64)
            except UserError:
                continue
            assert batch.tokens.shape == (64, 8)
            assert 0 <= batch.tokens.min() <= batch.tokens.max() < 100
        with suppress(UserError):
            check_data_against(config, 100)


@pytest.mark.parametrize(("dtype", "value"), [(np.int32, -5), (np.int32, 2**31 - 1), (np.int32, 259), (np.uint16, 300)])
@pytest.mark.parametrize("order", ["stable", "megatron"])
def test_an_id_without_a_row_is_named_by_file_and_place_when_it_is_read(
    tmp_path: Path, dtype: type, value: int, order: str
) -> None:  # fmt: skip
    a, b = write(tmp_path / "a", dtype), write(tmp_path / "b", dtype)
    tokens = np.fromfile(f"{b}.bin", dtype)
    tokens[777] = value
    tokens.tofile(f"{b}.bin")
    place = f"b.bin holds token id {value}, .* 259 entries \\(token 777, at byte {777 * tokens.itemsize}\\)"
    with pytest.raises(UserError, match=place):
        check_data_against(DataConfig(prefix=b), 259)
    for attention in ("window", "document"):
        config = DataConfig(prefix=f"0.5 {a} 0.5 {b}", split="1,0,0", order=order, attention=attention)
        batches = Batches(config, sequence_length=8, global_batch=4, seed=1, samples=600, vocab_size=259)
        with pytest.raises(UserError, match=place):
            [batches.batch(step, 0, 4) for step in range(150)]


def test_ids_and_labels_of_instructions_are_looked_at_too(tmp_path: Path) -> None:
    prefix = str(toy.write_instructions(tmp_path))
    config = DataConfig(prefix=prefix, split="1,0,0", packing="best-fit")
    check_data_against(config, 259)  # -100 stands for no loss
    at = int(IndexedDataset(f"{prefix}_packed_labels_document").starts[3]) + 6  # neither a first label nor a last id
    for field, value in (("input_ids", -100), ("labels", 259), ("labels", -3)):
        path = Path(f"{prefix}_packed_{field}_document.bin")
        before = path.read_bytes()
        tokens = np.frombuffer(before, np.int32).copy()
        tokens[at] = value
        path.write_bytes(tokens.tobytes())
        place = rf"{field}_document.bin holds token id {value}, .* \(token {at}, at byte {4 * at}\)"
        with pytest.raises(UserError, match=place):
            check_data_against(config, 259)
        batches = Batches(config, sequence_length=32, global_batch=1, seed=1, vocab_size=259)
        with pytest.raises(UserError, match=place):
            batches.samples(0, batches.samples_per_epoch)
        path.write_bytes(before)


def test_training_and_inspecting_them_ends_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = toy.write_recipe(tmp_path)
    path = tmp_path / "data/toy_text_document.bin"
    tokens = np.fromfile(path, np.uint16)
    tokens[40] = 300
    tokens.tofile(path)
    assert dispatch(["pretrain", str(recipe)]) == EXIT_USAGE
    assert "holds token id 300" in capsys.readouterr().err
    prefix = write(tmp_path / "x")
    tokens = np.fromfile(f"{prefix}.bin", np.int32)
    tokens[7] = -2
    tokens.tofile(f"{prefix}.bin")
    assert dispatch(["inspect", prefix]) == EXIT_CHECK_FAILED
    assert "x.bin holds token id -2, ids count from 0 (token 7, at byte 28)" in capsys.readouterr().out


def test_names_reach_the_terminal_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = write(tmp_path / "x\x1b[2Jy")
    assert inspect(Path(prefix)) == 0
    assert "\x1b" not in capsys.readouterr().out
    os.truncate(f"{prefix}.bin", 8)
    with pytest.raises(UserError) as found:
        IndexedDataset(prefix)
    assert "\x1b" not in str(found.value)


@pytest.mark.parametrize("figure", ["lengths.xyz", "file/lengths.png", "a" * 300 + ".png"])
def test_a_figure_that_cannot_be_drawn(tmp_path: Path, figure: str) -> None:
    prefix = write(tmp_path / "x")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"name a \.png"):
        inspect(Path(prefix), figure=tmp_path / figure)
