"""The work of `prepare`: read, tokenise, write under temporary names, publish. Nothing half-written is ever left."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from arriero.common.version import __version__
from arriero.data.formats import UnusableRecordError
from arriero.data.indexed import IndexedWriter, best_dtype
from arriero.data.manifest import manifest_path, sha256_file, write_manifest
from arriero.data.pipeline import Encoder, NumberedRecord, RecordLocation, chunks, map_in_order
from arriero.data.prepare_config import PrepareJob
from arriero.data.readers import MalformedRecord, read_records
from arriero.data.rejected import Counts, RejectedFile
from arriero.data.tokenizer import Tokenizer


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
class PreparedData:
    """What `prepare` wrote, or found to be there already."""

    out: str
    """What all names begin with."""
    manifest: dict[str, Any]
    """The content of OUT.manifest.json: sources, counts of records, and documents and tokens of each data set."""
    reused: bool = False
    """Whether an earlier run had written it."""
    seconds: float = 0.0
    """Time taken."""
    first_rejected: str = ""
    """File, line and reason of the first record that could not be used; empty if all could."""

    @property
    def prefixes(self) -> list[str]:
        """The written data sets, each as a recipe names it in `data.prefix`; the three parts of an instruction set are
        one, named by what stands before `_packed`."""
        names = list(self.manifest["outputs"])
        if any(name.startswith("packed_") for name in names):
            return [self.out]
        return [f"{self.out}_{name}" for name in names]


class InputProgress:
    """The fraction of all input bytes that has been read."""

    def __init__(self, files: list[Path]) -> None:
        self._sizes = [path.stat().st_size for path in files]
        self._before = self._current = 0
        self._fraction: Callable[[], float] = lambda: 0.0

    def start_file(self, n: int) -> None:
        """File `n` is read from now on."""
        self._before, self._current = sum(self._sizes[:n]), self._sizes[n]
        self._fraction = lambda: 0.0

    def track(self, fraction: Callable[[], float]) -> None:
        """Sets the function that returns the fraction of the current file that has been read."""
        self._fraction = fraction

    def fraction(self) -> float:
        """From 0 to 1."""
        return (self._before + self._current * min(1.0, self._fraction())) / max(1, sum(self._sizes))


OnProgress = Callable[[float, int, int, float], None]
"""Takes the fraction of the input that has been read, documents, bytes of text, and seconds since the start."""


def write(job: PrepareJob, tokenizer: Tokenizer, hashes: SourceHashes, on_progress: OnProgress) -> PreparedData:
    """Tokenises and writes; on any exception, KeyboardInterrupt included, nothing of it is left. Raises UserError."""
    began = time.monotonic()
    config, form = job.config, job.format
    dtype = np.dtype(np.int32) if form.masked else best_dtype(tokenizer.vocab_size)
    writers = {name: IndexedWriter(f"{config.out}_{name}", dtype) for name in form.outputs}
    rejected, counts, progress = RejectedFile(config.out, job.files), Counts(), InputProgress(job.files)
    try:
        encode = Encoder(tokenizer, form, job.bos, job.eos, job.files)
        workers = config.workers or len(os.sched_getaffinity(0))
        for chunk in map_in_order(encode, chunks(_records(job, progress)), workers=workers):
            for writer, (flat, sizes) in zip(writers.values(), chunk.columns, strict=True):
                writer.add_documents(flat, sizes)
            counts.add(chunk)
            rejected.add(chunk.rejected, counts, strict=config.strict)
            seconds = max(time.monotonic() - began, 1e-9)
            on_progress(progress.fraction(), counts.documents, counts.text_bytes, seconds)
        counts.check(config.max_bad)
        outputs = {name: writer.finish() for name, writer in writers.items()}
        manifest = _manifest(job, tokenizer, hashes.wait(), counts, outputs)
        # From here to the new manifest the set counts as unfinished.
        manifest_path(config.out).unlink(missing_ok=True)
        for writer in writers.values():
            writer.publish()
        rejected.publish()
        write_manifest(config.out, manifest)
    except BaseException:
        for writer in writers.values():
            writer.abort()
        rejected.abort()
        raise
    first = counts.first_rejected[0] if counts.first_rejected else ""
    return PreparedData(config.out, manifest, seconds=time.monotonic() - began, first_rejected=first)


def sample_texts(job: PrepareJob, characters: int = 300_000) -> list[str]:
    """Some of the user's text, as the format makes it: from the start of up to eight files spread over all of them."""
    texts: list[str] = []
    chosen = job.files[:: max(1, len(job.files) // 8)][:8]
    for path in chosen:
        left = characters // len(chosen)
        for _, record in read_records(path, job.kind, columns=job.format.columns, per=job.config.per):
            if isinstance(record, MalformedRecord):
                continue
            with contextlib.suppress(UnusableRecordError):
                found = [segment.text[:left] for document in job.format.documents(record) for segment in document]
                texts += [text for text in found if text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text)]
                left -= sum(map(len, found))
            if left <= 0:
                break
    return texts


def _records(job: PrepareJob, progress: InputProgress) -> Iterator[NumberedRecord]:
    for n, path in enumerate(job.files):
        progress.start_file(n)
        columns, per = job.format.columns, job.config.per
        for number, record in read_records(path, job.kind, columns=columns, per=per, track=progress.track):
            yield RecordLocation(n, number), record


def _manifest(
    job: PrepareJob, tokenizer: Tokenizer, hashes: list[str], counts: Counts, outputs: dict[str, Any]
) -> dict[str, Any]:
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
        "options": asdict(job.config) | {"tokenizer": str(job.config.tokenizer)},
        "sources": [
            {"path": str(path), "bytes": path.stat().st_size, "sha256": digest}
            for path, digest in zip(job.files, hashes, strict=True)
        ],
        "records": {
            "in": counts.records,
            "out": counts.documents,
            "quarantined": counts.rejected,
            "empty": counts.empty,
        },
        "text_bytes": counts.text_bytes,
        "largest_id": counts.largest_id,
        "outputs": outputs,
    }
