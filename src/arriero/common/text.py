"""Escapes text that comes from outside before it is printed: file names, recorded values, tensor names, other programs'
messages. Control characters in it could otherwise change a terminal's state or forge lines of a log file.
"""

from __future__ import annotations

import unicodedata

_ESCAPED = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Unicode categories that are escaped: controls, invisible and bidirectional formats, lone surrogates, private and
unassigned characters, line and paragraph separators."""


def escape(value: object, max_length: int = 200) -> str:
    """One value on one line: control and other invisible characters become escapes such as \\n or \\x1b.

    Args:
        value: anything; `str(value)` is escaped.
        max_length: in characters; the middle of a longer text is replaced by the number of characters left out.
    """
    text = str(value)
    if len(text) > max_length:
        head, tail = text[: max_length * 2 // 3], text[len(text) - max_length // 4 :]
        text = f"{head} ... ({len(text) - len(head) - len(tail):,} characters) ... {tail}"
    return _escaped(text, keep="")


def escape_message(text: str) -> str:
    """A whole message: as `escape`, but line ends and tabs are kept and nothing is shortened."""
    return _escaped(text, keep="\n\t")


def _escaped(text: str, *, keep: str) -> str:
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        c if c in keep or unicodedata.category(c) not in _ESCAPED else c.encode("unicode_escape").decode("ascii")
        for c in text
    )


def format_ranks(ranks: list[int]) -> str:
    """[0, 1, 2, 5] -> "ranks 0-2, 5"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank {text}" if len(ranks) == 1 else f"ranks {text}"
