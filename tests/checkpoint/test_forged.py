"""Checkpoints that a stranger made, digests and all: refused in a sentence, at once and in little memory."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forging import change_json, seal
from hypothesis import given
from hypothesis import strategies as st

from arriero.checkpoint import verify as verify_module
from arriero.checkpoint.directory import step_directory
from arriero.checkpoint.find import committed
from arriero.checkpoint.state import load_state
from arriero.checkpoint.tensors.safetensors_file import build_header
from arriero.checkpoint.verify import newest_intact_checkpoint, verify_checkpoint
from arriero.cli.main import dispatch
from arriero.common.errors import EXIT_CHECK_FAILED, EXIT_OK, EXIT_USAGE, UserError
from arriero.distributed.parallel.mesh import Ranks
from toy import CONFIG, write_recipe

INDEX, DATA = "rank-00000.json", "rank-00000.safetensors"


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with two checkpoints."""
    root = tmp_path_factory.mktemp("begun")
    words = ["pretrain", str(write_recipe(root)), "--train.steps", "4", "--checkpoint.every", "2"]
    assert dispatch(words) == EXIT_OK
    return root / "run"


@pytest.fixture
def newest(begun: Path, tmp_path: Path) -> Path:
    shutil.copytree(begun, tmp_path / "run")
    return step_directory(tmp_path / "run/checkpoints", 4)


def state(**values: Any) -> Callable[[Path], object]:
    return lambda path: change_json(path / "state.json", **values)


def sparse(path: Path) -> None:
    """A norm's weight of 9 GB, which takes no room on the disk."""
    count = 9 << 28
    header, starts, size = build_header({"model.norm.weight": ("F32", (count,))})
    with open(path / DATA, "wb") as file:
        file.write(header)
        file.truncate(size)
    entry = {"shape": [count], "offset": [0], "part": [count], "start": starts["model.norm.weight"], "dtype": "F32",
             "sha256": ["0" * 64] * (9 << 30 >> 30)}  # fmt: skip
    index = {"bytes": size, "header": "0" * 64, "block": 1 << 30, "tensors": {"model.norm.weight": entry}}
    (path / INDEX).write_text(json.dumps(index))


def many_blocks(path: Path) -> None:
    change_json(path / INDEX, block=1)


FORGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "negative step": (state(step=-4), "step is -4"),
    "step of another": (state(step=2, updates=2), "named after another"),
    "step 2^62": (state(step=2**62), "step is 46"),
    "step text": (state(step="4"), 'step is "4", not a whole number'),
    "step true": (state(step=True), "step is true"),
    "step 4.0": (state(step=4.0), "step is 4.0"),
    "no step": (state(step=...), "lacks 'step'"),
    "updates": (state(updates=5), "updates is 5, more than the 4 steps"),
    "negative updates": (state(updates=-1), "updates is -1"),
    "unknown key": (state(loss_scale__x=1), "unknown key 'x'"),
    "escapes": (state(**{"loss_scale__\x1b[2J": 1}), "unknown key '\\x1b[2J'"),
    "scale": (state(loss_scale__scale=0.0), "loss_scale.scale is 0.0"),
    "scale NaN": (state(loss_scale__scale=float("nan")), "loss_scale.scale is nan"),
    "window": (state(loss_scale__window=-1), "loss_scale.window is -1"),
    "no window": (state(loss_scale__window=...), "lacks 'window'"),
    "scale list": (state(loss_scale=[]), "loss_scale is a list"),
    "losses": (state(recent_losses=["x"]), "recent_losses[0]"),
    "losses infinite": (state(recent_losses=[float("inf")]), "finite numbers"),
    "windows": (state(skipped_windows=[1]), "skipped_windows[0]"),
    "windows of three": (state(skipped_windows=[[1, 2, 3]]), "pairs"),
    "windows negative": (state(skipped_windows=[[-1, 2]]), "pairs"),
    "inputs": (state(inputs=[1]), "inputs is a list"),
    "inputs inner": (state(inputs={"data": 1}), "inputs.data is 1"),
    "save": (state(save="x"), 'save is "x"'),
    "list": (lambda path: (path / "state.json").write_text("[]"), "is a list, not an object"),
    "9 GB": (sparse, "in this model [32]"),
    "small blocks": (many_blocks, "places tensors outside it"),
    "unknown tensor": (lambda path: change_json(path / INDEX, tensors={
        "x": {"shape": [1], "offset": [0], "part": [1], "start": 8, "dtype": "F32", "sha256": ["0" * 64]}
    }), "x is no tensor of this model"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FORGED)
