"""The run's directory: what is written where, and that a checkpoint is only read."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from forging import seal
from small_inputs import train_sentencepiece

from arriero.checkpoint.directory import file_digest
from arriero.checkpoint.find import committed
from arriero.checkpoint.lock import RunLock
from arriero.checkpoint.verify import verify_checkpoint
from arriero.cli.main import dispatch
from arriero.common.errors import EXIT_OK, EXIT_USAGE, UserError
from arriero.common.settings import parse
from arriero.common.toml import file_settings
from arriero.distributed.parallel.mesh import Ranks
from arriero.observe.events import Events
from arriero.observe.profile import Profile
from arriero.train import reporter as reporter_module
from arriero.train import watch as watch_module
from arriero.train.config import WatchConfig
from arriero.train.directory import prepare_run_directory
from arriero.train.recipe import Recipe
from arriero.train.reporter import Reporter, StepResult
from arriero.train.watch import Watchdog
from toy import CONFIG

pytestmark = pytest.mark.slow

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
    assert [line for p in committed(run / "checkpoints") for line in verify_checkpoint(p)] == []
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
    assert verify_checkpoint(best) == []


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


PLACES: dict[str, Callable[[Path, Path], object]] = {
    "directory": lambda path, theirs: path.mkdir(),
    "pipe": lambda path, theirs: os.mkfifo(path),
    "dangling link": lambda path, theirs: path.symlink_to(theirs / "nothing"),
    "outward link": lambda path, theirs: path.symlink_to(theirs / "file"),
    "outward link to a directory": lambda path, theirs: path.symlink_to(theirs),
    "hard link": lambda path, theirs: os.link(theirs / "file", path),
    "empty": lambda path, theirs: path.touch(),
    "no text": lambda path, theirs: path.write_bytes(b"\xff\0" * 1000),
}
FILES = ["log.txt", "metrics.jsonl", "events.jsonl", "env.json", "env-2.json", "recipe.toml", "lock.json", "loss.png",
         "tokenizer", "tokenizer/tokenizer.model", "stacks", "stacks/rank-00000.txt", "profile", "profile/rank-0.json",
         "checkpoints"]  # fmt: skip
LINES = ("log.txt", "metrics.jsonl", "events.jsonl")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_sentencepiece(path, vocab_size=400)
    return path


def start(recipe: Recipe, *, profiled: bool) -> None:
    """What a start of a run writes, without the training."""
    lock = RunLock(Path(recipe.out))
    try:
        prepare_run_directory(recipe)
        reporter = Reporter(
            Path(recipe.out), recipe.log, recipe.train, CONFIG, devices=1, device_name="cpu", first=True
        )  # fmt: skip
        events = Events(Path(recipe.out), first=True, since_start=0.0, errors=reporter.trouble)
        reporter.truncate_metrics_after(3)
        for step in (4, 5):
            result = StepResult(
                iteration=step, consumed_samples=0, consumed_tokens=0, lm_loss=1.0,
                grad_norm=1.0, learning_rate=1.0, loss_scale=1.0, skipped=False, seconds=1.0,
                phases={"data_wait": 0.0}, attended_length=1.0,
            )  # fmt: skip
            reporter.log_step(result)
            events.note("step", step=step, seconds=1.0, data=0.0)
        dog = Watchdog(Path(recipe.out), Ranks(), WatchConfig(seconds=0.0, times=0.0), reporter.log)
        dog._dump(1.0)
        dog._stack_summary()
        dog.end_step()
        profile = Profile("1:1" if profiled else "", Path(recipe.out) / "profile", 0)
        with profile.step(1):
            pass
        reporter.log(profile.finish())
        events.close()
        reporter.finish()
    finally:
        lock.release()


@pytest.mark.parametrize("kind", PLACES)
@pytest.mark.parametrize("name", FILES)
def test_whatever_lies_in_the_place_of_a_file_of_the_run_is_not_followed(
    run: Path, tokenizer: Path, name: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    theirs, path = run.parent / "theirs", run / name
    theirs.mkdir()
    (theirs / "file").write_text("theirs")
    (theirs / "step-00000001.tmp").mkdir()
    recipe = replace(
        parse(Recipe, file_settings(run / "recipe.toml"), prog="test"), out=str(run), tokenizer=str(tokenizer)
    )
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    PLACES[kind](path, theirs)
    before = content(theirs)
    refused = ""
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(watch_module, "STACK_FILE_WAIT", 0.0)  # there are no other processes to wait for
            if name != "loss.png":
                patch.setattr(reporter_module, "loss_figure", lambda *_: None)  # which takes most of the time
            start(recipe, profiled=name.startswith("profile"))
    except UserError as error:  # before the first step, with a sentence
        refused = str(error)
    assert not refused or (name not in LINES and name.partition("/")[0] in refused and "fix: " in refused)
    printed = "".join(capsys.readouterr())
    assert {k: v[:2] for k, v in content(theirs).items()} == {k: v[:2] for k, v in before.items()}
    assert sorted(p.name for p in theirs.iterdir()) == ["file", "step-00000001.tmp"]
    if name in LINES:
        assert "iteration        5/" in printed
        broken = kind not in ("hard link", "empty", "no text")
        assert printed.count("WARNING") == 2 * broken  # when it fails, and at the end
    if name in ("env.json", "env-2.json"):
        assert "iteration        5/" in printed
        assert any("started" in p.read_text() for p in run.glob("env-*.json") if p.is_file() and not p.is_symlink())


def test_a_run_with_a_log_that_cannot_be_written_trains_to_its_end(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    for name in LINES:
        (run / name).unlink()
        os.mkfifo(run / name)
    os.remove(run / "recipe.toml")  # its checkpoint has it
    (run / "recipe.toml").touch()
    first = (run / "env.json").read_bytes()
    assert dispatch(["pretrain", "--resume", str(run), "--train.steps", "7"]) == EXIT_OK
    assert committed(run / "checkpoints")[-1].name == "step-00000007"
    printed = capsys.readouterr()
    assert "iteration        7/" in printed.out
    assert "NO figure" in printed.out
    assert all(printed.err.count(f"{run / name}: is not a regular file") == 1 for name in LINES)
    assert (run / "env.json").read_bytes() == first  # the first start's
    assert json.loads((run / "env-2.json").read_text())["started"] >= json.loads(first)["started"]
    assert "steps = 7" in (run / "recipe.toml").read_text()


def test_recorded_values_cannot_write_lines_of_their_own_into_the_log(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    """The recipe of a stranger's checkpoint: its values are shown where they have changed."""
    checkpoint = committed(run / "checkpoints")[-1]
    recipe = checkpoint / "recipe.toml"
    recipe.write_text(recipe.read_text().replace('profile = ""', 'profile = "\\nrm -rf ~\\n\\u001b[2J"'))
    seal(checkpoint)
    (run / "lock.json").write_text(json.dumps({"process": "1\nrm -rf ~", "host": "\x1b[2J", "since": "x"}))
    assert dispatch(["pretrain", "--resume", str(run), "--train.steps", "7"]) == EXIT_OK
    printed, log = capsys.readouterr().out, (run / "log.txt").read_text()
    for text in (printed, log):
        assert "changed since the checkpoint: log.profile: \\nrm -rf ~\\n\\x1b[2J -> " in text
        assert "the last job was cut off: process 1\\nrm -rf ~ on \\x1b[2J" in text
        assert not any(line.startswith("rm") for line in text.splitlines())
        assert "\x1b" not in text
