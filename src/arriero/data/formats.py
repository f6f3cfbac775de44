"""Record formats: what is done with one record, and the prompt templates, which are data.

A format turns a record (a dictionary of columns) into documents. A document is a list of `Part`s; the loss mask follows
from the parts, never from searching the text.
"""

from __future__ import annotations

import re
import string
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from arriero.common.errors import UserError, nearest
from arriero.common.untrusted import read_text

Record = dict[str, Any]


class Part(NamedTuple):
    """A stretch of a document: its text, whether the loss falls on it, and whether EOS follows it."""

    text: str
    learn: bool = True
    end: bool = False


Document = list[Part]


class BadRecordError(ValueError):
    """A record that cannot be used; the message says why."""


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
    if not path.is_file():
        raise UserError(
            f"unknown template {name!r}; {nearest(name, TEMPLATES)}", "give one of these names, or a TOML file"
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
            raise UserError(f"{path}: unknown field {key!r}; {nearest(key, known)}", "a template has only these fields")
        if not isinstance(value, str):
            raise UserError(f"{path}: {key} must be a string", f'write {key} = "..."')
        _check_slots(path, key, value)
    return Template(**found)


def _check_slots(path: Path, key: str, value: str) -> None:
    try:
        slots = {slot for _, slot, _, _ in string.Formatter().parse(value) if slot is not None}
    except ValueError as error:
        raise UserError(
            f"{path}: {key} has a stray brace ({error})", "write {{ and }} for braces that are text"
        ) from error
    if extra := slots - _SLOTS[key]:
        raise UserError(
            f"{path}: {key} asks for {{{sorted(extra)[0]}}}", f"it may use {sorted(_SLOTS[key]) or 'no slot at all'}"
        )


def _text(record: Record, key: str) -> str:
    """A column's string. Raises BadRecordError when it is not there, null or not a string."""
    if key not in record:
        raise BadRecordError(f"no column {key!r} (columns: {', '.join(map(str, list(record)[:8])) or 'none'})")
    value = record[key]
    if value is None:
        raise BadRecordError(f"{key} is null")
    if not isinstance(value, str):
        raise BadRecordError(f"{key} is {type(value).__name__}, not a string")
    return value


def _filled(record: Record, key: str) -> str:
    value = _text(record, key)
    if not value or value.isspace():
        raise BadRecordError(f"{key} is {'blank' if value else 'empty'}")
    return value


def _alpaca(record: Record, template: Template) -> tuple[str, str]:
    """Prompt and answer of an instruction/input/output record; the input may be missing, null or blank."""
    instruction, output = _filled(record, "instruction"), _filled(record, "output")
    extra = record.get("input")
    if extra is not None and not isinstance(extra, str):
        raise BadRecordError(f"input is {type(extra).__name__}, not a string")
    if extra and not extra.isspace():
        return template.prompt.format(instruction=instruction, input=extra), template.answer.format(output=output)
    return template.prompt_no_input.format(instruction=instruction), template.answer.format(output=output)


_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
}
_TURN = re.compile(r"(?:^|\n)\s*(Human|Assistant|User|Bot):", re.IGNORECASE)


def _turns(record: Record) -> list[tuple[str, str]]:
    """(role, text) of a chat: `messages`, `conversations`, or Human:/Assistant: turns in instruction and output."""
    listed = record.get("messages", record.get("conversations"))
    if listed is None:
        pieces = _TURN.split(_filled(record, "instruction"))
        if pieces[0].strip():
            pieces = ["", "human", pieces[0].strip(), *pieces[1:]]
        # A trailing empty "Assistant:" only announces the output.
        turns = [(_ROLES[r.lower()], t.strip()) for r, t in zip(pieces[1::2], pieces[2::2], strict=True) if t.strip()]
        return [*turns, ("assistant", _filled(record, "output"))]
    if not isinstance(listed, list) or not listed:
        raise BadRecordError("messages is not a list of turns")
    turns = []
    for turn in listed:
        if not isinstance(turn, dict):
            raise BadRecordError("a turn is not an object")
        role = _text(turn, "role" if "role" in turn else "from")
        if role not in _ROLES:
            raise BadRecordError(f"unknown role {role!r} (known: {', '.join(_ROLES)})")
        turns.append((_ROLES[role], _filled(turn, "content" if "content" in turn else "value")))
    return turns


def _chat(record: Record, template: Template, loss_on: str) -> Document:
    turns = _turns(record)
    answers = [i for i, (role, _) in enumerate(turns) if role == "assistant"]
    if not answers:
        raise BadRecordError("no answer of the assistant")
    learned = answers if loss_on == "all" else answers[-1:]
    parts: Document = []
    for i, (role, content) in enumerate(turns):
        if role == "assistant":
            parts.append(Part(template.assistant, learn=False))
            parts.append(Part(template.reply.format(content=content), learn=i in learned, end=True))
            if i < len(turns) - 1:
                parts.append(Part(template.between, learn=False))
        else:
            parts.append(Part(getattr(template, role).format(content=content), learn=False))
    return [part for part in parts if part.text]


@dataclass(frozen=True)
class Format:
    """A format with its options bound.

    Attributes:
        names: what each document of a record is called; it goes into the file name.
        masked: whether the loss falls on part of a document only (three aligned files are written then).
        columns: the columns that are read, or None for all.
        documents: record -> one document for each name. Raises BadRecordError.
    """

    names: tuple[str, ...]
    masked: bool
    columns: tuple[str, ...] | None
    documents: Callable[[Record], list[Document]]


FORMATS = ("text", "alpaca", "alpaca-sft", "chat")


def make_format(name: str, *, keys: Sequence[str], template: Template, loss_on: str) -> Format:
    """Binds a format's options. Raises UserError for an unknown name."""
    alpaca = ("instruction", "input", "output")
    if name == "text":
        return Format(tuple(keys), False, tuple(keys), lambda record: [[Part(_filled(record, key))] for key in keys])
    if name == "alpaca":
        return Format(("text",), False, alpaca, lambda record: [[Part("".join(_alpaca(record, template)))]])
    if name == "alpaca-sft":

        def split(record: Record) -> list[Document]:
            prompt, answer = _alpaca(record, template)
            return [[Part(prompt, learn=False), Part(answer, end=True)]]

        return Format(("packed",), True, alpaca, split)
    if name == "chat":
        return Format(("packed",), True, None, lambda record: [_chat(record, template, loss_on)])
    raise UserError(f"unknown format {name!r}; {nearest(name, FORMATS)}", "see docs/prepare.md for the four formats")
