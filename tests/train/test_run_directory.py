"""The run's directory: what is written where, and that a checkpoint is only read."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from arriero.checkpoint.layout import committed, file_digest
from arriero.checkpoint.verify import verify
from arriero.cli import dispatch
from arriero.common.errors import EXIT_OK, EXIT_USAGE
from toy import write_recipe

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink", "os.chmod")
_written: list[str] | None = None


def _watch(event: str, args: tuple[Any, ...]) -> None:
    """Notes every path that is opened for writing or changed, while `_written` is a list."""
    if _written is None:
        return
    if event == "open" and isinstance(args[0], (str, bytes)) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        _written.append(os.path.abspath(os.fsdecode(args[0])))
    elif event in CHANGES:
        _written.extend(os.path.abspath(os.fsdecode(one)) for one in args[:2] if isinstance(one, (str, bytes)))


sys.addaudithook(_watch)


@contextmanager
def writes() -> Iterator[list[str]]:
    global _written  # noqa: PLW0603 - the hook is the interpreter's, there is one
    _written = []
    try:
        yield _written
    finally:
        _written = None


def content(directory: Path) -> dict[str, tuple[str, int, int]]:
    """Of every file below it: digest, time of its last change, number."""
    return {
        str(p.relative_to(directory)): (file_digest(p)["sha256"], p.stat().st_mtime_ns, p.stat().st_ino)
        for p in sorted(directory.rglob("*")) if p.is_file()
    }  # fmt: skip


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with three checkpoints; its recipe lies beside it."""
    root = tmp_path_factory.mktemp("begun")
    words = ["pretrain", str(write_recipe(root)), "--checkpoint.every", "2", "--checkpoint.keep", "0"]
    assert dispatch(words) == EXIT_OK
    return root / "run"


@pytest.fixture
def run(begun: Path, tmp_path: Path) -> Path:
    shutil.copytree(begun, tmp_path / "run")
    return tmp_path / "run"


NAMED = ["{run}/checkpoints/step-00000002", "{run}/checkpoints/step-00000002/", "link", "step-00000002", "."]


@pytest.mark.parametrize("named", NAMED)
def test_a_checkpoint_that_is_resumed_from_is_only_read(
    run: Path, named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    checkpoint, before = run / "checkpoints/step-00000002", content(run / "checkpoints")
    (run.parent / "link").symlink_to(checkpoint)
    monkeypatch.chdir({"step-00000002": run / "checkpoints", ".": checkpoint}.get(named, run.parent))
    with writes() as seen:
        assert dispatch(["pretrain", "--resume", named.format(run=run), "--train.steps", "3"]) == EXIT_OK
    assert " after step 2\n" in capsys.readouterr().out
    assert [path for path in seen if f"{os.sep}step-0000000" in path and "step-00000003" not in path] == []
    assert any(path.startswith(str(run)) for path in seen)  # the watch works, and the run's directory is written
    assert {k: v for k, v in content(run / "checkpoints").items() if "step-00000003" not in k} == before
    # the newest is what was saved last, though the steps 4 and 6 of the course that was left are still there
    assert [p.name[-1] for p in committed(run / "checkpoints")] == ["2", "4", "6", "3"]
    assert [line for p in committed(run / "checkpoints") for line in verify(p)] == []
    assert dispatch(["pretrain", "--resume", str(run), "--train.steps", "4"]) == EXIT_OK
    assert "step-00000003 after step 3" in capsys.readouterr().out


def test_the_checkpoint_just_saved_is_kept_though_later_steps_of_another_course_are_there(run: Path) -> None:
    words = ["pretrain", "--resume", str(run / "checkpoints/step-00000002"), "--train.steps", "3"]
    assert dispatch([*words, "--checkpoint.keep", "1"]) == EXIT_OK
    assert [p.name for p in committed(run / "checkpoints")] == ["step-00000003"]


def test_a_checkpoint_goes_on_in_another_directory(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, out = content(run), run.parent / "branch"
    resume = ["pretrain", "--resume", str(run / "checkpoints/step-00000004"), "--out", str(out)]
    assert dispatch(resume) == EXIT_OK
    assert content(run) == before
    assert [p.name for p in committed(out / "checkpoints")] == ["step-00000006"]
    assert dispatch(resume) == EXIT_USAGE
    assert f"{out} already holds a run" in capsys.readouterr().err


def test_a_checkpoint_outside_a_run_needs_an_out(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    best, before = run.parent / "best", content(run)
    shutil.copytree(run / "checkpoints/step-00000004", best)
    assert dispatch(["pretrain", "--resume", str(best)]) == EXIT_USAGE
    assert "lies in no run directory" in capsys.readouterr().err
    assert content(run) == before  # where its recipe says that it was written
    assert dispatch(["pretrain", "--resume", str(best), "--out", str(run.parent / "again")]) == EXIT_OK
    assert verify(best) == []


@pytest.mark.parametrize("inside", ["", "/deeper/down", ".tmp"])
@pytest.mark.parametrize("step", [2, 9])
def test_no_run_is_written_into_a_checkpoint(
    run: Path, inside: str, step: int, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    before, out = content(run), f"{run}/checkpoints/step-0000000{step}{inside}"
    for words in ([str(run / "recipe.toml")], ["--resume", str(run)]):
        assert dispatch(["pretrain", *words, "--out", out]) == EXIT_USAGE
        assert "which is only read" in capsys.readouterr().err
    assert content(run) == before


@pytest.mark.parametrize("words", [["--resume", ""], ["--resume"], ["--stop-after", ""], ["--allow-change", ""],
                                   ["--verify-layout", "maybe"]])  # fmt: skip
def test_a_flag_without_its_value_is_no_flag_that_was_left_out(
    run: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    before = content(run)
    assert dispatch(["pretrain", str(run / "recipe.toml"), *words]) == EXIT_USAGE
    assert words[0] in capsys.readouterr().err
    assert content(run) == before


def test_a_finished_run_says_that_it_is_complete(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["pretrain", "--resume", str(run)]) == EXIT_OK
    assert "the run is complete: step 6 of train.steps 6" in capsys.readouterr().out
