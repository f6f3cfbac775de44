"""Files that a stranger made: whatever is wrong with them, one sentence, exit code 2, nothing run and nothing written.

An audit hook (sys.addaudithook) sees what the interpreter does meanwhile: no process is started, no pickle looks for a
name, no source is compiled, and no file is opened outside the directory of the case and the interpreter's own.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pyarrow
import pytest
import torch
import torch.distributed.checkpoint as dcp
from small_inputs import train_sentencepiece
from small_models import TINY, random_weights, save_hf
from test_foreign import to_meta

import arriero
import toy
from arriero.checkpoint.load import CheckpointReader
from arriero.checkpoint.verify import newest_intact_checkpoint
from arriero.cli.convert import ConvertArgs, run
from arriero.cli.main import dispatch
from arriero.common.errors import UserError
from arriero.common.settings import parse
from arriero.common.toml import file_settings, to_toml
from arriero.data import inputs, readers
from arriero.distributed.parallel.mesh import Ranks
from arriero.train.loop import ResumePlan, train
from arriero.train.recipe import Recipe

pytestmark = pytest.mark.slow

Damage = Callable[[Path], object]
STARTS = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "pty.spawn", "pickle.find_class",
          "socket.connect", "ctypes.dlopen")  # fmt: skip
_seen: list[str] | None = None
_home = ""
OWN = tuple(
    map(str, (sys.prefix, sys.base_prefix, Path(arriero.__file__).parents[2], "/proc", "/dev", "/sys", "/etc/ssl"))
)


def _watch(event: str, args: tuple[Any, ...]) -> None:
    """Notes what a hostile file might want, while `_seen` is a list. A hook can't be taken away again."""
    if _seen is None:
        return
    if event == "subprocess.Popen" and list(args[1][1:4]) == ["-P", "-m", "arriero.data.column_reader"]:
        return  # the one process that is meant: it reads a parquet or arrow file, with a bound on its memory
    if event in STARTS or (event == "compile" and args[0] is not None and b"mark" in str(args[0]).encode()):
        _seen.append(f"{event} {args}")
    if event == "open" and isinstance(args[0], (str, bytes)):
        path = os.path.realpath(os.fsdecode(args[0]))
        if not path.startswith((_home, *OWN)):
            _seen.append(f"open {path}")


sys.addaudithook(_watch)


class Attack:
    """Pickled, it asks the reader to make a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of everything that is read, whole."""
    root = tmp_path_factory.mktemp("good")
    weights = random_weights(TINY)
    save_hf(root / "hf", TINY, weights)
    save_hf(root / "sharded", TINY, weights, shards=2)
    save_hf(root / "bin", TINY, weights)
    (root / "bin/model.safetensors").unlink()
    torch.save(weights, root / "bin/pytorch_model.bin")
    train_sentencepiece(root / "hf/tokenizer.model", vocab_size=400)
    with contextlib.redirect_stdout(io.StringIO()):
        run(ConvertArgs(root / "sharded", root / "megatron", "megatron"))
        run(ConvertArgs(root / "sharded", root / "deepspeed", "ascendspeed", deepspeed=True))
        for file in (root / "megatron/release/mp_rank_00/model_optim_rng.pt",
                     root / "deepspeed/release/mp_rank_00_model_states.pt"):  # fmt: skip
            payload = torch.load(file, weights_only=False)
            torch.save(payload, file)  # torch's own archive, which zipfile rewrites below
            if "model" in payload:
                model = {k: v for k, v in payload["model"].items() if v is not None}
                dcp.save(model, checkpoint_id=root / "dist", no_dist=True)
        shutil.copy(root / "hf/config.json", root / "dist")
        (root / "meta").mkdir()
        torch.save(to_meta(weights, TINY), root / "meta/consolidated.00.pth")
        params = {"dim": 32, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5}
        (root / "meta/params.json").write_text(json.dumps(params))
        recipe = parse(Recipe, file_settings(toy.write_recipe(root)), prog="test")
        recipe = replace(recipe, out=str(root / "run"), train=replace(recipe.train, steps=2))
        train(recipe, Ranks(), local_rank=0, device_kind="cpu", plan=ResumePlan())
        (root / "run/recipe.toml").write_text(to_toml(recipe))
        (root / "text").mkdir()
        (root / "text/a.txt").write_text("hello world\nsome words\n")
        shutil.copytree(root / "hf", root / "tok")
        (root / "tok/tokenizer_config.json").write_text("{}")
        assert (
            dispatch(["prepare", str(root / "text"), "--tokenizer", str(root / "tok"), "--out", str(root / "d/set")])
            == 0
        )
    return root


