"""A small tokenizer and small files for the tests of `data`."""

from __future__ import annotations

import io
import json
import pydoc_data.topics
from pathlib import Path

import pyarrow
import pyarrow.parquet

RECORDS = [
    {"instruction": "Name a llama.", "input": "", "output": "Paco"},
    {"instruction": "Add.", "input": "1 + 1", "output": "2"},
    {"instruction": "Sing ü <s>", "input": None, "output": "la\nla"},
]


def train_sentencepiece(path: Path, **options: object) -> None:
    import sentencepiece

    lines = [line for text in list(pydoc_data.topics.topics.values())[:20] for line in text.split("\n") if line.strip()]
    model = io.BytesIO()
    settings = {
        "model_type": "bpe", "vocab_size": 600, "byte_fallback": True, "unk_id": 0, "bos_id": 1, "eos_id": 2,
        "pad_id": -1, "split_digits": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True, "minloglevel": 2,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, **{**settings, **options}
    )
    path.write_bytes(model.getvalue())


def files_in(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.rglob("*") if p.is_file()) if directory.exists() else []


def write_records(directory: Path, kind: str) -> Path:
    path = directory / f"records.{kind}"
    if kind == "json":
        path.write_text(json.dumps(RECORDS, indent=1))
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps(r) for r in RECORDS))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
    return path
