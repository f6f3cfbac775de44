"""A verb from another package: `arriero tokens PREFIX` counts a data set's tokens.

A verb is a dataclass of arguments and `run(arguments) -> exit code` in the same module. tyro turns the fields into
positional arguments and flags; the docstrings below them are the help. The package names the class as an entry point:

    [project.entry-points."arriero.verbs"]
    tokens = "my_package.verb:TokensArgs"
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Interval
from tyro.conf import Positional

from arriero.common.errors import EXIT_CHECK_FAILED, EXIT_OK
from arriero.data.indexed import IndexedDataset


@dataclass(frozen=True)
class TokensArgs:
    """Count the tokens of a data set."""

    prefix: Positional[str]
    """The data set's prefix."""
    at_least: Annotated[int, Interval(ge=0, le=10**15)] = 0
    """Exit with code 1 if there are fewer tokens than this."""
    json: bool = False
    """Print JSON."""


def run(args: TokensArgs) -> int:
    """Prints the number of tokens; a UserError raised here is printed with its fix, exit code 2."""
    tokens = int(IndexedDataset(args.prefix).sizes.sum())
    print(json.dumps({"tokens": tokens}) if args.json else f"{tokens:,} tokens")
    return EXIT_OK if tokens >= args.at_least else EXIT_CHECK_FAILED
