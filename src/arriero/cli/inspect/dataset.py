"""`arriero inspect` of a data set: what it is, whether it is whole, and how its first documents read."""

from __future__ import annotations

import itertools
import json as jsonlib
from pathlib import Path
from typing import Any

import numpy as np

from arriero.common.errors import EXIT_CHECK_FAILED, EXIT_OK, UserError
from arriero.common.files import make_directory
from arriero.common.text import escape, escape_message
from arriero.data.check import check_token_ids
from arriero.data.indexed import PREPARE_AGAIN, IndexedDataset, bin_path, idx_path
from arriero.data.manifest import find_manifest, manifest_path, read_manifest, verify_checksums
from arriero.data.prefix import indexed_sets, is_file, is_instruction
from arriero.data.tokenizer import Tokenizer, load_tokenizer

_SHOWN = 3  # documents that are decoded
_LONG = 400  # characters of a stretch that are shown
_BINS = 24
_MOST = 4096  # tokens of a document that are looked at to show it


def _prefixes(path: Path) -> list[str]:
    """The data sets that a path names: one set (with or without .idx or .bin), or all that one `prepare` wrote."""
    prefix = str(path.with_suffix("")) if path.suffix in (".idx", ".bin") else str(path)
    if is_file(idx_path(prefix)) or (path.suffix == ".bin" and is_file(bin_path(prefix))):
        return [prefix]
    manifest = read_manifest(prefix) if is_file(manifest_path(prefix)) else None
    if manifest is not None:
        return [f"{prefix}_{name}" for name in manifest["outputs"]]
    return list(indexed_sets(prefix).values()) if is_instruction(prefix) else []


def recognises(path: Path) -> bool:
    """Whether `path` is a data set: a prefix, its .idx or .bin, or what `prepare --out` was."""
    return bool(_prefixes(Path(path)))


def inspect(path: Path, *, json: bool = False, verify: bool = False, figure: Path | None = None) -> int:
    """Prints what a data set holds and whether it is whole.

    Args:
        path: see `recognises`.
        json: print one JSON object instead of text.
        verify: read everything and compare the SHA-256 with the manifest.
        figure: where to draw the histogram of document lengths.

    Returns:
        0, or 1 when the set is damaged. Raises UserError when `path` is no data set.
    """
    prefixes = _prefixes(Path(path))
    if not prefixes:
        raise UserError(f"no data set at {escape(path)}", "give the prefix that `arriero prepare` printed")
    reports = [_report(prefix, deep=verify) for prefix in prefixes]
    if figure is not None and (whole := [r for r in reports if "lengths" in r]):
        if not figure.suffix:
            figure = figure.with_name(f"{figure.name}.png")
        _draw(IndexedDataset(whole[0]["prefix"]).sizes, whole[0]["prefix"], figure)
    if json:
        print(jsonlib.dumps(reports if len(reports) > 1 else reports[0], indent=1))
    else:
        for report in reports:
            _print(report)
        if figure is not None:
            print(f"figure     {escape(figure)}")
    return EXIT_CHECK_FAILED if any(report["wrong"] for report in reports) else EXIT_OK


def _report(prefix: str, *, deep: bool) -> dict[str, Any]:
    report: dict[str, Any] = {"prefix": prefix, "wrong": []}
    try:
        data = IndexedDataset(prefix)
        found = find_manifest(prefix)
    except UserError as error:
        report["wrong"].append(error.problem)
        return report
    sizes = data.sizes
    report |= {
        "documents": len(data.documents) - 1,
        "sequences": len(data),
        "tokens": int(sizes.sum(dtype=np.int64)),
        "dtype": data.dtype.name,
        "bin_bytes": bin_path(prefix).stat().st_size,
        "manifest": None,
    }
    if len(sizes):
        marks = np.percentile(sizes, [0, 50, 90, 99, 100]).round().astype(int).tolist()
        report["lengths"] = dict(zip(("min", "median", "p90", "p99", "max"), marks, strict=True))
        report["lengths"]["mean"] = float(sizes.mean())
        counts = np.bincount(np.log2(np.maximum(sizes, 1)).astype(int))
        report["histogram"] = {str(2**power): int(n) for power, n in enumerate(counts)}
    tokenizer: Tokenizer | None = None
    vocab_size: int | None = None
    if found is not None:
        name, manifest = found
        report["manifest"] = str(manifest_path(prefix.removesuffix(f"_{name}")))
        report |= {key: manifest[key] for key in ("records", "text_bytes", "largest_id", "request")}
        report["tokenizer"] = manifest["tokenizer"]
        if report["tokens"] and len(manifest["outputs"]) == 1:
            report["bytes_per_token"] = manifest["text_bytes"] / report["tokens"]
        report["wrong"] += _check(prefix, manifest["outputs"].get(name), report, deep=deep)
        tokenizer, vocab_size = _its_tokenizer(manifest["tokenizer"]), manifest["tokenizer"]["vocab_size"]
    elif deep:
        report["wrong"].append(f"{escape(prefix)} has no manifest to verify against")
    try:
        ignored = -100 if prefix.endswith("_packed_labels_document") else None
        check_token_ids(data, vocab_size, whole=deep, ignored=ignored, whose="its tokenizer's")
        report["first"] = [_show(data, i, prefix, tokenizer) for i in range(min(_SHOWN, len(data)))]
    except UserError as error:
        report["wrong"].append(error.problem)
    report["verified"] = deep
    return report


