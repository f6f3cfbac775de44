"""What storage can do to a checkpoint at rest: all of it is found, and named."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import saving
from test_save import flip

from arriero.checkpoint.find import candidates
from arriero.checkpoint.verify import newest_intact_checkpoint, verify_checkpoint, verify_metadata
from arriero.common.errors import UserError
from arriero.distributed.parallel.mesh import Ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    done = saving.save(saving.saver(tmp_path_factory.mktemp("whole")), 5)
    return done[0].path


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / whole.name)
    return tmp_path / whole.name


def test_ten_thousand_flipped_bits_are_all_found(copy: Path) -> None:
    chance = random.Random(0)
    files = sorted(copy.iterdir())
    bits = [(path, bit) for path in files for bit in range(8 * path.stat().st_size)]
    assert len(bits) > 10_000
    for path, bit in chance.sample(bits, 10_000):
        flip(path, bit)
        assert verify_checkpoint(copy), f"bit {bit} of {path.name}"
        flip(path, bit)
    assert verify_checkpoint(copy) == []


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 3)


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def garble(path: Path) -> None:
    content = json.loads(path.read_text())
    content["files"]["state.json"]["sha256"] = "0" * 64
    path.write_text(json.dumps(content))


def link(path: Path) -> None:
    shutil.move(path, path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


DAMAGE: list[tuple[str, Callable[[Path], object], str]] = [
    ("rank-00000.safetensors", truncate, "rank-00000.safetensors: has "),
    ("rank-00000.safetensors", zero, "tensor embed.weight is damaged"),
    ("rank-00000.safetensors", Path.unlink, "rank-00000.safetensors: missing"),
    ("rank-00000.safetensors", link, "is a link"),
    ("rank-00000.json", truncate, "rank-00000.json: size or SHA-256 differs"),
    ("rank-00000.json", Path.unlink, "rank-00000.json: missing"),
    ("state.json", zero, "state.json: size or SHA-256 differs"),
    ("manifest.json", garble, "not the manifest that was committed"),
    ("manifest.json", Path.unlink, "manifest.json: missing"),
    ("COMMITTED", Path.unlink, "not committed"),
    ("COMMITTED", zero, "COMMITTED: not JSON"),
    ("rank-00001.safetensors", Path.touch, "rank-00001.safetensors: not in the manifest"),
]


@pytest.mark.parametrize(("name", "damage", "said"), DAMAGE, ids=[f"{n}-{d.__name__}" for n, d, _ in DAMAGE])
def test_damage_is_named(copy: Path, name: str, damage: Callable[[Path], object], said: str) -> None:
    damage(copy / name)
    wrong = verify_checkpoint(copy)
    assert any(said in line for line in wrong), wrong
    if "tensor" not in said:
        assert verify_metadata(copy)


def test_files_of_others_are_no_damage(copy: Path) -> None:
    """What a file manager or a person puts beside the files of the manifest is neither read nor an error."""
    for name in (".DS_Store", "Thumbs.db", "notes.txt"):
        (copy / name).write_bytes(b"x")
    (copy / "__MACOSX").mkdir()
    assert verify_checkpoint(copy) == []
    assert verify_metadata(copy) == []


def test_shards_of_two_checkpoints_cannot_be_swapped(copy: Path, tmp_path: Path) -> None:
    other = saving.save(saving.saver(tmp_path / "other"), 5, saving.state(99))[0].path
    shutil.copy(other / "rank-00000.safetensors", copy)
    assert len([line for line in verify_checkpoint(copy) if "is damaged" in line]) == len(saving.state())
    shutil.copy(other / "rank-00000.json", copy)
    assert any("rank-00000.json: size or SHA-256 differs" in line for line in verify_checkpoint(copy))


def test_shares_together_check_every_byte(copy: Path) -> None:
    flip(copy / "rank-00000.safetensors", 8 * 2000)
    found = [line for share in range(3) for line in verify_checkpoint(copy, share=share, of=3)]
    assert any("is damaged" in line for line in found)


def test_a_damaged_one_is_named_and_the_one_before_it_is_used(tmp_path: Path) -> None:
    one = saving.saver(tmp_path / "checkpoints")
    for step in (1, 2, 3):
        saving.save(one, step)
    damaged = tmp_path / "checkpoints/step-00000003/rank-00000.safetensors"
    flip(damaged, 8 * damaged.stat().st_size - 1)
    said: list[str] = []
    assert newest_intact_checkpoint(candidates(tmp_path), Ranks(), log=said.append).name == "step-00000002"
    assert any("DAMAGED" in line and str(damaged) in line and "tensor" in line for line in said)
    for step in (1, 2):
        (tmp_path / f"checkpoints/step-0000000{step}/state.json").write_text("{}")
    with pytest.raises(UserError, match="no checkpoint there is whole"):
        newest_intact_checkpoint(candidates(tmp_path), Ranks(), log=said.append)
