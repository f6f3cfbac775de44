"""Saving and loading a training state beside the disk's own speed, safetensors, torch.save and DCP.

    python benchmarks/checkpoint_speed.py [--megabytes 1060] [--rounds 5] [--out DIR]

One state of float32 weights and two moments, in one process and one directory; every save ends with fsync of file and
directory; orders are shuffled. "blocked" is how long the training step stands still. Cold loads evict the file from the
page cache first. Extra memory is anonymous memory beyond the state itself, at its highest while the call runs.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from arriero.common.device import trim_memory

SAVES = ("raw write", "safetensors", "torch.save", "DCP, 1 thread", "DCP, 2 threads", "DCP, asynchronous",
         "arriero", "arriero, asynchronous")  # fmt: skip
LOADS = ("raw read", "DCP", "arriero, verified")


def make_state(megabytes: float) -> dict[str, torch.Tensor]:
    """Tensors of the sizes of a LLaMA of hidden 1,024."""
    hidden, state, size, layer = 1024, {}, 0.0, 0
    while size < megabytes * 1e6 / 12:
        for name, shape in (
            ("q", (hidden, hidden)),
            ("up", (2816, hidden)),
            ("down", (hidden, 2816)),
            ("norm", (hidden,)),
        ):
            state[f"model.layers.{layer}.{name}.weight"] = torch.randn(shape)
            size += state[f"model.layers.{layer}.{name}.weight"].numel()
        layer += 1
    return state | {f"{m}.{k}": torch.rand_like(v) for m in ("exp_avg", "exp_avg_sq") for k, v in state.items()}


def sync(path: Path) -> None:
    for one in (path, *([] if path.is_file() else path.rglob("*"))):
        handle = os.open(one, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def raw(state: dict[str, torch.Tensor], path: Path) -> None:
    with open(path, "wb") as file:
        for value in state.values():
            file.write(value.reshape(-1).view(torch.uint8).numpy().data)


def parts_of(state: dict[str, torch.Tensor]):
    from arriero.checkpoint.shards import TensorShard

    return {k: TensorShard(v, tuple(v.shape), (0,) * v.dim()) for k, v in state.items()}


class Saves:
    """One function a contender; each returns the seconds that the caller was held up."""

    def __init__(self, state: dict[str, torch.Tensor], root: Path) -> None:
        from arriero.checkpoint.config import CheckpointConfig
        from arriero.checkpoint.save import Saver
        from arriero.distributed.parallel.mesh import Ranks

        self.state, self.root = state, root
        self.savers = {
            mode: Saver(root / f"arriero-{mode}", CheckpointConfig(keep=0, retries=0, asynchronous=mode), Ranks())
            for mode in (False, True)
        }
        self.savers[True].allocate_buffers(parts_of(state))
        self.savers[True].wait()

    def run(self, name: str, path: Path) -> float:
        import torch.distributed.checkpoint as dcp
        from safetensors.torch import save_file

        began = time.perf_counter()
        if name == "raw write":
            raw(self.state, path)
        elif name == "safetensors":
            save_file(self.state, path)
        elif name == "torch.save":
            torch.save(self.state, path)
        elif name == "DCP, asynchronous":
            future = dcp.async_save(self.state, storage_writer=dcp.FileSystemWriter(path, thread_count=2))
            blocked = time.perf_counter() - began
            getattr(future, "upload_completion", future).result()
            return blocked
        elif name.startswith("DCP"):
            writer = dcp.FileSystemWriter(path, thread_count=int(name.split()[1]))
            dcp.save(self.state, storage_writer=writer, no_dist=True)
        else:
            saver = self.savers["asynchronous" in name]
            saver.save(1, parts_of(self.state), state={}, texts={})
            blocked = time.perf_counter() - began
            saver.wait()
            done = saver.results()[0]
            assert not done.problem, done.problem
            return blocked
        sync(path)
        return time.perf_counter() - began


class PeakMemory:
    """The highest anonymous memory while the block runs, in MB beyond what was there before."""

    def __enter__(self) -> PeakMemory:
        trim_memory()  # what earlier calls left behind must not hide what this one takes
        self.before = self.peak = self._now()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.peak = max(self.peak, self._now())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.extra = (max(self.peak, self._now()) - self.before) / 1e3

    @staticmethod
    def _now() -> int:
        text = Path("/proc/self/status").read_text()
        return int(text.split("RssAnon:")[1].split()[0])


def load(name: str, state: dict[str, torch.Tensor], files: dict[str, Path]) -> None:
    """Fills `state` in place."""
    if name == "raw read":
        with open(files[name], "rb") as file:
            for value in state.values():
                file.readinto(value.reshape(-1).view(torch.uint8).numpy().data)
    elif name == "DCP":
        import torch.distributed.checkpoint as dcp

        dcp.load(state, storage_reader=dcp.FileSystemReader(files[name]), no_dist=True)
    else:
        from arriero.checkpoint.load import CheckpointReader
        from arriero.checkpoint.verify import newest_intact_checkpoint
        from arriero.distributed.parallel.mesh import Ranks

        reader = CheckpointReader(newest_intact_checkpoint([files[name]], Ranks(), log=print))
        for key, value in state.items():
            reader.read_into(key, [0] * value.dim(), value)


def evict(path: Path) -> None:
    for one in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        handle = os.open(one, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def rounds(names: tuple[str, ...], count: int, one: Callable[[str], tuple[float, ...]]) -> dict[str, list[float]]:
    """Medians of each column over shuffled rounds."""
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in names}
    for _ in range(count):
        for name in random.sample(names, len(names)):
            found[name].append(one(name))
    return {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=1060)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", default=None)
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="arriero-bench-", dir=args.out))
    try:
        state = make_state(args.megabytes)
        gigabytes = sum(v.numel() for v in state.values()) * 4 / 1e9
        saves = Saves(state, root)

        def save_once(name: str) -> tuple[float, ...]:
            path = root / "saved"
            began = time.perf_counter()
            with PeakMemory() as memory:
                blocked = saves.run(name, path)
                seconds = time.perf_counter() - began
            for old in (path, *root.glob("arriero-*")):
                shutil.rmtree(old, ignore_errors=True) if old.is_dir() else old.unlink(missing_ok=True)
            reserved = sum(v.nbytes for v in saves.savers[True]._copies.values()) / 1e6 if "arriero, a" in name else 0
            return seconds, blocked, memory.extra + reserved

        print(f"torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores, "
              f"{gigabytes:.2f} GB, medians of {args.rounds} shuffled rounds\n")  # fmt: skip
        print("| save | seconds | GB/s | blocked s | extra MB |\n| --- | --- | --- | --- | --- |")
        for name, (seconds, blocked, extra) in rounds(SAVES, args.rounds, save_once).items():
            print(f"| {name} | {seconds:.2f} | {gigabytes / seconds:.2f} | {blocked:.2f} | {extra:.0f} |")
        files = {"raw read": root / "raw", "DCP": root / "dcp"}
        saves.run("raw write", files["raw read"])
        saves.run("DCP, 2 threads", files["DCP"])
        saves.run("arriero", root)
        files["arriero, verified"] = root / "arriero-False" / "step-00000001"

        def load_once(name: str) -> tuple[float, ...]:
            seconds, extra = [], 0.0
            for cold in (True, False):
                if cold:
                    evict(files[name])
                with PeakMemory() as memory:
                    began = time.perf_counter()
                    load(name, state, files)
                    seconds.append(time.perf_counter() - began)
                extra = max(extra, memory.extra)
            return (*seconds, extra)

        print("\n| load into place | cold s | warm s | extra MB |\n| --- | --- | --- | --- |")
        for name, (cold, warm, extra) in rounds(LOADS, args.rounds, load_once).items():
            print(f"| {name} | {cold:.2f} | {warm:.2f} | {extra:.0f} |")
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
