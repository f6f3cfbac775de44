"""Tokenizers that a stranger made: bounded in memory and time, and whatever they do is one sentence."""

from __future__ import annotations

import base64
import copy
import json
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_inputs import train_sentencepiece

from arriero.common.errors import UserError
from arriero.data import tokenizer_safety
from arriero.data.indexed import IndexedDataset
from arriero.data.tokenizer import JsonTokenizer, load_tokenizer
from arriero.data.tokenizer_safety import TooSlowError, call_with_timeout, check_charsmap, library_errors

Prepare = Callable[..., str]
BASE: dict[str, Any] = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
    "pre_tokenizer": None, "post_processor": None, "decoder": None,
    "model": {
        "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "merges": [],
        "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4},
    },
}  # fmt: skip
ADDED = {"content": "zz", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def charsmap(blob: bytes) -> dict[str, Any]:
    return {"normalizer": {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(blob).decode()}}


def write(directory: Path, model: dict[str, Any] | None = None, **parts: Any) -> Path:
    whole = copy.deepcopy(BASE) | parts
    whole["model"] |= model or {}
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(whole))
    return directory


UNIT = struct.pack("<I", 1024)
TEN = [replace({"String": "a"}, "a" * 10)] * 6
HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "id of 2^32": ({"model": {"vocab": {"<unk>": 0, "a": 2**32 - 1}}}, "has the id 4,294,967,295"),
    "id of 2^31": ({"model": {"vocab": {"<unk>": 0, "a": 2**31}}}, "has the id 2,147,483,648"),
    "id of an added token": ({"added_tokens": [{"id": 2**31, **ADDED}]}, "has the id 2,147,483,648"),
    "words": ({"model": {"type": "WordLevel", "vocab": {"<unk>": 0, "a": 2**31}}}, "has the id"),
    "negative id": ({"model": {"vocab": {"<unk>": -1}}}, "is not a tokenizer.json"),
    "ids of text": ({"model": {"vocab": {"<unk>": "0"}}}, "is not a tokenizer.json"),
    "no model": ({"model": {"type": "None"}}, "is not a tokenizer.json"),
    "unknown unk": ({"model": {"unk_token": "nothere"}}, "cannot tokenize .Unk token"),
    "unk id outside": ({"model": {"type": "Unigram", "unk_id": 9, "vocab": [["a", -1.0]]}}, "is not a tokenizer.json"),
    "no unk id": ({"model": {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0]]}}, "cannot tokenize"),
    "no unk of WordPiece": ({"model": {"type": "WordPiece", "unk_token": "x", "max_input_chars_per_word": 9,
                                       "continuing_subword_prefix": "##"}}, "cannot tokenize"),
    "text times 100,000": ({"normalizer": replace({"String": "a"}, "a" * 100_000)}, "more than 64"),
    "text times 10^6": ({"normalizer": {"type": "Sequence", "normalizers": TEN}}, r"1e\+06 bytes"),
    "before each character": ({"normalizer": replace({"Regex": ""}, "a" * 1000)}, "more than 64"),
    "a long beginning": ({"normalizer": {"type": "Prepend", "prepend": "a" * 10_000}}, "more than 64"),
    "decoder": ({"decoder": {"type": "Sequence", "decoders": TEN}}, "its decoder makes up to"),
    "empty map": (charsmap(b""), "precompiled_charsmap is empty"),
    "short map": (charsmap(b"\xff\xff\xff\x7fabc"), "trie does not fit"),
    "trie leads outside": (charsmap(UNIT + b"\xff\xff\xff\x7f" * 256 + b"a\0"), "leads outside"),
    "value outside": (charsmap(UNIT + struct.pack("<II", 1 << 8 | 1 << 10, 0x8000FFFF) + bytes(1016) + b"a\0"),
                      "leads beyond the texts"),
    "long texts in the map": (charsmap(UNIT + bytes(1024) + b"a" * 5000 + b"\0"), "more than 64"),
    "no base64": ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "!"}}, "its normalizer is broken"),
    "ill-typed": ({"normalizer": [1]}, "its normalizer is broken"),
    "deep": ({"decoder": json.loads('{"type":"Sequence","decoders":[' * 150 + "]}" * 150)}, "tokenizer.json"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_description_is_one_sentence(tmp_path: Path, case: str) -> None:
    parts, message = HOSTILE[case]
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(write(tmp_path / "t", **parts)).encode_batch(["aba", "xyz \U0001f999"])
    assert "tokenizer.json" in caught.value.problem


def test_a_panic_is_a_sentence_and_interrupts_stay_what_they_are(tmp_path: Path) -> None:
    from tokenizers import normalizers

    with pytest.raises(UserError, match=r"t\.json: is broken \("), library_errors(tmp_path / "t.json", "is broken"):
        normalizers.Precompiled(b"\xff\xff\xff\x7fabc")
    with pytest.raises(KeyboardInterrupt), library_errors(tmp_path / "t.json", "is broken"):
        raise KeyboardInterrupt


def test_a_record_on_which_the_tokenizer_fails_is_set_aside(tmp_path: Path, prepare: Prepare) -> None:
    """A regular expression that goes back and forth until its library gives up."""
    split = {"type": "Split", "pattern": {"Regex": "(a+)+c"}, "behavior": "Isolated", "invert": False}
    directory = write(tmp_path / "t", pre_tokenizer=split)
    (directory / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    source = tmp_path / "in.txt"
    source.write_text(f"ab\n{'a' * 60}b\nba\n")
    out = prepare(source, tokenizer=directory, max_bad=0.5, engine="reference")
    data = IndexedDataset(f"{out}_text_document")
    assert [data[i].tolist() for i in range(len(data))] == [[1, 3, 4, 2], [1, 4, 3, 2]]
    (line,) = [json.loads(one) for one in Path(f"{out}.quarantine.jsonl").read_text().splitlines()]
    assert line["line"] == 2
    assert "cannot tokenize" in line["reason"]
    with pytest.raises(UserError, match=r"in\.txt:2: .*cannot tokenize"):
        prepare(source, tokenizer=directory, strict=True, engine="reference", overwrite=True)


def test_a_tokenizer_that_never_ends_is_given_up(
    tmp_path: Path, prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    forever = threading.Event()
    monkeypatch.setattr(tokenizer_safety, "MIN_SECONDS", 0.1)
    try:
        with pytest.raises(TooSlowError, match=r"t\.json: has not tokenized 10 characters"):
            call_with_timeout(tmp_path / "t.json", 10, forever.wait)
        assert call_with_timeout(tmp_path / "t.json", 10**9, lambda: 7) == 7
        with pytest.raises(TimeoutError, match="its own"):
            call_with_timeout(tmp_path / "t.json", 10**9, lambda: (_ for _ in ()).throw(TimeoutError("its own")))

        def encode(self: JsonTokenizer, texts: list[str]) -> list[np.ndarray]:
            if any("slow" in text for text in texts):
                call_with_timeout(self.path, 1, forever.wait)
            return [np.zeros(1, np.int32) for _ in texts]

        monkeypatch.setattr(JsonTokenizer, "_encode", encode)
        directory = write(tmp_path / "t")
        (tmp_path / "in.txt").write_text("a\nslow\n")
        with pytest.raises(UserError, match=r"has not tokenized .* \(among records 1 to 2 of .*in\.txt\)"):
            prepare(tmp_path / "in.txt", tokenizer=directory, bos=False, eos=False, engine="reference")
        assert list((tmp_path / "out").iterdir()) == []
    finally:
        forever.set()


def test_dropout_is_left_out_and_lost_characters_are_named(tmp_path: Path) -> None:
    merging = {"dropout": 0.5, "unk_token": None, "merges": ["a b"], "vocab": {"a": 0, "b": 1, "ab": 2}}
    tokenizer = load_tokenizer(write(tmp_path / "t", model=merging))
    assert {tuple(tokenizer.encode("abab")) for _ in range(50)} == {(2, 2)}
    assert any("dropout" in note for note in tokenizer.notices)
    assert any("characters that its vocabulary lacks are lost" in note for note in tokenizer.notices)


@pytest.fixture(scope="module")
def nfkc(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """A tokenizer.model with SentencePiece's own NFKC map, and the map."""
    path = tmp_path_factory.mktemp("nfkc") / "tokenizer.model"
    train_sentencepiece(path, normalization_rule_name="nmt_nfkc", vocab_size=400)
    raw = path.read_bytes()
    (spec,) = tokenizer_safety._messages(raw, 3)
    (blob,) = tokenizer_safety._messages(spec, 2)
    assert len(blob) > 100_000
    return raw, blob


def test_sentencepieces_own_map_passes(tmp_path: Path, nfkc: tuple[bytes, bytes]) -> None:
    raw, blob = nfkc
    assert check_charsmap(blob) == 1.0
    (tmp_path / "tokenizer.model").write_bytes(raw)
    assert load_tokenizer(tmp_path).encode("①") == load_tokenizer(tmp_path).encode("1")
    tokenizer = load_tokenizer(write(tmp_path / "t", **charsmap(blob)))
    assert tokenizer.encode("ａ") == [3]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_map_is_refused_or_harmless(tmp_path: Path, nfkc: tuple[bytes, bytes], data: st.DataObject) -> None:
    """SentencePiece reads where the map's trie leads; beyond it, the process would end."""
    raw, blob = nfkc
    begin = raw.index(blob)
    damaged = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 20))):
        at = data.draw(st.integers(0, len(blob) - 1) | st.integers(0, 2000))
        damaged[begin + at] = data.draw(st.integers(0, 255))
    (tmp_path / "tokenizer.model").write_bytes(damaged)
    try:
        tokenizer = load_tokenizer(tmp_path)
    except UserError:
        return
    tokenizer.encode_batch(["①㍿ﷺ abc é 日本", "".join(map(chr, range(32, 0x300)))])