def test_a_forged_checkpoint_is_named_and_the_one_before_it_used(newest: Path, kind: str) -> None:
    forge, said = FORGED[kind]
    forge(newest)
    seal(newest)
    told: list[str] = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = newest_intact_checkpoint(committed(newest.parent)[::-1], Ranks(), log=told.append, model=CONFIG)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kilobytes
    assert found.name == "step-00000002"
    assert any("DAMAGED" in line and said in line for line in told), told
    assert all("\x1b" not in line for line in told)


def test_a_huge_block_is_read_in_small_pieces(newest: Path) -> None:
    sparse(newest)
    blocks = [verify_module.Block(newest / DATA, "x", 0, 1 << 28, "0")]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert verify_module.check_blocks(blocks) == [f"{newest / DATA}: x is damaged: its SHA-256 differs"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([DATA] * 10_000, f"names {DATA} twice"),
        ([DATA, "state.json"], "names state.json, which is no data file"),
        (["rank-00001.safetensors"], "lacks the index of rank-00001.safetensors"),
        (["rank-²²²²².safetensors"], "no data file"),
        ([""], "outside its directory"),
    ],
)
def test_a_manifest_names_each_data_file_once(newest: Path, data: list[str], said: str) -> None:
    seal(newest, data=data)
    wrong = verify_checkpoint(newest)
    assert len(wrong) == 1
    assert said in wrong[0]


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)


def nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)


@given(st.recursive(LEAVES, nested),
       st.sampled_from(["step", "updates", "save", "seed", "processes", "consumed_samples", "loss_scale", "inputs",
                        "versions", "skipped_windows", "recent_losses", "skipped_samples", "loss_scale__scale",
                        "loss_scale__clean"]))  # fmt: skip
def test_any_value_of_any_key_of_the_state_fits_or_is_an_error_with_the_files_name(
    begun: Path, tmp_path_factory: pytest.TempPathFactory, value: Any, key: str
) -> None:  # fmt: skip
    path = tmp_path_factory.getbasetemp() / "step-00000004"
    path.mkdir(exist_ok=True)
    shutil.copy(begun / "checkpoints/step-00000004/state.json", path)
    change_json(path / "state.json", **{key: value})
    try:
        found = load_state(path, {"step": int, "loss_scale": {"scale": float}})
    except UserError as error:
        assert str(path / "state.json") in str(error)  # noqa: PT017
        return
    assert found["step"] == 4
    assert 0 < found["loss_scale"]["scale"] < float("inf")


def test_names_that_are_no_checkpoints_are_none(newest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("step-²", "step-5", "step-000000005", "step-٠٠٠٠٠٠٠٥", "step-00000005 ", "step--0000005"):
        shutil.copytree(newest, newest.parent / name)
    assert [p.name for p in committed(newest.parent)] == ["step-00000002", "step-00000004"]
    assert dispatch(["pretrain", "--resume", str(newest.parent.parent)]) == EXIT_OK
    assert f"resumed from {newest} after step 4" in capsys.readouterr().out


def test_inspect_and_export_of_what_is_not_whole(newest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line that is no record is named; a run without a checkpoint is a run."""
    run = newest.parent.parent
    with open(run / "metrics.jsonl", "a") as file:
        file.write("{broken\n")
    assert dispatch(["inspect", str(run)]) == EXIT_CHECK_FAILED
    assert "metrics.jsonl, line 5: not JSON" in capsys.readouterr().out
    shutil.rmtree(run / "checkpoints")
    for _ in range(2):
        assert dispatch(["export", str(run), str(run.parent / "hf")]) == EXIT_USAGE
        assert "holds no checkpoint" in capsys.readouterr().err
        (run / "checkpoints").mkdir(exist_ok=True)
