"""A run or checkpoint -> a Hugging Face directory, read back and compared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from arriero.checkpoint.formats.huggingface import open_huggingface, write_huggingface
from arriero.checkpoint.open_model import build, open_model
from arriero.checkpoint.tensors.stream import ViewReader, torch_dtype
from arriero.checkpoint.tensors.transfer import read_fingerprints
from arriero.checkpoint.tensors.values import fingerprint
from arriero.common.errors import CheckFailed
from arriero.common.progress import ProgressBar
from arriero.model.config import LlamaConfig

ExportDtype = Literal["keep", "float32", "bfloat16", "float16"]
_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    source: Path
    """The checkpoint or model directory that was read."""
    destination: Path
    """The directory that was written."""
    parameters: int
    """Their number."""
    fingerprint: str
    """Of the weights, whatever files they lie in."""
    largest_logit_difference: float
    """Between the source and the directory read back, on random tokens, both in float32."""
    tokenizer: Path | None
    """The tokenizer that was copied, if there was one."""
    notes: list[str]
    """What was assumed, one sentence each."""


def export(
    source: Path, destination: Path, *, dtype: ExportDtype = "keep", tokenizer: Path | None = None,
    max_shard_gb: float = 5.0,
) -> Exported:  # fmt: skip
    """Writes a trained model as a Hugging Face directory, loads it back and compares the logits.

    Args:
        source: a run (its newest checkpoint), a checkpoint, or a Hugging Face directory.
        destination: a new directory; it appears whole or not at all.
        dtype: what the weights are written as; keep is as stored.
        tokenizer: the tokenizer's directory, if it does not lie with the source.
        max_shard_gb: largest size of one safetensors file, in GB.

    Raises:
        UserError: the source is not a whole model, or the destination cannot be written.
        CheckFailed: the directory does not hold what was written.
    """
    opened = open_model(source)
    tokenizer = tokenizer or opened.tokenizer
    with ProgressBar("writing", sum(t.nbytes for t in opened.reader.tensors.values())) as progress:
        fingerprints = write_huggingface(
            destination, opened.reader, config=opened.config, tokenizer_dir=tokenizer,
            generation=opened.generation, dtype=torch_dtype(_NAMES[dtype]) if dtype != "keep" else None,
            max_shard_bytes=max_shard_gb * 1e9, advance=progress.advance,
        )  # fmt: skip
    reloaded = open_huggingface(destination)
    if read_fingerprints(reloaded.tensors) != fingerprints:
        raise CheckFailed(f"{destination}: reads back other weights than were written")
    return Exported(
        opened.path, destination, sum(t.numel for t in reloaded.tensors.values()),
        fingerprint(reloaded.tensors, None, fingerprints), logit_difference(opened.reader, reloaded, opened.config),
        tokenizer, opened.notes,
    )  # fmt: skip


def logit_difference(a: ViewReader, b: ViewReader, config: LlamaConfig, *, tokens: int = 64) -> float:
    """Largest absolute difference of two models' logits on random tokens; both compute in float32."""
    import torch

    ids = torch.randint(config.vocab_size, (2, tokens), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = [build(reader, config, torch.float32)(ids) for reader in (a, b)]
    return float((logits[0] - logits[1]).abs().max())
