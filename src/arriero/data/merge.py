"""`prepare --merge`: joins finished data sets, in the order given."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from arriero.common.errors import UserError
from arriero.common.text import escape
from arriero.common.version import __version__
from arriero.data.indexed import IndexedDataset, IndexedWriter, idx_path
from arriero.data.manifest import RECORD_COUNTS, manifest_path, read_manifest, verify_checksums, write_manifest
from arriero.data.output import check_output, writing_output

_STEP = 1 << 22  # tokens copied at a time


def _open_all(prefixes: list[str]) -> list[dict[str, Any]]:
    """The manifests, if every set has one, kept its payload and was made alike. Raises UserError."""
    manifests = []
    for prefix in prefixes:
        found = read_manifest(prefix)
        if found is None:
            raise UserError(
                f"{escape(manifest_path(prefix))} is missing: {escape(prefix)} is not a finished set",
                "give what --out was, not the name of a .bin",
            )
        for name, entry in found["outputs"].items():
            if wrong := verify_checksums(f"{prefix}_{name}", entry):
                raise UserError("; ".join(wrong), "prepare this set again")
        manifests.append(found)
    first = manifests[0]
    for prefix, other in zip(prefixes[1:], manifests[1:], strict=True):
        if other["tokenizer"]["fingerprint"] != first["tokenizer"]["fingerprint"]:
            raise UserError(
                f"{prefix} was made with another tokenizer than {prefixes[0]}", "prepare it with the same one"
            )
        if list(other["outputs"]) != list(first["outputs"]):
            raise UserError(
                f"{prefix} holds {', '.join(other['outputs'])}, {prefixes[0]} holds {', '.join(first['outputs'])}",
                "join sets of one format",
            )
    return manifests


def _copy(source: IndexedDataset, writer: IndexedWriter) -> None:
    """Appends a whole set; tokens in pieces, so that memory stays constant."""
    bounds, i = source.documents, 0
    for document in range(len(bounds) - 1):
        for i in range(int(bounds[document]), int(bounds[document + 1])):
            writer.add(source[i])
        writer.end_document()


def merge(prefixes: Sequence[str], out: str, *, overwrite: bool) -> dict[str, Any]:
    """Joins the sets that `prepare --out PREFIX` wrote into one.

    Returns:
        The manifest's entry of each written data set.

    Raises:
        UserError: the sets are unfinished, damaged or of different kinds; OUT exists, or is being written.
    """
    check_output(out, ())
    with writing_output(out):
        return _merge(list(prefixes), out, overwrite=overwrite)


def _merge(prefixes: list[str], out: str, *, overwrite: bool) -> dict[str, Any]:
    if len(prefixes) < 2:
        raise UserError("--merge needs two or more prefixes", "give what --out was for each of them")
    manifests = _open_all(prefixes)
    if any(os.path.realpath(out) == os.path.realpath(prefix) for prefix in prefixes):
        raise UserError(f"{escape(out)} is both an input and the output of --merge", "choose another --out")
    ours = [manifest_path(out), *(idx_path(f"{out}_{name}") for name in manifests[0]["outputs"])]
    if any(map(os.path.lexists, ours)) and not overwrite:
        raise UserError(f"{escape(out)} exists", "give --overwrite to replace it, or another --out")
    outputs: dict[str, Any] = {}
    writers = []
    try:
        for name in manifests[0]["outputs"]:
            sets = [IndexedDataset(f"{prefix}_{name}") for prefix in prefixes]
            writer = IndexedWriter(f"{out}_{name}", np.result_type(*(s.dtype for s in sets)))
            writers.append(writer)
            for one in sets:
                _copy(one, writer)
            outputs[name] = writer.finish()
        manifest_path(out).unlink(missing_ok=True)
        for writer in writers:
            writer.publish()
        write_manifest(out, _joined(manifests, prefixes, outputs))
    except BaseException:
        for writer in writers:
            writer.abort()
        raise
    return outputs


def _joined(manifests: list[dict[str, Any]], prefixes: list[str], outputs: dict[str, Any]) -> dict[str, Any]:
    total = {key: sum(m["records"][key] for m in manifests) for key in RECORD_COUNTS}
    return {
        "arriero": __version__,
        "tokenizer": manifests[0]["tokenizer"],
        "request": {"merge": [m["request"] for m in manifests]},
        "options": {"merge": prefixes},
        "sources": [source for m in manifests for source in m["sources"]],
        "records": total,
        "text_bytes": sum(m["text_bytes"] for m in manifests),
        "largest_id": max(m["largest_id"] for m in manifests),
        "outputs": outputs,
    }
