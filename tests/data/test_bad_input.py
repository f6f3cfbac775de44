"""Input that cannot be used is counted, set aside with its place, and reconciled; the rest is prepared."""

from __future__ import annotations

import gzip
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
from small_inputs import files_in

from arriero.common.errors import UserError
from arriero.data.indexed import IndexedDataset
from arriero.data.manifest import read_manifest
from arriero.data.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

Prepare = Callable[..., str]
GOOD = b'{"text": "good"}\n'
# (name, bytes of a file's second line, reason); the first and third lines are good.
LINES = {
    "broken JSON": (b'{"text": "x"', "broken JSON"),
    "control character in a string": (b'{"text": "a\x00b"}', "broken JSON"),
    "not an object": (b"[1, 2]", "not an object but list"),
    "wrong column": (b'{"body": "x"}', "no column 'text' (columns: body)"),
    "null": (b'{"text": null}', "text is null"),
    "number": (b'{"text": 7}', "text is int, not a string"),
    "empty": (b'{"text": ""}', "text is empty"),
    "blank": (b'{"text": " \\n "}', "text is blank"),
    "invalid UTF-8": (b'{"text": "\xff"}', "invalid UTF-8"),
    "lone surrogate": (b'{"text": "a\\ud800b"}', "lone surrogate U+D800"),
    "deep nesting": (b'{"text": ' + b"[" * 100_000, "broken JSON"),
}


@pytest.mark.parametrize("case", list(LINES))
def test_a_bad_line_is_set_aside(tmp_path: Path, prepare: Prepare, case: str) -> None:
    line, reason = LINES[case]
    source = tmp_path / "a.jsonl"
    source.write_bytes(GOOD + line + b"\n" + GOOD)
    out = prepare(source, max_bad=0.5)
    (entry,) = [json.loads(one) for one in Path(f"{out}.quarantine.jsonl").read_text().splitlines()]
    assert (entry["file"], entry["line"]) == (str(source), 2)
    assert entry["reason"].startswith(reason)
    manifest = read_manifest(out)
    assert manifest is not None
    records = manifest["records"]
    assert records["in"] == records["out"] + records["quarantined"] == 3
    assert len(IndexedDataset(f"{out}_text_document")) == 2
    with pytest.raises(UserError, match=r"a\.jsonl:2: "):
        prepare(source, strict=True, overwrite=True)
    assert len(IndexedDataset(f"{out}_text_document")) == 2  # the earlier set is untouched


def test_too_many_bad_records_stop_the_run_but_empty_ones_do_not(tmp_path: Path, prepare: Prepare) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(GOOD + b"{\n" + GOOD)
    with pytest.raises(UserError, match=r"1 of 3 records cannot be used, more than --max-bad 0\.01"):
        prepare(source)
    source.write_bytes(b"{\n")
    with pytest.raises(UserError, match="no usable record among 1"):
        prepare(source, max_bad=1.0)
    assert files_in(tmp_path / "out") == []
    source.write_bytes(GOOD + b'{"text": ""}\n')
    prepare(source)


@pytest.mark.parametrize(
    ("raw", "texts"),
    [
        (b"\xef\xbb\xbffirst\r\nsecond\r\n", ["first", "second"]),
        (b"nul \x00 inside\n", ["nul \x00 inside"]),
        (b"no end of line", ["no end of line"]),
        (b"\n\n  \nlast\n\n", ["last"]),
    ],
)
def test_odd_but_sound_text(
    tmp_path: Path, prepare: Prepare, tokenizer: Tokenizer, raw: bytes, texts: list[str]
) -> None:
    source = tmp_path / "a.txt"
    source.write_bytes(raw)
    found = IndexedDataset(prepare(source) + "_text_document")
    assert [tokenizer.decode(found[i]) for i in range(len(found))] == texts


def test_what_a_document_of_a_text_file_is(tmp_path: Path, prepare: Prepare, tokenizer: Tokenizer) -> None:
    source = tmp_path / "a.txt"
    source.write_text("a\nb\n\nc\n")
    for per, texts in (("line", ["a", "b", "c"]), ("paragraph", ["a\nb", "c"]), ("file", ["a\nb\n\nc"])):
        found = IndexedDataset(prepare(source, per=per, out=str(tmp_path / "out" / per)) + "_text_document")
        assert [tokenizer.decode(found[i]) for i in range(len(found))] == texts


