"""Hugging Face directories: safetensors or pytorch_model.bin in, sharded safetensors out.

The names and shapes that the files must hold follow from `config.json` (model/config.py); whatever is missing, extra or
of another shape is reported in one message.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arriero.checkpoint.formats.names import explain_mismatch, strip_prefixes
from arriero.checkpoint.formats.tied import resolve_tied_head
from arriero.checkpoint.tensors.safetensors_file import SafetensorsFile, build_header
from arriero.checkpoint.tensors.stream import (
    ITEMSIZE,
    TORCH_NAMES,
    TensorView,
    ViewReader,
    dtype_name,
    matrix_shape,
)
from arriero.checkpoint.tensors.torch_file import TorchFile
from arriero.checkpoint.tensors.transfer import OutputFile, WriteOp, transfer
from arriero.common.errors import UserError, join_problems
from arriero.common.files import new_directory, write_atomic
from arriero.common.text import escape
from arriero.common.untrusted import parse_json, read_json, read_text, require_file_name, require_inside
from arriero.data.tokenizer_files import GENERATION_CONFIG, VOCABULARY_FILES, copy_tokenizer_files
from arriero.model.config import LlamaConfig, parameter_shapes

if TYPE_CHECKING:
    import torch

_SINGLES = ("model.safetensors", "pytorch_model.bin")
FIX_SHARD = "fetch the whole directory again"
FIX_GENERATION = "restore the file, or remove it"


def open_huggingface(directory: Path) -> ViewReader:
    """Opens a directory for reading any slice of any parameter, under Hugging Face's names; see `open_with_config`."""
    return open_with_config(directory)[0]


def open_with_config(directory: Path, config: LlamaConfig | None = None) -> tuple[ViewReader, LlamaConfig]:
    """Opens a directory, and gives the shape that its files have.

    Prefixes that training programs put before the names are taken off; old checkpoints' `rotary_emb.inv_freq`, and a
    head that equals the embedding it is tied to, are left out.

    Args:
        directory: with config.json and weights.
        config: in place of its config.json.

    Returns:
        The reader; the config, untied where the files hold a head that differs from the embedding.

    Raises:
        UserError: no weights, a missing or broken shard, or names and shapes that disagree with the config.
    """
    directory, where = Path(directory), str(directory)
    config = config or LlamaConfig.from_json(directory)
    return complete_model(strip_prefixes(open_files(directory).tensors, where), config, where=where)


def read_shape(path: Path) -> LlamaConfig:
    """The shape of the model in a directory: config.json's, untied where the files hold a head of their own.

    Raises:
        UserError: as `open_with_config`, but nothing about names and shapes, and weights may be missing.
    """
    path = Path(path)
    config = LlamaConfig.from_json(path)
    if not (config.tie_word_embeddings and path.is_dir() and has_weights(path)):
        return config
    files = [(file.name, file.lstat()) for file in sorted(path.glob("*model*"))]
    changed = tuple((name, stat.st_mtime_ns, stat.st_size) for name, stat in files)
    return _resolved_shape(path, config, changed)


@functools.lru_cache(maxsize=4)
def _resolved_shape(path: Path, config: LlamaConfig, changed: tuple[tuple[str, int, int], ...]) -> LlamaConfig:
    """Remembers the answer, for which two large tensors may have to be read, until a file has `changed`."""
    return resolve_tied_head(strip_prefixes(open_files(path).tensors, str(path)), config, where=str(path))[1]


def open_files(directory: Path) -> ViewReader:
    """All tensors of a directory's weight files, unchecked against the config."""
    for single in _SINGLES:
        if (directory / single).is_file():
            return open_file(require_inside(directory, directory / single))
        if (directory / f"{single}.index.json").is_file():
            return _open_shards(directory, directory / f"{single}.index.json")
    raise UserError(
        f"{directory}: holds no weights",
        f"it must hold {' or '.join(_SINGLES)}, or shards of either with their index.json",
    )


def has_weights(directory: Path) -> bool:
    """Whether a directory holds weight files of Hugging Face's names."""
    return any((directory / f"{single}{tail}").is_file() for single in _SINGLES for tail in ("", ".index.json"))


def open_file(path: Path) -> ViewReader:
    """One weight file: safetensors, or torch.save's with a flat dict of tensors."""
    return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path).reader()


