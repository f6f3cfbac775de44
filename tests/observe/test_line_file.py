"""No line is lost while a file cannot be written, none is written twice, and the user is logged once."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arriero.observe import line_file as lines
from arriero.observe.events import Events, goodput_line, read_events
from arriero.observe.line_file import LineFile, WriteErrors

WRITE = os.write


def write_errors() -> tuple[WriteErrors, list[str]]:
    logged: list[str] = []
    return WriteErrors(logged.append), logged


class Disk:
    """Takes what a list tells for each write: None all of it, a number that many bytes, or an error."""

    def __init__(self, plan: list[int | None]) -> None:
        self.plan = plan

    def write(self, handle: int, data: bytes) -> int:
        step = self.plan.pop(0) if self.plan else None
        if step is None:
            return WRITE(handle, data)
        if step < 0:
            raise OSError(-step, os.strerror(-step))
        return WRITE(handle, data[: max(1, step)])


OUTCOMES = st.one_of(st.none(), st.integers(1, 30), st.sampled_from([-errno.ENOSPC, -errno.EIO, -errno.EDQUOT]))


@given(plan=st.lists(OUTCOMES, max_size=60), count=st.integers(1, 40))
def test_whatever_the_disk_does_every_line_is_there_once_and_in_order(
    tmp_path_factory: pytest.TempPathFactory, plan: list[int | None], count: int
) -> None:  # fmt: skip
    path = tmp_path_factory.mktemp("lines") / "metrics.jsonl"
    found, logged = write_errors()
    failing = any(step is not None and step < 0 for step in plan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines.os, "write", Disk(plan).write)
        file = LineFile(path, found)
        for number in range(count):
            file.write(b"line %d" % number)
            whole = path.read_bytes()
            assert whole.count(b"\n") + len(file.pending) == number + 1
        plan.clear()
        file.close()
    assert path.read_bytes() == b"".join(b"line %d\n" % number for number in range(count))
    assert failing or logged == []
    if logged:  # pairs: it fails, it works again
        assert all("no line is lost" in line for line in logged[1::2])
        assert len(logged) % 2 == 0


def test_what_waits_is_bounded_and_what_is_lost_is_counted(tmp_path: Path) -> None:
    path, (found, logged) = tmp_path / "log.txt", write_errors()
    path.mkdir()
    file = LineFile(path, found, max_bytes=1000)
    for _ in range(500):
        file.write(b"123456789")
    assert len(file.pending) == 100
    assert len(logged) == 1
    path.rmdir()
    file.write(b"123456789")
    assert path.read_bytes() == b"123456789\n" * 100  # the one that came last found no room either
    assert logged[1:] == [f"arriero: {tmp_path}: its files are written again, and 401 lines are lost"]
    file.write(b"123456789")
    file.close()
    assert path.read_bytes() == b"123456789\n" * 101
    assert len(logged) == 2


def test_a_full_disk_is_one_warning_for_all_files_and_a_thing_in_the_way_one_for_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    found, logged = write_errors()
    files = [LineFile(tmp_path / name, found) for name in ("log.txt", "metrics.jsonl", "events.jsonl")]
    with monkeypatch.context() as patch:
        patch.setattr(lines.os, "write", Disk([-errno.ENOSPC] * 100).write)
        for file in files * 10:
            file.write(b"x")
    assert len(logged) == 1
    assert "No space left on device" in logged[0]
    for file in files:
        file.write(b"x")
    assert len(logged) == 2
    (tmp_path / "a").mkdir()
    os.mkfifo(tmp_path / "b")
    for name in "ab":
        LineFile(tmp_path / name, found).close()
    assert sum("a regular file" in line or "directory" in line for line in logged[2:]) >= 2


PLACES = {
    "directory": lambda path, out: path.mkdir(),
    "pipe": lambda path, out: os.mkfifo(path),
    "dangling link": lambda path, out: path.symlink_to(out / "nothing"),
    "outward link": lambda path, out: path.symlink_to(out / "theirs"),
    "hard link": lambda path, out: os.link(out / "theirs", path),
    "link to itself": lambda path, out: path.symlink_to(path),
}


@pytest.mark.parametrize("kind", PLACES)
def test_nothing_else_is_written_than_the_runs_own_file(tmp_path: Path, kind: str) -> None:
    out, path, (found, logged) = tmp_path / "out", tmp_path / "run" / "log.txt", write_errors()
    out.mkdir()
    path.parent.mkdir()
    (out / "theirs").write_text("alias ls=ls\n")
    PLACES[kind](path, out)
    file = LineFile(path, found)
    for _ in range(3):
        file.write(b"rm -rf /")
    file.close()
    assert (out / "theirs").read_text() == "alias ls=ls\n"
    assert [p.name for p in out.iterdir()] == ["theirs"]
    if kind == "hard link":
        assert path.read_text() == "alias ls=ls\n" + "rm -rf /\n" * 3
        assert logged == []
    else:
        assert len(logged) == 2  # that it cannot be written, and how many lines were not
        assert "3 lines could not be written" in logged[1]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("before", [b"", b"a\n", b"a\nhalf", b"half", b"a\n" + b"h" * 200_000])
def test_half_a_line_that_a_kill_left_does_not_swallow_the_next(tmp_path: Path, before: bytes, whole: bool) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(before)
    file = LineFile(path, WriteErrors(), whole_lines=whole)
    file.write(b"next")
    file.close()
    kept = (
        before[: before.rfind(b"\n") + 1] if whole else before + b"\n" * (not before.endswith(b"\n") and before != b"")
    )
    assert path.read_bytes() == kept + b"next\n"


def test_events_with_values_of_other_types_or_cut_off_are_left_out(tmp_path: Path) -> None:
    bad = [b"{", b"[]", b"1", b'{"event": 1, "at": 2}', b'{"event": "step", "at": "x"}',
           b'{"event": "step", "at": 1, "step": "x", "seconds": 1}', b'{"event": "step", "at": 1, "seconds": NaN}',
           b'{"event": "step", "at": 1, "seconds": [1]}', b'{"event": "begin", "at": Infinity}', b"\xff", b"[" * 5000,
           b'{"event": "step", "at": 1, "x": "' + b"x" * 20_000 + b'"}']  # fmt: skip
    good = b'{"event": "begin", "at": 1.0}\n{"event": "step", "at": 3.0, "step": 1, "seconds": 2.0, "data": 0.5}\n'
    (tmp_path / "events.jsonl").write_bytes(b"\n".join(bad) + b"\n" + good + b'{"event": "half')
    assert len(read_events(tmp_path)) == 2
    assert goodput_line(tmp_path) == "75.0% productive, 25.0% data wait, 0.0% checkpoint, 0.0% restart, 0.0% lost, " \
                                     "0.0% other of 2.0 s"  # fmt: skip
    events = Events(tmp_path, first=True, since_start=0.0)
    events.close()
    assert len(read_events(tmp_path)) == 4
    os.remove(tmp_path / "events.jsonl")
    os.mkfifo(tmp_path / "events.jsonl")
    assert goodput_line(tmp_path) == ""
