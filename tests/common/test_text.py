"""What comes from outside reaches a terminal as text only."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arriero.common.text import escape, escape_message

ANY_TEXT = st.text(st.characters())  # lone surrogates and controls included


@given(ANY_TEXT)
def test_nothing_that_a_terminal_obeys_is_left(text: str) -> None:
    line = escape(text)
    assert not [c for c in line if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")]
    assert not [c for c in escape_message(text) if unicodedata.category(c)[0] == "C" and c not in "\n\t"]
    line.encode("utf-8")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("plain", "plain"),
        ("café 日本", "café 日本"),
        ("a\nb", "a\\nb"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\udc80", "\\udc80"),
        ("\u202eabc", "\\u202eabc"),
        ("\u2028", "\\u2028"),
    ],
)
def test_examples(text: str, line: str) -> None:
    assert escape(text) == line


def test_long_text_is_cut_and_says_so() -> None:
    line = escape("a" * 100_000 + "z")
    assert len(line) < 300
    assert line.startswith("aaa")
    assert line.endswith("z")
    assert "characters" in line
