"""Speed of reading batches and of building the index, beside Megatron's data set and bare numpy.

    python benchmarks/data_batches.py [--documents 200000] [--seconds 2]

Samples of 2,048 tokens (2,049 with the label of the last), uint16 on disk and in the page cache, read in the training
process in global batches of 256, as int64. The index: 4 million samples over 5 million documents.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from arriero.data.batches import Batches
from arriero.data.config import DataConfig
from arriero.data.indexed import IndexedWriter
from arriero.data.order import MegatronOrder, StableOrder

LENGTH, BATCH = 2048, 256


def write_set(prefix: Path, documents: int) -> None:
    random = np.random.default_rng(0)
    with IndexedWriter(prefix, np.dtype(np.uint16)) as writer:
        for _ in range(documents // 1000):
            sizes = np.maximum(1, random.lognormal(6.9, 1.0, 1000).astype(np.int32))  # mean 1,640 tokens, long tail
            writer.add_documents(random.integers(3, 32000, int(sizes.sum()), dtype=np.uint16), sizes)


def rate(read: Callable[[int], int], seconds: float) -> tuple[float, float]:
    """Samples a second and a CPU second; `read(i)` returns how many samples it read."""
    read(0)
    began, cpu, done, i = time.perf_counter(), time.process_time(), 0, 1
    while time.process_time() - cpu < seconds:
        done += read(i)
        i += 1
    return done / (time.perf_counter() - began), done / (time.process_time() - cpu)


def megatron(prefix: str) -> Callable[[int], int]:
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    class Fake:
        vocab_size, eod, eos, pad, unique_identifiers, special_tokens_dict = 32000, 2, 2, 0, {}, {}

    config = GPTDatasetConfig(
        random_seed=1, sequence_length=LENGTH, blend=([prefix], None), split="1,0,0", tokenizer=Fake(),
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
    )  # fmt: skip
    data = BlendedMegatronDatasetBuilder(GPTDataset, [50_000, 0, 0], lambda: True, config).build()[0]

    def read(i: int) -> int:
        for n in range(i * 64, i * 64 + 64):
            data[n % len(data)]
        return 64

    return read


def contiguous(prefix: str) -> Callable[[int], int]:
    """The upper bound: whole windows at random places, no documents, no labels, uint16."""
    tokens = np.asarray(np.memmap(f"{prefix}.bin", np.uint16, "r"))
    places = np.random.default_rng(0).integers(0, len(tokens) - LENGTH - 1, (1000, BATCH))
    out = np.empty((BATCH, LENGTH + 1), np.uint16)

    def read(i: int) -> int:
        np.concatenate([tokens[p : p + LENGTH + 1] for p in places[i % 1000].tolist()], out=out.reshape(-1))
        return BATCH

    return read


def index_times() -> None:
    sizes = np.random.default_rng(0).integers(1, 3280, 5_000_000).astype(np.int32)
    documents = np.arange(len(sizes), dtype=np.int32)
    for name in ("stable", "megatron"):
        took = []
        for _ in range(3):
            began, cpu = time.perf_counter(), time.process_time()
            if name == "stable":
                order = StableOrder(sizes, documents, length=LENGTH, seed=1)
                windows = order.windows(0)
            else:
                windows = MegatronOrder(sizes, documents, length=LENGTH, seed=1, samples=4_000_000).windows()
            took.append((time.perf_counter() - began, time.process_time() - cpu))
        held = sum(a.nbytes for a in (windows.documents, windows.first, windows.offset, windows.shuffle)) / 1e6
        print(
            f"index, {name:8} {len(windows.shuffle):,} samples over 5,000,000 documents: {min(took)[0]:.2f} s "
            f"({min(took)[1]:.2f} CPU s), {held:.0f} MB"
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--documents", type=int, default=200_000)
    parser.add_argument("--seconds", type=float, default=2.0)
    args = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, numpy {np.__version__}")
    with tempfile.TemporaryDirectory() as name:
        prefix = str(Path(name) / "set")
        write_set(Path(prefix), args.documents)
        print(f"data set: {args.documents:,} documents, {os.path.getsize(prefix + '.bin') / 1e6:,.0f} MB")
        options = {"sequence_length": LENGTH, "global_batch": BATCH, "seed": 1}
        window = Batches(DataConfig(prefix=prefix, split="1,0,0"), **options)
        inside = Batches(DataConfig(prefix=prefix, split="1,0,0", attention="document"), **options)
        rows: dict[str, Callable[[int], int]] = {
            "numpy, contiguous windows (bound)": contiguous(prefix),
            "arriero": lambda i: len(window.batch(i, 0, BATCH).tokens),
            "arriero, attention in documents": lambda i: len(inside.batch(i, 0, BATCH).tokens),
            "Megatron's GPTDataset": megatron(prefix),
        }
        best = dict.fromkeys(rows, (0.0, 0.0))
        for _ in range(3):
            for label, read in rows.items():
                found = rate(read, args.seconds)
                best[label] = (max(best[label][0], found[0]), max(best[label][1], found[1]))
        for label, (wall, cpu) in best.items():
            print(f"{label:36}{wall:12,.0f} samples/s {cpu:12,.0f} a CPU second")
    index_times()
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000:,.0f} MB")


if __name__ == "__main__":
    main()
