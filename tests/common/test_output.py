"""Output that cannot be written: a run goes on and takes note, a verb whose result is the output ends."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from arriero.cli.main import dispatch
from arriero.common.errors import UserError
from arriero.common.output import OutputClosed, guarded_output, new_write_failures
from toy import write_recipe

pytestmark = pytest.mark.slow


def unread_pipe() -> io.TextIOWrapper:
    """A stream into a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


@contextmanager
def streams(monkeypatch: pytest.MonkeyPatch, out: object, err: object) -> Iterator[None]:
    with monkeypatch.context() as one:
        one.setattr(sys, "stdout", out)
        one.setattr(sys, "stderr", err)
        yield
    for stream in (out, err):
        if isinstance(stream, io.TextIOWrapper):
            with suppress(OSError):
                stream.close()


def full() -> io.TextIOWrapper:
    return open("/dev/full", "w")


def test_a_required_stream_ends_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, expected in ((unread_pipe(), OutputClosed), (full(), UserError)):
        with streams(monkeypatch, stream, io.StringIO()), guarded_output(required=True):
            print("held back")
            with pytest.raises(expected):
                sys.stdout.flush()
            print("harmless from here on", flush=True)


def test_another_stream_is_noted_once_on_the_other_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, why in ((unread_pipe(), "nobody reads it any more"), (full(), "No space left on device")):
        said = io.StringIO()
        with streams(monkeypatch, stream, said), guarded_output(required=False):
            for _ in range(3):
                print("lost", flush=True)
            assert [why in note for note in new_write_failures()] == [True]
            assert new_write_failures() == []
        assert said.getvalue().count(why) == 1


def test_both_streams_fail_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    with streams(monkeypatch, full(), full()), guarded_output(required=False):
        print("lost", flush=True)
        print("lost", file=sys.stderr, flush=True)
        assert len(new_write_failures()) == 2


def test_any_character_can_be_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    narrow = io.TextIOWrapper(raw, encoding="ascii")
    with streams(monkeypatch, narrow, io.StringIO()), guarded_output(required=True):
        print("caf\u00e9 \udcff", flush=True)
        assert raw.getvalue() == b"caf\\xe9 \\udcff\n"


RESULTS = (["--help"], ["--version"], ["doctor", "--help"], ["pretrain", "--help"], ["compare", "--help"])


@pytest.mark.parametrize("words", RESULTS, ids=" ".join)
def test_a_result_on_a_full_device_is_one_sentence(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    said = io.StringIO()
    with streams(monkeypatch, full(), said):
        assert dispatch(words) == 2
    assert said.getvalue().startswith("arriero: standard output cannot be written: No space left on device\n  fix: ")
    assert said.getvalue().count("\n") == 2


@pytest.mark.parametrize("words", RESULTS, ids=" ".join)
def test_a_result_that_nobody_reads_ends_quietly(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    said = io.StringIO()
    with streams(monkeypatch, unread_pipe(), said):
        assert dispatch(words) == 0
    assert said.getvalue() == ""


@pytest.mark.parametrize("stream", [unread_pipe, full])
def test_a_training_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stream: type) -> None:
    with streams(monkeypatch, stream(), stream()):
        assert dispatch(["pretrain", str(write_recipe(tmp_path))]) == 0
    assert len(list(tmp_path.glob("run/checkpoints/*/COMMITTED"))) == 1
    log = (tmp_path / "run/log.txt").read_text()
    assert log.count("NOTICE: standard output cannot be written") == 1
    assert log.count(" iteration   ") == 6


@pytest.mark.parametrize(("redirect", "notes"), [("2>&1 | head -1", 2), ("<&- >&- 2>&-", 2)])
def test_a_training_of_several_processes_goes_on(tmp_path: Path, redirect: str, notes: int) -> None:
    command = f"set -o pipefail; {sys.executable} -m arriero pretrain {write_recipe(tmp_path)} --nproc-per-node 2"
    done = subprocess.run(["bash", "-c", f"{command} {redirect}"], capture_output=True, timeout=900, check=False)
    assert done.returncode == 0
    assert len(list(tmp_path.glob("run/checkpoints/*/COMMITTED"))) == 1
    assert (tmp_path / "run/log.txt").read_text().count("cannot be written") == notes
