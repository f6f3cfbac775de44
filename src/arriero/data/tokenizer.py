"""Tokenizers: SentencePiece through sentencepiece itself, `tokenizer.json` through tokenizers.

Text is text: a literal `<s>` in a document never becomes a special id. Begin and end of document are added by the
caller (`prepare`), from `bos_id` and `eos_id`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arriero.common.errors import UserError
from arriero.common.text import escape
from arriero.common.untrusted import read_bytes, read_json, require_inside
from arriero.data.tokenizer_files import VOCABULARY_FILES, copy_generation_config, copy_tokenizer_files
from arriero.data.tokenizer_safety import call_with_timeout, check_sentencepiece, check_tokenizer_json, library_errors

# Usual names of the two ids, for tokenizers without a configuration file.
_KNOWN_BOS = ("<s>", "<|begin_of_text|>", "<bos>")
_KNOWN_EOS = ("</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>")


CHUNK_CHARACTERS = 2000  # characters given to an engine at a time
_BLANK_INSIDE = re.compile("[^▁]▁")


def split_text(text: str, length: int = CHUNK_CHARACTERS) -> list[str]:
    """Splits a text before words, so that tokenising the pieces one by one gives the ids of the whole.

    The blank at which it divides is dropped: the tokenizer puts it in front of the next piece. It must be the
    first of its run, since a run of blanks is a piece of its own. `▁` is how these vocabularies write a blank.
    """
    stretches, at = [], 0
    while len(text) - at > length:
        end = text.rfind(" ", at + 1, at + length)
        while end > 0 and text[end - 1] in " ▁":
            end = text.rfind(" ", at + 1, end)
        if end < 0:
            end = text.find(" ", at + length)
            while end > 0 and text[end - 1] in " ▁":
                end = text.find(" ", end + 1)
            if not 0 < end < len(text) - 1:  # nor at a last blank: an empty text gets no blank in front
                break
        stretches.append(text[at:end])
        at = end + 1
    return [*stretches, text[at:]]


class Tokenizer:
    """What every engine offers. Ids are plain integers; nothing is added at either end.

    Attributes:
        path: the file that decides the ids.
        vocab_size: one more than the largest id.
        bos_id, eos_id: ids that begin and end a document, or None.
        fingerprint: SHA-256 of the vocabulary in order of ids: the same for a tokenizer.model and its tokenizer.json.
        file_sha256: of `path`.
        notices: what was corrected on loading, one sentence each; the caller prints them.
    """

    engine = ""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file_sha256 = hashlib.sha256(read_bytes(path, "give the tokenizer's own file")).hexdigest()
        self.fingerprint = ""
        self.vocab_size = 0
        self.bos_id: int | None = None
        self.eos_id: int | None = None
        self.notices: list[str] = []
        self._splittable = False

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, one integer array a text. Raises UnicodeEncodeError for lone surrogates.

        A long text goes to the engine in pieces (see `split_text`): a fifth faster with sentencepiece, and a huge
        document needs little more memory than its own.
        """
        if not self._splittable or all(len(text) <= CHUNK_CHARACTERS for text in texts):
            return self._encode(texts)
        stretches = [split_text(text) for text in texts]
        found = iter(self._encode([piece for pieces in stretches for piece in pieces]))
        parts = [[next(found) for _ in pieces] for pieces in stretches]
        return [one[0] if len(one) == 1 else np.concatenate(one) for one in parts]

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        raise NotImplementedError

    def _is_splittable(self, pieces: Sequence[str]) -> bool:
        """Whether `split_text` changes no id: each text gets a blank in front, and no piece goes on over a blank."""
        if not self._has_prefix_space() or any(_BLANK_INSIDE.search(piece) for piece in pieces):
            return False
        whole = "".join(f"{word} " * 40 for word in ("some", "words\n", "\tx = 1;", "é 日本", "  two", "a▁ b"))
        split = self._encode(split_text(whole, 50))
        return np.array_equal(np.concatenate(split), self._encode([whole])[0])

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of some ids; special ids give nothing."""
        raise NotImplementedError

    def piece(self, token: int) -> str:
        """One id as it is written in the vocabulary."""
        raise NotImplementedError

    def unused_ids(self, rows: int) -> np.ndarray:
        """The ids below `rows`, in order, that the vocabulary has no entry for."""
        return np.arange(min(self.vocab_size, rows), rows)

    def encode(self, text: str) -> list[int]:
        """Token ids of one text."""
        return self.encode_arrays([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of several texts."""
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def encode_continuation(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of texts that go on from earlier text: without the blank that LLaMA puts before a first word.

        The blank is kept away by a newline in front, whose ids are cut off again. Raises UserError if they cannot be.
        """
        if not self._has_prefix_space():
            return self.encode_arrays(texts)
        head = self.encode_arrays(["\n"])[0]
        whole = self.encode_arrays(["\n" + text for text in texts])
        for ids in whole:
            if not np.array_equal(ids[: len(head)], head):
                raise UserError(
                    f"{self.path}: this tokenizer joins a newline with the text after it, so an answer cannot be "
                    "tokenized apart from its prompt",
                    "use a tokenizer with a newline token of its own, as LLaMA's",
                )
        return [ids[len(head) :] for ids in whole]

    def _has_prefix_space(self) -> bool:
        return True

    def save_to(self, directory: Path) -> None:
        """Copies the tokenizer's files, and the generation_config.json beside them, into `directory`."""
        copy_tokenizer_files(self.path, directory)
        copy_generation_config(self.path.parent, directory)


class SentencePieceTokenizer(Tokenizer):
    """A `tokenizer.model`, through sentencepiece."""

    engine = "sentencepiece"

    def __init__(self, path: Path) -> None:
        import sentencepiece

        super().__init__(path)
        check_sentencepiece(path, read_bytes(path, "give the tokenizer's own file"))
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
            self.vocab_size = len(self._processor)
            pieces = self._processor.id_to_piece(list(range(self.vocab_size)))
            self.fingerprint = _hash_pieces(pieces)
            self._splittable = self._is_splittable(pieces)
            self.bos_id = _valid_id(self._processor.bos_id())
            self.eos_id = _valid_id(self._processor.eos_id())
        except (RuntimeError, OSError, ValueError, IndexError) as error:  # ValueError: pieces that are not UTF-8
            raise UserError(
                f"{path} is not a SentencePiece model ({str(error).splitlines()[0]})",
                "give the original tokenizer.model",
            ) from error

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        # Bytes, not str: sentencepiece's own message for a lone surrogate names a C++ type.
        return self._processor.encode([text.encode() for text in texts], return_type="numpy", num_threads=1)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """See `Tokenizer`."""
        return self._processor.decode([int(i) for i in ids])

    def piece(self, token: int) -> str:
        """See `Tokenizer`."""
        return self._processor.id_to_piece(int(token))


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json`, through tokenizers."""

    engine = "tokenizers"

    def __init__(self, path: Path) -> None:
        import tokenizers

        super().__init__(path)
        check_tokenizer_json(path)
        with library_errors(path, "is not a tokenizer.json"):
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        if getattr(self._tokenizer.model, "dropout", None):
            self._tokenizer.model.dropout = None
            self.notices.append(f"{path}: its dropout, which would draw the ids at random, is left out")
        self._tokenizer.encode_special_tokens = True  # a literal <s> stays text
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.fingerprint = _hash_pieces(sorted(vocabulary, key=vocabulary.__getitem__))
        self._splittable = self._is_splittable(list(vocabulary))
        if not len(self._encode(["\U00013000"])[0]):  # a hieroglyph, which no small vocabulary has
            self.notices.append(f"{path}: characters that its vocabulary lacks are lost: it has no unk_token for them")
        config = _special_names(path.parent)
        self.bos_id = self._find(config.get("bos_token"), _KNOWN_BOS)
        self.eos_id = self._find(config.get("eos_token"), _KNOWN_EOS)

    def _find(self, named: str | None, known: Sequence[str]) -> int | None:
        candidates = [named] if named else list(known)
        return next((i for name in candidates if (i := self._tokenizer.token_to_id(name)) is not None), None)

    def _has_prefix_space(self) -> bool:
        with library_errors(self.path, "cannot be written"):
            raw = json.loads(self._tokenizer.to_str())
        return _adds_prefix_space(raw.get("normalizer")) or _adds_prefix_space(raw.get("pre_tokenizer"))

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        for text in texts:
            text.encode()  # the same exception for a lone surrogate from every engine
        if not texts:
            return []

        def call() -> list[Any]:
            return self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)

        with library_errors(self.path, "cannot tokenize"):
            found = call_with_timeout(self.path, sum(map(len, texts)), call)
        return [np.array(one.ids, np.int32) for one in found]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """See `Tokenizer`."""
        with library_errors(self.path, "cannot give the text of ids"):
            return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def piece(self, token: int) -> str:
        """See `Tokenizer`."""
        return self._tokenizer.id_to_token(int(token)) or f"<{int(token)}>"

    def unused_ids(self, rows: int) -> np.ndarray:
        """See `Tokenizer`; the ids of a tokenizer.json may have gaps."""
        free = np.ones(rows, bool)
        known = np.fromiter(self._tokenizer.get_vocab(with_added_tokens=True).values(), np.int64)
        free[known[known < rows]] = False
        return np.flatnonzero(free)


def _hash_pieces(pieces: list[str]) -> str:
    return hashlib.sha256("\n".join(pieces).encode("utf-8", "surrogatepass")).hexdigest()


def _valid_id(value: int) -> int | None:
    return value if value >= 0 else None


def _adds_prefix_space(part: Any) -> bool:
    """Whether a normalizer or pre-tokenizer of a tokenizer.json puts a blank in front of the text."""
    if not part:
        return False
    if part["type"] == "Sequence":
        return any(_adds_prefix_space(p) for p in part.get("normalizers", part.get("pretokenizers", [])))
    if part["type"] == "Metaspace":
        return part.get("prepend_scheme", "always") != "never"
    return part["type"] == "Prepend" or bool(part.get("add_prefix_space"))


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    found: dict[str, Any] = read_json(require_inside(path.parent, path), "restore it from the tokenizer's source", dict)
    return found


def _special_names(directory: Path) -> dict[str, str]:
    """`bos_token` and `eos_token` as the configuration files beside a tokenizer name them."""
    names: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        for key in ("bos_token", "eos_token"):
            value = _read_json(directory / file).get(key)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str) and value:
                names[key] = value
    return names


def _note_legacy_config(tokenizer: Tokenizer) -> None:
    """Recognises the configuration files of early LLaMA conversions, which deny the tokenizer its BOS and EOS."""
    directory = tokenizer.path.parent
    config = _read_json(directory / "tokenizer_config.json")
    wrong = []
    if config.get("tokenizer_class") == "LLaMATokenizer":
        wrong.append("tokenizer_class LLaMATokenizer")
    if config.get("bos_token") == "" or config.get("eos_token") == "":
        wrong.append("empty bos_token or eos_token")
    for file in ("config.json", "generation_config.json"):
        ids = _read_json(directory / file)
        if "bos_token_id" in ids and ids["bos_token_id"] == ids.get("eos_token_id"):
            wrong.append(f"bos_token_id = eos_token_id = {ids['bos_token_id']} in {file}")
    if wrong and tokenizer.bos_id is not None and tokenizer.eos_id is not None:
        bos, eos = tokenizer.bos_id, tokenizer.eos_id
        tokenizer.notices.append(
            f"{directory}: fixed the configuration of an early LLaMA conversion ({'; '.join(wrong)}): the vocabulary "
            f"itself says BOS {bos} {tokenizer.piece(bos)}, EOS {eos} {tokenizer.piece(eos)}"
        )


def load_tokenizer(path: Path) -> Tokenizer:
    """Opens a tokenizer: a directory, a `tokenizer.model` or a `tokenizer.json`.

    In a directory that has both, `tokenizer.model` decides: it is the original, and sentencepiece is the faster engine.

    Raises:
        UserError: nothing there, or a file that is not a tokenizer.
    """
    path = Path(path)
    if os.path.isdir(path):  # as below, False for names that no file can have
        found = next((path / n for n in VOCABULARY_FILES if (path / n).is_file()), None)
        if found is None:
            raise UserError(
                f"{escape(path)} holds no tokenizer.model and no tokenizer.json",
                "give the directory of the model's tokenizer",
            )
        path = require_inside(path, found)
    if not os.path.isfile(path):
        raise UserError(
            f"no tokenizer at {escape(path)}", "give a directory with tokenizer.model or tokenizer.json, or such a file"
        )
    tokenizer: Tokenizer = JsonTokenizer(path) if path.suffix == ".json" else SentencePieceTokenizer(path)
    _note_legacy_config(tokenizer)
    return tokenizer
