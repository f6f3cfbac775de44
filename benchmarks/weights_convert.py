"""`arriero convert` against `cp -r`: seconds and peak memory on random bf16 weights.

    python benchmarks/weights_convert.py --size 1b --repeats 3 --where /some/disk

Inputs are evicted from the page cache before each run, the output's fsync is counted for both, the order is shuffled in
each round, and all lies in one directory. It needs free disk for two copies of the model (1b: 2.1 GB, 7b: 13.5 GB).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from arriero.checkpoint.formats.huggingface import write_config, write_json
from arriero.checkpoint.tensors.safetensors_file import build_header
from arriero.model.config import LlamaConfig, parameter_shapes

SHAPES = {
    "1b": LlamaConfig(
        hidden_size=2048, intermediate_size=4864, num_hidden_layers=20, num_attention_heads=16, num_key_value_heads=16
    ),
    "7b": LlamaConfig(),
}  # fmt: skip
LAYOUTS = {"tp2-pp2": ["--tp", "2", "--pp", "2"], "tp8-pp4": ["--tp", "8", "--pp", "4"]}


LAUNCHER = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""  # a small process in between: a child's peak counts what its parent held when it forked


def make_source(directory: Path, config: LlamaConfig, shards: int) -> None:
    """Random finite bf16 weights in safetensors shards."""
    directory.mkdir()
    write_config(directory, config, dtype="BF16")
    names = list(parameter_shapes(config).items())
    size = -(-len(names) // shards)
    weight_map, rng = {}, np.random.default_rng(0)
    for i in range(shards):
        part = names[i * size : (i + 1) * size]
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        header, _, _ = build_header({name: ("BF16", shape) for name, shape in part})
        with open(directory / file, "wb") as out:
            out.write(header)
            for name, shape in part:
                left = int(np.prod(shape))
                while left:
                    count = min(left, 1 << 24)
                    words = np.frombuffer(rng.bytes(2 * count), np.uint16)
                    out.write((words & 0x81FF | 0x3C00).tobytes())
                    left -= count
                weight_map[name] = file
    write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def evict(directory: Path) -> None:
    """Drops a tree's pages from the page cache."""
    for path in directory.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def sync(directory: Path) -> None:
    for path in directory.rglob("*"):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def measure(command: list[str], source: Path, target: Path) -> tuple[float, float]:
    """Seconds until the target is on the disk, and the process's peak memory in MB."""
    evict(source)
    started = time.perf_counter()
    answer = subprocess.run([sys.executable, "-c", LAUNCHER, *command], check=True, stdout=subprocess.PIPE, text=True)
    sync(target)
    return time.perf_counter() - started, int(answer.stdout.split()[-1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=SHAPES, default="1b")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--where", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--layouts", nargs="*", default=list(LAYOUTS))
    args = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="arriero-bench-", dir=args.where))
    arriero = [sys.executable, "-m", "arriero", "convert"]
    try:
        make_source(home / "hf", SHAPES[args.size], shards=3)
        jobs = {"cp -r": (["cp", "-r"], home / "hf")}
        for name in args.layouts:
            subprocess.run([*arriero, home / "hf", home / name, "--to", "megatron", *LAYOUTS[name]], check=True)
            jobs[f"hf -> {name}"] = ([*arriero, "--to", "megatron", *LAYOUTS[name]], home / "hf")
            jobs[f"{name} -> hf"] = ([*arriero, "--to", "hf"], home / name)
        results: dict[str, list[tuple[float, float]]] = {name: [] for name in jobs}
        for _ in range(args.repeats):
            for name in random.sample(list(jobs), len(jobs)):
                command, source = jobs[name]
                out = home / "out"
                results[name].append(measure([*command, str(source), str(out)], source, out))
                shutil.rmtree(out)
        base = statistics.median(seconds for seconds, _ in results["cp -r"])
        size = sum(p.stat().st_size for p in (home / "hf").glob("*.safetensors")) / 1e9
        print(f"{args.size}: {size:.2f} GB, median of {args.repeats}, in {args.where}")
        print(f"{'':24}{'seconds':>9}{'all':>24}{'x cp -r':>9}{'peak MB':>9}")
        for name, found in results.items():
            seconds = statistics.median(s for s, _ in found)
            every = " ".join(f"{s:.2f}" for s, _ in found)
            print(f"{name:24}{seconds:9.2f}{every:>24}{seconds / base:9.2f}{max(m for _, m in found):9.0f}")
        print(json.dumps(results))
    finally:
        shutil.rmtree(home)


if __name__ == "__main__":
    main()
