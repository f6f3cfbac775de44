"""Record formats: what is done with one record, and the prompt templates, which are data.

A format turns a record (a dictionary of columns) into documents, which are lists
of `Segment`s; the loss mask follows from the segments, never from searching the text.
"""

from __future__ import annotations

import os
import string
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

from arriero.common.errors import UserError, closest_match
from arriero.common.text import escape
from arriero.common.untrusted import read_text
from arriero.data import chat
from arriero.data.prefix import INSTRUCTION_FIELDS
from arriero.data.records import (
    CONTENT_COLUMNS,
    LOSS_WEIGHT_KEYS,
    Record,
    UnusableRecordError,
    optional_text,
    reject_unused_content,
    required_text,
)


class Segment(NamedTuple):
    """A piece of a document: its text, whether the loss is computed on it, and whether EOS follows it."""

    text: str
    in_loss: bool = True
    eos: bool = False


Document = list[Segment]


_INPUT = "Below is an instruction that describes a task, paired with an input that provides further context. "
_PLAIN = "Below is an instruction that describes a task. "
_WRITE = "Write a response that appropriately completes the request."
_CHAT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_STEPS = "Please note that you need to think through your response logically and step by step."


@dataclass(frozen=True)
class Template:
    """How a record becomes text. `{instruction}`, `{input}`, `{output}` and, in chats, `{content}` are filled in."""

    prompt: str = f"{_INPUT}{_WRITE}\n\n### Instruction:\n{{instruction}}\n\n### Input:\n{{input}}\n\n### Response:\n"
    """Prompt of a record with an input."""
    prompt_no_input: str = f"{_PLAIN}{_WRITE}\n\n### Instruction:\n{{instruction}}\n\n### Response:\n"
    """Prompt of a record without one."""
    answer: str = "{output}"
    """What follows the prompt."""
    system: str = "{content}\n\n"
    """A chat's system message."""
    user: str = "### Human: {content}\n\n"
    """One turn of the user."""
    assistant: str = "### Assistant: "
    """What stands before an answer; no loss falls on it."""
    reply: str = "{content}"
    """An answer; the loss falls on it, and on the EOS after it."""
    between: str = "\n\n"
    """What stands between an answer and the next turn."""


# AscendSpeed used one text for pre-training and another for instructions, hence two names.
TEMPLATES: dict[str, Template] = {
    "stanford": Template(),
    "ascendspeed": Template(
        prompt=f"{_CHAT}USER: {_PLAIN}{_WRITE}\n\n### Instruction:\n{{instruction}}\n\n"
        "### Input:\n{input}\n\n### Response: ASSISTANT: ",
        prompt_no_input=f"{_CHAT}USER: {_PLAIN}{_WRITE}\n\n### Instruction:\n{{instruction}}\n\n"
        "### Response: ASSISTANT: ",
    ),
    "ascendspeed-instruction": Template(
        prompt=f"\n{_INPUT}{_WRITE} {_STEPS}\n### Instruction:\n{{instruction}}\n{{input}}\n### Response:\n",
        prompt_no_input=f"\n{_INPUT}{_WRITE} {_STEPS}\n### Instruction:\n{{instruction}}\n\n### Response:\n",
        answer="{output}\n",
    ),
    "vicuna": Template(system="{content} ", user="USER: {content} ", assistant="ASSISTANT: ", between=""),
}
_SLOTS = {
    "prompt": {"instruction", "input"},
    "prompt_no_input": {"instruction"},
    "answer": {"output"},
    "system": {"content"},
    "user": {"content"},
    "assistant": set(),
    "reply": {"content"},
    "between": set(),
}


