"""`arriero generate`: text from a run, a checkpoint or a Hugging Face directory."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Interval
from tyro.conf import Positional

from arriero.checkpoint.language_model import LanguageModel, ModelDtype
from arriero.common.device import DeviceChoice
from arriero.common.errors import EXIT_OK, join_problems
from arriero.common.ranges import flag, range_problems
from arriero.common.text import escape_message


@dataclass(frozen=True)
class GenerateArgs:
    """Continue a prompt with a trained model."""

    model: Positional[Path]
    """A run (its newest checkpoint), a checkpoint, or a Hugging Face directory."""
    prompt: str
    """The text to go on from; may be empty if the tokenizer has a BOS."""
    max_new_tokens: Annotated[int, Interval(ge=1, le=10_000_000)] = 100
    """Stop after this many tokens; the end-of-text token stops earlier."""
    temperature: Annotated[float, Interval(ge=0, le=100)] = 0.0
    """0 always takes the likeliest token; 1 samples from the model's own distribution, more is wilder."""
    top_p: Annotated[float, Interval(gt=0, le=1)] = 1.0
    """Sample only from the likeliest tokens that together have this probability."""
    seed: Annotated[int, Interval(ge=0, lt=2**32)] = 0
    """Seed of the sampling; the same seed gives the same text on the same machine."""
    dtype: ModelDtype = "auto"
    """auto is as stored, but float32 for a float16 model on the CPU, where float16 is very slow."""
    device: DeviceChoice = "auto"
    """Where to compute; auto takes the accelerator that is there, or the CPU."""
    tokenizer: Path | None = None
    """The tokenizer's directory, if it is not beside the model."""
    json: bool = False
    """Print one JSON object: prompt, text, continuation, tokens, finish (eos or length), tokens_per_second."""


def run(args: GenerateArgs) -> int:
    """Loads, generates and prints; returns the exit code."""
    if problems := range_problems(args, flag):
        raise join_problems(problems)
    model = LanguageModel(args.model, tokenizer=args.tokenizer, dtype=args.dtype, device=args.device)
    for note in model.notes:
        print(escape_message(f"note: {note}"), file=sys.stderr)
    for notice in model.notices(args.prompt, args.max_new_tokens):
        print(escape_message(f"note: {notice}"), file=sys.stderr)
    started, printer = time.perf_counter(), _Printer()
    made = model.generate(
        args.prompt, args.max_new_tokens, temperature=args.temperature, top_p=args.top_p, seed=args.seed,
        on_text=(lambda text: None) if args.json else printer.show,
    )  # fmt: skip
    if args.json:
        rate = len(made.tokens) / (time.perf_counter() - started)
        answer = {"prompt": made.prompt, "text": made.text, "continuation": made.continuation, "tokens": made.tokens}
        print(json.dumps({**answer, "finish": made.finish, "tokens_per_second": round(rate, 1)}, ensure_ascii=False))
    else:
        printer.finish(made.text)
    return EXIT_OK


class _Printer:
    """Prints a growing text."""

    def __init__(self) -> None:
        self._printed = ""

    def show(self, text: str) -> None:
        """Prints what is new and final: a character whose bytes are incomplete decodes to the replacement mark."""
        ready = text.rstrip("\ufffd")
        sys.stdout.write(_for_terminal(ready[len(self._printed) :]))
        sys.stdout.flush()
        self._printed = max(self._printed, ready, key=len)

    def finish(self, text: str) -> None:
        """Prints the rest of it."""
        sys.stdout.write(_for_terminal(text[len(self._printed) :]) + "\n")


def _for_terminal(text: str) -> str:
    """The text as it is, but for control characters that a terminal would obey."""
    return escape_message(text) if sys.stdout.isatty() else text
