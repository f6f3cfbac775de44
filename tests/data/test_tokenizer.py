from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from arriero.common.errors import UserError
from arriero.data.tokenizer import Tokenizer, load_tokenizer

TEXTS = [
    "Hello world",
    "a  b   c",
    "",
    " lead",
    "tail ",
    "x\n\n\ty",
    "größe 日本 🦙",
    "a\0b",
    "def f():\r\n    pass",
    "12 345",
]


def test_ids_are_sentencepieces_own(tokenizer: Tokenizer) -> None:
    own = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    assert tokenizer.encode_batch(TEXTS) == own.encode(TEXTS)


def test_tokenizer_json_gives_the_same_ids_and_fingerprint(tokenizer: Tokenizer, json_tokenizer_dir: Path) -> None:
    fast = load_tokenizer(json_tokenizer_dir)
    assert fast.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
    assert (fast.vocab_size, fast.bos_id, fast.eos_id) == (600, 1, 2)
    assert fast.fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("literal", ["<s>", "</s>", "<unk>", "a <s>b</s>"])
def test_literal_special_tokens_stay_text(tokenizer: Tokenizer, json_tokenizer_dir: Path, literal: str) -> None:
    for one in (tokenizer, load_tokenizer(json_tokenizer_dir)):
        ids = one.encode(literal)
        assert not {0, 1, 2} & set(ids)
        assert one.decode(ids) == literal


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁")))
@settings(max_examples=200, deadline=None)
def test_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)).removeprefix(" ") == text.removeprefix(" ")


@given(st.text("ab \n<s>é", min_size=1), st.text("ab \n<s>é"))
@settings(deadline=None)
def test_a_continuation_adds_no_blank(tokenizer: Tokenizer, json_tokenizer_dir: Path, prompt: str, answer: str) -> None:
    for one in (tokenizer, load_tokenizer(json_tokenizer_dir)):
        ids = np.concatenate([one.encode(prompt + "\n"), one.encode_continuation([answer])[0]])
        assert one.decode(ids).removeprefix(" ") == f"{prompt}\n{answer}".removeprefix(" ")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", {"tokenizer_class": "LLaMATokenizer", "bos_token": "", "eos_token": ""}),
        ("config.json", {"bos_token_id": 0, "eos_token_id": 0}),
    ],
)
def test_an_early_llama_conversion_is_mended(tokenizer_dir: Path, tmp_path: Path, file: str, content: object) -> None:
    shutil.copy(tokenizer_dir / "tokenizer.model", tmp_path)
    (tmp_path / file).write_text(json.dumps(content))
    found = load_tokenizer(tmp_path)
    assert (found.bos_id, found.eos_id) == (1, 2)
    assert len(found.notices) == 1
    assert "BOS 1 <s>, EOS 2 </s>" in found.notices[0]


def test_a_sound_tokenizer_gives_no_notice(tokenizer: Tokenizer) -> None:
    assert tokenizer.notices == []


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no tokenizer\.model and no tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "none")
    for name in ("tokenizer.model", "tokenizer.json"):
        (tmp_path / name).write_bytes(b"nonsense")
        with pytest.raises(UserError, match=name):
            load_tokenizer(tmp_path / name)


def test_save_to_copies_the_files(json_tokenizer_dir: Path, tmp_path: Path) -> None:
    load_tokenizer(json_tokenizer_dir).save_to(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").fingerprint == load_tokenizer(json_tokenizer_dir).fingerprint
