"""Records of chats as turns: (role, text) in their order."""

from __future__ import annotations

import re
from collections.abc import Sequence

from arriero.common.text import escape
from arriero.data.records import (
    LOSS_WEIGHT_KEYS,
    Record,
    UnusableRecordError,
    first_filled,
    is_filled,
    optional_text,
    reject_unused_content,
    required_text,
    text_column,
)

Turn = tuple[str, str]
CHAT_COLUMNS = ("messages", "conversations", "instruction", "input", "output", "system", "history")
"""What a chat is made of; see `parse_turns`."""

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
}
_TURN = re.compile(r"(?:^|\n)\s*(Human|Assistant|User|Bot):", re.IGNORECASE)


def parse_turns(record: Record, ignored: Sequence[str] = ()) -> list[Turn]:
    """The turns of a record.

    It is `messages` (role, content), `conversations` (from, value), or an instruction with an output; the instruction
    may hold Human:/Assistant: turns, and the input follows its last one. `history`, pairs of earlier questions and
    answers, and `system` stand before it.

    Args:
        record: the record.
        ignored: columns, or keys of turns, that may be left out though they are filled.

    Raises:
        BadRecordError: no chat, or content that would be lost.
    """
    record = {key: value for key, value in record.items() if key not in ignored}
    reject_unused_content(record, CHAT_COLUMNS, "a chat")
    listed = first_filled(record, ("messages", "conversations"))
    if listed is None and "instruction" not in record and (empty := [k for k in CHAT_COLUMNS[:2] if k in record]):
        raise UnusableRecordError(f"{empty[0]} is not a list of turns")
    turns = _from_instruction(record) if listed is None else _from_messages(record, listed, ignored)
    if system := optional_text(record, "system"):
        if any(role == "system" and text != system for role, text in turns):
            raise UnusableRecordError(f"system is filled, and {listed} has another system message")
        turns = [("system", system), *(turn for turn in turns if turn[0] != "system")]
    return turns


def _from_messages(record: Record, column: str, ignored: Sequence[str]) -> list[Turn]:
    for key in ("input", "history"):
        if is_filled(record, key):
            raise UnusableRecordError(f"{key} is filled beside {column}, and it is not known where it belongs")
    listed = record[column]
    if not isinstance(listed, list):
        raise UnusableRecordError(f"{column} is not a list of turns")
    turns: list[Turn] = []
    for turn in listed:
        if not isinstance(turn, dict):
            raise UnusableRecordError("a turn is not an object")
        reject_unused_content(turn, ignored, "a turn")
        role = text_column(turn, first_filled(turn, ("role", "from")) or "role")
        if role not in _ROLES:
            raise UnusableRecordError(f"unknown role {role!r} (known: {', '.join(_ROLES)})")
        for key in LOSS_WEIGHT_KEYS if _ROLES[role] == "assistant" else ():
            if turn.get(key) not in (None, 1) and key not in ignored:
                raise UnusableRecordError(
                    f"a turn has {key} {escape(turn[key], 40)}, and --loss-on knows all or last only"
                )
        words = first_filled(turn, ("content", "value")) or ("content" if "content" in turn else "value")
        turns.append((_ROLES[role], required_text(turn, words)))
    return turns


def _from_instruction(record: Record) -> list[Turn]:
    pieces = _TURN.split(required_text(record, "instruction"))
    if pieces[0].strip():
        pieces = ["", "human", pieces[0].strip(), *pieces[1:]]
    # A trailing empty "Assistant:" only announces the output.
    turns = [(_ROLES[r.lower()], t.strip()) for r, t in zip(pieces[1::2], pieces[2::2], strict=True) if t.strip()]
    if extra := optional_text(record, "input"):
        if not turns or turns[-1][0] != "user":
            raise UnusableRecordError("input is filled, and the instruction does not end with the user's turn")
        turns[-1] = ("user", f"{turns[-1][1]}\n{extra}")
    return [*_history(record), *turns, ("assistant", required_text(record, "output"))]


def _history(record: Record) -> list[Turn]:
    if not is_filled(record, "history"):
        return []
    pairs = record["history"]
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise UnusableRecordError("history is not a list of pairs of a question and an answer")
    turns = []
    for pair in pairs:
        both = {"question of history": pair[0], "answer of history": pair[1]}
        turns += [(role, required_text(both, key)) for role, key in zip(("user", "assistant"), both, strict=True)]
    return turns
