"""The fast engine against the reference; gigatoken is part of the development extra."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_inputs import train_sentencepiece

from arriero.common.errors import UserError
from arriero.data import fast
from arriero.data.fast import FastTokenizer, choose_fast_tokenizer
from arriero.data.indexed import IndexedDataset
from arriero.data.tokenizer import Tokenizer, load_tokenizer, split_text

pytestmark = pytest.mark.slow

SAMPLE = list(pydoc_data.topics.topics.values())[:4]


@given(st.text(st.sampled_from("ab ▁\n\té<s>"), max_size=120), st.integers(1, 20))
@settings(deadline=None)
def test_cutting_changes_no_id(tokenizer: Tokenizer, json_tokenizer_dir: Path, text: str, length: int) -> None:
    for one in (tokenizer, load_tokenizer(json_tokenizer_dir)):
        whole = one._encode([text])[0]
        assert np.concatenate(one._encode(split_text(text, length))).tolist() == whole.tolist()


def test_a_long_document_has_the_ids_of_the_whole(tokenizer: Tokenizer) -> None:
    text = "\n".join(SAMPLE)
    assert len(split_text(text)) > 5
    assert tokenizer.encode(text) == tokenizer._encode([text])[0].tolist()


def test_a_vocabulary_with_pieces_over_blanks_is_never_cut(tmp_path: Path) -> None:
    train_sentencepiece(tmp_path / "tokenizer.model", user_defined_symbols=["of▁the"])
    assert not load_tokenizer(tmp_path)._splittable


def test_ids_equal_the_references(tokenizer: Tokenizer, json_tokenizer_dir: Path) -> None:
    for reference in (tokenizer, load_tokenizer(json_tokenizer_dir)):
        engine, reason = choose_fast_tokenizer(reference, SAMPLE)
        assert engine is not None, reason
        assert "ids equal" in reason
        texts = [*SAMPLE, "", "<s> literal </s>", "x" * 5000, " a"]
        assert engine.encode_batch(texts) == reference.encode_batch(texts)
        assert (engine.bos_id, engine.vocab_size, engine.fingerprint) == (1, 600, reference.fingerprint)
        assert engine.decode(engine.encode("a b")) == "a b"


def test_the_cache_is_dropped_after_enough_text(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "_MAX_CACHE_BYTES", 1000)
    engine = FastTokenizer(tokenizer)
    first = engine._backend
    assert engine.encode_batch(SAMPLE) == tokenizer.encode_batch(SAMPLE)
    engine.encode("more")
    assert engine._backend is not first


def test_a_vocabulary_without_all_bytes_falls_back_and_says_so(tmp_path: Path) -> None:
    train_sentencepiece(tmp_path / "tokenizer.model", byte_fallback=False)
    engine, reason = choose_fast_tokenizer(load_tokenizer(tmp_path), SAMPLE)
    assert engine is None
    assert "byte_fallback" in reason


def test_other_ids_are_found_before_and_during_the_work(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_sentencepiece(tmp_path / "tokenizer.model", vocab_size=500)
    other = load_tokenizer(tmp_path)
    wrong = FastTokenizer(other)
    wrong.reference = tokenizer  # as if gigatoken had read the vocabulary wrongly
    with pytest.raises(UserError, match=r"other ids than sentencepiece for .*\n.*--engine reference"):
        wrong.encode_batch(SAMPLE)
    monkeypatch.setattr(fast, "FastTokenizer", lambda reference: wrong)
    engine, reason = choose_fast_tokenizer(tokenizer, SAMPLE)
    assert engine is None
    assert "other ids" in reason


def test_prepare_writes_the_same_bytes_with_either_engine(tmp_path: Path, prepare: Callable[..., str]) -> None:
    source = tmp_path / "a.txt"
    source.write_text("\n".join(SAMPLE))
    made = [
        Path(prepare(source, engine=engine, out=str(tmp_path / "out" / engine)) + "_text_document.bin").read_bytes()
        for engine in ("fast", "reference")
    ]
    assert made[0] == made[1]


def test_asking_for_the_fast_engine_without_it_is_an_error(
    tmp_path: Path, prepare: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "a.txt"
    source.write_text("a line\n")
    monkeypatch.setattr(fast.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="gigatoken is not installed"):
        prepare(source, engine="fast")
    prepare(source, engine="auto")
    assert "engine     sentencepiece: gigatoken is not installed" in capsys.readouterr().out


def test_a_document_of_200_megabytes(tmp_path: Path, prepare: Callable[..., str], tokenizer: Tokenizer) -> None:
    """Far longer than a chunk of the reader, between two short ones: the three keep their bounds and their ends."""
    unit = " the documentation of the standard library tells what each function does,"  # of 74 characters
    source = tmp_path / "long.jsonl"
    with source.open("w") as file:
        file.write(
            '{"text": "first"}\n{"text": "start' + unit * (200_000_000 // len(unit)) + ' end"}\n{"text": "last"}\n'
        )
    data = IndexedDataset(prepare(source, engine="fast") + "_text_document")
    assert len(data) == 3
    inner, whole = len(data[1]), 200_000_000 // len(unit)
    assert inner % whole < 200  # the same ids for every unit, and a few at either end
    assert tokenizer.decode(data[1][:100]).startswith("start" + unit)
    assert tokenizer.decode(data[1][-100:]).endswith(unit + " end")
    assert [int(data[i][0]) for i in range(3)] == [1, 1, 1]
    assert [int(data[i][-1]) for i in range(3)] == [2, 2, 2]
