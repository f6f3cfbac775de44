"""The verb `inspect`: what a path is, and whether it is whole. Each kind of path has a module beside this one."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path

import tyro

from arriero.common.errors import UserError

# Tried in this order: a run holds checkpoints, and a checkpoint holds a config.json as a Hugging Face directory does.
KINDS = ("arriero.cli.inspect.run", "arriero.cli.inspect.dataset", "arriero.cli.inspect.weights")


@dataclass(frozen=True)
class InspectArgs:
    """Print what a data set, checkpoint, run or model directory is, and whether it is whole."""

    path: tyro.conf.Positional[Path]
    """A run, one of its checkpoints, a data set's prefix, a Hugging Face directory or a neighbour's checkpoint."""
    verify: bool = False
    """Read every byte and check it against the SHA-256 that was written with it, where there is one."""
    figure: Path | None = None
    """Data sets: a PNG to draw the length histogram to."""
    json: bool = False
    """Print the answer as JSON."""


def run(args: InspectArgs) -> int:
    """Inspects the path by the first module that recognises it; returns 1 if it is not whole."""
    for name in KINDS:
        part = importlib.import_module(name)
        if part.recognises(args.path):
            extra = {"figure": args.figure} if name == "arriero.cli.inspect.dataset" else {}
            if args.figure is not None and not extra:
                raise UserError(f"--figure has no effect on {args.path}", "leave it out: it draws data sets only")
            return int(part.inspect(args.path, json=args.json, verify=args.verify, **extra))
    if not args.path.exists():
        raise UserError(f"{args.path}: no such file or directory", "name a path, or a data set's prefix without .bin")
    fix = "name a run, a checkpoint, a data set's prefix, or a directory with a config.json or weights"
    raise UserError(f"{args.path}: not of a kind that arriero reads", fix)
