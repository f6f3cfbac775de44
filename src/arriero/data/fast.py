"""The `[fast]` engine, gigatoken: used only where its ids are seen to equal the reference tokenizer's.

It is compared before the start on the user's own text, and again on a few characters of every unit of work.
"""

from __future__ import annotations

import importlib.util
import json
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from arriero.common.device import trim_memory
from arriero.common.errors import UserError
from arriero.data.tokenizer import JsonTokenizer, Tokenizer
from arriero.data.tokenizer_safety import call_with_timeout, library_errors

# gigatoken caches every word that it has met (about 2 MB for each MB of program text): it is started over after this
# much text.
_MAX_CACHE_BYTES = 48 << 20
_PROBE_CHARACTERS = 256  # of each unit of work, compared with the reference while the work goes on


class UnsupportedTokenizerError(Exception):
    """The fast engine does not support this tokenizer; the message gives the reason."""


def _description(reference: Tokenizer) -> dict[str, Any]:
    """A tokenizer.json in which special tokens are not looked for in the text. Raises UnsuitableError."""
    if isinstance(reference, JsonTokenizer):
        found: dict[str, Any] = json.loads(reference.path.read_text(encoding="utf-8"))
    else:
        try:
            from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json

            found = json.loads(sentencepiece_to_tokenizer_json(reference.path.read_bytes()))
        except (ImportError, ValueError) as error:
            raise UnsupportedTokenizerError(str(error)) from error
    try:
        return _without_specials(found)
    except (KeyError, TypeError, AttributeError) as error:
        raise UnsupportedTokenizerError(f"gigatoken does not read this tokenizer ({error!r})") from error


def _without_specials(found: dict[str, Any]) -> dict[str, Any]:
    model = found["model"]
    if model.get("byte_fallback"):
        lacking = [b for b in range(256) if f"<0x{b:02X}>" not in model["vocab"]]
        if lacking:
            raise UnsupportedTokenizerError(f"the vocabulary lacks {len(lacking)} of the 256 byte tokens")
    found["added_tokens"] = [token for token in found.get("added_tokens", []) if not token["special"]]
    found["post_processor"] = None
    return found


class FastTokenizer(Tokenizer):
    """Replaces a reference tokenizer: same ids, same attributes, `encode_arrays` by gigatoken.

    Raises:
        UnsuitableError: gigatoken is not installed, or does not know this kind of tokenizer.
    """

    engine = "gigatoken"

    def __init__(self, reference: Tokenizer) -> None:
        if importlib.util.find_spec("gigatoken") is None:
            raise UnsupportedTokenizerError("gigatoken is not installed")
        self.reference = reference
        self.__dict__.update({k: v for k, v in reference.__dict__.items() if not k.startswith("_")})
        self._splittable = reference._splittable
        self._json = json.dumps(_description(reference))
        self._lock = threading.Lock()
        self._since_start = 0
        self._padding: Any = None
        self._backend = self._start()

    def _start(self) -> Any:
        from gigatoken import Tokenizer as Gigatoken
        from gigatoken.gigatoken_rs import PadTruncate

        self._padding = PadTruncate(0)
        with library_errors(self.path, "gigatoken does not read this tokenizer"):  # it raises whatever its parser met
            return Gigatoken.from_json(self._json).backend

    def _current(self, size: int) -> Any:
        """The engine for `size` more bytes of text: a fresh one when the cache of the old one has grown."""
        with self._lock:
            if self._since_start > _MAX_CACHE_BYTES:
                self._backend, self._since_start = None, 0  # the old one goes first, and its memory with it
                trim_memory()
                self._backend = self._start()
            self._since_start += size
            return self._backend

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Raises UserError when a probe's ids differ from the reference tokenizer's, or gigatoken fails or hangs."""
        with library_errors(self.path, "gigatoken cannot tokenize"):
            return call_with_timeout(self.path, sum(map(len, texts)), lambda: self._encode_all(texts))

    def _encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        raw = [text.encode() for text in texts]
        backend = self._current(sum(map(len, raw)))
        out: list[np.ndarray] = []
        # The one call that works outside the interpreter's lock returns a padded matrix: texts of like length together.
        order = sorted(range(len(raw)), key=lambda i: len(raw[i]))
        last = len(order)
        places: list[int] = []
        while last:
            first = last - 1
            while first and 4 * len(raw[order[first - 1]]) >= len(raw[order[last - 1]]) - 256:
                first -= 1
            rows, lengths = backend.encode_batch_padded(
                [raw[i] for i in order[first:last]], self._padding, parallel=False
            )
            out += [row[:length] for row, length in zip(rows, lengths.tolist(), strict=True)]
            places += order[first:last]
            last = first
        if texts:
            self._compare_one(texts[places[0]][:_PROBE_CHARACTERS])
        return [out[i] for i in np.argsort(places).tolist()]

    def compare(self, texts: Sequence[str]) -> None:
        """Raises UserError when the two engines give different ids for any of the texts."""
        for text in texts:
            self._compare_one(text)

    def _compare_one(self, text: str) -> None:
        raw = text.encode()
        # Not `encode`: that call wants the engine for itself, and other threads are using it.
        with library_errors(self.path, "gigatoken cannot tokenize"):
            backend = self._current(len(raw))
            rows, lengths = call_with_timeout(
                self.path, len(text), lambda: backend.encode_batch_padded([raw], self._padding, parallel=False)
            )
        if not np.array_equal(rows[0][: lengths[0]], self.reference._encode([text])[0]):
            shown = text if len(text) < 80 else text[:80] + "..."
            raise UserError(
                f"gigatoken gives other ids than {self.reference.engine} for {shown!r}", "use --engine reference"
            )

    def _has_prefix_space(self) -> bool:
        return self.reference._has_prefix_space()

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """See `Tokenizer`."""
        return self.reference.decode(ids)

    def piece(self, token: int) -> str:
        """See `Tokenizer`."""
        return self.reference.piece(token)


# Text that engines are known to differ on: every one is compared before the user's own text is.
_HARD_CASES = [
    "",
    " ",
    "  a   b ",
    "\n",
    "\t\r\n x",
    "<s></s><unk>",
    "a <s> b",
    "<0x0A>",
    "é e\u0301 日本 🦙\u200d",
    "\x00",
    "▁ ▁▁",
    "1234567",
]


def choose_fast_tokenizer(reference: Tokenizer, sample: Sequence[str]) -> tuple[FastTokenizer | None, str]:
    """The fast engine if it may be used, and the reason for the choice, one sentence.

    Args:
        reference: the tokenizer whose ids count.
        sample: some of the user's own text.
    """
    specials = [reference.piece(i) for i in (reference.bos_id, reference.eos_id) if i is not None]
    try:
        fast = FastTokenizer(reference)
        fast.compare([*_HARD_CASES, *specials, *(f"x{s}y" for s in specials), *sample])
    except (UnsupportedTokenizerError, UserError) as error:
        return None, error.problem if isinstance(error, UserError) else str(error)
    size = sum(len(text.encode()) for text in sample)
    return fast, f"ids equal {reference.engine}'s on {size / 1e6:.2f} MB of this text"
