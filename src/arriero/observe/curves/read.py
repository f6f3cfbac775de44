"""Reads the curves of a run, whatever wrote them; the kind of a file follows from its content, see `FORMATS`."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from pathlib import Path

from arriero.common.errors import UserError
from arriero.common.files import os_error_text
from arriero.common.text import escape
from arriero.observe.curves.curve import Curves
from arriero.observe.curves.logs import read_log
from arriero.observe.curves.tables import header, read_json_lines, read_table, read_trainer_state
from arriero.observe.curves.tensorboard import is_event_file, read_events
from arriero.observe.curves.text_lines import TextLine, open_text, read_lines

FORMATS = (
    "a run directory or its metrics.jsonl; a console log of Megatron-LM, MindSpeed, AscendSpeed, arriero, torchtitan, "
    "litgpt, nanoGPT or Hugging Face's Trainer; trainer_state.json; LLaMA-Factory's trainer_log.jsonl, or other JSON "
    "lines with a step; CSV, also wandb's and TensorBoard's; TensorBoard's event files"
)
"""What is read, for messages."""
_IN_A_DIRECTORY = ("metrics.jsonl", "trainer_state.json", "trainer_log.jsonl")
_EVENTS = "events.out.tfevents."
_MAX_SNIFFED_LINES = 100  # lines that may stand before the first of JSON


def read_curves(path: Path, only: Collection[str] | None = None) -> Curves:
    """Reads whatever `path` is; memory grows with the iterations, not with the size of the file or of a line.

    Args:
        path: a file or directory that FORMATS names.
        only: the quantities to keep, under arriero's names; None keeps all.

    Raises:
        UserError: no such file, nothing to compare in it, or a value that is no number, named by file and line.
    """
    try:
        files = _files(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{escape(path)}: {os_error_text(error)}", "check the path") from None
    curves = read_events(path, files, only) if len(files) > 1 else _read_file(files[0], only)
    if not curves.iterations:
        raise UserError(f"{escape(path)}: no training step in it (read as {curves.kind})", f"what is read: {FORMATS}")
    return curves


def _files(path: Path) -> list[Path]:
    """The file itself, or what a directory holds: a run's metrics, a Trainer's state, or all its event files."""
    if not path.is_dir():
        return [path]
    for name in _IN_A_DIRECTORY:
        if (path / name).exists():
            return [path / name]
    events = sorted(file for file in path.iterdir() if file.name.startswith(_EVENTS))
    if not events:
        raise UserError(
            f"{escape(path)}: no {', '.join(_IN_A_DIRECTORY)} or {_EVENTS}* in it", f"what is read: {FORMATS}"
        )
    return events


def _read_file(path: Path, only: Collection[str] | None) -> Curves:
    with open_text(path) as file:
        head = file.read(12)
        if is_event_file(head):
            return read_events(path, [path], only)
        if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
            fix = f"iconv -f UTF-16 -t UTF-8 {escape(path)} > utf8.log"
            raise UserError(f"{escape(path)}: is UTF-16, as PowerShell writes it", fix)
        file.seek(0)
        lines = read_lines(file)
        before = []
        for line in itertools.islice(lines, _MAX_SNIFFED_LINES):
            before.append(line)
            if line.cut:
                break
        kind = _kind(path, before)
        if kind == "state":
            return read_trainer_state(path, only)
        reader = {"json": read_json_lines, "csv": read_table, "log": read_log}[kind]
        return reader(path, itertools.chain(before, lines), only)


def _kind(path: Path, lines: list[TextLine]) -> str:
    """What a text is: json (lines), state (one JSON document), csv or log.

    A log may begin with a JSON object of its settings, so JSON is what has two such lines, or the suffix.
    """
    texts = [line.text.strip() for line in lines if line.text.strip()]
    first = texts[0] if texts else ""
    objects = [text.startswith("{") and text.endswith("}") and text[1:2] in ('"', "}", " ") for text in texts[:2]]
    history = first[:1] in ("{", "[") and any('"log_history"' in text for text in texts)
    if path.suffix == ".jsonl" or (objects and all(objects) and not history):
        return "json"
    if history or path.suffix == ".json":
        return "state"
    if path.suffix in (".csv", ".tsv") or (header(first) and "|" not in first):
        return "csv"
    return "log"
