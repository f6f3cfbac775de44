from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import saving
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arriero.checkpoint import disk, retention
from arriero.checkpoint import save as save_module
from arriero.checkpoint.config import CheckpointConfig
from arriero.checkpoint.directory import step_directory
from arriero.checkpoint.find import committed
from arriero.checkpoint.load import CheckpointReader
from arriero.checkpoint.save import raise_if_last_save_failed
from arriero.checkpoint.verify import verify_checkpoint
from arriero.cli.torture.fault import Fault
from arriero.common.checkpoint_names import step_of
from arriero.common.errors import UserError


def read_all(path: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(path)
    return {key: reader.read(key) for key in reader.keys()}  # noqa: SIM118


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_what_is_saved_is_read_back_and_verifies(tmp_path: Path) -> None:
    done = saving.save(saving.saver(tmp_path), 7)
    assert [(s.step, s.problem, s.notice) for s in done] == [(7, "", "")]
    assert verify_checkpoint(done[0].path) == []
    assert same(read_all(done[0].path), saving.state(7))


def test_what_changes_while_it_is_written_does_not_leak_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go, write = threading.Event(), save_module.write_shards

    def late(path: Path, parts: dict[str, save_module.TensorShard]) -> None:
        assert go.wait(20)
        write(path, parts)

    monkeypatch.setattr(save_module, "write_shards", late)
    one, tensors = saving.saver(tmp_path), saving.state(1)
    one.save(1, saving.parts(tensors), state={}, texts={})
    assert one.results() == []  # the step goes on
    for tensor in tensors.values():
        tensor.fill_(0)
    go.set()
    one.wait()
    assert same(read_all(step_directory(tmp_path, 1)), saving.state(1))


def test_one_save_at_a_time_and_the_copies_are_reused(tmp_path: Path) -> None:
    one = saving.saver(tmp_path)
    one.allocate_buffers(saving.parts(saving.state()))
    one.wait()
    rooms = {key: room.data_ptr() for key, room in one._copies.items()}
    for step in (1, 2, 3):
        one.save(step, saving.parts(saving.state(step)), state={}, texts={})
    one.wait()
    assert [s.step for s in one.results()] == [1, 2, 3]
    assert rooms == {key: room.data_ptr() for key, room in one._copies.items()}
    assert rooms.keys() == saving.state().keys()
    for step in (1, 2, 3):
        assert same(read_all(step_directory(tmp_path, step)), saving.state(step))


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_failed_save_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, asynchronous: bool) -> None:
    monkeypatch.setattr(save_module, "RETRY_DELAY", 0.0)
    arm(monkeypatch, "EIO@4")
    done = saving.save(saving.saver(tmp_path, retries=1, asynchronous=asynchronous), 1)
    assert done[0].problem == ""
    assert verify_checkpoint(done[0].path) == []


def test_a_save_that_fails_for_good_is_told_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    one = saving.saver(tmp_path, retries=1)
    assert saving.save(one, 1)[0].problem == ""
    monkeypatch.setattr(save_module, "RETRY_DELAY", 0.0)
    arm(monkeypatch, "ENOSPC@2+")
    done = saving.save(one, 2)
    assert "step-00000002.tmp: No space left on device" in done[0].problem
    assert "B free there" in done[0].problem
    assert "tried 2 times" in done[0].problem
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    with pytest.raises(UserError, match="the last checkpoint, of step 2, could not be written"):
        raise_if_last_save_failed(done)
    disarm(monkeypatch)
    assert saving.save(one, 3)[0].problem == ""
    assert [p.name for p in committed(tmp_path)] == ["step-00000001", "step-00000003"]


def arm(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """Makes an operation from here on fail."""
    monkeypatch.setattr(disk, "before_operation", Fault.parse(fault))


def disarm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "before_operation", disk.no_fault)


def test_every_operation_can_fail_and_none_leaves_a_checkpoint_that_is_not_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """EIO at the first, the second, ... operation until a save no longer notices."""
    failed = 0
    for number in range(1, 60):
        root = tmp_path / str(number)
        one = saving.saver(root, keep=1)
        assert saving.save(one, 1)[0].problem == ""
        arm(monkeypatch, f"EIO@{number}")
        done = saving.save(one, 2)[0]
        disarm(monkeypatch)
        whole = committed(root)
        assert whole
        assert all(verify_checkpoint(path) == [] for path in whole)
        if done.problem:
            failed += 1
            assert step_of(whole[0]) == 1
        elif not done.notice:
            assert [step_of(p) for p in whole] == [2]
            break
    assert failed > 10
    assert not done.problem
    assert not done.notice


