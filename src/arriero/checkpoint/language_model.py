"""A model in memory with its tokenizer: text in, text out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from arriero.checkpoint.open_model import build, end_ids, open_model
from arriero.common.device import DeviceChoice, device_type, select_device
from arriero.common.errors import UserError
from arriero.common.text import escape
from arriero.data.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from arriero.model.llama import Llama

ModelDtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class GeneratedText:
    """What a model wrote."""

    prompt: str
    text: str
    """Prompt and continuation."""
    continuation: str
    tokens: list[int]
    """Ids of the continuation, without the end-of-text token."""
    finish: Literal["eos", "length"]
    """Why it ended: the end-of-text token, or the number of tokens asked for."""


class LanguageModel:
    """A model with its tokenizer; the weights are read when they are first needed, after the prompt was checked."""

    def __init__(
        self, path: Path, *, tokenizer: Path | None = None, dtype: ModelDtype = "auto", device: DeviceChoice = "auto"
    ) -> None:
        """Opens a run's newest checkpoint, a checkpoint, or a model directory.

        Args:
            path: where it lies.
            tokenizer: the tokenizer's directory, if it does not lie with the model.
            dtype: auto is as stored, but float32 for a float16 model on the CPU, where float16 is very slow.
            device: auto takes the accelerator that is there, or the CPU.

        Raises:
            UserError: not a whole model, or no tokenizer.
        """
        self._opened = open_model(path)
        self.config, self.notes = self._opened.config, self._opened.notes
        where = tokenizer or self._opened.tokenizer
        if where is None:
            raise UserError(f"{self._opened.path}: has no tokenizer beside it", "give one with --tokenizer DIR")
        self.tokenizer = load_tokenizer(where)
        self._dtype, self._device = dtype, device

    @cached_property
    def model(self) -> Llama:
        """The model in memory, in evaluation mode."""
        import torch

        reader, kind = self._opened.reader, device_type(self._device)
        dtype = None if self._dtype == "auto" else getattr(torch, self._dtype)
        if dtype is None and kind == "cpu" and reader.dtype("model.norm.weight") == torch.float16:
            dtype = torch.float32
        return build(reader, self.config, dtype, select_device(kind, 0))

    @cached_property
    def ends(self) -> frozenset[int]:
        """Ids that end a text."""
        return end_ids(self._opened, self.tokenizer.eos_id)

    def generate(
        self, prompt: str, max_new_tokens: int = 100, *, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0,
        on_text: Callable[[str], None] = lambda text: None,
    ) -> GeneratedText:  # fmt: skip
        """Continues a text until the end-of-text token, or for `max_new_tokens`.

        Args:
            prompt: the text to go on from; may be empty if the tokenizer has a BOS.
            max_new_tokens: the most tokens to add.
            temperature: 0 always takes the likeliest token; 1 samples from the model's own distribution.
            top_p: sample only from the likeliest tokens that together have this probability.
            seed: of the sampling.
            on_text: called with prompt and continuation after each token.

        Raises:
            UserError: an empty prompt without BOS, a token that the model has no row for, logits that are not finite.
        """
        from arriero.model.generate import generate

        ids = encode_prompt(self.tokenizer, prompt, self.config.vocab_size)
        unused = self.tokenizer.unused_ids(self.config.vocab_size).tolist()
        excluded = [i for i in unused if i not in self.ends]
        new: list[int] = []
        for token in generate(
            self.model, ids, max_new_tokens, temperature=temperature, top_p=top_p, seed=seed, excluded=excluded
        ):
            if token in self.ends:
                break
            new.append(token)
            on_text(self.tokenizer.decode([*ids, *new]))
        text = self.tokenizer.decode([*ids, *new])
        finish: Literal["eos", "length"] = "length" if len(new) == max_new_tokens else "eos"
        return GeneratedText(prompt, text, text[len(self.tokenizer.decode(ids)) :], new, finish)

    def notices(self, prompt: str, max_new_tokens: int) -> list[str]:
        """What the user should know of the tokenizer and of `max_new_tokens` after `prompt`, one sentence each."""
        found, config = [], self.config
        if self.tokenizer.vocab_size > config.vocab_size:
            found.append(
                f"{self.tokenizer.path} has {self.tokenizer.vocab_size} ids, the model {config.vocab_size} rows: ids "
                f"from {config.vocab_size} on are neither read nor written"
            )
        count = len(encode_prompt(self.tokenizer, prompt, config.vocab_size))
        positions = config.max_position_embeddings
        if count + max_new_tokens > positions and config.rope_scaling.rope_type != "dynamic":
            found.append(
                f"{count} tokens of prompt and up to {max_new_tokens} new ones exceed the model's "
                f"max_position_embeddings {positions}: text beyond it may be poor"
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
