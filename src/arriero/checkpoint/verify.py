"""Checks that a checkpoint is what was committed.

The marker holds the SHA-256 of the manifest, the manifest those of the small files, and their indices those of every
block of the data. What differs is reported, with the tensor's name.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arriero.checkpoint.directory import FORMAT, MANIFEST, file_digest, is_checkpoint_file, read_json
from arriero.checkpoint.load import INDEX as SHARDS
from arriero.checkpoint.state import state_problem
from arriero.common.checkpoint_names import MARKER, STATE
from arriero.common.errors import UserError
from arriero.common.files import open_regular, os_error_text
from arriero.common.text import escape
from arriero.common.untrusted import MAX_JSON_BYTES, require_file_name
from arriero.model.config import LlamaConfig, parameter_shapes

if TYPE_CHECKING:
    from arriero.distributed.parallel.mesh import Ranks

INDEX = {"bytes": int, "block": int, "header": str, "tensors": {str: {"start": int, "sha256": [str]}}}
DATA = re.compile(r"rank-[0-9]{5,}\.safetensors")
SMALLEST_BLOCK, LARGEST_BLOCK = 64 << 10, 1 << 30
"""Bytes that one digest covers; arriero writes blocks of 8 MiB."""
CHUNK = 8 << 20
"""Bytes that one thread reads at a time."""


@dataclass(frozen=True)
class Block:
    """A range of a file with the SHA-256 that it must have."""

    path: Path
    what: str
    start: int
    length: int
    sha256: str


def verify_checkpoint(path: Path, *, share: int = 0, of: int = 1, only: Path | None = None) -> list[str]:
    """Checks every byte of a checkpoint; returns what is wrong, one sentence each.

    Args:
        path: the checkpoint's directory.
        share: which part of the data this process checks, of
        of: so many; the small files are checked by all.
        only: the one data file to check, for the process that has just written it.
    """
    wrong, blocks = _check_small_files(path)
    chosen = [b for b in blocks if b.path == only] if only else contiguous_share(blocks, share, of)
    return wrong + check_blocks(chosen)


def verify_metadata(path: Path) -> list[str]:
    """Checks all but the data itself: quick, whatever the model's size."""
    return _check_small_files(path)[0]


def _check_small_files(path: Path) -> tuple[list[str], list[Block]]:
    """As `_follow_digests`, with an error that ends it as the one problem."""
    try:
        return _follow_digests(path)
    except UserError as error:
        return [error.problem], []
    except OSError as error:
        return [f"{escape(error.filename or path)}: cannot be read ({os_error_text(error)})"], []


def shape_problems(path: Path, model: LlamaConfig) -> list[str]:
    """What of a checkpoint's tensors, as its small files declare them, does not belong to the model: one sentence.

    The data is not read, so that a shape that a file merely claims costs neither time nor memory.
    """
    whole = parameter_shapes(model)
    try:
        for index in sorted(path.glob("rank-*.json")):
            for key, place in read_json(index, SHARDS)["tensors"].items():
                expected = whole.get(key) or whole.get(key.partition(".")[2])  # an optimizer state is STATE.PARAMETER
                if expected is None:
                    return [f"{index}: {escape(key)} is no tensor of this model"]
                if tuple(place["shape"]) != expected:
                    return [f"{index}: {escape(key)} is {escape(place['shape'])}, in this model {list(expected)}"]
    except UserError as error:
        return [error.problem]
    return []


def _follow_digests(path: Path) -> tuple[list[str], list[Block]]:
    """What is wrong with the small files and the files' sizes, and the blocks still to be hashed."""
    if not (path / MARKER).is_file():
        return [f"{escape(path)}: not committed, its writing was cut off"], []
    marker = read_json(path / MARKER, {"manifest": dict})
    if not (path / MANIFEST).is_file():
        return [f"{path / MANIFEST}: missing"], []
    if marker["manifest"] != file_digest(path / MANIFEST):
        return [f"{path / MANIFEST}: not the manifest that was committed"], []
    manifest = read_json(path / MANIFEST, {"format": int, "files": {str: dict}, "data": [str]})
    for name in (*manifest["files"], *manifest["data"]):
        require_file_name(name, str(path / MANIFEST))
    if manifest["format"] != FORMAT:
        return [f"{path / MANIFEST}: format {manifest['format']}, this version reads {FORMAT}"], []
    if problem := _names_problem(manifest):
        return [f"{path / MANIFEST}: {problem}"], []
    wrong = [problem for name, expected in manifest["files"].items() if (problem := _differs(path / name, expected))]
    blocks: list[Block] = []
    for name in manifest["data"]:
        index = (path / name).with_suffix(".json")
        if any(line.startswith(f"{index}:") for line in wrong):
            continue
        content = read_json(index, INDEX)
        problem = _file_problem(path / name) or _size_problem(path / name, content["bytes"])
        if problem:
            wrong.append(problem)
        else:
            blocks += _blocks(path / name, content)
    if STATE in manifest["files"] and not wrong and (problem := state_problem(path)):
        wrong.append(problem)
    known = {*manifest["files"], *manifest["data"], MANIFEST, MARKER}
    extra = sorted(one.name for one in path.iterdir() if is_checkpoint_file(one.name) and one.name not in known)
    wrong += [f"{path / escape(name)}: not in the manifest" for name in extra]
    return wrong, blocks


