"""Parquet and arrow files: joined or cut ones are refused or read whole, and none unpacks without bound."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from arriero.common.errors import UserError
from arriero.data import columns
from arriero.data.inputs import kind_of
from arriero.data.json_stream import MalformedRecord
from arriero.data.readers import read_records

BIG = "a" * 3_000_000


def records(path: Path, wanted: tuple[str, ...] | None = ("text",)) -> list[Any]:
    kind = kind_of(path)
    assert kind is not None
    found = list(read_records(path, kind, columns=wanted))
    assert [number for number, _ in found] == list(range(1, len(found) + 1))
    return [record for _, record in found]


def ipc(batch: pa.RecordBatch, count: int = 1, *, stream: bool = False, packing: str | None = None) -> bytes:
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=packing)
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, batch.schema, options=options) as writer:
        for _ in range(count):
            writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def parquet(table: pa.Table, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    return sink.getvalue().to_pybytes()


def column(values: Any) -> pa.RecordBatch:
    return pa.record_batch({"text": values})


def dictionary(rows: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array([BIG]))


def views(rows: int) -> pa.Array:
    """Many views of one text."""
    one = pa.array([BIG], pa.string_view()).buffers()
    repeated = np.tile(np.frombuffer(one[1], np.uint8)[:16], rows).tobytes()
    return pa.Array.from_buffers(pa.string_view(), rows, [None, pa.py_buffer(repeated), one[2]])


def nulls(rows: int) -> pa.Array:
    return pa.Array.from_buffers(pa.null(), rows, [None])


MANY = 2**31 - 1
OFFSETS = pa.array([0, MANY], pa.int32())
SAME = pa.table({"text": [BIG] * 40})
BOMBS: dict[str, tuple[str, Callable[[], bytes]]] = {
    **{
        f"dictionary page, {packing}": (
            "a.parquet",
            lambda packing=packing: parquet(  # type: ignore[misc]
                pa.table({"text": dictionary(2000)}), compression=packing, dictionary_pagesize_limit=1 << 30
            ),
        )
        for packing in ("zstd", "gzip", "brotli", "lz4", "snappy", "none")
    },
    "shared prefixes": ("a.parquet", lambda: parquet(
        SAME, compression="zstd", use_dictionary=False, column_encoding={"text": "DELTA_BYTE_ARRAY"})),
    "compressed pages": ("a.parquet", lambda: parquet(SAME, compression="zstd", use_dictionary=False)),
    "a list of nothing": ("a.parquet", lambda: parquet(
        pa.table({"text": pa.array([[None] * 5_000_000], pa.list_(pa.string()))}), compression="zstd")),
    "compressed buffers": ("a.arrow", lambda: ipc(column(SAME["text"].combine_chunks()), stream=True, packing="zstd")),
    "compressed with lz4": ("a.feather", lambda: ipc(column(SAME["text"].combine_chunks()), packing="lz4")),
    "dictionary": ("a.arrow", lambda: ipc(column(dictionary(2000)), packing="zstd")),
    "views": ("a.arrow", lambda: ipc(column(views(2000)), packing="zstd")),
    "run lengths": ("a.arrow", lambda: ipc(
        column(pa.RunEndEncodedArray.from_arrays(pa.array([2**30], pa.int32()), pa.array([BIG]))), packing="zstd")),
    "nulls": ("a.arrow", lambda: ipc(column(nulls(MANY)))),
    "list of nulls": ("a.arrow", lambda: ipc(column(pa.ListArray.from_arrays(OFFSETS, nulls(MANY))))),
    "list of empty structs": ("a.arrow", lambda: ipc(
        column(pa.ListArray.from_arrays(OFFSETS, pa.StructArray.from_buffers(pa.struct([]), MANY, [None]))))),
}  # fmt: skip


@pytest.mark.parametrize("case", BOMBS)
def test_a_file_unpacks_to_no_more_than_it_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.setattr(columns, "MIN_UNPACKED_BYTES", 50 << 20)
    monkeypatch.setattr(columns, "MAX_UNPACKED", 1)
    monkeypatch.setattr(columns, "MEMORY_LIMITS", (400 << 20, 400 << 20))
    name, make = BOMBS[case]
    (tmp_path / name).write_bytes(make())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=rf"{name}: .*(unpacks to more than|rows in [\d,]+ bytes)"):
        records(tmp_path / name)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


AB, CD = column(["a", "b"]), column(["c", "d"])
JOINED = [{"text": c} for c in "abcd"]


def test_joined_streams_are_read_whole_and_joined_files_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    path.write_bytes(ipc(AB, stream=True) + ipc(CD, stream=True))
    assert records(path) == JOINED
    for first, second in ((1, 1), (1, 3), (3, 1)):
        path.write_bytes(ipc(AB, first) + ipc(CD, second))
        with pytest.raises(UserError, match="two files joined"):
            records(path)
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet(pa.table({"text": ["a", "b"]})) + parquet(pa.table({"text": ["c", "d"]})))
    with pytest.raises(UserError, match="two parquet files are joined"):
        records(path)


def test_a_stream_cut_anywhere_is_refused(tmp_path: Path) -> None:
    raw, path = ipc(AB, 2, stream=True), tmp_path / "a.arrow"
    ends = [at for at in range(8, len(raw), 8) if raw[at : at + 4] == b"\xff\xff\xff\xff"]  # whole messages before
    for end in (*ends, len(raw) - 4, ends[-1] - 3):
        path.write_bytes(raw[:end])
        with pytest.raises(UserError, match=r"a\.arrow: "):
            records(path)


def test_row_groups_batches_and_odd_types(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(3000)]
    table = pa.table({"text": texts, "n": pa.array(range(3000))})
    (tmp_path / "a.parquet").write_bytes(parquet(table, row_group_size=700))
    assert records(tmp_path / "a.parquet") == [{"text": text} for text in texts]
    turns = [[{"role": "user", "content": "x", "weight": None}], None, []]
    raw = pa.array([b"good", b"\xff", b"x"], pa.binary()).view(pa.string())
    odd = pa.record_batch({"text": raw, "messages": turns, "day": pa.array([0, 1, None], pa.date32())})
    for name, content in (("b.arrow", ipc(odd)), ("b.parquet", parquet(pa.table(odd)))):
        (tmp_path / name).write_bytes(content)
        found = records(tmp_path / name, None)
        assert found[0] == {"text": "good", "messages": turns[0], "day": ("date",)}
        assert isinstance(found[1], MalformedRecord)
        assert found[1].reason.startswith("invalid UTF-8")
        assert found[2] == {"text": "x", "messages": [], "day": None}
    for kind in (pa.dictionary(pa.int8(), pa.string()), pa.large_string(), pa.string_view()):
        (tmp_path / "c.arrow").write_bytes(ipc(column(pa.array(["a", None, "b"]).cast(kind))))
        assert records(tmp_path / "c.arrow") == [{"text": "a"}, {"text": None}, {"text": "b"}]


def test_columns_are_named_once(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet(pa.table({"text": ["a"]}).append_column("text", pa.array(["b"]))))
    with pytest.raises(UserError, match="has the column 'text' 2 times"):
        records(path)
    path.write_bytes(parquet(pa.table({"body": ["a"]})))
    with pytest.raises(UserError, match="has no column 'text'; it has body"):
        records(path)


def test_a_reader_that_dies_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "MEMORY_LIMITS", (1, 1))  # so little that the interpreter itself can't go on
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet(pa.table({"text": ["a"]})))
    with pytest.raises(UserError, match=r"a\.parquet: "):
        records(path)
