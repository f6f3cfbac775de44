"""Checkpoints of one file a rank: Megatron's `torch` format, AscendSpeed's and ModelLink's, in and out.

    DIR/latest_checkpointed_iteration.txt                          "5000" or "release"
    DIR/iter_0005000 or DIR/release/mp_rank_TT[_PPP]/model_optim_rng.pt      {model or model0, model1, ...}
    DIR/latest, DIR/release/mp_rank_TT_model_states.pt             AscendSpeed's DeepSpeed flavour: {module}

Weights only: optimizer states are sharded along buffers that no other layout shares. Beside the ranks lie config.json
and the tokenizer, which Megatron ignores: they give heads, vocabulary and rotary settings when it is converted back.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arriero.checkpoint.formats.dialects import Dialect, recognise
from arriero.checkpoint.formats.foreign_config import ConfigHints, ForeignModel, resolve_config
from arriero.checkpoint.formats.huggingface import complete_model
from arriero.checkpoint.formats.sharding_plan import ParallelDegrees, RankTensor, ShardingPlan, merge_ranks
from arriero.checkpoint.formats.tied import same_values
from arriero.checkpoint.tensors.stream import TensorView
from arriero.checkpoint.tensors.torch_file import TorchFile
from arriero.common.errors import UserError, join_problems
from arriero.common.text import escape
from arriero.common.untrusted import read_text, require_inside
from arriero.model.config import MAX_LAYERS, LlamaConfig, parameter_shapes

TRACKER, DEEPSPEED_TRACKER = "latest_checkpointed_iteration.txt", "latest"
_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(_\d{3,})?$")
_RANK_FILE = re.compile(r"mp_rank_(\d{2,})_model_states\.pt$")
RANK_FILE_NAME = "model_optim_rng.pt"
_FILES = (RANK_FILE_NAME, "model_rng.pt")
FIX = "copy the whole directory again"


def is_rank_directory(path: Path) -> bool:
    """Whether this is a directory of rank files, or one with a tracker file for such."""
    if (path / TRACKER).is_file() or (path / DEEPSPEED_TRACKER).is_file():
        return True
    return any(_RANK.match(p.name) or _RANK_FILE.match(p.name) for p in path.iterdir()) if path.is_dir() else False


def iteration_directory(path: Path) -> Path:
    """Follows the tracker file, if there is one.

    Raises:
        UserError: the tracker names no number and not `release`, or a directory that is not there.
    """
    for tracker in (TRACKER, DEEPSPEED_TRACKER):
        file = path / tracker
        if not file.is_file():
            continue
        word = read_text(require_inside(path, file), FIX, 1000).strip()
        if not re.fullmatch(r"[0-9]{1,12}|release|iter_[0-9]{1,12}", word):
            raise UserError(
                f"{file}: holds {word[:40]!r}, which is no iteration", "write the iteration or `release` into it"
            )
        folder = path / (f"iter_{int(word):07d}" if word.isdigit() else word)
        if not folder.is_dir():
            raise UserError(f"{file}: names {folder.name}, which is not there", FIX)
        return folder
    return path


def rank_files(folder: Path) -> dict[tuple[int, int], Path]:
    """(tensor rank, stage) -> file.

    Raises:
        UserError: none, a gap, or expert parallel ranks.
    """
    found: dict[tuple[int, int], Path] = {}
    for entry in sorted(folder.iterdir()):
        if match := _RANK_FILE.match(entry.name):
            found[int(match[1]), 0] = entry
        elif match := _RANK.match(entry.name):
            if match[3]:
                raise UserError(f"{entry}: is an expert's rank", "arriero reads dense LLaMA models only")
            file = next((entry / name for name in _FILES if (entry / name).is_file()), None)
            if file is None:
                raise UserError(f"{entry}: holds no {_FILES[0]}", FIX)
            found[int(match[1]), int(match[2] or 0)] = file
    if not found:
        raise UserError(f"{folder}: holds no mp_rank_* files", "name the checkpoint's directory")
    tensor, pipeline = max(t for t, _ in found) + 1, max(p for _, p in found) + 1
    if tensor * pipeline > 1000 * len(found):
        raise UserError(f"{folder}: has {len(found)} files of {tensor * pipeline:,} ranks", FIX)
    missing = [(t, p) for t in range(tensor) for p in range(pipeline) if (t, p) not in found]
    if missing:
        names = ", ".join(f"tensor rank {t} of stage {p}" for t, p in missing[:3])
        raise UserError(f"{folder}: {len(missing)} of {tensor * pipeline} rank files are missing: {names}", FIX)
    return {place: require_inside(folder, file) for place, file in found.items()}


@dataclass(frozen=True)
class RankModel:
    """One rank's file: its model chunks' tensors, and the rest of its payload."""

    path: Path
    chunks: list[dict[str, TensorView]]
    payload: dict[str, Any]


def read_rank(path: Path) -> RankModel:
    """Opens one rank's file; raises UserError if it holds no model."""
    file = TorchFile(path)
    payload = file.root if isinstance(file.root, dict) else {}
    version = payload.get("checkpoint_version", 3.0)
    if isinstance(version, (int, float)) and version < 2:
        raise UserError(
            f"{path}: checkpoint_version {version} orders q, k, v otherwise", "save it with a Megatron after 2021"
        )
    names = [n for n in ("model", "module") if isinstance(payload.get(n), dict)]
    names = names[:1] or sorted(
        (n for n in payload if isinstance(n, str) and re.fullmatch(r"model[0-9]{1,4}", n)), key=lambda n: int(n[5:])
    )
    if not names:
        raise UserError(f"{path}: holds no model", "name a checkpoint's directory, not an optimizer's")
    chunks = []
    for name in names:
        tensors = file.tensors(payload[name])
        chunks.append({key: t for key, t in tensors.items() if "_extra_state" not in key})
    return RankModel(path, chunks, payload)


