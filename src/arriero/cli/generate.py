"""`arriero generate`: text from a run, a checkpoint or a Hugging Face directory."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Interval
from tyro.conf import Positional

from arriero.common.device import device_type, select_device
from arriero.common.errors import EXIT_OK, UserError, join_problems
from arriero.common.ranges import flag, range_problems
from arriero.common.text import escape, escape_message

if TYPE_CHECKING:
    from arriero.data.tokenizer import Tokenizer
    from arriero.model.config import LlamaConfig


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
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto is as stored, but float32 for a float16 model on the CPU, where float16 is very slow."""
    device: Literal["auto", "cpu", "cuda", "npu"] = "auto"
    """Where to compute; auto takes the accelerator that is there, or the CPU."""
    tokenizer: Path | None = None
    """The tokenizer's directory, if it is not beside the model."""
    json: bool = False
    """Print one JSON object: prompt, text, continuation, tokens, finish (eos or length), tokens_per_second."""


def run(args: GenerateArgs) -> int:
    """Loads, generates and prints; returns the exit code."""
    if problems := range_problems(args, flag):
        raise join_problems(problems)
    import torch

    from arriero.checkpoint.open_model import build, end_ids, open_model
    from arriero.data.tokenizer import load_tokenizer
    from arriero.model.generate import generate

    opened = open_model(args.model)
    for note in opened.notes:
        print(escape_message(f"note: {note}"), file=sys.stderr)
    where = args.tokenizer or opened.tokenizer
    if where is None:
        raise UserError(f"{opened.path}: has no tokenizer beside it", "give one with --tokenizer DIR")
    tokenizer = load_tokenizer(where)
    prompt = encode_prompt(tokenizer, args.prompt, opened.config.vocab_size)
    for notice in notices(tokenizer, opened.config, len(prompt), args.max_new_tokens):
        print(escape_message(f"note: {notice}"), file=sys.stderr)
    kind = device_type(args.device)
    dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
    if dtype is None and kind == "cpu" and opened.reader.dtype("model.norm.weight") == torch.float16:
        dtype = torch.float32
    model = build(opened.reader, opened.config, dtype, select_device(kind, 0))
    ends = end_ids(opened, tokenizer.eos_id)
    started = time.perf_counter()
    new: list[int] = []
    printed = ""
    for token in generate(
        model,
        prompt,
        args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        excluded=[i for i in tokenizer.unused_ids(opened.config.vocab_size).tolist() if i not in ends],
    ):
        if token in ends:
            break
        new.append(token)
        if not args.json:
            printed = _print_complete(tokenizer.decode([*prompt, *new]), printed)
    finish = "length" if len(new) == args.max_new_tokens else "eos"
    text = tokenizer.decode([*prompt, *new])
    if args.json:
        rate = len(new) / (time.perf_counter() - started)
        start = len(tokenizer.decode(prompt))
        answer = {"prompt": args.prompt, "text": text, "continuation": text[start:], "tokens": new}
        print(json.dumps({**answer, "finish": finish, "tokens_per_second": round(rate, 1)}, ensure_ascii=False))
    else:
        sys.stdout.write(_for_terminal(text[len(printed) :]) + "\n")
    return EXIT_OK


def _print_complete(text: str, before: str) -> str:
    """Prints what is new, without a last character whose bytes are incomplete: it decodes to the replacement mark."""
    ready = text.rstrip("\ufffd")
    sys.stdout.write(_for_terminal(ready[len(before) :]))
    sys.stdout.flush()
    return ready if len(ready) > len(before) else before


def _for_terminal(text: str) -> str:
    """The text, with control characters escaped on a terminal."""
    return escape_message(text) if sys.stdout.isatty() else text


def notices(tokenizer: Tokenizer, config: LlamaConfig, prompt: int, count: int) -> list[str]:
    """Warnings about this tokenizer, and about `count` tokens after `prompt`, with this model."""
    found = []
    if tokenizer.vocab_size > config.vocab_size:
        found.append(
            f"{tokenizer.path} has {tokenizer.vocab_size} ids, the model {config.vocab_size} rows: ids from "
            f"{config.vocab_size} on are neither read nor written"
        )
    positions = config.max_position_embeddings
    if prompt + count > positions and config.rope_scaling.rope_type != "dynamic":
        found.append(
            f"{prompt} tokens of prompt and up to {count} new ones exceed the model's max_position_embeddings "
            f"{positions}: text beyond it may be poor"
        )
    return found


def encode_prompt(tokenizer: Tokenizer, text: str, vocab_size: int) -> list[int]:
    """BOS and the text's ids.

    Raises:
        UserError: no token at all, not UTF-8, or an id beyond the model's vocabulary.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"--prompt is '{escape(text)}', which is not UTF-8", "give text") from None
    ids = ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + tokenizer.encode(text)
    if not ids:
        raise UserError("the prompt is empty and the tokenizer has no BOS", "give --prompt some text")
    if max(ids) >= vocab_size:
        raise UserError(
            f"{tokenizer.path}: has {tokenizer.vocab_size} ids, the model has {vocab_size} rows, and the prompt needs "
            f"id {max(ids)}",
            "name the model's own tokenizer with --tokenizer",
        )
    return ids
