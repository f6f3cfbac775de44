"""A disk that is full, and one that turns read-only, as the kernel gives them."""

from __future__ import annotations

import contextlib
import resource
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from arriero.checkpoint.find import committed
from arriero.checkpoint.verify import verify_checkpoint
from arriero.cli.main import dispatch
from arriero.common.errors import EXIT_OK, EXIT_USAGE
from arriero.observe.line_file import LineFile, WriteErrors
from toy import write_config, write_recipe

pytestmark = pytest.mark.slow


class SmallDisk:
    """A tmpfs of a size where this user may mount one; elsewhere a limit on the size of files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        self.mounted = self._mount("size=900k")

    def _mount(self, options: str) -> bool:
        words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.path)]
        return subprocess.run(words, capture_output=True, check=False).returncode == 0

    def fill(self, kilobytes: int) -> None:
        """Leaves no room for a checkpoint."""
        if self.mounted:
            (self.path / "other people's files").write_bytes(bytes(kilobytes << 10))
        else:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

    def free_space(self) -> None:
        if self.mounted:
            subprocess.run(["mount", "-o", "remount,size=9m", str(self.path)], check=True)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def close(self) -> None:
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.path)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    made = SmallDisk(tmp_path / "disk")
    yield made
    made.close()


def test_a_full_disk_is_told_the_run_goes_on_and_the_old_checkpoint_stays(
    tmp_path: Path, disk: SmallDisk, capfd: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    words = ["pretrain", str(write_recipe(tmp_path)), "--out", str(disk.path / "run"), "--resume", "auto"]
    words += ["--checkpoint.every", "2", "--checkpoint.keep", "0", "--checkpoint.retries", "0"]
    assert dispatch([*words, "--train.steps", "2"]) == EXIT_OK
    disk.fill(350)
    assert dispatch([*words, "--train.steps", "6"]) == EXIT_USAGE
    printed = capfd.readouterr()
    assert "CHECKPOINT of step 4 NOT written" in printed.out
    assert "rank-00000.safetensors: " in printed.out
    assert "the run goes on without it" in printed.out
    assert "iteration        6/       6" in printed.out
    assert "the last checkpoint, of step 6, could not be written" in printed.err
    left = committed(disk.path / "run/checkpoints")
    assert [(p.name, verify_checkpoint(p)) for p in left] == [("step-00000002", [])]
    assert sorted(p.name for p in (disk.path / "run/checkpoints").iterdir()) == ["step-00000002"]
    disk.free_space()
    assert dispatch([*words, "--train.steps", "4"]) == EXIT_OK
    assert [p.name for p in committed(disk.path / "run/checkpoints")] == ["step-00000002", "step-00000004"]


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path)
    (tmp_path / "a-file").write_text("")
    assert dispatch(["pretrain", str(recipe), "--out", str(tmp_path / "a-file/run")]) == EXIT_USAGE
    assert "a-file/run: Not a directory" in capsys.readouterr().err


def test_no_line_is_lost_however_long_the_disk_is_full(
    tmp_path: Path, disk: SmallDisk, capfd: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    if not disk.mounted:
        pytest.skip("needs a disk of its own")
    trouble = WriteErrors()
    files = [LineFile(disk.path / name, trouble) for name in ("metrics.jsonl", "log.txt")]
    with contextlib.suppress(OSError):
        disk.fill(900)
    for number in range(2000):  # 1.4 MB a file
        for file in files:
            file.write(b"%6d " % number + b"x" * 700)
    disk.free_space()
    (disk.path / "other people's files").unlink()
    for file in files:
        file.close()
        found = file.path.read_bytes().splitlines()
        assert [int(line.split()[0]) for line in found] == list(range(2000))
    printed = capfd.readouterr().err
    assert printed.count("No space left on device") == 1
    assert printed.count("no line is lost") == 1


def test_a_model_whose_checkpoint_no_disk_here_holds_is_refused_and_little_room_is_a_warning(
    tmp_path: Path, disk: SmallDisk, capfd: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    if not disk.mounted:
        pytest.skip("needs a disk of its own")
    recipe = write_recipe(tmp_path)
    wide = write_config(tmp_path / "wide", vocab_size=4000)
    words = [
        "pretrain",
        str(recipe),
        "--out",
        str(disk.path / "run"),
        "--train.steps",
        "1",
        "--checkpoint.retries",
        "0",
    ]
    assert dispatch([*words, "--model", str(wide)]) == EXIT_USAGE
    printed = capfd.readouterr().err
    assert "a checkpoint of this model takes 3.3 MB, and the disk of" in printed
    assert "has 922 kB in all" in printed
    assert list(disk.path.iterdir()) == []
    disk.fill(600)
    assert dispatch(words) == EXIT_USAGE
    assert "WARNING: a checkpoint of this model takes 422 kB" in capfd.readouterr().out
    disk.free_space()
    assert dispatch([*words, "--train.steps", "2", "--checkpoint.every", "1", "--checkpoint.keep", "0"]) == EXIT_OK