def open_ranks(path: Path, hints: ConfigHints) -> ForeignModel:
    """Opens a checkpoint of rank files under Hugging Face's names; see `combine_ranks`.

    Args:
        path: the directory with the tracker file, or an iteration's.
        hints: where to take the model's shape and vocabulary from.
    """
    folder = iteration_directory(path)
    return combine_ranks(path, folder, {place: read_rank(file) for place, file in rank_files(folder).items()}, hints)


def combine_ranks(
    path: Path, folder: Path, ranks: dict[tuple[int, int], RankModel], hints: ConfigHints
) -> ForeignModel:  # fmt: skip
    """The whole model of the ranks of a checkpoint, by (tensor rank, stage).

    Raises:
        UserError: a file or tensor is missing, broken, extra or of another shape, or ranks contradict each other.
    """
    tensor, pipeline = max(t for t, _ in ranks) + 1, max(p for _, p in ranks) + 1
    first = ranks[0, 0]
    keys = {key for rank in ranks.values() for chunk in rank.chunks for key in chunk}
    dialect = recognise(keys)
    if dialect is None:
        raise UserError(f"{first.path}: holds no LLaMA layers of a known naming", f"its keys begin {sorted(keys)[:3]}")
    chunks = {(v, p): chunk for (t, p), r in ranks.items() if t == 0 for v, chunk in enumerate(r.chunks)}
    layers, at = {}, 0
    for v, p in sorted(chunks):
        count = _count_layers(chunks[v, p], dialect)
        layers[p, v] = range(at, at + count)
        at += count
    embedding = first.chunks[0].get(dialect.embedding)
    if embedding is None:
        raise UserError(f"{first.path}: lacks {dialect.embedding}", FIX)
    merged = {key: view for chunk in chunks.values() for key, view in chunk.items()}
    config, notes = resolve_config(
        path, folder, hints, tensors=merged, dialect=dialect, tensor=tensor, layers=at, payload=first.payload
    )
    rows = embedding.shape[0] * tensor
    if rows < config.vocab_size:
        problem = f"{folder}: has {rows} vocabulary rows, fewer than the {config.vocab_size} of its config"
        raise UserError(problem, FIX)
    degrees = ParallelDegrees(tensor, pipeline, len(first.chunks), padded_vocab=rows)
    pairs = list(_match(ranks, config, dialect, degrees, layers))
    reader, config = complete_model(merge_ranks(pairs, parameter_shapes(config)), config, where=str(folder))
    kind = "ascendspeed" if dialect.inv_freq else "megatron"
    return ForeignModel(kind, reader, config, f"{dialect.name}, {degrees.describe()}", notes)


def _count_layers(chunk: Mapping[str, TensorView], dialect: Dialect) -> int:
    pattern = re.escape(dialect.layer).replace(r"\{\}", r"([0-9]{1,9})(?![0-9])")
    numbers = {int(m[1]) for key in chunk if (m := re.match(pattern, key))}
    count = max(numbers, default=-1) + 1
    if count > MAX_LAYERS:
        raise UserError(f"the checkpoint numbers a layer {count - 1}", FIX)
    return count


def _match(
    ranks: dict[tuple[int, int], RankModel], config: LlamaConfig, dialect: Dialect, degrees: ParallelDegrees,
    layers: dict[tuple[int, int], range],
) -> Iterator[tuple[TensorView, RankTensor]]:  # fmt: skip
    """Pairs every planned tensor with the stored one; replicated ones are compared with rank 0's and given once."""
    problems: list[UserError] = []
    first: dict[tuple[int, int, str], TensorView] = {}
    for (t, p), rank in sorted(ranks.items()):
        plan = ShardingPlan(config, dialect, degrees, t)
        for v, chunk in enumerate(rank.chunks):
            known: set[str] = set()
            for planned in plan.readable_tensors(p, v, layers[p, v], chunk):
                known.add(planned.key)
                tensor = chunk.get(planned.key)
                if tensor is None:
                    if not planned.tied:
                        problems.append(UserError(f"{rank.path}: lacks {planned.key}", FIX))
                elif tensor.shape != planned.shape:
                    found = f"{planned.key} is {list(tensor.shape)}, its config says {list(planned.shape)}"
                    problems.append(UserError(f"{rank.path}: {found}", "give the right --config"))
                elif planned.replicated and t:
                    other = first[p, v, planned.key]
                    if tensor.dtype != other.dtype or not same_values(tensor, other):
                        problems.append(UserError(f"{rank.path}: {planned.key} differs from tensor rank 0's", FIX))
                else:
                    if planned.replicated:
                        first[p, v, planned.key] = tensor
                    yield tensor, planned
            extra = sorted(k for k in chunk.keys() - known if not k.endswith("inv_freq"))
            if extra:
                unknown = f"{escape(extra[0], 120)} and {len(extra) - 1} more unknown"
                problems.append(UserError(f"{rank.path}: holds {unknown}", "is it a dense LLaMA?"))
    if problems:
        raise join_problems(problems[:6])
