"""JSON files give every record, or one error with the place; `json.loads` of the whole file is the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arriero.common.errors import UserError
from arriero.data import json_stream
from arriero.data.json_stream import MalformedRecord
from arriero.data.readers import read_records


def documents(path: Path, raw: bytes) -> list[Any]:
    path.write_bytes(raw)
    return [record for _, record in read_records(path, "json")]


A, B, C, D = ({"text": letter} for letter in "abcd")
SOUND: dict[str, tuple[bytes, list[Any]]] = {
    "joined arrays": (b'[{"text":"a"},{"text":"b"}]\n[{"text":"c"},{"text":"d"}]', [A, B, C, D]),
    "joined without a line end": (b'[{"text":"a"}][{"text":"b"}]{"text":"c"}', [A, B, C]),
    "byte order marks": (b'\xef\xbb\xbf[{"text":"a"}]\n\xef\xbb\xbf[{"text":"b"}]', [A, B]),
    "objects without a line end": (b'{"text":"a"}{"text":"b"} {"text":"c"}', [A, B, C]),
    "indented objects": (b'{\n "text": "a"\n}\n{\n "text": "b"\n}\n', [A, B]),
    "one object": (b'{"text":"a"}', [A]),
    "lines": (b'{"text":"a"}\r\n\r\n{"text":"b"}\n', [A, B]),
    "lines, then an array is no record": (
        b'{"text":"a"}\n[1]\n', [A, MalformedRecord("not an object but list", "[1]")]
    ),
    "empty arrays": (b'[] [ ]\n[{"text":"a"}]', [A]),
    "brackets in strings": (b'[{"text":"a] , [{"},{"text":"\\"]"}]', [{"text": "a] , [{"}, {"text": '"]'}]),
    "nested arrays": (b'[[{"text":"a"}], {"text":"b", "c": [[1], {}]}]',
                      [MalformedRecord("not an object but list", "[{'text': 'a'}]"), {"text": "b", "c": [[1], {}]}]),
    "Python's numbers": (b'[{"text":"a","x":Infinity,"y":-Infinity,"z":1e999}]',
                         [{"text": "a", "x": float("inf"), "y": float("-inf"), "z": float("inf")}]),
    "escaped pair and lone surrogate": (b'[{"text":"\\ud83e\\udd99"},{"text":"\\ud800"}]',
                                        [{"text": "\U0001f999"}, {"text": "\ud800"}]),
    "foreign byte": (b'[{"text":"a\xff"},{"text":"b"}]', [{"text": "a\udcff"}, B]),
    "same key, same value": (b'[{"text":"a","text":"a"}]', [A]),
}  # fmt: skip


@pytest.mark.parametrize("block", [1, 2, 7, 1 << 20])
@pytest.mark.parametrize("case", SOUND)
def test_sound_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, block: int) -> None:
    monkeypatch.setattr(json_stream, "BLOCK", block)
    raw, expected = SOUND[case]
    assert documents(tmp_path / "a.json", raw) == expected


BROKEN = {
    "text after the array": (b'[{"text":"a"}]\nand more', r"'a' stands outside of an array \(line 2, column 1"),
    "a value after the array": (b'[{"text":"a"}] 5', "'5' stands outside"),
    "a bracket too many": (b'[{"text":"a"}]]', "']' stands outside"),
    "comma between objects": (b'{"text":"a"},\n{"text":"b"}', "',' stands outside"),
    "missing comma": (b'[{"text":"a"}\n {"text":"b"}]', r"'{' where , or \] is due \(line 2, column 2, after record 1"),
    "doubled comma": (b'[{"text":"a"},,{"text":"b"}]', r"broken JSON: Expecting value \(line 1, column 15"),
    "trailing comma": (b'[{"text":"a"},]', r"Expecting value \(line 1, column 15"),
    "leading comma": (b'[,{"text":"a"}]', "Expecting value"),
    "only a comma": (b"[,]", "Expecting value"),
    "cut in the array": (b'[{"text":"a"},{"text":"b"}', "ends within an array"),
    "cut after a comma": (b'[{"text":"a"},', "ends within an array"),
    "cut in a record": (b'[{"text":"a"},{"text":"b', "ends within a value: Unterminated string"),
    "cut in a later array": (b'[{"text":"a"}][', "ends within an array"),
    "wrong bracket": (b'[{"text":"a"}}', "where , or"),
    "no colon": (b'[{"text":"a"},{"text" "b"},{"text":"' + b"c" * 99 + b'"}]', "line 1, column 23, after record 1"),
    "bad escape": (b'[{"text":"\\x' + b"c" * 99 + b'"}]', "Invalid \\\\escape"),
    "bad unicode escape": (b'[{"text":"\\uZZZZ' + b"c" * 99 + b'"}]', "Invalid"),
    "control character": (b'[{"text":"a\x00' + b"c" * 99 + b'"}]', "Invalid control character"),
    "comment": (b'[{"text":"a"} // note\n]', "'/' where"),
    "NUL bytes at the end": (b'[{"text":"a"}]\x00\x00', "stands outside"),
    "single quotes": (b"[{'text':'a'}]", "Expecting property name"),
    "too deep": (b"[" * 100_000, "nested too deep"),
    "too many digits": (b"[" + b"9" * 5000 + b"]", "broken JSON"),
    "UTF-16": ("[]".encode("utf-16"), "is UTF-16"),
    "a string": (b'"x"', "neither a JSON array nor JSON lines"),
}  # fmt: skip


@pytest.mark.parametrize("block", [1, 16, 1 << 20])
@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_name_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, block: int) -> None:
    monkeypatch.setattr(json_stream, "BLOCK", block)
    raw, message = BROKEN[case]
    with pytest.raises(UserError, match=message):
        documents(tmp_path / "a.json", raw)


def test_a_key_that_stands_twice_with_other_values_is_a_bad_record(tmp_path: Path) -> None:
    line = b'{"text":"a","text":"b"}'
    turns = b'{"messages":[{"role":"user","content":"x","content":"y"}]}'
    for raw in (b"[" + line + b"]", line + b"\n", b"[" + turns + b"]"):
        (found,) = documents(tmp_path / "a.json", raw)
        assert isinstance(found, MalformedRecord)
        assert "stands twice, with different values" in found.reason


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=8,
)
ARRAYS = st.lists(st.lists(st.dictionaries(st.text(max_size=5), VALUES, max_size=3), max_size=4), max_size=3)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    arrays=ARRAYS, ascii_only=st.booleans(), indent=st.sampled_from([None, 1]), block=st.integers(1, 60),
    gap=st.sampled_from(["", "\n", " \r\n\t"]),
)  # fmt: skip
def test_joined_arrays_equal_json_loads(
    tmp_path: Path, *, arrays: list[list[Any]], ascii_only: bool, indent: int | None, block: int, gap: str
) -> None:
    texts = [json.dumps(one, ensure_ascii=ascii_only, indent=indent) for one in arrays]
    raw = gap.join(texts).encode("utf-8", "surrogatepass")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "BLOCK", block)
        assert documents(tmp_path / "a.json", raw) == [record for one in texts for record in json.loads(one)]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), block=st.integers(1, 40))
def test_a_damaged_array_is_read_as_json_loads_reads_it_or_refused(
    tmp_path: Path, data: st.DataObject, block: int
) -> None:
    """One place of a sound file is cut out, doubled or replaced: where `json.loads` refuses, so does the reader."""
    text = '[{"text":"a","n":[1,-2.5e3,true,null]},\n {"text":"b \\u00e9 \\" ]"}, {"text":"c","x":{"y":[]}}]'
    begin = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(begin, min(len(text), begin + 3)))
    damaged = text[:begin] + data.draw(
        st.sampled_from(["", ",", "]", "[", "{", "}", '"', "1", "x", text[begin:end] * 2])
    )
    damaged += text[end:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "BLOCK", block)
        try:
            expected = json.loads(damaged)
        except ValueError:
            expected = None
        try:
            found = documents(tmp_path / "a.json", damaged.encode())
        except UserError:
            assert not isinstance(expected, list)
            return
    if expected is not None:
        assert found == [one if isinstance(one, dict) else json_stream.check_record(one) for one in expected]
    else:  # what json.loads takes for extra data: several values, each of them sound
        decoder, at, values = json.JSONDecoder(), 0, []
        while at < len(damaged):
            value, at = decoder.raw_decode(damaged, at)
            values += value if isinstance(value, list) else [value]
            at += len(damaged[at:]) - len(damaged[at:].lstrip())
        assert found == [json_stream.check_record(one) for one in values]


def test_tiny_records_cost_linear_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Characters that are copied, not seconds: what is held is moved once for each block, not for each record."""
    moved = 0
    before = json_stream._JsonBuffer._fill

    def count(self: json_stream._JsonBuffer) -> bool:
        nonlocal moved
        moved += len(self.buffer) - self.at
        return before(self)

    monkeypatch.setattr(json_stream._JsonBuffer, "_fill", count)
    raw = b"[" + b",".join([b'{"t":1}'] * 300_000) + b"]"  # 2.4 MB
    assert len(documents(tmp_path / "a.json", raw)) == 300_000
    assert moved < 1000