def _open_shards(directory: Path, index: Path) -> ViewReader:
    weight_map = read_json(require_inside(directory, index), FIX_SHARD, {"weight_map": {str: str}})["weight_map"]
    files = sorted({require_file_name(file, str(index)) for file in weight_map.values()})
    missing = [file for file in files if not (directory / file).is_file()]
    if missing:
        raise UserError(
            f"{directory}: {len(missing)} of {len(files)} shards are missing: {_first_names(missing)}", FIX_SHARD
        )
    tensors: dict[str, TensorView] = {}
    for file in files:
        shard = open_file(require_inside(directory, directory / file))
        promised = {name for name, where in weight_map.items() if where == file}
        absent = sorted(promised - set(shard.tensors))
        if absent:
            raise UserError(f"{directory / file}: lacks {_first_names(absent)}, which {index.name} promises", FIX_SHARD)
        twice = sorted(tensors.keys() & shard.tensors.keys())
        if twice:
            raise UserError(f"{directory / file}: holds {_first_names(twice)} again", FIX_SHARD)
        tensors.update(shard.tensors)
    return ViewReader(tensors, where=str(directory))


FLOATS = ("F64", "F32", "F16", "BF16")


def complete_model(
    tensors: Mapping[str, TensorView], config: LlamaConfig, *, where: str
) -> tuple[ViewReader, LlamaConfig]:
    """A reader of all parameters, and the config, untied where the head differs from the embedding.

    Raises:
        UserError: as `validate_tensors`.
    """
    tensors, config = resolve_tied_head(tensors, config, where=where)
    return validate_tensors(ViewReader(tensors, where=where), config, where=where), config


def validate_tensors(reader: ViewReader, config: LlamaConfig, *, where: str) -> ViewReader:
    """The parameters of `config` in the model's order; a UserError lists all that is missing, extra or misshapen."""
    expected = parameter_shapes(config)
    found = {n: t for n, t in reader.tensors.items() if not n.endswith("rotary_emb.inv_freq")}
    missing = [name for name in expected if name not in found]
    extra = sorted(found.keys() - expected.keys())
    problems = []
    if missing or extra:
        cause, fix = explain_mismatch(config, missing, extra)
        parts = [f"lacks {_first_names(missing)}"] if missing else []
        parts += [f"holds {_first_names(extra)}, unknown to config.json"] if extra else []
        problems.append(UserError(f"{where}: {'; '.join(parts)}" + (f": {cause}" if cause else ""), fix))
    for name, shape in expected.items():
        if name not in found:
            continue
        if found[name].shape != shape:
            problem = f"{where}: {name} is {list(found[name].shape)}, config.json says {list(shape)}"
            fix = "correct config.json, or fetch the matching one"
            if len(found[name].shape) == 1 and len(shape) == 2:
                fix = "these are flat or packed weights, of FSDP or a quantized model: save the plain state dict"
            problems.append(UserError(problem, fix))
        elif found[name].dtype not in FLOATS:
            fix = "save the model in float32, bfloat16 or float16: a quantized one must be dequantized"
            problems.append(UserError(f"{where}: {name} is {found[name].dtype}", fix))
    if problems:
        raise join_problems(problems[:6])
    return ViewReader({name: found[name] for name in expected}, where=where)


def _first_names(names: list[str]) -> str:
    return f"{', '.join(escape(name, 120) for name in names[:3])}" + (
        f" and {len(names) - 3} more" if len(names) > 3 else ""
    )