CHECKPOINT = "run/checkpoints/step-00000002"
COMMANDS = {  # by the directory of the damaged file; {} is the case's own directory
    "hf": "export {}/hf {}/out/x", "sharded": "export {}/sharded {}/out/x", "bin": "export {}/bin {}/out/x",
    "megatron": "convert {}/megatron {}/out/x --to hf", "deepspeed": "convert {}/deepspeed {}/out/x --to hf",
    "dist": "convert {}/dist {}/out/x --to hf", "meta": "convert {}/meta {}/out/x --to hf",
    "run": "export {}/run {}/out/x", "tok": "prepare {}/text/a.txt --tokenizer {}/tok --out {}/out/set --workers 1",
    "d": "prepare --merge {}/d/set {}/d/set --out {}/out/set", "recipe": "pretrain {}/recipe/r.toml",
    "text": "prepare {}/text --tokenizer {}/tok --out {}/out/set --workers 1",
    "logs": "compare {}/logs {}/logs --out {}/out/report",
}  # fmt: skip


@contextlib.contextmanager
def watched(home: Path) -> Iterator[list[str]]:
    global _seen, _home  # noqa: PLW0603 - the hook is the interpreter's, there is one
    _seen, _home = [], str(home.resolve())
    try:
        yield _seen
    finally:
        _seen = None


def refused(good: Path, home: Path, file: str, damage: Damage, capsys: pytest.CaptureFixture[str]) -> str:
    """Damages a copy of `file` and runs its command; what was printed, after all that must not happen is excluded."""
    kind = file.partition("/")[0]
    for name in {kind, "text", "tok"}:
        if (good / name).exists():
            shutil.copytree(good / name, home / name, symlinks=True)
    (home / file).parent.mkdir(parents=True, exist_ok=True)
    (home / "out").mkdir()
    damage(home / file)
    words = COMMANDS[kind].replace("{}", str(home)).split()
    before = set(threading.enumerate())
    with watched(home) as seen:
        code = dispatch(words)
        for thread in set(threading.enumerate()) - before:  # such as the one that hashes sources: it must not be seen
            thread.join()  # by the next case, nor escape this one
    printed = "".join(capsys.readouterr())
    assert code == 2, printed
    assert "Traceback" not in printed
    assert "fix: " in printed or kind == "recipe"
    assert seen == []
    assert list((home / "out").rglob("*")) == []
    assert not list(home.rglob("mark"))
    return printed


