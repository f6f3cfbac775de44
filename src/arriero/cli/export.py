"""`arriero export`: a run or checkpoint -> a Hugging Face directory, read back and compared."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Interval
from tyro.conf import Positional

from arriero.checkpoint.export import ExportDtype, export
from arriero.common.errors import EXIT_OK, join_problems
from arriero.common.ranges import flag, range_problems
from arriero.common.text import escape


@dataclass(frozen=True)
class ExportArgs:
    """Write a trained model as a Hugging Face directory, then load it back and compare the logits."""

    source: Positional[Path]
    """A run (its newest checkpoint), a checkpoint, or a Hugging Face directory."""
    destination: Positional[Path]
    """A new directory; it appears whole or not at all."""
    dtype: ExportDtype = "keep"
    """What the weights are written as; keep is as stored, which for a run is its float32 master weights."""
    tokenizer: Path | None = None
    """The tokenizer's directory, if it does not lie with the source."""
    max_shard_gb: Annotated[float, Interval(gt=0, le=1e6)] = 5.0
    """Largest size of one safetensors file, in GB."""
    json: bool = False
    """Print the result as JSON."""


def run(args: ExportArgs) -> int:
    """Writes, reads back, compares and prints; returns the exit code."""
    if problems := range_problems(args, flag):
        raise join_problems(problems)
    done = export(
        args.source, args.destination, dtype=args.dtype, tokenizer=args.tokenizer, max_shard_gb=args.max_shard_gb
    )
    if args.json:
        facts = dataclasses.asdict(done) | {"source": str(done.source), "destination": str(done.destination)}
        print(json.dumps({key: value for key, value in facts.items() if key != "tokenizer"}))
        return EXIT_OK
    print(f"{escape(done.destination)}: {done.parameters:,} parameters from {escape(done.source)}")
    print(
        f"fingerprint {done.fingerprint[:16]}; largest logit difference after reloading "
        f"{done.largest_logit_difference:.3g}"
    )
    for note in done.notes:
        print(f"note: {note}")
    if done.tokenizer is None:
        print("no tokenizer was found beside the source: give one with --tokenizer DIR")
    return EXIT_OK