def load_template(name: str) -> Template:
    """A named template, or a TOML file with some of `Template`'s fields.

    Raises:
        UserError: an unknown name, or a file with unknown fields or slots.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    path = Path(name)
    if not os.path.isfile(name):  # False for names that no file can have
        raise UserError(
            f"unknown template {escape(name)!r}; {closest_match(name, TEMPLATES)}",
            "give one of these names, or a TOML file",
        )
    try:
        found = tomllib.loads(read_text(path, "give a template's TOML file", 1_000_000))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not TOML ({error})", 'write lines such as prompt = "Q: {instruction}\\n"'
        ) from error
    known = [f.name for f in fields(Template)]
    for key, value in found.items():
        if key not in known:
            raise UserError(
                f"{path}: unknown field {key!r}; {closest_match(key, known)}", "a template has only these fields"
            )
        if not isinstance(value, str):
            raise UserError(f"{path}: {key} must be a string", f'write {key} = "..."')
        _check_slots(path, key, value)
    return Template(**found)


def _check_slots(path: Path, key: str, value: str) -> None:
    """Raises UserError unless a field has its slots, each as a plain {name}: text without its slot would be lost."""
    try:
        found = [one for one in string.Formatter().parse(value) if one[1] is not None]
    except ValueError as error:
        raise UserError(
            f"{path}: {key} has a stray brace ({error})", "write {{ and }} for braces that are text"
        ) from error
    slots = {slot for _, slot, _, _ in found if slot is not None}
    if extra := slots - _SLOTS[key]:
        raise UserError(
            f"{path}: {key} asks for {{{sorted(extra)[0]}}}", f"it may use {sorted(_SLOTS[key]) or 'no slot at all'}"
        )
    if any(form or conversion for _, _, form, conversion in found):
        raise UserError(f"{path}: {key} has a slot with : or !", f"write it plainly: {{{sorted(slots)[0]}}}")
    if (lacking := _SLOTS[key] - slots) and (value or key != "system"):  # `system = ""` is for models without one
        lost = sorted(lacking)[0]
        raise UserError(f"{path}: {key} has no {{{lost}}}: what stands there in a record would be lost", "put it in")


ALPACA_COLUMNS = ("instruction", "input", "output")
IGNORABLE = (*CONTENT_COLUMNS, *LOSS_WEIGHT_KEYS)


def _alpaca(record: Record, template: Template, ignored: Sequence[str]) -> tuple[str, str]:
    """Prompt and answer of an instruction/input/output record; the input may be missing, null or blank."""
    record = {key: value for key, value in record.items() if key not in ignored}
    reject_unused_content(record, ALPACA_COLUMNS, "an Alpaca record (--format chat has one for system and history)")
    instruction, output = required_text(record, "instruction"), required_text(record, "output")
    if extra := optional_text(record, "input"):
        return template.prompt.format(instruction=instruction, input=extra), template.answer.format(output=output)
    return template.prompt_no_input.format(instruction=instruction), template.answer.format(output=output)


def _chat(record: Record, template: Template, loss_on: str, ignored: Sequence[str]) -> Document:
    turns = chat.parse_turns(record, ignored)
    answers = [i for i, (role, _) in enumerate(turns) if role == "assistant"]
    if not answers:
        raise UnusableRecordError("no answer of the assistant")
    learned = answers if loss_on == "all" else answers[-1:]
    segments: Document = []
    for i, (role, content) in enumerate(turns):
        if role == "assistant":
            segments.append(Segment(template.assistant, in_loss=False))
            segments.append(Segment(template.reply.format(content=content), in_loss=i in learned, eos=True))
            if i < len(turns) - 1:
                segments.append(Segment(template.between, in_loss=False))
        else:
            segments.append(Segment(getattr(template, role).format(content=content), in_loss=False))
    return [segment for segment in segments if segment.text]


@dataclass(frozen=True)
class Format:
    """A format with its options bound.

    Attributes:
        names: what each document of a record is called; it goes into the file name.
        masked: whether the loss falls on segment of a document only (three aligned files are written then).
        columns: the columns that are read, or None for all.
        documents: record -> one document for each name. Raises BadRecordError.
    """

    names: tuple[str, ...]
    masked: bool
    columns: tuple[str, ...] | None
    documents: Callable[[Record], list[Document]]

    @property
    def outputs(self) -> list[str]:
        """What the written data sets are called after `OUT_`."""
        names = [f"packed_{field}" for field in INSTRUCTION_FIELDS] if self.masked else self.names
        return [f"{name}_document" for name in names]


@dataclass(frozen=True)
class FormatOptions:
    """The options of `prepare` that concern a format.

    Attributes:
        keys: the columns of format text.
        template: of the other formats.
        loss_on: chats: "all" answers, or the "last".
        ignored: columns of IGNORABLE that may be left out though they are filled.
    """

    keys: tuple[str, ...] = ("text",)
    template: Template = Template()
    loss_on: str = "all"
    ignored: tuple[str, ...] = ()


def _text_format(options: FormatOptions) -> Format:
    keys = options.keys
    return Format(keys, False, keys, lambda record: [[Segment(required_text(record, key))] for key in keys])


def _alpaca_format(options: FormatOptions) -> Format:
    def documents(record: Record) -> list[Document]:
        return [[Segment("".join(_alpaca(record, options.template, options.ignored)))]]

    return Format(("text",), False, _ALPACA_READ, documents)


def _alpaca_sft_format(options: FormatOptions) -> Format:
    def documents(record: Record) -> list[Document]:
        prompt, answer = _alpaca(record, options.template, options.ignored)
        return [[Segment(prompt, in_loss=False), Segment(answer, eos=True)]]

    return Format(("packed",), True, _ALPACA_READ, documents)


def _chat_format(options: FormatOptions) -> Format:
    def documents(record: Record) -> list[Document]:
        return [_chat(record, options.template, options.loss_on, options.ignored)]

    return Format(("packed",), True, tuple(dict.fromkeys(chat.CHAT_COLUMNS + CONTENT_COLUMNS)), documents)


_ALPACA_READ = tuple(
    dict.fromkeys(ALPACA_COLUMNS + CONTENT_COLUMNS)
)  # content is read to be refused where it is filled
FORMATS: dict[str, Callable[[FormatOptions], Format]] = {
    "text": _text_format,
    "alpaca": _alpaca_format,
    "alpaca-sft": _alpaca_sft_format,
    "chat": _chat_format,
}
"""Every format by the name that `--format` takes. A plugin (common/registry.py) adds its own with one line,
`FORMATS["name"] = function`."""


def make_format(name: str, options: FormatOptions) -> Format:
    """The format of this name with its options bound.

    Raises:
        UserError: an unknown name, of the format or of an ignored column.
    """
    for one in options.ignored:
        if one not in IGNORABLE:
            raise UserError(f"--ignore {one}: {closest_match(one, IGNORABLE)}", "other columns are not read anyway")
    if name not in FORMATS:
        raise UserError(
            f"unknown format {name!r}; {closest_match(name, FORMATS)}", "see docs/prepare.md for the formats"
        )
    return FORMATS[name](options)