@pytest.fixture(scope="module", autouse=True)
def _warm(good: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Every command once on what is whole: it works, and all that it imports is there before the hook looks."""
    out = tmp_path_factory.mktemp("warm") / "out"
    for kind, command in COMMANDS.items():
        if kind not in ("recipe", "logs"):
            words = command.replace("{}/out", str(out / kind)).replace("{}", str(good)).split()
            assert dispatch(words) == 0, command
    assert dispatch(["compare", str(good / "run"), str(good / "run"), "--out", str(out / "report")]) == 0
    assert dispatch(["pretrain", str(out / "none.toml")]) == 2


def write(content: bytes | str) -> Damage:
    return lambda path: path.write_bytes(content.encode() if isinstance(content, str) else content)


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def huge(path: Path) -> None:
    with path.open("ab") as file:
        file.truncate(100_000_001)  # sparse


JSON = {
    "empty": write(b""), "deep": write(b"[" * 100_000), "deep object": write(b'{"a":' * 100_000), "list": write(b"[]"),
    "not UTF-8": write(b"\xff\xfe"), "digits": write(b"9" * 5000), "null": write(b"null"),
}  # fmt: skip
JSON_FILES = (
    "hf/config.json", "sharded/model.safetensors.index.json", "meta/params.json", f"{CHECKPOINT}/rank-00000.json",
    f"{CHECKPOINT}/config.json", "d/set.manifest.json", "tok/tokenizer_config.json", "logs/metrics.jsonl",
)  # fmt: skip


@pytest.mark.parametrize("damage", JSON)
@pytest.mark.parametrize("file", JSON_FILES)
def test_json(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, damage: str) -> None:
    assert Path(file).name in refused(good, tmp_path, file, JSON[damage], capsys)


def change(**values: Any) -> Damage:
    """Replaces keys of a JSON file: a__b is b within a."""

    def damage(path: Path) -> None:
        tree = json.loads(path.read_text())
        for key, value in values.items():
            *outer, last = key.split("__")
            inner = tree
            for name in outer:
                inner = inner[name]
            inner[last] = value
        path.write_text(json.dumps(tree))

    return damage


OUTPUT = {
    "dtype": "uint16",
    "sequences": 1,
    "documents": 1,
    "tokens": 1,
    "bin_bytes": 2,
    "bin_sha256": "",
    "idx_sha256": "",
}
VALUES = [
    ("hf/config.json", change(num_hidden_layers=10**12)), ("hf/config.json", change(vocab_size=2**40)),
    ("hf/config.json", change(num_key_value_heads="x")), ("hf/config.json", change(rope_scaling=True)),
    ("hf/config.json", change(rope_parameters={"rope_theta": []})),
    ("hf/config.json", change(rms_norm_eps=float("nan"))),
    ("sharded/model.safetensors.index.json", change(weight_map={"a": "../hf/model.safetensors"})),
    ("sharded/model.safetensors.index.json", change(weight_map={"a": "/etc/passwd"})),
    ("sharded/model.safetensors.index.json", change(weight_map={"a": 1})),
    ("meta/params.json", change(n_layers=10**12)), ("meta/params.json", change(n_heads=0)),
    ("meta/params.json", change(norm_eps=[1])),
    (f"{CHECKPOINT}/rank-00000.json", change(tensors={"model.norm.weight": {"shape": [2**62], "offset": [0]}})),
    (f"{CHECKPOINT}/rank-00000.json", change(tensors={"model.norm.weight": {"shape": [32], "offset": [-1]}})),
    ("d/set.manifest.json", change(outputs={"../../etc/passwd": OUTPUT})),
    ("d/set.manifest.json", change(outputs={"x": {}})), ("d/set.manifest.json", change(sources=1)),
    ("logs/metrics.jsonl", write(json.dumps({"kind": "step", "iteration": 1, "lm_loss": 10**400}) + "\n")),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(VALUES)))
def test_values(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: int) -> None:
    file, damage = VALUES[case]
    refused(good, tmp_path, file, damage, capsys)


def link(path: Path) -> None:
    """Moves a file out of its directory and leaves a link to it."""
    away = path.parents[1].parent / "elsewhere"
    away.mkdir(exist_ok=True)
    shutil.move(path, away / path.name)
    path.symlink_to(away / path.name)


READ = (
    "hf/config.json", "hf/model.safetensors", "hf/tokenizer.model", "sharded/model-00001-of-00002.safetensors",
    "sharded/model.safetensors.index.json", "bin/pytorch_model.bin", "megatron/latest_checkpointed_iteration.txt",
    "megatron/release/mp_rank_00/model_optim_rng.pt", "deepspeed/release/mp_rank_00_model_states.pt", "dist/.metadata",
    "dist/__0_0.distcp", "meta/params.json", "meta/consolidated.00.pth", f"{CHECKPOINT}/rank-00000.safetensors",
    f"{CHECKPOINT}/rank-00000.json", f"{CHECKPOINT}/config.json", "tok/tokenizer.model", "tok/tokenizer_config.json",
    "text/a.txt",
)  # fmt: skip


@pytest.mark.parametrize("file", READ)
def test_a_link_out_of_the_directory(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str) -> None:
    assert "is a link out of its directory" in refused(good, tmp_path, file, link, capsys)


def test_the_links_of_hugging_faces_cache_are_followed(good: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots/abc"
    shutil.copytree(good / "sharded", blobs)
    snapshot.mkdir(parents=True)
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(f"../../blobs/{blob.name}")
    assert dispatch(["export", str(snapshot), str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("file", ["hf/config.json", "sharded/model.safetensors.index.json", "d/set.manifest.json"])
@pytest.mark.parametrize("damage", [pipe, huge])
def test_no_regular_or_a_huge_file(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, damage: Damage
) -> None:
    refused(good, tmp_path, file, damage, capsys)


def attack(path: Path) -> None:
    if path.name == ".metadata":
        path.write_bytes(pickle.dumps(Attack(path.parent / "mark")))
    else:
        torch.save({"model": {"x": Attack(path.parent / "mark")}}, path)


def laughs(path: Path) -> None:
    """A dictionary whose key is 2^60 nested tuples, in 300 bytes: to hash it takes longer than anyone waits."""
    raw = b"\x80\x02}K\x01" + b"".join(b"q\x00h\x00\x86" for _ in range(60)) + b"K\x01s."
    if path.name == ".metadata":
        path.write_bytes(raw)
        return
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", raw)


def branches(path: Path) -> None:
    """Dictionaries that hold one another twice, 60 deep: a tree of 2^60 branches."""
    tree: dict[str, Any] = {}
    for _ in range(60):
        tree = {"a": tree, "b": tree}
    torch.save({"model": tree, "module": tree, **tree}, path)


PICKLES = [f for f in READ if f.endswith((".bin", ".pt", ".pth", ".metadata", ".distcp"))]


@pytest.mark.parametrize("damage", [attack, laughs, branches])
@pytest.mark.parametrize("file", PICKLES)
def test_pickles(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, damage: Damage) -> None:
    if damage is branches and "dist" in file:
        damage = laughs  # a DCP file is a list of tensors: no tree is walked
    printed = refused(good, tmp_path, file, damage, capsys)
    assert damage is not attack or "distcp" in file or "system, which no checkpoint needs" in printed


def header(**entry: Any) -> Damage:
    """A safetensors file with one tensor whose entry is changed."""
    whole = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | entry
    text = json.dumps({"a": whole, "b": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}}).encode()
    return write(struct.pack("<Q", len(text)) + text + bytes(12))


HEADERS = {
    "length": write(struct.pack("<Q", 2**63) + b"{}"), "overlap": header(data_offsets=[4, 12]),
    "outside": header(data_offsets=[0, 2**62]), "dtype": header(dtype="PICKLE"), "negative": header(shape=[-2]),
    "deep": write(struct.pack("<Q", 100_000) + b"[" * 100_000), "cut": write(b"\1"),
}  # fmt: skip


@pytest.mark.parametrize("damage", HEADERS)
@pytest.mark.parametrize("file", [f for f in READ if f.endswith(".safetensors")])
def test_safetensors(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, damage: str) -> None:
    assert Path(file).name in refused(good, tmp_path, file, HEADERS[damage], capsys)


def arrow_beyond_its_file(path: Path) -> None:
    """An offset of a string column that leads out of the buffer, where arrow itself would read."""
    batch = pyarrow.record_batch({"text": ["aaaa", "bbbb", "cccc"]})
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_file(sink, batch.schema) as stream:
        stream.write_batch(batch)
    raw = sink.getvalue().to_pybytes()
    good, bad = struct.pack("<4i", 0, 4, 8, 12), struct.pack("<4i", 0, 4, 2**30, 12)
    assert raw.count(good) == 1
    path.write_bytes(raw.replace(good, bad))


TEXTS = {
    "a.jsonl.gz": write(gzip.compress(b"a" * 5_000_000)), "a.txt.gz": write(gzip.compress(b"a" * 5_000_000)),
    "a.csv.gz": write(gzip.compress(b"text\n" + b"a" * 5_000_000)),
    "a.json.gz": write(gzip.compress(b'["' + b"a" * 5_000_000)),
    "a.parquet.gz": write(gzip.compress(bytes(300_000_000), 1)), "a.arrow": arrow_beyond_its_file,
    "a.json": write(b"[" + b"[" * 100_000), "a.parquet": write(b"PAR1" + bytes(100) + b"PAR1"),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_text(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for module in (inputs, readers):
        monkeypatch.setattr(module, "MAX_RECORD_BYTES", 1_000_000)  # a bomb of 5 MB is a bomb
    monkeypatch.setattr(inputs, "SCRATCH_DIRECTORY", str(tmp_path))

    def damage(path: Path) -> None:
        path.unlink()
        TEXTS[name](path.with_name(name))

    assert name in refused(good, tmp_path, "text/a.txt", damage, capsys)


RECIPES = {
    "deep": "a = " + "[" * 100_000, "digits": "[train]\nsteps = " + "9" * 5000, "huge": "a" * 200_000,
    "not UTF-8": b"\xff", "quote": "[data]\nprefix = \"'x\"\n", "flag": '"--help" = 1', "nul": 'model = "a\\u0000"',
}  # fmt: skip


@pytest.mark.parametrize("case", RECIPES)
def test_recipes(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    refused(good, tmp_path, "recipe/r.toml", write(RECIPES[case]), capsys)


LOGS = {
    "log": b" iteration " + b"9" * 5000 + b"/ 3 | elapsed time per iteration (ms): 1 | lm loss: 1 |\n",
    "cell": b'iteration,loss\n1,"' + b"x" * 200_000 + b'"\n', "iteration": b"iteration,loss\n1e300,1\n",
    "nul": b"\0" * 1000,
}  # fmt: skip


@pytest.mark.parametrize("case", LOGS)
def test_logs(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setitem(COMMANDS, "logs", "compare {}/logs/a.txt {}/logs/a.txt --out {}/out/report")
    refused(good, tmp_path, "logs/a.txt", write(LOGS[case]), capsys)


@pytest.mark.parametrize("name", ["manifest.json", "COMMITTED", "rank-00000.json", "rank-00000.safetensors"])
def test_a_checkpoint_is_not_resumed_from(good: Path, tmp_path: Path, name: str) -> None:
    said: list[str] = []
    for i, damage in enumerate([*JSON.values(), link]):
        checkpoint = tmp_path / str(i) / "step-00000002"
        shutil.copytree(good / CHECKPOINT, checkpoint)
        damage(checkpoint / name)
        with watched(tmp_path) as seen, pytest.raises(UserError, match="no checkpoint there is whole"):
            newest_intact_checkpoint([checkpoint], Ranks(), log=said.append)
        assert seen == []


def test_a_manifest_that_names_files_elsewhere_reads_none_of_them(good: Path, tmp_path: Path) -> None:
    """Its digests may even be right: who can write the manifest can write the marker."""
    from arriero.checkpoint.directory import MANIFEST, file_digest
    from arriero.common.checkpoint_names import MARKER

    checkpoint = tmp_path / "step-00000002"
    shutil.copytree(good / CHECKPOINT, checkpoint)
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["files"]["/etc/hostname"] = {}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    (checkpoint / MARKER).write_text(json.dumps({"manifest": file_digest(checkpoint / MANIFEST)}))
    said: list[str] = []
    with watched(tmp_path) as seen, pytest.raises(UserError):
        newest_intact_checkpoint([checkpoint], Ranks(), log=said.append)
    assert seen == []
    assert "outside its directory" in said[0]
    assert CheckpointReader(checkpoint).names()  # the weights themselves never were in doubt


def listening(process: psutil.Process) -> set[int]:
    return {c.laddr.port for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}


def test_nothing_listens_but_what_torch_distributed_needs(tmp_path: Path) -> None:
    """Two processes: the store's process on one port, and in each worker gloo, one port for each group at most."""
    path = toy.write_recipe(tmp_path)
    command = [sys.executable, "-m", "arriero", "pretrain", str(path), "--train.steps", "100000", "--nproc-per-node"]
    for count in (1, 2):
        out = tmp_path / str(count)
        with subprocess.Popen([*command, str(count), "--out", str(out)], stdout=subprocess.DEVNULL) as launcher:
            try:
                while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").stat().st_size:
                    assert launcher.poll() is None
                    time.sleep(0.05)
                here = psutil.Process(launcher.pid)
                ports = {p.pid: listening(p) for p in (here, *here.children(recursive=True))}
            finally:
                launcher.terminate()
        held = sorted(len(found) for found in ports.values() if found)
        if count == 1:
            assert held == []
        else:
            assert held[0] == 1  # the store
            assert len(held) == 3  # and two workers
            assert len(set().union(*ports.values())) == sum(held)  # nothing is inherited by another process
