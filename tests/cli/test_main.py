"""The command line as a user meets it: what works, and what is refused with exit code 2, one message, no traceback."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

import toy
from arriero.cli import main as cli
from programs import arriero

pytestmark = pytest.mark.slow


def test_overview_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.dispatch([]) == 0
    printed = capsys.readouterr().out
    assert all(verb in printed for verb in cli.VERBS)
    assert cli.dispatch(["--version"]) == 0
    assert cli.dispatch(["pretrian"]) == 2
    assert "did you mean 'pretrain'" in capsys.readouterr().err


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_of_every_verb(verb: str) -> None:
    printed = arriero(verb, "--help")
    assert re.match(rf"usage: arriero {verb}\b", printed)
    assert "-h, --help" in printed
    assert "Traceback" not in printed


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on one process, through the command line, with validation."""
    root = tmp_path_factory.mktemp("cli")
    recipe = toy.write_recipe(root)
    printed = arriero(
        "pretrain", recipe, "--train.eval-every", "3", "--train.eval-batches", "1", "--checkpoint.every", "2"
    )
    assert "iteration        6/       6" in printed
    assert "validation loss at iteration 3" in printed
    return root


def test_run_directory(run: Path) -> None:
    out = run / "run"
    assert {p.name for p in out.iterdir()} == {
        "recipe.toml", "env.json", "metrics.jsonl", "events.jsonl", "log.txt", "lock.json", "checkpoints", "loss.png"
    }  # fmt: skip
    assert [p.name for p in sorted((out / "checkpoints").iterdir())] == ["step-00000004", "step-00000006"]  # keep = 2
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["iteration"] for r in records if r["kind"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert [r["iteration"] for r in records if r["kind"] == "validation"] == [3, 6]
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert "iteration        6/" in (out / "log.txt").read_text()


def test_resume_extends_and_equals_a_longer_run(run: Path, tmp_path: Path) -> None:
    """4 steps more on two processes, from the saved recipe alone; compared with a run that was never stopped."""
    base = [run / "toy.toml", "--schedule.decay-steps", "10"]
    arriero("pretrain", *base, "--train.steps", "6", "--out", tmp_path / "a")
    arriero("pretrain", *base, "--train.steps", "10", "--out", tmp_path / "b")
    printed = arriero(
        "pretrain",
        "--resume",
        tmp_path / "a",
        "--train.steps",
        "10",
        "--nproc-per-node",
        "2",
        "--log.style",
        "megatron",
    )
    assert "resumed from" in printed
    assert "throughput per GPU (TFLOP/s/GPU)" in printed
    arriero("compare", tmp_path / "b", tmp_path / "a", "--max-rel", "1e-5")
    arriero("inspect", tmp_path / "a", "--verify")


def test_start_from_hugging_face(run: Path, tmp_path: Path) -> None:
    """Export, then `--init`: the first loss is the exported model's, not ln V; other weights differ."""
    arriero("export", run / "run", tmp_path / "hf")
    arriero("pretrain", run / "toy.toml", "--model", "", "--init", tmp_path / "hf", "--out", tmp_path / "c")
    first = json.loads((tmp_path / "c" / "metrics.jsonl").read_text().splitlines()[0])
    last = json.loads((run / "run" / "metrics.jsonl").read_text().splitlines()[-2])
    assert first["lm_loss"] < 5.3  # ln 259 is 5.56
    assert first["lm_loss"] == pytest.approx(last["lm_loss"], abs=0.35)
    refused = arriero("pretrain", run / "toy.toml", "--init", tmp_path / "nowhere", "--out", tmp_path / "d", code=2)
    assert "nowhere" in refused
    assert not (tmp_path / "d").exists()


REFUSED = {
    "unknown key": (["--train.stesp", "3"], "did you mean 'train.steps'"),
    "batch": (["--train.global-batch", "7"], "use train.global_batch 6 or 8"),
    "tensor parallel": (["--parallel.tensor-parallel", "3"], "use one of 1, 2"),
    "vocabulary": (["--model", "SMALL"], "the model's vocabulary has 100 entries"),
    "missing data": (["--data.prefix", "nowhere"], "data.prefix: no data set at nowhere"),
    "too short": (["--train.sequence-length", "100000"], "is shorter than one sample of 100000 tokens"),
    "resume nothing": (["--resume", "EMPTY"], "holds no checkpoint"),
    "resume checkpoints": (["--resume", "RUNS_CHECKPOINTS"], "fix: name the run's directory: --resume "),
    "resume missing": (["--resume", "NOWHERE"], "no such directory"),
    "device": (["--device", "npu"], "device 'npu' is not available"),
    "stray word": (["stray"], "Unrecognized options: stray"),
    "no value": (["--train.steps"], "train.steps: Missing value"),
    "watch": (["--watch.seconds", "1e-320"], "give a number from 0.1 on, or 0 to turn it off"),
    "processes": (["--nproc-per-node", "-1"], "--nproc-per-node is -1\n  fix: give a whole number from 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_one_message_and_nothing_written(run: Path, tmp_path: Path, name: str) -> None:
    words, message = REFUSED[name]
    toy.write_config(tmp_path / "small", vocab_size=100)
    (tmp_path / "EMPTY").mkdir()
    words = [w.replace("SMALL", str(tmp_path / "small")) for w in words]
    words = [w.replace("RUNS_CHECKPOINTS", str(run / "run" / "checkpoints")) for w in words]
    words = [str(tmp_path / w) if w in ("EMPTY", "NOWHERE") else w for w in words]
    printed = arriero("pretrain", run / "toy.toml", "--out", tmp_path / "out", *words, code=2)
    assert message in printed
    assert "Traceback" not in printed
    assert printed.count("arriero: ") == 1
    assert not (tmp_path / "out").exists()
    assert list((tmp_path / "EMPTY").iterdir()) == []


def test_a_finished_run_is_not_overwritten(run: Path) -> None:
    before = (run / "run" / "metrics.jsonl").read_bytes()
    printed = arriero("pretrain", run / "toy.toml", code=2)
    assert "already holds a run" in printed
    assert f"--resume {run / 'run'}" in printed
    assert (run / "run" / "metrics.jsonl").read_bytes() == before


def test_nothing_is_written_among_a_runs_checkpoints(run: Path) -> None:
    checkpoints = run / "run" / "checkpoints"
    before = sorted(checkpoints.iterdir())
    refused = "where only a run's checkpoints belong"
    assert refused in arriero("pretrain", run / "toy.toml", "--out", checkpoints / "x", code=2)
    assert refused in arriero("torture", "--kills", "1", "--out", checkpoints / "x" / "y", code=2)
    assert sorted(checkpoints.iterdir()) == before


def test_no_recipe_and_missing_recipe() -> None:
    assert "no recipe named" in arriero("pretrain", code=2)
    assert "no such file" in arriero("pretrain", "nowhere.toml", "--out", "x", code=2)


def test_inspect_names_what_it_does_not_know(tmp_path: Path) -> None:
    assert "no such file" in arriero("inspect", tmp_path / "nothing", code=2)
    (tmp_path / "empty").mkdir()
    assert "not of a kind" in arriero("inspect", tmp_path / "empty", code=2)


UNEXPECTED = {
    "full": (OSError(28, "No space left on device"), "No space left on device"),
    "named": (PermissionError(13, "Permission denied", "/a\x1b[31mb"), r"/a\x1b[31mb: Permission denied"),
    "long": (OSError(36, "File name too long", "x" * 5000), "File name too long"),
    "two names": (OSError(18, "Invalid cross-device link", "a", None, "b"), "a -> b: Invalid cross-device link"),
    "null": (ValueError("embedded null byte"), "embedded null byte"),
    "surrogate": (UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates not allowed"), "surrogates not allowed"),
    "deep": (RecursionError("maximum recursion depth exceeded"), "nested too deep"),
    "memory": (MemoryError("Unable to allocate 8.00 TiB"), "memory does not suffice: Unable to allocate 8.00 TiB"),
    "torch's memory": (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate"), "memory does not suffice"),
    "npu": (RuntimeError("Failed to load the backend extension: torch_npu. You can"), "torch cannot load torch_npu"),
}


@pytest.mark.parametrize("name", UNEXPECTED)
def test_an_error_that_nobody_expected_is_a_sentence(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error, said = UNEXPECTED[name]

    def fail(*_: object) -> int:
        raise error

    monkeypatch.setattr(cli, "run_verb", fail)
    assert cli.dispatch(["inspect", "x"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("arriero: ")
    assert said in printed
    assert len(printed) < 1000
    assert "\x1b" not in printed


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (ValueError("odd"), KeyError("x"), BrokenPipeError(32, "Broken pipe"), ConnectionResetError()):

        def fail(*_: object, error: Exception = error) -> int:
            raise error

        monkeypatch.setattr(cli, "run_verb", fail)
        with pytest.raises(type(error)):
            cli.dispatch(["inspect", "x"])


def test_torch_npu_without_its_libraries_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch does where torch_npu is installed and CANN is not: `import torch` fails."""
    (tmp_path / "torch_npu.py").write_text("raise ImportError('libhccl.so: cannot open shared object file')\n")
    (tmp_path / "torch_npu-2.dist-info").mkdir()
    (tmp_path / "torch_npu-2.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: torch-npu\nVersion: 2\n")
    (tmp_path / "torch_npu-2.dist-info/entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:load\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    printed = arriero("pretrain", "demo", "--device", "npu", code=2)
    assert "torch cannot load torch_npu: libhccl.so: cannot open shared object file" in printed
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in printed
    assert "Traceback" not in printed


def test_every_verb_that_trains_asks_the_same_of_the_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import arriero.cli.bench.command
    import arriero.train.run

    for module in (arriero.cli.bench.command, arriero.train.run):
        monkeypatch.setattr(module, "device_type", lambda _: "npu")
        monkeypatch.setattr(module, "process_count", lambda *_: 1)
    flags = ["--train.float8", "tensorwise", "--train.compile", "true"]
    for verb in ("bench", "pretrain"):
        assert cli.dispatch([verb, "demo", *flags]) == 2
        printed = capsys.readouterr().err
        assert "train.float8 does not work on npu" in printed
        assert "train.compile has not been tried on npu" in printed
