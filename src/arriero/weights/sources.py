"""Which kind of model a path is, and opening any of them under Hugging Face's names."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from arriero.errors import UserError
from arriero.model.config import LlamaConfig
from arriero.weights import run
from arriero.weights.huggingface import open_huggingface
from arriero.weights.stream import PieceReader

if TYPE_CHECKING:
    import torch

    from arriero.model.llama import Llama


@dataclass(frozen=True)
class Opened:
    """A model that can be read."""

    kind: str
    path: Path
    reader: PieceReader
    config: LlamaConfig
    tokenizer: Path | None = None
    """Directory of the tokenizer's files, where the source has one."""
    layout: str = "whole"
    """How the source is cut, in words."""
    notes: list[str] = field(default_factory=list)
    """What was assumed, one sentence each."""


def open_model(path: Path) -> Opened:
    """Opens a Hugging Face directory, a run (its newest checkpoint) or a checkpoint.

    Raises:
        UserError: nothing there, or not a whole model; the error names the file.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or directory", "name a run, a checkpoint or a Hugging Face directory")
    if run.is_run(path) or run.is_checkpoint(path):
        reader, config, directory = run.open_run(path)
        home = directory.parent.parent
        tokenizer = tokenizer_in(directory) or tokenizer_in(home / "tokenizer")
        return Opened(
            "checkpoint", directory, reader, config, tokenizer, layout=f"step {directory.name[5:].lstrip('0')}"
        )
    return Opened("huggingface", path, open_huggingface(path), LlamaConfig.from_json(path), tokenizer_in(path))


def tokenizer_in(directory: Path) -> Path | None:
    """The directory, if it holds a tokenizer."""
    held = (directory / "tokenizer.model").is_file() or (directory / "tokenizer.json").is_file()
    return directory if held else None


def load_model(
    path: Path, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> tuple[Llama, Path | None]:
    """Loads a model for inference, and says where its tokenizer lies.

    Args:
        path: a Hugging Face directory, a run or a checkpoint.
        dtype: None keeps the stored one.
        device: None is the CPU.

    Raises:
        UserError: see `open_model`.
    """
    opened = open_model(path)
    return build(opened.reader, opened.config, dtype, device), opened.tokenizer


def build(
    reader: PieceReader, config: LlamaConfig, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> Llama:
    """The model in memory, one tensor read at a time, in evaluation mode."""
    import torch

    from arriero.model.llama import Llama

    with torch.device("meta"):
        model = Llama(config)
    weights = {name: reader.read(name).to(device=device, dtype=dtype) for name in reader.names()}
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval().requires_grad_(False)
