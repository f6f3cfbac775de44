"""tokenizer.json for a bare SentencePiece model.

transformers 5 given only a `tokenizer.model` splits runs of blanks wrongly; a tokenizer.json that states the merges is
read as it stands. SentencePiece BPE joins the pair whose union has the best score; tokenizers joins the pair with the
lowest rank: so every way to cut a piece into two pieces becomes a merge, ranked by the piece's score.
"""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

from arriero.common.errors import UserError
from arriero.common.files import write_atomic
from arriero.common.protobuf import read_fields
from arriero.common.untrusted import read_bytes, read_json, require_inside, schema_problem
from arriero.data.tokenizer_files import VOCABULARY_FILES
from arriero.data.tokenizer_safety import MAX_ID, check_sentencepiece, library_errors

PROBES = (
    "Hello world", "  two  blanks", "a  b   c", "tab\tand\nnewline\n\n", "naïve café — “quotes”", "日本語 и русский 🦙",
    "x = [1, 2, 3]  # done", "\u200bzero width", "", " ", "aaaaaaaaaaaa", "    def f(x):\n        return x",
)  # fmt: skip
"""Texts on which the file must agree with sentencepiece before it is kept."""

_BPE = 2  # sentencepiece's trainer_spec.model_type
_NORMAL, _UNKNOWN, _CONTROL, _DEFINED, _BYTE = 1, 2, 3, 4, 6  # sentencepiece's piece types
_CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}


def write_tokenizer_json(model: Path, directory: Path, *, source: Path | None = None) -> str:
    """Writes tokenizer.json and, if there is none, tokenizer_config.json into `directory`.

    Args:
        model: the tokenizer.model, beside its added_tokens.json if it has one.
        directory: where to.
        source: what messages name in place of `model`.

    Returns:
        "" if written; else why not, one sentence: the model is no BPE, or the two disagree on some text.

    Raises:
        UserError: the file is no SentencePiece model.
    """
    where, raw = source or model, read_bytes(model, "copy it again")
    check_sentencepiece(where, raw)
    with library_errors(where, "is no SentencePiece model"):
        return _convert(model, raw, directory, str(where))


def _convert(model: Path, content: bytes, directory: Path, where: str) -> str:
    import sentencepiece
    import tokenizers

    raw = _fields(content)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    if _number(_fields(raw.get(2, [b""])[0]), 3, 1) != _BPE:
        return f"{where} is not a BPE model, so no tokenizer.json was written: open it with sentencepiece"
    kinds = [_number(_fields(piece), 3, 1) for piece in raw[1]]
    built = _tokenizer_json(processor, kinds, _fields(raw.get(3, [b""])[0]))
    added = sorted((i, token) for token, i in added_tokens(model.parent).items() if i >= len(kinds))
    if [i for i, _ in added] != list(range(len(kinds), len(kinds) + len(added))):
        return f"{where}: added tokens leave ids out, so no tokenizer.json was written"
    built["added_tokens"] += [_added_token(i, token, special=True) for i, token in added]
    text = json.dumps(built, ensure_ascii=False)
    fast = tokenizers.Tokenizer.from_str(text)
    fast.encode_special_tokens = True
    defined = [processor.id_to_piece(i) for i, kind in enumerate(kinds) if kind == _DEFINED]
    for probe in (*PROBES, *(f"a {symbol} b" for symbol in defined)):
        if fast.encode(probe, add_special_tokens=False).ids != processor.encode(probe):
            return f"{where}: a tokenizer.json would tokenize {probe!r} differently, so none was written"
    write_atomic(directory / "tokenizer.json", text)
    config = directory / "tokenizer_config.json"
    if not config.exists():
        ids = {"bos_token": processor.bos_id(), "eos_token": processor.eos_id(), "unk_token": processor.unk_id()}
        names = {key: processor.id_to_piece(i) for key, i in ids.items() if i >= 0}
        write_atomic(config, json.dumps({**_CONFIG, **names}, indent=2) + "\n")
    return ""


