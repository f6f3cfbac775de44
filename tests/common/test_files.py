"""Only regular files are opened, no link is followed, and nothing is ever half-written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from arriero.common.errors import UserError
from arriero.common.files import APPEND, make_directory, open_regular, write_atomic


def a_link(path: Path) -> None:
    (path.parent / "elsewhere").write_text("foreign")
    path.symlink_to(path.parent / "elsewhere")


IMPOSTORS: dict[str, Callable[[Path], None]] = {
    "directory": Path.mkdir,
    "pipe": os.mkfifo,
    "link": a_link,
    "dangling link": lambda path: path.symlink_to(path.parent / "elsewhere"),
    "link to a device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("kind", IMPOSTORS)
@pytest.mark.parametrize("flags", [os.O_RDONLY, APPEND, os.O_RDWR | os.O_CREAT])
def test_what_is_no_regular_file_is_refused_with_its_name(tmp_path: Path, kind: str, flags: int) -> None:
    path = tmp_path / "log.txt"
    IMPOSTORS[kind](path)
    with pytest.raises(OSError, match=r".") as caught:
        os.close(open_regular(path, flags))
    assert caught.value.filename == str(path) or caught.value.filename == path
    assert caught.value.strerror
    assert not (tmp_path / "elsewhere").exists() or (tmp_path / "elsewhere").read_text() == "foreign"


def test_a_link_that_the_user_names_is_followed(tmp_path: Path) -> None:
    a_link(tmp_path / "input")
    handle = open_regular(tmp_path / "input", follow=True)
    assert os.read(handle, 100) == b"foreign"
    os.close(handle)


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_replaced_at_once_and_a_link_is_not_followed(tmp_path: Path, durable: bool) -> None:
    write_atomic(tmp_path / "a", "one", durable=durable)
    write_atomic(tmp_path / "a", b"two", durable=durable)
    assert (tmp_path / "a").read_text() == "two"
    a_link(tmp_path / "b")
    write_atomic(tmp_path / "b", "mine", durable=durable)
    assert (tmp_path / "elsewhere").read_text() == "foreign"
    assert (tmp_path / "b").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "elsewhere"]


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError, match=r"."):
        write_atomic(tmp_path / "a", "text")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(tmp_path / "b", "\udc80")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("name", ["a" * 300, "nul\0", "file/below", "/proc/nothing/here"])
def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as caught:
        make_directory(tmp_path / name, "name another")
    assert "name another" in str(caught.value)
    assert "\0" not in str(caught.value)


def test_a_link_in_a_run_directory_is_no_directory_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    make_directory(tmp_path / "link", "fix")
    with pytest.raises(UserError, match="symbolic link"):
        make_directory(tmp_path / "link", "fix", follow=False)


@pytest.mark.parametrize("below", ["", "more", "more/and more"])
def test_no_directory_is_made_in_a_committed_checkpoint(tmp_path: Path, below: str) -> None:
    checkpoint = tmp_path / "anywhere"
    checkpoint.mkdir()
    for name in ("COMMITTED", "state.json"):
        (checkpoint / name).write_text("{}")
    for path in (checkpoint / below, tmp_path / "run" / "checkpoints" / "step-00000004" / below):
        with pytest.raises(UserError, match="lies in the checkpoint"):
            make_directory(path, "name another")
    assert sorted(p.name for p in checkpoint.iterdir()) == ["COMMITTED", "state.json"]
    assert not (tmp_path / "run").exists()


PLACES = (".", "hf", "a/b", "link", "link/hf", "../step-00000002/hf")


@pytest.mark.parametrize("place", PLACES)
def test_nothing_is_made_in_a_whole_checkpoint(tmp_path: Path, place: str) -> None:
    checkpoint = tmp_path / "checkpoints/step-00000002"
    checkpoint.mkdir(parents=True)
    for name in ("COMMITTED", "state.json"):
        (checkpoint / name).touch()
    (checkpoint.parent / "link").symlink_to(checkpoint)
    path = checkpoint.parent / place if place.startswith("link") else checkpoint / place
    with pytest.raises(UserError, match="which is only read"):
        make_directory(path, "fix")
    assert sorted(p.name for p in checkpoint.iterdir()) == ["COMMITTED", "state.json"]
    make_directory(checkpoint.parent / "step-00000002-hf", "fix")
