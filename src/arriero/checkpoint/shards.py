"""What one process writes: its shards of the tensors in one safetensors file, hashed while they are written.

Beside it lies an index: of each shard its place in the whole tensor, its place in the file, and a SHA-256 a block of
8 MiB. Each shard has digests of its own, so that damage is reported by tensor; blocks, so that all cores can hash.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, uint8

from arriero.checkpoint import disk
from arriero.checkpoint.directory import write_json
from arriero.checkpoint.tensors.safetensors_file import build_header
from arriero.checkpoint.tensors.stream import dtype_name

BLOCK = 8 << 20


@dataclass(frozen=True)
class TensorShard:
    """A part of a whole tensor."""

    value: Tensor
    """Contiguous, on the CPU when it is written."""
    shape: tuple[int, ...]
    """The whole tensor's shape."""
    offset: tuple[int, ...]
    """Where the shard begins in the whole tensor."""


def data_file(directory: Path, rank: int) -> Path:
    """The file of one process; its index has the suffix .json."""
    return directory / f"rank-{rank:05d}.safetensors"


def write_shards(path: Path, shards: dict[str, TensorShard]) -> None:
    """Writes `shards` to `path` and their index beside it, and waits until the disk has both."""
    header, starts, size = build_header(
        {k: (dtype_name(p.value.dtype), tuple(p.value.shape)) for k, p in shards.items()}
    )
    handle = os.open(path, disk.CREATE_NEW, 0o644)
    pool = ThreadPoolExecutor(max(2, min(8, len(os.sched_getaffinity(0)))), thread_name_prefix="checkpoint")
    try:
        disk.write_at(handle, memoryview(header), 0, path)
        pending = {key: _submit(pool, handle, shard.value, starts[key], path) for key, shard in shards.items()}
        hashes = {key: [block.result() for block in blocks] for key, blocks in pending.items()}
        disk.sync(handle, path)
    finally:
        pool.shutdown(cancel_futures=True)
        os.close(handle)
    tensors = {
        key: {
            "shape": shard.shape, "offset": shard.offset, "part": tuple(shard.value.shape), "start": starts[key],
            "dtype": dtype_name(shard.value.dtype), "sha256": hashes[key],
        }
        for key, shard in shards.items()
    }  # fmt: skip
    index: dict[str, Any] = {"bytes": size, "header": hashlib.sha256(header).hexdigest(), "block": BLOCK}
    write_json(path.with_suffix(".json"), index | {"tensors": tensors})
    disk.sync_directory(path.parent)


def _submit(pool: ThreadPoolExecutor, handle: int, value: Tensor, start: int, path: Path) -> list[Future[str]]:
    data = value.reshape(-1).view(uint8).numpy().data
    return [
        pool.submit(_write_block, handle, data[at : at + BLOCK], start + at, path) for at in range(0, len(data), BLOCK)
    ]


def _write_block(handle: int, data: memoryview, offset: int, path: Path) -> str:
    disk.write_at(handle, data, offset, path)
    disk.start_writeback(handle, offset, len(data))
    return hashlib.sha256(data).hexdigest()  # neither holds the interpreter's lock
