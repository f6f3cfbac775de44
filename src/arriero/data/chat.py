"""Records of chats as turns: (role, text) in their order."""

from __future__ import annotations

import re
from collections.abc import Sequence

from arriero.common.text import escape
from arriero.data.records import WEIGHTS, BadRecordError, Record, either, filled, has, optional, refuse_content, text_of

Turn = tuple[str, str]
COLUMNS = ("messages", "conversations", "instruction", "input", "output", "system", "history")
"""What a chat is made of; see `turns_of`."""

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
}
_TURN = re.compile(r"(?:^|\n)\s*(Human|Assistant|User|Bot):", re.IGNORECASE)


def turns_of(record: Record, ignored: Sequence[str] = ()) -> list[Turn]:
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
    refuse_content(record, COLUMNS, "a chat")
    listed = either(record, ("messages", "conversations"))
    if listed is None and "instruction" not in record and (empty := [k for k in COLUMNS[:2] if k in record]):
        raise BadRecordError(f"{empty[0]} is not a list of turns")
    turns = _asked(record) if listed is None else _listed(record, listed, ignored)
    if system := optional(record, "system"):
        if any(role == "system" and text != system for role, text in turns):
            raise BadRecordError(f"system is filled, and {listed} has another system message")
        turns = [("system", system), *(turn for turn in turns if turn[0] != "system")]
    return turns


def _listed(record: Record, column: str, ignored: Sequence[str]) -> list[Turn]:
    for key in ("input", "history"):
        if has(record, key):
            raise BadRecordError(f"{key} is filled beside {column}, and it is not known where it belongs")
    listed = record[column]
    if not isinstance(listed, list):
        raise BadRecordError(f"{column} is not a list of turns")
    turns: list[Turn] = []
    for turn in listed:
        if not isinstance(turn, dict):
            raise BadRecordError("a turn is not an object")
        refuse_content(turn, ignored, "a turn")
        role = text_of(turn, either(turn, ("role", "from")) or "role")
        if role not in _ROLES:
            raise BadRecordError(f"unknown role {role!r} (known: {', '.join(_ROLES)})")
        for key in WEIGHTS if _ROLES[role] == "assistant" else ():
            if turn.get(key) not in (None, 1) and key not in ignored:
                raise BadRecordError(f"a turn has {key} {escape(turn[key], 40)}, and --loss-on knows all or last only")
        words = either(turn, ("content", "value")) or ("content" if "content" in turn else "value")
        turns.append((_ROLES[role], filled(turn, words)))
    return turns


def _asked(record: Record) -> list[Turn]:
    pieces = _TURN.split(filled(record, "instruction"))
    if pieces[0].strip():
        pieces = ["", "human", pieces[0].strip(), *pieces[1:]]
    # A trailing empty "Assistant:" only announces the output.
    turns = [(_ROLES[r.lower()], t.strip()) for r, t in zip(pieces[1::2], pieces[2::2], strict=True) if t.strip()]
    if extra := optional(record, "input"):
        if not turns or turns[-1][0] != "user":
            raise BadRecordError("input is filled, and the instruction does not end with the user's turn")
        turns[-1] = ("user", f"{turns[-1][1]}\n{extra}")
    return [*_history(record), *turns, ("assistant", filled(record, "output"))]


def _history(record: Record) -> list[Turn]:
    if not has(record, "history"):
        return []
    pairs = record["history"]
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise BadRecordError("history is not a list of pairs of a question and an answer")
    turns = []
    for pair in pairs:
        both = {"question of history": pair[0], "answer of history": pair[1]}
        turns += [(role, filled(both, key)) for role, key in zip(("user", "assistant"), both, strict=True)]
    return turns
