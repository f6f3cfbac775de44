"""Showing text that came from outside: file names, recorded values, names of tensors, messages of other programs.

A terminal obeys control characters and a log file keeps them, so neither gets any that arriero did not write itself.
"""

from __future__ import annotations

import unicodedata

_ESCAPED = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Unicode's categories of characters that are not shown as they are: controls, invisible and bidirectional formats,
lone surrogates, private and unassigned ones, and the separators that end a line."""


def shown(value: object, most: int = 200) -> str:
    """One foreign value on one line: characters that cannot be seen become escapes such as \\n or \\x1b.

    Args:
        value: anything; `str(value)` is shown.
        most: characters at most; a longer text loses its middle, and the number of lost characters is named.
    """
    text = str(value)
    if len(text) > most:
        head, tail = text[: most * 2 // 3], text[len(text) - most // 4 :]
        text = f"{head} ... ({len(text) - len(head) - len(tail):,} characters) ... {tail}"
    return _escaped(text, keep="")


def printable(text: str) -> str:
    """A whole message: as `shown`, but line ends and tabs stay and nothing is cut."""
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
