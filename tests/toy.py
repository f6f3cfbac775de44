"""Small inputs that several tests make: a model shape, a token file, a recipe."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from arriero.data.indexed import IndexedWriter
from arriero.model.config import LlamaConfig
from programs import arriero  # noqa: F401 - with the toy recipe, most often

CONFIG = LlamaConfig(
    vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5, max_position_embeddings=64,
)  # fmt: skip


def write_config(directory: Path, **changes: Any) -> Path:
    """A config.json of the toy shape; 259 entries do not divide by 2, on purpose."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "config.json"
    path.write_text(json.dumps(replace(CONFIG, **changes).to_json()))
    return path


def write_data(directory: Path, documents: int = 200) -> Path:
    """A token file whose next token is easy to learn; returns its prefix."""
    directory.mkdir(parents=True, exist_ok=True)
    prefix = directory / "toy_text_document"
    random = np.random.default_rng(0)
    writer = IndexedWriter(prefix, np.dtype(np.uint16))
    for _ in range(documents):
        start, stride, length = random.integers(0, 256), random.integers(1, 3), random.integers(5, 60)
        writer.add(((start + np.arange(length) * stride) % 256 + 3).astype(np.uint16))
        writer.end_document()
    writer.close()
    return prefix


def write_instructions(directory: Path, records: int = 120) -> Path:
    """An instruction set: prompts without loss, records shorter than a sample; returns its prefix."""
    random = np.random.default_rng(1)
    prefix = directory / "toy"
    fields = ("input_ids", "attention_mask", "labels")
    writers = {f: IndexedWriter(f"{prefix}_packed_{f}_document", np.dtype(np.int32)) for f in fields}
    for _ in range(records):
        length, prompt = int(random.integers(8, 30)), int(random.integers(2, 6))
        ids = ((random.integers(0, 256) + np.arange(length)) % 256 + 3).astype(np.int32)
        labels = np.where(np.arange(length) < prompt, -100, ids).astype(np.int32)
        for f, values in zip(fields, (ids, np.ones(length, np.int32), labels), strict=True):
            writers[f].add(values)
            writers[f].end_document()
    for writer in writers.values():
        writer.close()
    return prefix


def write_few_labels(directory: Path, records: int = 120, every: int = 12) -> Path:
    """An instruction set of which one record in so many keeps a label that carries a loss; returns its prefix.

    Of the last tenth, which is the validation split, none does.
    """
    random = np.random.default_rng(2)
    prefix = directory / "few"
    fields = ("input_ids", "attention_mask", "labels")
    writers = {f: IndexedWriter(f"{prefix}_packed_{f}_document", np.dtype(np.int32)) for f in fields}
    for i in range(records):
        ids = ((random.integers(0, 256) + np.arange(20)) % 256 + 3).astype(np.int32)
        labels = ids if i % every == 0 and i < 0.9 * records else np.full(20, -100, np.int32)
        for f, values in zip(fields, (ids, np.ones(20, np.int32), labels), strict=True):
            writers[f].add(values)
            writers[f].end_document()
    for writer in writers.values():
        writer.close()
    return prefix


def write_recipe(directory: Path, **top: str) -> Path:
    """A recipe of six steps over the toy data, model and data beside it."""
    data = write_data(directory / "data")
    config = write_config(directory / "model")
    lines = [f'{key} = "{value}"' for key, value in ({"model": config, "out": directory / "run"} | top).items()]
    path = directory / "toy.toml"
    path.write_text(
        "\n".join(lines)
        + f"""
[data]
prefix = "{data}"
split = "90,10,0"
[train]
steps = 6
sequence_length = 32
global_batch = 8
micro_batch = 2
dtype = "float32"
[schedule]
lr = 1e-2
min_lr = 1e-3
warmup_steps = 2
"""
    )
    return path
