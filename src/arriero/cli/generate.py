"""`arriero generate`: text from a run, a checkpoint or a Hugging Face directory, with a cache of keys and values."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Interval
from tyro.conf import Positional

from arriero.common.device import device_type, take_device
from arriero.common.errors import EXIT_OK, UserError, join_problems
from arriero.common.ranges import flag, range_problems
from arriero.common.text import escape, escape_message

if TYPE_CHECKING:
    import numpy as np
    import torch

    from arriero.data.tokenizer import Tokenizer
    from arriero.model.config import LlamaConfig
    from arriero.model.llama import KeyValues, Llama


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
    """The tokenizer's directory, if it does not lie with the model."""
    json: bool = False
    """Print one JSON object: prompt, text, continuation, tokens, finish (eos or length), tokens_per_second."""


def run(args: GenerateArgs) -> int:
    """Loads, generates and prints; returns the exit code."""
    if problems := range_problems(args, flag):
        raise join_problems(problems)
    import torch

    from arriero.checkpoint.open_model import build, end_ids, open_model
    from arriero.data.tokenizer import load_tokenizer

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
    model = build(opened.reader, opened.config, dtype, take_device(kind, 0))
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
        never=[i for i in tokenizer.unused_ids(opened.config.vocab_size).tolist() if i not in ends],
    ):
        if token in ends:
            break
        new.append(token)
        if not args.json:
            printed = _show(tokenizer.decode([*prompt, *new]), printed)
    finish = "length" if len(new) == args.max_new_tokens else "eos"
    text = tokenizer.decode([*prompt, *new])
    if args.json:
        rate = len(new) / (time.perf_counter() - started)
        start = len(tokenizer.decode(prompt))
        answer = {"prompt": args.prompt, "text": text, "continuation": text[start:], "tokens": new}
        print(json.dumps({**answer, "finish": finish, "tokens_per_second": round(rate, 1)}, ensure_ascii=False))
    else:
        sys.stdout.write(_visible(text[len(printed) :]) + "\n")
    return EXIT_OK


def _show(text: str, before: str) -> str:
    """Prints what is new and final: a character whose bytes are not all there yet decodes to the replacement mark."""
    ready = text.rstrip("\ufffd")
    sys.stdout.write(_visible(ready[len(before) :]))
    sys.stdout.flush()
    return ready if len(ready) > len(before) else before


def _visible(text: str) -> str:
    """The text as it is, but for control characters that a terminal would obey."""
    return escape_message(text) if sys.stdout.isatty() else text


def notices(tokenizer: Tokenizer, config: LlamaConfig, prompt: int, count: int) -> list[str]:
    """What the user should know of this tokenizer and of `count` tokens after `prompt` with this model."""
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
        UserError: nothing to begin with, not text, or an id that the model has no row for.
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


def generate(
    model: Llama, prompt: list[int], count: int, *, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0,
    never: Sequence[int] | np.ndarray = (),
) -> Iterator[int]:  # fmt: skip
    """Yields `count` token ids that follow `prompt`, none of `never`; the caller stops at the end-of-text id.

    Keys and values are cached, except under `dynamic` rotary scaling, where a longer row turns every position anew.
    """
    import torch

    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt)
    cache: dict[str, KeyValues] | None = None
    cached = model.config.rope_scaling.rope_type != "dynamic"
    with torch.inference_mode():
        for _ in range(count):
            fresh = ids[-1:] if cache else ids
            tokens_1L = torch.tensor([fresh], device=device)
            if cached:
                logits_V, cache = next_logits(model, tokens_1L, cache)
            else:
                logits_V = model(tokens_1L)[0, -1]
            logits_V = logits_V.float().cpu()
            logits_V[torch.as_tensor(never, dtype=torch.int64)] = -torch.inf
            ids.append(choose(logits_V, temperature=temperature, top_p=top_p, generator=generator))
            yield ids[-1]


def next_logits(
    model: Llama, tokens_BL: torch.Tensor, cache: dict[str, KeyValues] | None
) -> tuple[torch.Tensor, dict[str, KeyValues]]:
    """Logits [V] after the last of `tokens_BL` [1, L], which follow the cached positions; and the longer cache."""
    import torch

    past = 0 if not cache else next(iter(cache.values())).keys.shape[1]
    length = tokens_BL.shape[1]
    x_BLD = model.model.embed_tokens(tokens_BL)
    positions = torch.arange(past, past + length, device=tokens_BL.device)
    cos, sin = model.rope(positions, x_BLD.dtype, past + length)
    mask = None
    if past:  # a new token sees all before it; several see each other causally
        mask = positions[:, None] >= torch.arange(past + length, device=tokens_BL.device)
        mask = mask[None, None]
    longer: dict[str, KeyValues] = {}
    for name, layer in model.model.layers.items():
        x_BLD, longer[name] = layer.step(x_BLD, cos, sin, mask, cache[name] if cache else None)  # type: ignore[operator]
    return model.lm_head(model.model.norm(x_BLD[:, -1:]))[0, 0], longer


def choose(logits_V: torch.Tensor, *, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """The next id: the likeliest at temperature 0, else a draw from the smallest set of probability `top_p`.

    Raises:
        UserError: the logits are NaN or infinite.
    """
    import torch

    if not torch.isfinite(logits_V.max()):  # minus infinity marks ids that are never chosen
        raise UserError("the model's logits are not finite", "try --dtype float32, or another checkpoint")
    if temperature == 0:
        return int(logits_V.argmax())
    logits_V = logits_V.double() - logits_V.max()  # so that no temperature, however low, makes them infinite
    probabilities_V = torch.softmax(logits_V / temperature, dim=-1)
    sorted_V, ids_V = probabilities_V.sort(descending=True)
    before_V = sorted_V.cumsum(-1) - sorted_V
    sorted_V[before_V >= top_p] = 0  # the first is always kept
    return int(ids_V[torch.multinomial(sorted_V, 1, generator=generator)])