def test_a_csv_with_a_short_row_foreign_bytes_and_a_quoted_newline(
    tmp_path: Path, prepare: Prepare, tokenizer: Tokenizer
) -> None:
    source = tmp_path / "a.csv"
    source.write_bytes(b'id,text\n1,"two\nlines"\n2\n3,\xff\n4,last\n')
    out = prepare(source, max_bad=0.6)
    found = IndexedDataset(f"{out}_text_document")
    assert [tokenizer.decode(found[i]) for i in range(len(found))] == ["two\nlines", "last"]
    lines = [json.loads(one) for one in Path(f"{out}.quarantine.jsonl").read_text().splitlines()]
    assert [(one["line"], one["reason"]) for one in lines] == [
        (4, "1 columns, not 2"),
        (5, "invalid UTF-8 (byte 0xff)"),
    ]


def test_a_parquet_with_null_and_foreign_bytes(tmp_path: Path, prepare: Prepare) -> None:
    source = tmp_path / "a.parquet"
    raw = pyarrow.array([b"good", None, b"\xff", b"good"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": raw}), source)
    out = prepare(source, max_bad=0.6)
    lines = [json.loads(one) for one in Path(f"{out}.quarantine.jsonl").read_text().splitlines()]
    assert [one["line"] for one in lines] == [2, 3]
    assert lines[0]["reason"] == "text is null"
    assert lines[1]["reason"].startswith("invalid UTF-8")


def unreadable(directory: Path) -> dict[str, tuple[str, bytes, str]]:
    packed = gzip.compress(GOOD * 5000, mtime=0)
    table = pyarrow.table({"text": ["some words"] * 500})
    parquet, feather = directory / "t.parquet", directory / "t.feather"
    pyarrow.parquet.write_table(table, parquet)
    pyarrow.feather.write_feather(table, feather)
    return {
        "gzip cut short": ("a.jsonl.gz", packed[: len(packed) // 2], "damaged or cut short"),
        "not gzip": ("a.jsonl.gz", GOOD, "damaged or cut short"),
        "zstd cut short": ("a.jsonl.zst", zstd(GOOD * 5000)[:-9], "cannot be read|damaged|ends"),
        "parquet cut short": ("a.parquet", parquet.read_bytes()[:-10], "a.parquet"),
        "feather cut short": ("a.feather", feather.read_bytes()[:-10], "a.feather"),
        "array cut short": ("a.json", b'[{"text": "x"}, {"text": "y"', "ends within a value"),
        "array broken": ("a.json", b'[{"text": "x"}, {"text" "y"}, {"text": "and more after it"}]', "after record 1"),
        "no array": ("a.json", b'"x"', "neither a JSON array nor JSON lines"),
        "UTF-16": ("a.txt", "text\n".encode("utf-16"), "is UTF-16"),
        "unclosed quote": ("a.csv", b'text\n"never closed\n', "line"),
        "empty file": ("a.txt", b"", "no usable record among 0"),
    }


def zstd(raw: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(raw)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("case", list(unreadable(Path(__import__("tempfile").mkdtemp()))))
def test_an_unreadable_file_is_one_message_and_leaves_nothing(tmp_path: Path, prepare: Prepare, case: str) -> None:
    name, raw, message = unreadable(tmp_path)[case]
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(UserError, match=message):
        prepare(tmp_path / name)
    assert files_in(tmp_path / "out") == []


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "csv", "parquet", "arrow", "feather"])
def test_every_kind_gives_the_same_set(
    tmp_path: Path, prepare: Prepare, capsys: pytest.CaptureFixture[str], kind: str, suffix: str
) -> None:
    texts = ["first", "second words", "third ü"]
    table = pyarrow.table({"text": texts, "other": [1, 2, 3]})
    path = tmp_path / f"a.{kind}"
    if kind == "txt":
        path.write_text("\n".join(texts))
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps({"text": t}) for t in texts))
    elif kind == "json":
        path.write_text(json.dumps([{"text": t, "other": None} for t in texts], indent=2))
    elif kind == "csv":
        path.write_text("other,text\n" + "".join(f'1,"{t}"\n' for t in texts))
    elif kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    elif kind == "feather":
        pyarrow.feather.write_feather(table, path)
    else:
        with pyarrow.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    raw = path.read_bytes()
    if suffix:
        path.unlink()
        path = path.with_name(path.name + suffix)
        path.write_bytes(gzip.compress(raw) if suffix == ".gz" else zstd(raw))
    plain = tmp_path / "plain.txt"
    plain.write_text("\n".join(texts))
    expected = Path(prepare(plain, out=str(tmp_path / "out" / "plain")) + "_text_document.bin").read_bytes()
    capsys.readouterr()
    assert Path(prepare(path, log_interval=1) + "_text_document.bin").read_bytes() == expected
    assert "processed 3 documents" in capsys.readouterr().out


def test_a_directory_of_several_kinds_is_refused_and_one_kind_is_read_by_name(tmp_path: Path, prepare: Prepare) -> None:
    here = tmp_path / "in"
    here.mkdir()
    for name in ("b.txt", "a.txt", "README"):
        (here / name).write_text(f"from {name}\n")
    out = prepare(here)
    manifest = read_manifest(out)
    assert manifest is not None
    assert [Path(s["path"]).name for s in manifest["sources"]] == ["a.txt", "b.txt"]
    (here / "c.jsonl").write_bytes(GOOD)
    with pytest.raises(UserError, match=r"several kinds: 1 jsonl \(c\.jsonl\); 2 text \(a\.txt\)"):
        prepare(here)
    assert prepare(str(here / "*.txt")) == out  # the same files by a glob: reused


def test_the_bytes_do_not_depend_on_the_workers(
    tmp_path: Path, prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    from arriero.data import pipeline

    monkeypatch.setattr(pipeline, "CHUNK_CHARACTERS", 500)
    source = tmp_path / "a.jsonl"
    source.write_bytes(b"".join(b'{"text": "%d %s"}\n' % (n, b"word " * (n * 37 % 90)) for n in range(300)))
    made = set()
    for workers in (1, 2, 5):
        out = prepare(source, workers=workers, out=str(tmp_path / "out" / str(workers)))
        made.add(Path(f"{out}_text_document.bin").read_bytes() + Path(f"{out}_text_document.idx").read_bytes())
    assert len(made) == 1


def test_one_huge_record_of_an_array(tmp_path: Path, prepare: Prepare, tokenizer: Tokenizer) -> None:
    text = "some words " * 500_000  # 5.5 MB: longer than several blocks of reading
    source = tmp_path / "a.json"
    source.write_text(json.dumps([{"text": "before"}, {"text": text}, {"text": "after"}]))
    found = IndexedDataset(prepare(source) + "_text_document")
    assert tokenizer.decode(found[1]) == text
    assert tokenizer.decode(found[2]) == "after"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_run_leaves_no_set_and_the_next_one_starts_cleanly(
    tmp_path: Path, prepare: Prepare, tokenizer_dir: Path, number: int
) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    code = (  # records without end, so that the run is surely in the middle
        "import itertools, sys; from arriero.cli.main import main; from arriero.data import writing\n"
        "writing.read_records = lambda *_, **__: ((n, {'text': 'good'}) for n in itertools.count(1))\n"
        "main(['prepare', sys.argv[1], '--out', sys.argv[2], '--tokenizer', sys.argv[3], '--engine', 'reference', "
        "'--workers', '2'])"
    )
    out = tmp_path / "out" / "set"
    command = [sys.executable, "-c", code, str(tmp_path / "a.jsonl"), str(out), str(tokenizer_dir)]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    partial = Path(f"{out}_text_document.bin.partial")
    try:
        while not (partial.exists() and partial.stat().st_size):
            assert child.poll() is None
            time.sleep(0.01)
        child.send_signal(number)
        child.wait(timeout=900)
    finally:
        child.kill()
    assert child.returncode != 0
    left = files_in(tmp_path / "out")
    assert left == [] if number != signal.SIGKILL else all(name.endswith((".partial", ".lock")) for name in left)
    source = tmp_path / "b.jsonl"
    source.write_bytes(GOOD)
    prepare(source)
    assert files_in(tmp_path / "out") == ["set.manifest.json", "set_text_document.bin", "set_text_document.idx"]