def write_huggingface(
    directory: Path,
    reader: ViewReader,
    *,
    config: LlamaConfig,
    tokenizer_dir: Path | None = None,
    generation: Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: float = 5e9,
    advance: Callable[[int], None] | None = None,
) -> dict[str, int]:
    """Writes a directory that transformers loads: safetensors, config.json, generation_config.json, the tokenizer.

    Args:
        directory: must not exist, or be empty; it appears complete or not at all.
        reader: the model's parameters under Hugging Face's names.
        config: the model's shape.
        tokenizer_dir: where the tokenizer's files lie; None leaves them out.
        generation: the generation_config.json to copy; None writes one of config.json's token ids.
        dtype: float32, bfloat16 or float16; None keeps each tensor's own.
        max_shard_bytes: a shard grows no larger, unless one tensor is.
        advance: called with the bytes read since the last call.

    Returns:
        Each parameter's fingerprint as written (tensors/transfer.py).

    Raises:
        UserError: names or shapes disagree with the config, a value is not finite, the disk is too small.
    """
    name = dtype_name(dtype) if dtype is not None else None
    complete, config = complete_model(reader.tensors, config, where="the weights")
    weights = complete.tensors
    with new_directory(directory, need_bytes=bytes_in_dtype(weights, name)) as partial:
        files = plan_safetensors(partial, weights, dtype=name, max_shard_bytes=max_shard_bytes)
        fingerprints, _ = transfer(weights, files, dtype=name, advance=advance)
        kind = name or next(iter(weights.values())).dtype
        write_config_and_tokenizer(partial, config, dtype=kind, tokenizer=tokenizer_dir, generation=generation)
    return fingerprints


def bytes_in_dtype(weights: Mapping[str, TensorView], dtype: str | None) -> int:
    """Disk space of the tensors in another dtype, with room for headers."""
    return sum(t.numel * ITEMSIZE[dtype or t.dtype] for t in weights.values()) + (64 << 20)


def write_config_and_tokenizer(
    directory: Path, config: LlamaConfig, *, dtype: str, tokenizer: Path | None, generation: Path | None = None
) -> None:
    """Writes what belongs beside the weights: config.json, generation_config.json, the tokenizer's files."""
    write_config(directory, config, dtype=dtype)
    if generation is not None:
        text = read_text(generation, FIX_GENERATION)
        parse_json(text, str(generation), FIX_GENERATION, dict)
        write_atomic(directory / GENERATION_CONFIG, text)
    if tokenizer is not None:
        notice = copy_tokenizer(tokenizer, directory)
        if notice:
            warnings.warn(notice, stacklevel=2)


def plan_safetensors(
    directory: Path, weights: Mapping[str, TensorView], *, dtype: str | None, max_shard_bytes: float
) -> list[OutputFile]:
    """Divides the tensors over shards in order, and writes the index if there is more than one."""
    shards: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
    filled, total = 0, 0
    for name, tensor in weights.items():
        kind = dtype or tensor.dtype
        size = tensor.nbytes // ITEMSIZE[tensor.dtype] * ITEMSIZE[kind]
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = (kind, tensor.shape)
        filled, total = filled + size, total + size
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        weight_map = {tensor: file for file, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(directory / "model.safetensors.index.json", index)
    files = []
    for file, shard in zip(names, shards, strict=True):
        header, offsets, end = build_header(shard)
        writes = []
        for name, (_, shape) in shard.items():
            rows, columns = matrix_shape(shape)
            writes.append(WriteOp(name, 0, rows, 0, columns, offsets[name]))
        files.append(OutputFile(directory / file, end, [(0, header)], writes))
    return files


def write_config(directory: Path, config: LlamaConfig, *, dtype: str) -> None:
    """config.json and generation_config.json; transformers 4 reads `torch_dtype`, 5 reads `dtype`."""
    kind = TORCH_NAMES[dtype]
    write_json(directory / "config.json", {**config.to_json(), "torch_dtype": kind, "dtype": kind})
    ids = {key: value for key, value in config.to_json().items() if key.endswith("token_id")}
    write_json(directory / GENERATION_CONFIG, {"_from_model_config": True, **ids})


def write_json(path: Path, value: Any) -> None:
    """Indented JSON with a final newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_tokenizer(source: Path, directory: Path) -> str:
    """Copies a tokenizer's files; a bare SentencePiece model gets a tokenizer.json besides, which transformers needs.

    Returns:
        "", or why no tokenizer.json could be made.

    Raises:
        UserError: there is no tokenizer at `source`.
    """
    source = Path(source)
    found = [name for name in VOCABULARY_FILES if source.is_file() or (source / name).is_file()]
    if not found:
        raise UserError(f"{source}: holds no tokenizer.model or tokenizer.json", "name the tokenizer's directory")
    if "tokenizer.json" in copy_tokenizer_files(source, directory):
        return ""
    from arriero.data.tokenizer_json import write_tokenizer_json

    return write_tokenizer_json(directory / "tokenizer.model", directory, source=source)
