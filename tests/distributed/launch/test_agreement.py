"""The guard "same data?": the digests are of exactly the files that are read, however a prefix is spelled."""

from __future__ import annotations

import hashlib
import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import toy
from arriero.common.errors import UserError
from arriero.data.batches import Batches
from arriero.data.config import DataConfig
from arriero.data.indexed import IndexedDataset, IndexedWriter
from arriero.data.prefix import data_files, parse_prefix
from arriero.train.facts import file_sample, input_changes, input_digests
from arriero.train.recipe import Recipe

NAMES = ("plain", "with blanks", "b[a]r", "star*", "what?", "it's", 'quo"te', "back\\slash", "0.7 A 0.3 B", "0.5",
         "ünï", "-n", "#5", "$HOME", "a;b", " front", "new\nline", "{a,b}", "~", "1.0 x")  # fmt: skip


def write(prefix: Path, seed: int = 0, documents: int = 40) -> Path:
    random = np.random.default_rng(seed)
    with IndexedWriter(prefix, np.dtype(np.uint16)) as writer:
        for _ in range(documents):
            writer.add(random.integers(0, 200, 20))
            writer.end_document()
    return prefix


def recipe(prefix: str, **top: Any) -> Recipe:
    return Recipe(data=DataConfig(prefix=prefix, split="1,0,0"), **top)


def shuffle(path: Path) -> None:
    """Other bytes, the same length and time."""
    raw, stat = np.fromfile(path, np.uint16), path.stat()
    raw[::-1].tofile(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def spellings(name: str) -> list[str]:
    """Ways to name one set in a recipe."""
    quoted = shlex.quote(name)
    return [name, f"1.0 {quoted}", f"0.3 {quoted} 0.7 other", f"other {quoted}", f"other {quoted} other"]


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_file_is_noticed_behind_every_spelling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    write(tmp_path / name)
    write(tmp_path / "other", 1)
    for text in spellings(name):
        if text != name:
            assert name in parse_prefix(text).prefixes
        batches = Batches(DataConfig(prefix=text, split="1,0,0"), sequence_length=16, global_batch=8, seed=1)
        before, rows = input_digests(recipe(text)), batches.samples(0, 60).tokens
        assert input_changes(before, recipe(text)) == {}
        shuffle(tmp_path / f"{name}.bin")
        assert not np.array_equal(batches.samples(0, 60).tokens, rows)  # it is what is read
        assert "data" in input_changes(before, recipe(text))


@pytest.mark.parametrize("name", ["NAME_text_document", "n[a]me"])
def test_neighbours_are_not_the_data(tmp_path: Path, name: str) -> None:
    write(tmp_path / name)
    before = input_digests(recipe(str(tmp_path / name)))
    for neighbour in (f"{name}_v2", f"{name}2", f"x{name}", "name", name.lower() + "_"):
        write(tmp_path / neighbour, 3)
    assert input_changes(before, recipe(str(tmp_path / name))) == {}
    assert set(before) == {"data[0].idx", "data[0].bin"}


def test_every_file_that_is_opened_is_in_the_digest_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    instructions = toy.write_instructions(tmp_path)
    text = f"0.5 {instructions} 0.5 {shlex.quote(str(write(tmp_path / 'a [b]')))}"
    write(tmp_path / "toy2")
    opened = []
    original = IndexedDataset.__init__
    monkeypatch.setattr(IndexedDataset, "__init__", lambda self, p: (opened.append(str(p)), original(self, p))[1])
    Batches(DataConfig(prefix=text, split="1,0,0"), sequence_length=16, global_batch=8, seed=1)
    files = {str(path) for path in data_files(text).values()}
    assert files == {f"{name}{suffix}" for name in opened for suffix in (".idx", ".bin")}


def test_weights_and_order_of_a_blend_are_part_of_the_data(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a"), write(tmp_path / "b", 1)
    before = input_digests(recipe(f"0.7 {a} 0.3 {b}"))
    assert input_changes(before, recipe(f"7 {a} 3 {b}")) == {}
    for other in (f"0.3 {a} 0.7 {b}", f"0.7 {b} 0.3 {a}", f"{a} {b}", f"0.7 {a} 0.2 {b} 0.1 {a}", str(a)):
        then, now = input_changes(before, recipe(other))["data"]
        assert then != now
    moved = write(tmp_path / "elsewhere" / "named otherwise")
    assert input_changes(before, recipe(f"0.7 {shlex.quote(str(moved))} 0.3 {b}")) == {}


def test_digests_of_older_versions_are_understood(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a_text_document"), write(tmp_path / "b_text_document", 1)
    text = f"0.7 {a} 0.3 {b}"
    older = {f"data {n} {p.name}{s}": file_sample(Path(f"{p}{s}"), blocks=0)
             for n, p in ((1, a), (3, b)) for s in (".idx", ".bin")}  # fmt: skip
    neighbour = {"data 1 a_text_document_v2.idx": "5 bytes, abc", "data 1 a_text_document_v2.bin": "5 bytes, abc"}
    assert input_changes(older, recipe(text)) == {}
    assert input_changes(older | neighbour, recipe(text)) == {}
    shuffle(Path(f"{a}.bin"))
    assert "data" in input_changes(older | neighbour, recipe(text))
    assert "data" in input_changes({}, recipe(text))


def test_the_digest_of_a_tokenizer_is_of_the_file_that_is_read(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer.model").write_bytes(b"model")
    ours = recipe("", tokenizer=str(tmp_path))
    before = input_digests(ours)
    older = {"tokenizer": hashlib.sha256(b"{}").hexdigest()[:12]}  # looked at tokenizer.json first
    assert input_changes(before, ours) == input_changes(older, ours) == {}
    (tmp_path / "tokenizer.model").write_bytes(b"other")
    assert set(input_changes(before, ours)) == {"tokenizer"}
    assert set(input_changes(before, replace(ours, tokenizer=""))) == {"tokenizer"}


def test_a_large_file_is_noticed_by_its_middle(tmp_path: Path) -> None:
    path = tmp_path / "large.bin"
    path.write_bytes(b"a" * (1 << 20) + bytes(range(256)) * 16384 + b"z" * (1 << 20))
    before, ends = file_sample(path), file_sample(path, blocks=0)
    raw = bytearray(path.read_bytes())
    raw[1 << 20 : -(1 << 20)] = raw[1 << 20 : -(1 << 20)][::-1]
    path.write_bytes(raw)
    assert file_sample(path) != before
    assert file_sample(path, blocks=0) == ends
    assert file_sample(tmp_path / "none") == "No such file or directory"
    os.mkfifo(tmp_path / "pipe")
    assert "regular" in file_sample(tmp_path / "pipe")


@given(st.text(max_size=30))
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_is_a_blend_or_an_error_that_can_be_shown(text: str) -> None:
    try:
        blend = parse_prefix(text)
    except UserError as error:
        problem = error.problem
    else:
        problem = ""
    assert problem.isprintable()
    if problem:
        return
    assert blend.prefixes
    assert blend.weights is None or all(w > 0 for w in blend.weights)
    assert data_files(text)


@pytest.mark.parametrize("text", ["a" * 5000, "0.5 " + "a" * 300, "a\0b", "\ud800", "a/" * 3000, "/dev/null", "."])
def test_impossible_names_are_problems_of_the_key(text: str) -> None:
    (problem,) = DataConfig(prefix=text).problems()
    assert problem.problem.startswith("data.prefix")
    assert len(str(problem)) < 1500
    assert problem.problem.isprintable()