def _differs(path: Path, expected: dict[str, Any]) -> str:
    """What is wrong with a small file; empty if it is as the manifest says."""
    if problem := _file_problem(path):
        return problem
    return "" if file_digest(path) == expected else f"{path}: size or SHA-256 differs from the manifest"


def _names_problem(manifest: dict[str, Any]) -> str:
    """Each data file is named once, by the name that arriero gives it, and its index is among the small files."""
    seen: set[str] = set()
    for name in manifest["data"]:
        if name in seen or not DATA.fullmatch(name):
            return f"names {escape(name)}" + (" twice" if name in seen else ", which is no data file of a checkpoint")
        if Path(name).with_suffix(".json").name not in manifest["files"]:
            return f"lacks the index of {name}"
        seen.add(name)
    return ""


def _file_problem(path: Path) -> str:
    if path.is_symlink():
        return f"{path}: is a link, which a checkpoint never holds"
    return "" if path.is_file() else f"{path}: missing"


def _size_problem(path: Path, expected: int) -> str:
    size = path.stat().st_size
    return "" if size == expected else f"{path}: has {size:,} of {expected:,} bytes"


def _blocks(path: Path, index: dict[str, Any]) -> list[Block]:
    """All blocks of a data file, the header first; they cover every byte, or UserError is raised."""
    tensors = sorted(index["tensors"].items(), key=lambda item: item[1]["start"])
    size, step = index["bytes"], index["block"]
    starts = [entry["start"] for _, entry in tensors] + [size]
    ordered = 0 <= starts[0] <= MAX_JSON_BYTES + 8 and starts == sorted(starts)
    if not ordered or not SMALLEST_BLOCK <= step <= LARGEST_BLOCK:
        raise UserError(f"{path}: its index places tensors outside it")
    found = [Block(path, "the header", 0, starts[0], index["header"])]
    for (name, entry), end in zip(tensors, starts[1:], strict=True):
        ranges = range(entry["start"], end, step)
        if len(ranges) != len(entry["sha256"]):
            raise UserError(f"{path}: {escape(name)} has {len(entry['sha256'])} digests for {len(ranges)} blocks")
        found += [
            Block(path, f"tensor {escape(name)}", at, min(step, end - at), sha256)
            for at, sha256 in zip(ranges, entry["sha256"], strict=True)
        ]
    return found


def check_blocks(blocks: list[Block]) -> list[str]:
    """Reads and hashes on all cores; returns one sentence for each tensor or header that differs."""
    workers = max(2, min(8, 2 * len(os.sched_getaffinity(0))))  # several requests at a time are faster on a disk
    with ThreadPoolExecutor(workers, thread_name_prefix="verify") as pool:
        parts = [contiguous_share(blocks, i, workers) for i in range(workers)]
        wrong = [line for found in pool.map(_check, [p for p in parts if p]) for line in found]
    return list(dict.fromkeys(wrong))


def contiguous_share(blocks: list[Block], part: int, of: int) -> list[Block]:
    """One of `of` contiguous parts, so that the system reads ahead."""
    return blocks[len(blocks) * part // of : len(blocks) * (part + 1) // of]


def _check(blocks: list[Block]) -> list[str]:
    buffer = memoryview(bytearray(min(CHUNK, max(b.length for b in blocks))))
    handles: dict[Path, int] = {}
    wrong = []
    try:
        for block in blocks:
            if block.path not in handles:
                handles[block.path] = open_regular(block.path)
                os.posix_fadvise(handles[block.path], 0, 0, os.POSIX_FADV_SEQUENTIAL)
            if _digest(handles[block.path], block, buffer) != block.sha256:
                wrong.append(f"{block.path}: {block.what} is damaged: its SHA-256 differs")
    except OSError as error:
        wrong.append(f"{block.path}: {block.what} cannot be read ({error.strerror})")
    finally:
        for handle in handles.values():
            os.close(handle)
    return wrong


def _digest(handle: int, block: Block, buffer: memoryview) -> str:
    """SHA-256 of a block, read through the buffer; of less, and so another one, where the file ends too early."""
    total, done = hashlib.sha256(), 0
    while done < block.length:
        read = os.preadv(handle, [buffer[: min(len(buffer), block.length - done)]], block.start + done)
        if not read:
            break
        total.update(buffer[:read])
        done += read
    return total.hexdigest()


def newest_intact_checkpoint(
    paths: list[Path], ranks: Ranks, *, log: Callable[[str], None], model: LlamaConfig | None = None
) -> Path:  # fmt: skip
    """The first of these checkpoints in which every byte is as it was written; each process reads a share.

    Args:
        paths: the best first; the same on every process.
        ranks: this process among all.
        log: called with a warning for each one that is damaged.
        model: what the checkpoint must hold the tensors of; compared before any of them is read.

    Raises:
        UserError: none of them is intact.
    """
    for path in paths:
        mine = "\n".join(
            (shape_problems(path, model) if model else []) or verify_checkpoint(path, share=ranks.rank, of=ranks.world)
        )
        wrong = list(dict.fromkeys(line for text in ranks.gather_texts(mine) for line in text.splitlines()))
        if not wrong:
            return path
        listed = [*wrong[:4], f"and {len(wrong) - 4} more"] if len(wrong) > 5 else wrong
        for line in listed:
            log(f" DAMAGED: {line}")
        log(f" DAMAGED: {escape(path)} is not used")
    raise UserError(f"{paths[0].parent}: no checkpoint there is whole", "start again, or from a copy kept elsewhere")
