"""A data format and a file type of one's own: questions and answers as tab-separated text, the loss on the answers.

    ARRIERO_PLUGINS=data_format arriero prepare questions.tsv --format question-answer --tokenizer DIR --out questions

The format is the function `question_answer`, the file type is the function `read_tsv`; one line each adds them. Files
of any known type (JSON lines, parquet, CSV) can hold the columns too.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from arriero.data.formats import FORMATS, Document, Format, FormatOptions, Segment
from arriero.data.json_stream import MalformedRecord
from arriero.data.readers import ReadOptions, register_reader
from arriero.data.records import Record, required_text


def question_answer(options: FormatOptions) -> Format:
    """One document a record: the question without a loss, the answer and EOS after it with one."""

    def documents(record: Record) -> list[Document]:
        question, answer = required_text(record, "question"), required_text(record, "answer")
        return [[Segment(f"Question: {question}\nAnswer: ", in_loss=False), Segment(answer, eos=True)]]

    # masked: the loss is on a part of each document only; columns: what is read of a file that has more.
    return Format(names=("packed",), masked=True, columns=("question", "answer"), documents=documents)


def read_tsv(path: Path, options: ReadOptions) -> Iterator[tuple[int, Record | MalformedRecord]]:
    """A numbered record for each line, under the names in the first line."""
    with path.open(encoding="utf-8", newline="") as file:
        options.track(lambda: 1.0 if file.closed else file.buffer.tell() / max(1, path.stat().st_size))
        lines = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        header = next(lines, [])
        for cells in lines:
            if len(cells) == len(header):
                yield lines.line_num, dict(zip(header, cells, strict=True))
            else:  # counted, and written to OUT.quarantine.jsonl
                yield lines.line_num, MalformedRecord(f"{len(cells)} cells, not {len(header)}", "\t".join(cells))


FORMATS["question-answer"] = question_answer
register_reader("tsv", read_tsv, suffixes=(".tsv",))
