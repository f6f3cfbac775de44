"""The demo's text, Python's own documentation, which every machine has, as Alpaca records; and a tokenizer for it.

Docstrings are read from the standard library's sources with `ast`: nothing is imported, so nothing runs.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import io
import json
import os
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from arriero.common.errors import UserError

# Left out: tests and examples (not documentation), other people's packages, and sources that are data.
_SKIPPED = {"test", "tests", "idle_test", "lib2to3", "turtledemo", "site-packages", "dist-packages", "ensurepip",
            "__pycache__", "config"}  # fmt: skip
_MIN_CHARACTERS = 40  # characters: shorter docstrings say little more than the name


@dataclass(frozen=True)
class CorpusStats:
    """What `write_corpus` wrote."""

    records: int
    characters: int
    """Of instruction, input and output together."""


def corpus_records(stdlib: Path | None = None) -> list[dict[str, str]]:
    """Alpaca records (instruction, input, output) of the standard library's documentation.

    The order is that of a hash of the text: the same on every machine with the same Python, and such that any
    contiguous split into training and validation is a fair sample of it.

    Raises:
        UserError: this Python has no sources of its standard library.
    """
    root = stdlib or Path(sysconfig.get_paths()["stdlib"])
    seen: dict[str, dict[str, str]] = {}
    for path in _sources(root):
        for record in _topics(path) if path.parent.name == "pydoc_data" else _docstrings(path, root):
            seen.setdefault(hashlib.sha256(record["output"].encode()).hexdigest(), record)
    if not seen:
        raise UserError(f"{root}: no documentation in it", "use a Python that has its standard library's .py files")
    return [seen[key] for key in sorted(seen)]


def write_corpus(path: Path) -> CorpusStats:
    """Writes the records to `path` as parquet with the columns instruction, input and output."""
    import pyarrow
    import pyarrow.parquet

    records = corpus_records()
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), beside)
    os.replace(beside, path)
    return CorpusStats(len(records), sum(len(text) for record in records for text in record.values()))


def corpus_texts(path: Path) -> list[str]:
    """Each record of `write_corpus`'s file as one text, for `train_tokenizer`."""
    import pyarrow.parquet

    return ["\n".join(record.values()) for record in pyarrow.parquet.read_table(path).to_pylist()]


def train_tokenizer(texts: Iterable[str], directory: Path, vocab_size: int) -> Path:
    """Trains a SentencePiece BPE tokenizer as LLaMA's is, and writes tokenizer.model and tokenizer_config.json.

    LLaMA's properties: unknown 0, BOS 1, EOS 2, no padding; bytes for what has no piece (newlines among it); a blank
    in front of the text; no normalisation; each digit a piece of its own; runs of blanks may be pieces.

    Returns:
        The path of tokenizer.model.

    Raises:
        UserError: the text is too small for `vocab_size` pieces, or the vocabulary too small for the text's characters.
    """
    import sentencepiece

    # Lines, not texts: a newline must stay a byte, as in LLaMA, not become part of a piece.
    lines = [line for text in texts for line in text.split("\n") if line.strip()]
    if not lines:
        raise UserError(f"no tokenizer of {vocab_size} pieces from no text", "give it text to learn from")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=vocab_size,
            byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, unk_surface=" \u2047 ", split_digits=True,
            add_dummy_prefix=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True, character_coverage=0.9999, max_sentence_length=1 << 16,
            num_threads=os.cpu_count() or 1, minloglevel=2,
        )  # fmt: skip
    except (RuntimeError, OSError) as error:  # sentencepiece gives its reason as text only
        reason = str(error).rpartition("] ")[2].strip()
        raise UserError(
            f"no tokenizer of {vocab_size} pieces from this text: {reason}", "choose another size"
        ) from None
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "tokenizer.model"
    _write(file, model.getvalue())
    config = {
        "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "bos_token": "<s>",
        "eos_token": "</s>", "unk_token": "<unk>", "clean_up_tokenization_spaces": False, "legacy": True,
    }  # fmt: skip
    _write(directory / "tokenizer_config.json", (json.dumps(config, indent=2) + "\n").encode())
    return file


def _sources(root: Path) -> Iterator[Path]:
    """Every documented source below `root`, in the order of its path."""
    for path in sorted(root.rglob("*.py")):
        if not any(part in _SKIPPED or part.startswith("config-") for part in path.relative_to(root).parts):
            yield path


def _docstrings(path: Path, root: Path) -> Iterator[dict[str, str]]:
    """A record for the module, and for every public class, function and method in it that has a docstring."""
    tree = _parse(path)
    if tree is None:
        return
    parts = path.relative_to(root).with_suffix("").parts
    module = ".".join(part for part in parts if part != "__init__")
    if not module or any(part.startswith("_") and part != "__future__" for part in module.split(".")):
        return
    yield from _record(f"Document the module {module}.", "", tree)
    yield from _members(tree, module, "function")


def _members(parent: ast.Module | ast.ClassDef, prefix: str, kind: str) -> Iterator[dict[str, str]]:
    for node in parent.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith("_"):
            signature = f"{node.name}({ast.unparse(node.args)})"
            yield from _record(f"Document the {kind} {prefix}.{node.name}.", signature, node)
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            bases = ", ".join(ast.unparse(base) for base in node.bases)
            yield from _record(f"Document the class {prefix}.{node.name}.", f"class {node.name}({bases})", node)
            yield from _members(node, f"{prefix}.{node.name}", "method")


def _record(
    instruction: str, given: str, node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
) -> Iterator[dict[str, str]]:
    text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "")
    text = text.encode("utf-8", errors="ignore").decode()  # a docstring may hold half a surrogate pair
    if len(text) >= _MIN_CHARACTERS:
        yield {"instruction": instruction, "input": given, "output": text}


def _topics(path: Path) -> Iterator[dict[str, str]]:
    """The language reference as `help()` shows it: a source that is one dictionary, so that it can be read as data."""
    tree = _parse(path)
    for node in tree.body if tree else ():
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for name, text in ast.literal_eval(node.value).items():
                yield {"instruction": f"Explain the Python topic {name}.", "input": "", "output": text.strip()}


def _parse(path: Path) -> ast.Module | None:
    """The source's tree, or None where it cannot be read: some of the library's files are broken on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            return None


def _write(path: Path, data: bytes) -> None:
    beside = path.with_name(path.name + ".tmp")
    beside.write_bytes(data)
    os.replace(beside, path)
