"""What `prepare` is asked to do: the options, and what they name, opened and checked together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Interval

from arriero.common.errors import UserError, join_problems
from arriero.common.ranges import PathText, flag, range_problems
from arriero.common.registry import load_plugins
from arriero.data.formats import FORMATS, Format, FormatOptions, Template, load_template, make_format
from arriero.data.inputs import find_inputs
from arriero.data.output import check_output
from arriero.data.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class PrepareConfig:
    """What to tokenise, how, and where to write it."""

    inputs: tuple[Annotated[str, PathText], ...]
    """Files, directories or globs of one kind: parquet, json, jsonl, csv, txt, arrow, feather (also .gz and .zst)."""
    out: Annotated[str, PathText]
    """Path that the written names begin with: OUT_text_document.bin, .idx and OUT.manifest.json."""
    tokenizer: Path | None = None
    """Directory with tokenizer.model or tokenizer.json, or such a file."""
    format: str = "text"
    """text, alpaca (one text of instruction, input and output), alpaca-sft (loss on the answer) or chat (loss on the
    answers)."""
    keys: tuple[str, ...] = ("text",)
    """Columns of the text format; one data set for each."""
    template: str | None = None
    """stanford (the default), ascendspeed, ascendspeed-instruction, vicuna, or a TOML file."""
    loss_on: Literal["all", "last"] = "all"
    """Chats: compute the loss on every answer, or only on the last."""
    ignore: tuple[str, ...] = ()
    """Columns of alpaca and chat records (or keys of a chat's turns), such as tools, that are left out though they are
    filled. Without it such records are set aside, since their content would be lost."""
    per: Literal["line", "paragraph", "file"] = "line"
    """Text files: what one document is."""
    bos: bool = True
    """Put BOS before every document."""
    eos: bool = True
    """Put EOS after every document (after every answer, in chats)."""
    workers: Annotated[int, Interval(ge=0, le=4096)] = 0
    """Threads that tokenise; 0 means one for each core. The output does not depend on it."""
    engine: Literal["auto", "reference", "fast"] = "auto"
    """reference: sentencepiece or tokenizers; fast: gigatoken, after a check on your own text; auto: fast if it is
    installed and passes the check."""
    strict: bool = False
    """Stop at the first record that cannot be used."""
    max_bad: Annotated[float, Interval(ge=0, le=1)] = 0.01
    """Largest share of records that may be quarantined (empty ones do not count); above it nothing is written."""
    overwrite: bool = False
    """Replace what an earlier run with other inputs wrote under this name."""

    def load_template(self) -> Template:
        """The prompt template. Raises UserError."""
        return load_template("stanford" if self.template is None else self.template)

    def format_options(self) -> FormatOptions:
        """The options that concern the format. Raises UserError for a template that cannot be read."""
        return FormatOptions(self.keys, self.load_template(), self.loss_on, self.ignore)

    def problems(self, kind: str) -> list[UserError]:
        """Values out of range, and options that have no effect on inputs of `kind` ("" where it is not known)."""
        unused = [
            ("--keys", self.keys != ("text",) and self.format != "text", f"format {self.format} has its own columns"),
            ("--template", self.template is not None and self.format == "text", "format text has no template"),
            ("--ignore", bool(self.ignore) and self.format == "text", "format text reads the columns of --keys alone"),
            ("--loss-on", self.loss_on != "all" and self.format != "chat", "it is for format chat"),
            ("--per", self.per != "line" and kind not in ("", "text"), f"the inputs are {kind}, not text files"),
        ]
        found = [UserError(f"{name} has no effect: {why}", "leave it out") for name, wrong, why in unused if wrong]
        if self.format in FORMATS and self.format != "text" and kind == "text":
            needs = f"format {self.format} needs columns, and text files have none"
            found.append(UserError(needs, "use --format text"))
        if len(set(self.keys)) != len(self.keys) or not self.keys:
            found.append(
                UserError(f"--keys {' '.join(self.keys)}: none, or one of them twice", "name each column once")
            )
        return found + range_problems(self, flag)


@dataclass(frozen=True)
class PrepareJob:
    """A checked `PrepareConfig` with everything opened that it names.

    Attributes:
        kind, files: the inputs, all of one kind.
        bos, eos: ids put before and after a document; None for none.
    """

    config: PrepareConfig
    kind: str
    files: list[Path]
    format: Format
    tokenizer: Tokenizer

    @property
    def bos(self) -> int | None:
        """The id that begins a document."""
        return self.tokenizer.bos_id if self.config.bos else None

    @property
    def eos(self) -> int | None:
        """The id that ends a document."""
        return self.tokenizer.eos_id if self.config.eos else None

    @cached_property
    def request(self) -> dict[str, Any]:
        """Everything that decides the output, apart from the sources. Neither workers nor engine do."""
        config = self.config
        return {
            "format": config.format,
            "keys": list(self.format.names),
            "template": None if config.format == "text" else dataclasses.asdict(config.load_template()),
            "loss_on": config.loss_on,
            "per": config.per,
            "bos": config.bos,
            "eos": config.eos,
            "tokenizer": self.tokenizer.file_sha256,
        } | ({"ignore": sorted(config.ignore)} if config.ignore else {})


def open_job(config: PrepareConfig) -> PrepareJob:
    """Opens everything that is read, without writing anything. Raises UserError with all problems together."""
    problems: list[UserError] = []

    def attempt(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except UserError as error:
            problems.append(error)
            return None

    load_plugins()  # they may add file types and formats
    kind, files = attempt(lambda: find_inputs(config.inputs)) or ("", [])
    tokenizer = attempt(lambda: _open_tokenizer(config))
    for name, needed, token in (("BOS", config.bos, "bos_id"), ("EOS", config.eos, "eos_id")):
        if tokenizer is not None and needed and getattr(tokenizer, token) is None:
            fix = f"give --no-{name.lower()} to do without"
            problems.append(UserError(f"{tokenizer.path} has no {name} token", fix))
    form = attempt(lambda: make_format(config.format, config.format_options()))
    attempt(lambda: check_output(config.out, form.outputs if form else ()))
    problems += config.problems(kind)
    if problems:
        raise join_problems(problems)
    return PrepareJob(config, kind, files, form, tokenizer)


def _open_tokenizer(config: PrepareConfig) -> Tokenizer:
    if config.tokenizer is None:
        raise UserError("--tokenizer is missing", "give the directory of the model's tokenizer")
    return load_tokenizer(config.tokenizer)