def _check(prefix: str, entry: dict[str, Any] | None, report: dict[str, Any], *, deep: bool) -> list[str]:
    if entry is None:
        return [f"the manifest does not list {escape(prefix)}"]
    wrong = [
        f"{escape(prefix)}: {report[key]:,} {key}, the manifest says {entry[key]:,}"
        for key in ("documents", "sequences", "tokens", "bin_bytes")
        if report[key] != entry[key]
    ]
    return wrong + (verify_checksums(prefix, entry) if deep else [])


def _its_tokenizer(made_by: dict[str, Any]) -> Tokenizer | None:
    """The tokenizer that made the set, if it is still where it was and still the same."""
    try:
        tokenizer = load_tokenizer(Path(made_by["path"]))
    except UserError:
        return None
    return tokenizer if tokenizer.fingerprint == made_by["fingerprint"] else None


def _show(data: IndexedDataset, i: int, prefix: str, tokenizer: Tokenizer | None) -> list[list[str]]:
    """The begin of a document as stretches: ("loss" or "no loss", text). Special ids are shown in their written form.

    Raises:
        UserError: the three files of an instruction set do not belong together.
    """
    ids = data[i][:_MOST]
    learned = np.ones(len(ids), bool)
    stem = prefix.rpartition("_packed_")[0]
    if stem and is_instruction(stem):
        labels, inputs = (IndexedDataset(f"{stem}_packed_{name}_document") for name in ("labels", "input_ids"))
        if not np.array_equal(labels.sizes, inputs.sizes):
            raise UserError(f"{escape(stem)}: the three packed files have different lengths", PREPARE_AGAIN)
        learned, ids = labels[i][:_MOST] != -100, inputs[i][:_MOST]
    edges = [0, *(np.flatnonzero(np.diff(learned)) + 1).tolist(), len(ids)]
    return [
        ["loss" if learned[a] else "no loss", _text(ids[a:b], tokenizer)] for a, b in itertools.pairwise(edges) if b > a
    ]


def _text(ids: np.ndarray, tokenizer: Tokenizer | None) -> str:
    if tokenizer is None:
        return " ".join(map(str, ids[:40].tolist())) + (" ..." if len(ids) > 40 else "")
    special = {i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None}
    out, run = "", list[int]()
    for token in [*ids.tolist(), None]:
        known = token is not None and 0 <= token < tokenizer.vocab_size
        if known and token not in special:
            run.append(token)
            continue
        out += tokenizer.decode(run) if run else ""
        run = []
        out += f"⟦{tokenizer.piece(token) if known else token}⟧" if token is not None else ""
    return out if len(out) <= _LONG else f"{out[: _LONG // 2]} ... {out[-_LONG // 2 :]}"


def _print(report: dict[str, Any]) -> None:
    print(f"data set   {escape(report['prefix'])}")
    if "tokens" in report:
        counts = f"{report['documents']:,} documents, {report['tokens']:,} tokens"
        print(f"holds      {counts}, {report['dtype']}, {report['bin_bytes']:,} bytes")
    if "lengths" in report:
        lengths = report["lengths"]
        print("lengths    " + ", ".join(f"{name} {lengths[name]:,.0f}" for name in lengths))
        most = max(report["histogram"].values())
        for start, n in report["histogram"].items():
            if n:
                print(f"  {start:>9}+ {n:>10,} {'#' * max(1, round(40 * n / most))}")
    if report.get("tokenizer"):
        made_by = report["tokenizer"]
        entries, largest = made_by["vocab_size"], report["largest_id"]
        print(f"tokenizer  {escape(made_by['path'])}, {entries:,} entries, largest id used {largest:,}")
    if "bytes_per_token" in report:
        print(f"text       {report['text_bytes']:,} bytes, {report['bytes_per_token']:.2f} bytes a token")
    if "records" in report:
        records = report["records"]
        print(f"records    {records['in']:,} in = {records['out']:,} out + {records['quarantined']:,} quarantined")
    for i, stretches in enumerate(report.get("first", [])):
        print(f"document {i}")
        for kind, text in stretches:
            print(f"  {kind:>7}  {text!r}")
    for problem in report["wrong"]:
        print(escape_message(f"WRONG      {problem}"))
    if not report["wrong"]:
        how = "index and payload fit; no manifest (another program wrote it)"
        if report["manifest"]:
            how = (
                "both files equal the manifest's SHA-256" if report["verified"] else "counts fit; --verify reads it all"
            )
        print(escape_message(f"whole      {how}"))


def _draw(sizes: np.ndarray, prefix: str, figure: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    plot, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    edges = np.geomspace(max(1, int(sizes.min())), max(2, int(sizes.max()) + 1), _BINS + 1)
    axes.hist(np.maximum(sizes, 1), bins=edges.tolist(), color="#2a6f97")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("tokens in a document")
    axes.set_ylabel("documents")
    axes.set_title(f"{Path(prefix).name}: {len(sizes):,} documents, {int(sizes.sum(dtype=np.int64)):,} tokens")
    axes.axvline(float(np.median(sizes)), color="#c44536", label=f"median {np.median(sizes):,.0f}")
    axes.legend()
    fix = "name a .png, .svg or .pdf where it can be written"
    make_directory(figure.parent, fix)
    try:
        plot.savefig(figure, dpi=120)
    except (OSError, ValueError) as error:  # ValueError: a kind of figure that matplotlib does not draw
        raise UserError(f"--figure {escape(figure)}: {escape(error)}", fix) from None
    finally:
        pyplot.close(plot)