@given(
    steps=st.lists(st.integers(1, 40), min_size=1, max_size=12, unique=True).map(sorted), keep=st.integers(0, 4),
    every=st.sampled_from([0, 1, 3, 10]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_retention_keeps_the_newest_and_every_nth(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], keep: int, every: int
) -> None:  # fmt: skip
    root = tmp_path_factory.mktemp("kept")
    for step in steps:
        step_directory(root, step).mkdir()
        (step_directory(root, step) / "COMMITTED").touch()
    policy = CheckpointConfig(keep=keep, keep_every=every)
    for path in retention.expired(root, policy, is_intact=lambda path: True)[0]:
        retention.delete_checkpoint(path)
    left = [step_of(p) for p in committed(root)]
    newest = steps[-keep:] if keep else steps
    assert left == [s for s in steps if s in newest or (every and s % every == 0)]


def test_the_only_checkpoint_that_verifies_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk takes the new one and gives back something else: the old one must stay."""
    one = saving.saver(tmp_path, keep=1)
    saving.save(one, 1)
    commit = save_module.commit

    def commit_and_rot(temporary: Path, final: Path) -> None:
        commit(temporary, final)
        flip(final / "rank-00000.safetensors", 8 * (final / "rank-00000.safetensors").stat().st_size - 1)

    monkeypatch.setattr(save_module, "commit", commit_and_rot)
    done = saving.save(one, 2)[0]
    assert "does not read back; older checkpoints are kept" in done.notice
    assert [step_of(p) for p in committed(tmp_path)] == [1, 2]
    monkeypatch.setattr(save_module, "commit", commit)
    assert saving.save(one, 3)[0].notice == ""
    assert [step_of(p) for p in committed(tmp_path)] == [3]


def flip(path: Path, bit: int) -> None:
    """Changes one bit of a file, in place."""
    handle = os.open(path, os.O_RDWR)
    byte = os.pread(handle, 1, bit // 8)[0] ^ (1 << bit % 8)
    os.pwrite(handle, bytes([byte]), bit // 8)
    os.close(handle)


def test_only_what_verifies_counts_as_kept(tmp_path: Path) -> None:
    """Two damaged ones are the newest by name: what was just saved stays, and so does the one before it."""
    one = saving.saver(tmp_path)
    for step in (1, 2, 5, 6):
        assert saving.save(one, step)[0].problem == ""
    for step in (5, 6):
        data = step_directory(tmp_path, step) / "rank-00000.safetensors"
        flip(data, 8 * data.stat().st_size - 1)
    again = saving.saver(tmp_path, keep=2)  # a start that went on from step 2
    done = saving.save(again, 3)[0]
    assert [step_of(p) for p in committed(tmp_path)] == [2, 5, 6, 3]  # 1 is expired; damaged ones are left
    assert "step-00000006 is damaged, and does not count as kept" in done.notice
    assert saving.save(again, 4)[0].notice == ""
    assert [step_of(p) for p in committed(tmp_path)] == [3, 4]
    assert all(verify_checkpoint(path) == [] for path in committed(tmp_path))


def test_one_that_is_damaged_after_it_was_saved_does_not_count(tmp_path: Path) -> None:
    one = saving.saver(tmp_path, keep=2)
    for step in (1, 2):
        saving.save(one, step)
    flip(step_directory(tmp_path, 2) / "rank-00000.safetensors", 8000)
    saving.save(one, 3)
    assert [step_of(p) for p in committed(tmp_path)] == [1, 2, 3]
    saving.save(one, 4)
    assert [step_of(p) for p in committed(tmp_path)] == [3, 4]


FOREIGN = ["step-00000002-hf", "step-2", "step-000000002", "step-²", "step-0000000²", "step-", "step-00000002.tmp2",
           "notes", "step-00000002.txt",
           "STEP-00000002", " step-00000002", "step-00000002\n", "step-\u0660\u0660\u0662"]  # fmt: skip


def test_what_arriero_did_not_write_is_never_touched(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "step-00000008").mkdir(parents=True)
    root = tmp_path / "checkpoints"
    for name in FOREIGN:
        for path in (root / name, root / f"{name}.tmp"):
            path.mkdir(parents=True)
            (path / "model.safetensors").write_text("mine")
    for name in ("step-00000007", "step-00000007.tmp"):  # their names are right, their content is not
        (root / name).mkdir()
        (root / name / "notes.txt").write_text("mine")
    (root / "step-00000008").symlink_to(elsewhere / "step-00000008")
    (root / "step-00000009").write_text("a file")
    before = sorted((str(p), p.lstat().st_mtime_ns) for p in root.rglob("*"))
    (root / "step-00000005.tmp").mkdir()  # a kill left these
    (root / "step-00000006").mkdir()
    (root / "step-00000006/state.json").write_text("{}")
    one = saving.saver(root, keep=1)
    for step in (10, 11):
        assert saving.save(one, step)[0].problem == ""
    assert [step_of(p) for p in committed(root)] == [11]
    ours = {str(root / "step-00000011"), *map(str, (root / "step-00000011").iterdir())}
    assert sorted((str(p), p.lstat().st_mtime_ns) for p in root.rglob("*") if str(p) not in ours) == before
    assert "in the way" in saving.save(one, 7)[0].problem or "File exists" in saving.save(one, 7)[0].problem
    (root / "step-00000007.tmp/notes.txt").unlink()
    (root / "step-00000007.tmp").rmdir()
    problem = saving.save(one, 7)[0].problem
    assert "in the way" in problem
    assert "free there" not in problem  # of a full disk only
    assert (root / "step-00000007/notes.txt").read_text() == "mine"
    assert list(elsewhere.iterdir()) == [elsewhere / "step-00000008"]


def test_a_checkpoint_with_files_of_others_in_it_counts_and_is_not_deleted(tmp_path: Path) -> None:
    one = saving.saver(tmp_path, keep=1)
    saving.save(one, 1)
    (step_directory(tmp_path, 1) / "notes.txt").write_text("mine")
    for step in (2, 3):
        assert saving.save(one, step)[0].notice == ""
    assert [step_of(p) for p in committed(tmp_path)] == [1, 3]
    (step_directory(tmp_path, 3) / ".DS_Store").write_text("a file manager's")
    again = saving.saver(tmp_path, keep=2)
    for step in (4, 5):
        assert saving.save(again, step)[0].notice == ""
    assert [step_of(p) for p in committed(tmp_path)] == [1, 3, 4, 5]
