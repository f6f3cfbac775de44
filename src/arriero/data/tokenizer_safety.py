"""Checks of an untrusted tokenizer: before a library opens it, and a time limit while the library works.

The libraries do not check their files: an id of 2^32 costs gigabytes, a normalizer may multiply the text, a broken trie
is read beyond its end, a regular expression may never end, and a panic of Rust is no Exception.
"""

from __future__ import annotations

import base64
import contextlib
import math
import queue
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from arriero.common.errors import UserError
from arriero.common.protobuf import DamagedMessageError, read_fields
from arriero.common.text import escape
from arriero.common.untrusted import read_json

MAX_ID = (1 << 24) - 1  # the largest vocabularies that are published have a million entries
MAX_GROWTH = 64.0  # bytes that a byte of text may become; `▁` for a blank is 3
MIN_SECONDS, CHARACTERS_A_SECOND = (
    60.0,
    20_000,
)  # what a call may take: the first, and for its text; engines do millions
_FIX = "give the file that tokenizers wrote"
T = TypeVar("T")


class TooSlowError(UserError):
    """A tokenizer takes longer than any sound one does."""


def check_tokenizer_json(path: Path) -> None:
    """Checks a tokenizer.json. Raises UserError for ids that are too large or a text that would grow too much."""
    found = read_json(path, _FIX, {"model": dict})
    vocabulary, added = found["model"].get("vocab"), found.get("added_tokens") or []
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    ids += [one.get("id") for one in added if isinstance(one, dict)] if isinstance(added, list) else []
    largest = max((one for one in ids if isinstance(one, int)), default=0)
    if largest > MAX_ID:
        raise UserError(f"{escape(path)}: has the id {largest:,}, above {MAX_ID:,}", "number its entries without gaps")
    for part in ("normalizer", "decoder"):
        try:
            growth = _max_growth(found.get(part))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(f"{escape(path)}: its {part} is broken ({escape(error)})", _FIX) from None
        if growth > MAX_GROWTH:
            raise UserError(
                f"{escape(path)}: its {part} makes up to {growth:.3g} bytes of each byte of text, more than "
                f"{MAX_GROWTH:g}", "use the model's own tokenizer",
            )  # fmt: skip


def _max_growth(part: Any) -> float:
    """How many bytes a normalizer or decoder may make of one byte. Raises ValueError and the like for a broken one."""
    kind = part["type"] if part else ""
    growth = 1.0  # the normal forms of Unicode are the library's own
    if kind == "Sequence":
        growth = math.prod(map(_max_growth, part.get("normalizers") or part.get("decoders") or []))
    elif kind == "Prepend":
        growth = len(part["prepend"].encode()) / 16  # once a text
    elif kind == "Replace":
        # An expression may match nothing, before each character.
        pattern, content = part["pattern"], len(part["content"].encode())
        growth = content / max(1, len(pattern["String"].encode())) if "String" in pattern else 1.0 + content
    elif kind == "Precompiled":
        growth = check_charsmap(base64.b64decode(part["precompiled_charsmap"] or "", validate=True))
    return max(1.0, growth)


def check_charsmap(blob: bytes) -> float:
    """Checks a map of characters as SentencePiece compiles it: a trie (darts-clone) and the texts that it leads to.

    Returns:
        the bytes that one byte may become, in units of what Unicode's own normal forms do (33).

    Raises:
        ValueError: it is cut short, or leads outside of itself.
    """
    if len(blob) < 4:
        raise ValueError("precompiled_charsmap is empty")
    size = struct.unpack_from("<I", blob)[0]
    if size % 1024 or not 0 < size <= len(blob) - 4:
        raise ValueError("precompiled_charsmap: the trie does not fit")
    units, texts = np.frombuffer(blob, "<u4", size // 4, 4).astype(np.int64), blob[4 + size :]
    inner = units >> 31 == 0
    # A node leads to a block of 256 units, in which the next byte chooses; with a leaf, its value stands there.
    leads = (np.arange(len(units)) ^ (units >> 10) << ((units & 1 << 9) >> 6))[inner]
    if not (leads < len(units)).all() or not texts.endswith(b"\0"):
        raise ValueError("precompiled_charsmap: the trie leads outside of it")
    values = units[leads[units[inner] >> 8 & 1 == 1]] & 0x7FFFFFFF
    if (values >= len(texts)).any():
        raise ValueError("precompiled_charsmap: the trie leads beyond the texts")
    return max(1.0, max(map(len, texts.split(b"\0")), default=0) / 33)


def check_sentencepiece(path: Path, raw: bytes) -> None:
    """Checks the character maps in a tokenizer.model. Raises UserError for a broken one, or one that grows the text."""
    for part, spec in ((3, "normalizer"), (5, "denormalizer")):
        for message in _messages(raw, part):
            for blob in _messages(message, 2):
                try:
                    growth = check_charsmap(blob) if blob else 1.0
                except ValueError as error:
                    raise UserError(f"{escape(path)}: its {spec} is broken ({error})", "copy it again") from None
                if growth > MAX_GROWTH:
                    problem = f"{escape(path)}: its {spec} makes {growth * 33:.3g} bytes of one character"
                    raise UserError(problem, "use the model's own tokenizer")


def _messages(message: bytes, number: int) -> Iterator[bytes]:
    """The values of one field of a protocol buffer; stops where the message is damaged."""
    with contextlib.suppress(DamagedMessageError):
        for field, _, value in read_fields(message):
            if field == number and isinstance(value, bytes):
                yield value


@contextlib.contextmanager
def library_errors(path: Path, doing: str) -> Iterator[None]:
    """Turns whatever a library raises, a panic of Rust's included, into a UserError that names the tokenizer."""
    try:
        yield
    except (UserError, UnicodeEncodeError):
        raise
    except BaseException as error:
        # PanicException can't be imported: pyo3 makes one for each library, and derives it from BaseException.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{escape(path)}: {doing} ({escape(first)})", _FIX) from None


class _CallThread:
    """A thread that makes calls, one after the other, until the object is deleted."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, args=(self._calls,), daemon=True, name="tokenizer").start()

    @staticmethod
    def _work(calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None]) -> None:
        while (job := calls.get()) is not None:
            call, result = job
            try:
                result.set_result(call())
            except BaseException as error:  # a panic too is for the caller
                result.set_exception(error)
            del job, call, result  # what was returned is the caller's alone

    def submit(self, call: Callable[[], T]) -> Future[T]:
        result: Future[T] = Future()
        self._calls.put((call, result))
        return result

    def __del__(self) -> None:
        self._calls.put(None)


_thread_local = threading.local()


def call_with_timeout(path: Path, characters: int, call: Callable[[], T]) -> T:
    """Calls a tokenizer in a thread that is abandoned, to end with the process, if it takes too long.

    A thread of a pool reuses its call thread: new threads would each take memory of their own from malloc.

    Raises:
        TooSlowError: it has taken longer than its text can explain.
    """
    pooled = threading.current_thread() is not threading.main_thread()
    helper: _CallThread = (getattr(_thread_local, "helper", None) if pooled else None) or _CallThread()
    if pooled:
        _thread_local.helper = helper
    result = helper.submit(call)
    seconds = MIN_SECONDS + characters / CHARACTERS_A_SECOND
    try:
        return result.result(seconds)
    except FutureTimeoutError:
        if result.done():
            raise
        _thread_local.helper = None
        problem = f"{escape(path)}: has not tokenized {characters:,} characters in {seconds:.0f} s"
        fix = "one of its regular expressions may never end on this text: use the model's own tokenizer"
        raise TooSlowError(problem, fix) from None
