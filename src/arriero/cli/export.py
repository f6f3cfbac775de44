"""`arriero export`: a run or checkpoint -> a Hugging Face directory, read back and compared."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Interval
from tyro.conf import Positional

from arriero.checkpoint.formats.huggingface import open_huggingface, write_huggingface
from arriero.checkpoint.open_model import build, open_model
from arriero.checkpoint.tensors.stream import ViewReader, torch_dtype
from arriero.checkpoint.tensors.transfer import read_fingerprints
from arriero.checkpoint.tensors.values import fingerprint
from arriero.common.errors import EXIT_OK, CheckFailed, join_problems
from arriero.common.progress import ProgressBar
from arriero.common.ranges import flag, range_problems
from arriero.common.text import escape
from arriero.model.config import LlamaConfig


@dataclass(frozen=True)
class ExportArgs:
    """Write a trained model as a Hugging Face directory, then load it back and compare the logits."""

    source: Positional[Path]
    """A run (its newest checkpoint), a checkpoint, or a Hugging Face directory."""
    destination: Positional[Path]
    """A new directory; it appears whole or not at all."""
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep"
    """What the weights are written as; keep is as stored, which for a run is its float32 master weights."""
    tokenizer: Path | None = None
    """The tokenizer's directory, if it does not lie with the source."""
    max_shard_gb: Annotated[float, Interval(gt=0, le=1e6)] = 5.0
    """Largest size of one safetensors file, in GB."""
    json: bool = False
    """Print the result as JSON."""


NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def run(args: ExportArgs) -> int:
    """Writes, reads back, compares; returns 0, or raises CheckFailed if the directory is not what was written."""
    if problems := range_problems(args, flag):
        raise join_problems(problems)
    opened = open_model(args.source)
    tokenizer = args.tokenizer or opened.tokenizer
    dtype = torch_dtype(NAMES[args.dtype]) if args.dtype != "keep" else None
    with ProgressBar("writing", sum(t.nbytes for t in opened.reader.tensors.values())) as progress:
        fingerprints = write_huggingface(
            args.destination, opened.reader, config=opened.config, tokenizer_dir=tokenizer,
            generation=opened.generation, dtype=dtype, max_shard_bytes=args.max_shard_gb * 1e9,
            advance=progress.advance,
        )  # fmt: skip
    reloaded = open_huggingface(args.destination)
    if read_fingerprints(reloaded.tensors) != fingerprints:
        raise CheckFailed(f"{args.destination}: reads back other weights than were written")
    difference = logit_difference(opened.reader, reloaded, opened.config)
    digest = fingerprint(reloaded.tensors, None, fingerprints)
    parameters = sum(t.numel for t in reloaded.tensors.values())
    if args.json:
        keys = {"source": str(opened.path), "destination": str(args.destination), "parameters": parameters}
        facts = {**keys, "fingerprint": digest, "largest_logit_difference": difference, "notes": opened.notes}
        print(json.dumps(facts))
        return EXIT_OK
    print(f"{escape(args.destination)}: {parameters:,} parameters from {escape(opened.path)}")
    print(f"fingerprint {digest[:16]}; largest logit difference after reloading {difference:.3g}")
    for note in opened.notes:
        print(f"note: {note}")
    if tokenizer is None:
        print("no tokenizer was found beside the source: give one with --tokenizer DIR")
    return EXIT_OK


def logit_difference(a: ViewReader, b: ViewReader, config: LlamaConfig, *, tokens: int = 64) -> float:
    """Largest absolute difference of two models' logits on random tokens; both compute in float32."""
    import torch

    ids = torch.randint(config.vocab_size, (2, tokens), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = [build(reader, config, torch.float32)(ids) for reader in (a, b)]
    return float((logits[0] - logits[1]).abs().max())
