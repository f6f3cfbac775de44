"""`arriero generate`: text from a run, a checkpoint or a Hugging Face directory, with a cache of keys and values."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from arriero.common.device import device_type, take_device
from arriero.common.errors import EXIT_OK, UserError
from arriero.common.text import printable

if TYPE_CHECKING:
    import torch

    from arriero.data.tokenizer import Tokenizer
    from arriero.model.llama import KeyValues, Llama


@dataclass(frozen=True)
class GenerateArgs:
    """Continue a prompt with a trained model."""

    model: Positional[Path]
    """A run (its newest checkpoint), a checkpoint, or a Hugging Face directory."""
    prompt: str
    """The text to go on from; may be empty if the tokenizer has a BOS."""
    max_new_tokens: int = 100
    """Stop after this many tokens; the end-of-text token stops earlier."""
    temperature: float = 0.0
    """0 always takes the likeliest token; 1 samples from the model's own distribution, more is wilder."""
    top_p: float = 1.0
    """Sample only from the likeliest tokens that together have this probability."""
    seed: int = 0
    """Seed of the sampling; the same seed gives the same text on the same machine."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto is as stored, but float32 for a float16 model on the CPU, where float16 is very slow."""
    device: str = "auto"
    """auto, cpu, cuda or npu."""
    tokenizer: Path | None = None
    """The tokenizer's directory, if it does not lie with the model."""
    json: bool = False
    """Print one JSON object: prompt, text, continuation, tokens, finish (eos or length), tokens_per_second."""


def run(args: GenerateArgs) -> int:
    """Loads, generates and prints; returns the exit code."""
    if args.temperature < 0 or not 0 < args.top_p <= 1 or args.max_new_tokens < 1:
        raise UserError(
            "--temperature, --top-p or --max-new-tokens is out of range",
            "temperature is 0 or more, top-p in (0, 1], max-new-tokens 1 or more",
        )
    import torch

    from arriero.data.tokenizer import load_tokenizer
    from arriero.weights.sources import build, end_ids, open_model

    opened = open_model(args.model)
    for note in opened.notes:
        print(printable(f"note: {note}"), file=sys.stderr)
    where = args.tokenizer or opened.tokenizer
    if where is None:
        raise UserError(f"{opened.path}: has no tokenizer beside it", "give one with --tokenizer DIR")
    tokenizer = load_tokenizer(where)
    prompt = encode_prompt(tokenizer, args.prompt, opened.config.vocab_size)
    kind = device_type(args.device)
    dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
    if dtype is None and kind == "cpu" and opened.reader.dtype("model.norm.weight") == torch.float16:
        dtype = torch.float32
    model = build(opened.reader, opened.config, dtype, take_device(kind, 0))
    ends = end_ids(opened, tokenizer.eos_id)
    started = time.perf_counter()
    new: list[int] = []
    shown = ""
    for token in generate(
        model, prompt, args.max_new_tokens, temperature=args.temperature, top_p=args.top_p, seed=args.seed
    ):
        if token in ends:
            break
        new.append(token)
        if not args.json:
            shown = _show(tokenizer.decode([*prompt, *new]), shown)
    finish = "length" if len(new) == args.max_new_tokens else "eos"
    text = tokenizer.decode([*prompt, *new])
    if args.json:
        rate = len(new) / (time.perf_counter() - started)
        start = len(tokenizer.decode(prompt))
        answer = {"prompt": args.prompt, "text": text, "continuation": text[start:], "tokens": new}
        print(json.dumps({**answer, "finish": finish, "tokens_per_second": round(rate, 1)}, ensure_ascii=False))
    else:
        sys.stdout.write(text[len(shown) :] + "\n")
    return EXIT_OK


def _show(text: str, shown: str) -> str:
    """Prints what is new and final: a character whose bytes are not all there yet decodes to the replacement mark."""
    ready = text.rstrip("\ufffd")
    sys.stdout.write(ready[len(shown) :])
    sys.stdout.flush()
    return ready if len(ready) > len(shown) else shown


def encode_prompt(tokenizer: Tokenizer, text: str, vocab_size: int) -> list[int]:
    """BOS and the text's ids.

    Raises:
        UserError: nothing to begin with, or a tokenizer with more ids than the model has rows.
    """
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{tokenizer.path}: has {tokenizer.vocab_size} ids, the model has {vocab_size}",
            "name the model's own tokenizer with --tokenizer",
        )
    ids = ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + tokenizer.encode(text)
    if not ids:
        raise UserError("the prompt is empty and the tokenizer has no BOS", "give --prompt some text")
    return ids


def generate(
    model: Llama, prompt: list[int], count: int, *, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0
) -> Iterator[int]:
    """Yields `count` token ids that follow `prompt`; the caller stops at the end-of-text id.

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
            ids.append(choose(logits_V.float().cpu(), temperature=temperature, top_p=top_p, generator=generator))
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
    """The next id: the likeliest at temperature 0, else a draw from the smallest set of probability `top_p`."""
    import torch

    if temperature == 0:
        return int(logits_V.argmax())
    probabilities_V = torch.softmax(logits_V.double() / temperature, dim=-1)
    sorted_V, ids_V = probabilities_V.sort(descending=True)
    before_V = sorted_V.cumsum(-1) - sorted_V
    sorted_V[before_V >= top_p] = 0  # the first is always kept
    return int(ids_V[torch.multinomial(sorted_V, 1, generator=generator)])
