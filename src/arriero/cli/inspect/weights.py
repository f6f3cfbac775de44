"""What a model directory or weight file is, and whether it is complete."""

from __future__ import annotations

import json as json_module
from collections import Counter
from pathlib import Path
from typing import Any

from arriero.checkpoint.formats.huggingface import open_file
from arriero.checkpoint.open_model import detect_kind, open_model
from arriero.checkpoint.tensors.stream import TensorView
from arriero.checkpoint.tensors.transfer import read_fingerprints
from arriero.checkpoint.tensors.values import fingerprint
from arriero.common.errors import EXIT_CHECK_FAILED, EXIT_OK, UserError
from arriero.common.progress import ProgressBar
from arriero.common.text import escape, escape_message
from arriero.data.tokenizer_json import vocabulary_size

_FILES = (".safetensors", ".bin", ".pt", ".pth")


def recognises(path: Path) -> bool:
    """Whether `path` is a model directory of any known kind (not a run), a weight file, or a conversion cut short."""
    if path.is_file():
        return path.suffix in _FILES and path.with_suffix(".idx").exists() is False
    if path.name.endswith(".partial") and path.is_dir():
        return True
    try:
        return path.is_dir() and detect_kind(path) != "run"
    except UserError:
        return False


def inspect(path: Path, *, json: bool, verify: bool) -> int:
    """Prints what `path` is; returns 1 if it is not whole.

    Args:
        path: recognised.
        json: print one JSON object.
        verify: read every value, refuse NaN and infinity, and print the fingerprint.
    """
    facts: dict[str, Any] = {"path": str(path)}
    try:
        if path.name.endswith(".partial"):
            facts["kind"] = "unfinished conversion"
            raise UserError(f"{path}: was left by a conversion that was killed, or one still runs", "convert again")
        tensors = _describe_file(path, facts) if path.is_file() else _describe(path, facts)
        if verify:
            with ProgressBar("reading", sum(t.nbytes for t in tensors.values())) as progress:
                fingerprints = read_fingerprints(tensors, advance=progress.advance)
            facts["fingerprint"] = fingerprint(tensors, None, fingerprints)
        facts["whole"] = True
    except UserError as error:
        facts = {"kind": facts.get("kind") or _kind(path), **facts, "whole": False, "problem": str(error)}
    if json:
        print(json_module.dumps(facts))
    else:
        _print(facts)
    return EXIT_OK if facts["whole"] else EXIT_CHECK_FAILED


def _kind(path: Path) -> str:
    return "file" if path.is_file() else detect_kind(path)


def _describe(path: Path, facts: dict[str, Any]) -> dict[str, TensorView]:
    """Opens a model directory, which checks that every tensor is there in its right shape."""
    opened = open_model(path)
    config = opened.config
    facts |= {
        "kind": opened.kind, "layout": opened.layout, "layers": config.num_hidden_layers, "hidden": config.hidden_size,
        "heads": config.num_attention_heads, "key_value_heads": config.num_key_value_heads, "head_dim": config.head_dim,
        "feed_forward": config.intermediate_size, "vocabulary": config.vocab_size,
        "tied_embeddings": config.tie_word_embeddings, "rope": config.rope_scaling.rope_type,
    }  # fmt: skip
    facts |= _count(opened.reader.tensors)
    notes = list(opened.notes)
    if opened.tokenizer is None:
        notes.append("no tokenizer lies beside it")
    else:
        facts["tokenizer_ids"] = vocabulary_size(opened.tokenizer)
        if facts["tokenizer_ids"] > config.vocab_size:
            ids = f"the tokenizer has {facts['tokenizer_ids']} ids, the model {config.vocab_size} rows"
            if vocabulary_size(opened.tokenizer, added=False) > config.vocab_size:
                raise UserError(f"{opened.tokenizer}: {ids}", "put the model's own tokenizer there")
            notes.append(f"{ids}: tokens that were added to it have no row, and cannot be used")
    facts["notes"] = notes
    return opened.reader.tensors


def _describe_file(path: Path, facts: dict[str, Any]) -> dict[str, TensorView]:
    """Opens one weight file, whatever its tensors' names."""
    tensors = open_file(path).tensors
    facts |= {"kind": "file", "tensors": len(tensors), **_count(tensors), "first": sorted(tensors)[:3], "notes": []}
    return tensors


def _count(tensors: dict[str, TensorView]) -> dict[str, Any]:
    dtypes: Counter[str] = Counter()
    for tensor in tensors.values():
        dtypes[tensor.dtype] += tensor.numel
    return {
        "parameters": sum(dtypes.values()), "dtypes": dict(dtypes), "bytes": sum(t.nbytes for t in tensors.values()),
    }  # fmt: skip


def _print(facts: dict[str, Any]) -> None:
    print(f"{escape(facts['path'])}: {facts['kind']}" + (f" ({facts['layout']})" if "layout" in facts else ""))
    if "hidden" in facts:
        print(
            f"{facts['layers']} layers, hidden {facts['hidden']}, {facts['heads']} heads of {facts['head_dim']} "
            f"({facts['key_value_heads']} key-value), feed-forward {facts['feed_forward']}, "
            f"vocabulary {facts['vocabulary']:,}, embeddings {'tied' if facts['tied_embeddings'] else 'apart'}"
        )
    if "parameters" in facts:
        dtypes = ", ".join(facts["dtypes"])
        print(f"{facts['parameters']:,} parameters, {dtypes}, {facts['bytes'] / 1e9:.3f} GB")
    if "fingerprint" in facts:
        print(f"every value read and finite, fingerprint {facts['fingerprint'][:16]}")
    for note in facts.get("notes", []):
        print(escape_message(f"note: {note}"))
    print("whole" if facts["whole"] else escape_message(f"not whole: {facts['problem']}"))
