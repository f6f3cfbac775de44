"""The work of `prepare`: read, tokenise, write under temporary names, publish. Nothing half-written is ever left."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from arriero.common.text import escape
from arriero.common.version import __version__
from arriero.data.formats import BadRecordError, Format
from arriero.data.indexed import IndexedWriter, best_dtype
from arriero.data.manifest import manifest_path, sha256_file, write_manifest
from arriero.data.pipeline import Item, Place, Result, Work, in_order, units
from arriero.data.prefix import INSTRUCTION_FIELDS
from arriero.data.progress import Progress
from arriero.data.quarantine import Quarantine, Tally, judge
from arriero.data.readers import Bad, read_records
from arriero.data.tokenizer import Tokenizer


def output_names(form: Format) -> list[str]:
    """What the written data sets are called after `OUT_`."""
    if form.masked:
        return [f"packed_{name}_document" for name in INSTRUCTION_FIELDS]
    return [f"{name}_document" for name in form.names]


class SourceHashes:
    """SHA-256 of the sources, computed beside the work."""

    def __init__(self, files: list[Path]) -> None:
        self._files, self._found = files, [""] * len(files)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        for i, path in enumerate(self._files):
            with contextlib.suppress(OSError):  # the reader reports it
                self._found[i] = sha256_file(path)

    def wait(self) -> list[str]:
        """The digests, one a file."""
        self._thread.join()
        return self._found


@dataclass(frozen=True)
class Job:
    """One checked run of `prepare`.

    Attributes:
        request: everything that decides the output apart from the sources; a later run is compared with it.
        options: the command line as given, for the manifest.
    """

    out: str
    kind: str
    files: list[Path]
    form: Format
    tokenizer: Tokenizer
    bos: int | None
    eos: int | None
    per: str
    workers: int
    strict: bool
    max_bad: float
    log_interval: int
    request: dict[str, Any]
    options: dict[str, Any]


def write(job: Job, hashes: SourceHashes) -> None:
    """Tokenises and writes; on any error, SIGTERM and Ctrl-C included, nothing of it is left. Raises UserError."""
    began = time.monotonic()
    dtype = np.dtype(np.int32) if job.form.masked else best_dtype(job.tokenizer.vocab_size)
    names = output_names(job.form)
    writers = [IndexedWriter(f"{job.out}_{name}", dtype) for name in names]
    quarantine, tally = Quarantine(job.out, job.files, strict=job.strict), Tally()
    try:
        with _sigterm_raises(), Progress(job.files, job.log_interval) as progress:
            work = Work(job.tokenizer, job.form, job.bos, job.eos, job.files)
            for result in in_order(work, units(_records(job, progress)), workers=job.workers):
                _take(result, writers, tally)
                quarantine.add(result.rejected, tally)
                progress.show(tally.documents, tally.text_bytes)
            judge(tally, job.max_bad)
            outputs = {name: writer.finish() for name, writer in zip(names, writers, strict=True)}
            manifest = _manifest(job, hashes.wait(), tally, outputs)
        # From here to the new manifest the set counts as unfinished.
        manifest_path(job.out).unlink(missing_ok=True)
        for writer in writers:
            writer.publish()
        quarantine.publish()
        write_manifest(job.out, manifest)
    except BaseException:
        for writer in writers:
            writer.abort()
        quarantine.abort()
        raise
    _report(job.out, outputs, tally, time.monotonic() - began)


def sample_texts(files: list[Path], kind: str, form: Format, *, per: str, characters: int = 300_000) -> list[str]:
    """Some of the user's text, as the format makes it: from the start of up to eight files spread over all of them."""
    texts: list[str] = []
    chosen = files[:: max(1, len(files) // 8)][:8]
    for path in chosen:
        left = characters // len(chosen)
        for _, record in read_records(path, kind, columns=form.columns, per=per):
            if isinstance(record, Bad):
                continue
            with contextlib.suppress(BadRecordError):
                found = [part.text[:left] for document in form.documents(record) for part in document]
                texts += [text for text in found if text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text)]
                left -= sum(map(len, found))
            if left <= 0:
                break
    return texts


def _records(job: Job, progress: Progress) -> Iterator[Item]:
    for n, path in enumerate(job.files):
        progress.enter(n)
        for number, record in read_records(path, job.kind, columns=job.form.columns, per=job.per, meter=progress.meter):
            yield Place(n, number), record


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Turns SIGTERM into an exception, so that it cleans up as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(*_: object) -> None:
    raise SystemExit(128 + signal.SIGTERM)


def _take(result: Result, writers: list[IndexedWriter], tally: Tally) -> None:
    for writer, (flat, sizes) in zip(writers, result.columns, strict=True):
        writer.add_documents(flat, sizes)
    tally.records += result.documents + len(result.rejected)
    tally.documents += result.documents
    tally.text_bytes += result.text_bytes
    tally.largest = max(tally.largest, result.largest)


def _manifest(job: Job, hashes: list[str], tally: Tally, outputs: dict[str, Any]) -> dict[str, Any]:
    tokenizer = job.tokenizer
    return {
        "arriero": __version__,
        "tokenizer": {
            "path": str(tokenizer.path),
            "fingerprint": tokenizer.fingerprint,
            "sha256": tokenizer.file_sha256,
            "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
            "engine": tokenizer.engine,
        },
        "request": job.request,
        "options": job.options,
        "sources": [
            {"path": str(path), "bytes": path.stat().st_size, "sha256": digest}
            for path, digest in zip(job.files, hashes, strict=True)
        ],
        "records": {"in": tally.records, "out": tally.documents, "quarantined": tally.rejected, "empty": tally.empty},
        "text_bytes": tally.text_bytes,
        "largest_id": tally.largest,
        "outputs": outputs,
    }


def _report(out: str, outputs: dict[str, Any], tally: Tally, seconds: float) -> None:
    for name, entry in outputs.items():
        print(
            f"wrote      {escape(out)}_{name}: {entry['documents']:,} documents, {entry['tokens']:,} tokens, "
            f"{entry['dtype']}"
        )
    print(
        f"records    {tally.records:,} in = {tally.documents:,} out + {tally.rejected:,} quarantined "
        f"({tally.empty:,} empty)"
    )
    if tally.rejected:
        print(f"           see {escape(out)}.quarantine.jsonl; first: {tally.first_bad[0]}")
    megabytes = tally.text_bytes / 1e6
    print(f"speed      {megabytes:.1f} MB of text in {seconds:.1f} s, {megabytes / max(seconds, 1e-9):.1f} MB/s")
