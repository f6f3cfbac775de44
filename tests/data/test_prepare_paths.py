"""Names that no file can have, things in a file's place, and links: one sentence, nothing written, nothing followed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from small_inputs import files_in

from arriero.cli.main import dispatch
from arriero.common.errors import UserError
from arriero.data.formats import load_template
from arriero.data.inputs import find_inputs
from arriero.data.tokenizer import load_tokenizer

Prepare = Callable[..., str]
NAMES = {
    "5,000 characters": "a" * 5000, "a component of 300": "a/" + "b" * 300, "NUL": "a\0b",
    "a lone surrogate": "a\ud800", "below a file": "in.txt/x", "empty": "", "a name that grows too long": "c" * 240,
}  # fmt: skip


@pytest.mark.parametrize("case", NAMES)
@pytest.mark.parametrize("place", ["input", "out", "tokenizer", "template", "merge"])
def test_prepare_names_what_cannot_be(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *,
    place: str, case: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("in.txt").write_text("text\n")
    Path("in.csv").write_text("instruction,output\na,b\n")
    name, good = NAMES[case], str(tokenizer_dir)
    if place == "tokenizer" and not name:
        pytest.skip("an empty path is the working directory")
    words = {
        "input": [name, "--tokenizer", good, "--out", "o"],
        "out": ["in.txt", "--tokenizer", good, "--out", name],
        "tokenizer": ["in.txt", "--tokenizer", name, "--out", "o"],
        "template": ["in.csv", "--tokenizer", good, "--out", "o", "--format", "alpaca", "--template", name],
        "merge": [name, name, "--merge", "--out", "o"],
    }[place]
    assert dispatch(["prepare", *words]) == 2
    said = capsys.readouterr()
    assert "arriero: " in said.err
    assert "Traceback" not in said.err
    assert len(said.err) < 3000
    assert files_in(tmp_path) == ["in.csv", "in.txt"]


@pytest.mark.parametrize("name", NAMES.values())
def test_functions_refuse_the_names_too(name: str) -> None:
    if "\0" not in name:
        with pytest.raises(UserError):
            find_inputs((name,))
    with pytest.raises(UserError):
        load_tokenizer(Path(name or "nothing"))
    with pytest.raises(UserError):
        load_template(name)


OURS = ("set.lock", "set.manifest.json", "set.quarantine.jsonl", "set_text_document.bin", "set_text_document.idx",
        "set_text_document.bin.partial", "set_text_document.sizes.partial", "set.manifest.json.partial")  # fmt: skip


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_something_in_a_files_place(tmp_path: Path, prepare: Prepare, name: str, make: Callable[[Path], None]) -> None:
    (tmp_path / "in.txt").write_text("text\n")
    (tmp_path / "out").mkdir()
    make(tmp_path / "out" / name)
    with pytest.raises(UserError, match=f"{name}: is no file"):
        prepare(tmp_path / "in.txt", overwrite=True)
    assert os.listdir(tmp_path / "out") == [name]


@pytest.mark.parametrize("name", OURS)
def test_no_link_is_written_through(tmp_path: Path, prepare: Prepare, name: str) -> None:
    (tmp_path / "in.txt").write_text("text\n\xff\n", encoding="latin-1")
    (tmp_path / "out").mkdir()
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "out" / name).symlink_to(tmp_path / "victim")
    with contextlib.suppress(UserError):  # a lock or a manifest that is a link is refused, others are replaced
        prepare(tmp_path / "in.txt", overwrite=True, max_bad=0.9)
    assert (tmp_path / "victim").read_text() == "mine"


def test_a_directory_that_cannot_be_written(tmp_path: Path, prepare: Prepare) -> None:
    (tmp_path / "in.txt").write_text("text\n")
    for out in ("/proc/none/set", "/dev/null/set"):
        with pytest.raises(UserError, match="fix: choose another --out"):
            prepare(tmp_path / "in.txt", out=out)
    os.mkfifo(tmp_path / "p.txt")
    with pytest.raises(UserError, match="is not a regular file"):
        prepare(tmp_path / "p.txt")


def test_control_characters_do_not_reach_the_terminal(
    tmp_path: Path, prepare: Prepare, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "we\x1b[31mird.txt"
    source.write_text("text\n")
    out = prepare(source, out=str(tmp_path / "o\x1b[31m"))
    prepare(source, out=out)
    with pytest.raises(UserError):
        prepare(source, out=out, eos=False)
    assert "\x1b" not in capsys.readouterr().out