def vocabulary_size(tokenizer: Path, *, added: bool = True) -> int:
    """How many ids a tokenizer has.

    Args:
        tokenizer: its directory, or its tokenizer.model or tokenizer.json.
        added: whether to count the tokens that were added to the vocabulary later, in tokenizer.json,
            added_tokens.json or tokenizer_config.json.

    Raises:
        UserError: there is no tokenizer, or a broken one, or one with an id that no vocabulary has.
    """
    folder = tokenizer if tokenizer.is_dir() else tokenizer.parent
    model, fast = (folder / name for name in VOCABULARY_FILES)
    if not tokenizer.is_dir():
        model, fast = (model, tokenizer) if tokenizer.suffix == ".json" else (tokenizer, fast)
    if not (model.is_file() or fast.is_file()):
        raise UserError(f"{tokenizer}: holds no tokenizer", "name the directory of tokenizer.model or .json")
    try:
        if model.is_file() and not (tokenizer.is_file() and tokenizer.suffix == ".json"):
            largest = len(_fields(read_bytes(require_inside(folder, model), "copy it again"))[1]) - 1
        else:
            raw = read_json(require_inside(folder, fast), "copy it again")
            vocab = raw["model"]["vocab"]
            ids = list(vocab.values()) if isinstance(vocab, dict) else [len(vocab) - 1]
            largest = max([*ids, *(token["id"] for token in raw.get("added_tokens") or [] if added)])
        largest = max([largest, *(added_tokens(folder).values() if added else ())])
        if type(largest) is not int:
            raise ValueError("an id that is no whole number")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError):
        raise UserError(f"{tokenizer}: holds a broken tokenizer", "copy it again") from None
    if not 0 <= largest <= MAX_ID:
        raise UserError(f"{tokenizer}: has a token of id {largest:,}, which no vocabulary has", "copy it again")
    return largest + 1


def added_tokens(folder: Path) -> dict[str, int]:
    """Tokens and ids that lie beside a vocabulary: added_tokens.json, added_tokens_decoder of tokenizer_config.json.

    Raises:
        UserError: a file is broken, or holds an id that is no whole number.
    """
    found: dict[str, int] = {}
    config = folder / "tokenizer_config.json"
    if config.is_file():
        raw = read_json(require_inside(folder, config), "restore it from the tokenizer's source", dict)
        decoder = raw.get("added_tokens_decoder") or {}
        if wrong := schema_problem(decoder, {str: {"content": str}}, "added_tokens_decoder"):
            raise UserError(f"{config}: {wrong}", "restore it from the tokenizer's source")
        found |= {entry["content"]: int(key) for key, entry in decoder.items() if re.fullmatch("[0-9]{1,4000}", key)}
    beside = folder / "added_tokens.json"
    if beside.is_file():
        found |= read_json(require_inside(folder, beside), "restore it from the tokenizer's source", {str: int})
    return found


def _tokenizer_json(processor: Any, kinds: list[int], normalizer: dict[int, list[Any]]) -> dict[str, Any]:
    size = len(processor)
    pieces = [processor.id_to_piece(i) for i in range(size)]
    special = [i for i, kind in enumerate(kinds) if kind in (_UNKNOWN, _CONTROL)]
    defined = [i for i, kind in enumerate(kinds) if kind == _DEFINED]
    steps: list[dict[str, Any]] = []
    charsmap = normalizer.get(2, [b""])[0]
    if charsmap:
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()})
    if _number(normalizer, 4, 1):  # remove_extra_whitespaces
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    prefix = bool(_number(normalizer, 3, 1))  # add_dummy_prefix
    if prefix:
        steps.append({"type": "Prepend", "prepend": "▁"})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
    ]  # fmt: skip
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [_added_token(i, pieces[i], i in special) for i in sorted(special + defined)],
        "normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": None,
        "post_processor": _bos_post_processor(processor), "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": processor.id_to_piece(processor.unk_id()),
            "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True,
            "byte_fallback": _BYTE in kinds, "ignore_merges": False,
            "vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": _merges(processor, pieces, kinds),
        },
    }  # fmt: skip


def _merges(processor: Any, pieces: list[str], kinds: list[int]) -> list[list[str]]:
    """Every cut of every piece into two pieces, best score first."""
    plain = {piece: i for i, piece in enumerate(pieces) if kinds[i] in (_NORMAL, _DEFINED)}
    ranked = []
    for piece, i in plain.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in plain and right in plain:
                ranked.append((-processor.get_score(i), i, plain[left], plain[right], left, right))
    return [[left, right] for *_, left, right in sorted(ranked)]


def _added_token(i: int, piece: str, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": piece, **flags, "special": special}


def _bos_post_processor(processor: Any) -> dict[str, Any] | None:
    """BOS in front of every text, as LLaMA's tokenizer puts it, unless the caller turns special tokens off."""
    i = processor.bos_id()
    if i < 0:
        return None
    name = processor.id_to_piece(i)
    bos = {"SpecialToken": {"id": name, "type_id": 0}}
    single = [bos, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, {"SpecialToken": {"id": name, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    tokens = {name: {"id": name, "ids": [i], "tokens": [name]}}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}


def _fields(data: bytes) -> dict[int, list[Any]]:
    """The fields of one protobuf message: numbers for varints, bytes for the rest. Raises DamagedMessageError."""
    fields: dict[int, list[Any]] = {}
    for field, _, value in read_fields(data):
        fields.setdefault(field, []).append(value)
    return fields


def _number(fields: dict[int, list[Any]], field: int, default: int) -> int:
    return int(fields.get(field, [default])[0])
