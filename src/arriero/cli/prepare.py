"""The verb `prepare`: text in, Megatron-format .bin/.idx out. The work is done by data/prepare.py."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated

import tyro
from annotated_types import Interval

from arriero.common.errors import EXIT_OK
from arriero.common.progress import ProgressBar
from arriero.common.ranges import PathText
from arriero.common.text import escape, escape_message
from arriero.data.merge import merge
from arriero.data.prepare import PrepareConfig, PreparedData, PrepareJob, open_job, run_job


@dataclass(frozen=True)
class PrepareArgs(PrepareConfig):
    """Tokenise text into a data set."""

    inputs: tyro.conf.Positional[tuple[Annotated[str, PathText], ...]]
    """Files, directories or quoted globs of one kind: parquet, json, jsonl, csv, txt, arrow, feather (also .gz and
    .zst). With --merge: the data sets to join."""
    merge: bool = False
    """Join finished data sets (their prefixes are the inputs) instead of tokenising."""
    log_interval: Annotated[int, Interval(ge=0, le=1_000_000_000)] = 0
    """Print a plain progress line every so many documents instead of a bar."""


def run(args: PrepareArgs) -> int:
    """Runs `arriero prepare`; returns the exit code. Raises UserError."""
    if args.merge:
        for name, entry in merge(args.inputs, args.out, overwrite=args.overwrite).items():
            print(f"merged     {args.out}_{name}: {entry['documents']:,} documents, {entry['tokens']:,} tokens")
        return EXIT_OK
    job = open_job(args)
    _print_job(job)
    with _ProgressDisplay(args.log_interval) as display:
        prepared = run_job(job, on_engine=_print_engine, on_progress=display.show)
    _print_reused(prepared) if prepared.reused else _print_written(prepared)
    return EXIT_OK


class _ProgressDisplay:
    """A bar on a terminal, plain lines every `interval` documents if that is above 0, nothing otherwise."""

    def __init__(self, interval: int) -> None:
        self._interval, self._next = interval, interval
        self._bar: ProgressBar | None = None

    def show(self, fraction: float, documents: int, text_bytes: int, seconds: float) -> None:
        """Shows the fraction of the input that is done, and the speed."""
        speed = f"{documents / seconds:,.0f} documents/s, {text_bytes / 1e6 / seconds:.1f} MB/s"
        if not self._interval:
            if self._bar is None:
                self._bar = ProgressBar("tokenising", stream=sys.stdout).__enter__()
            self._bar.update(fraction, speed)
        elif documents >= self._next:
            self._next = (documents // self._interval + 1) * self._interval
            left = seconds / max(fraction, 1e-6) - seconds
            print(f"processed {documents:,} documents ({speed}, {fraction:.0%}, {left:.0f} s left)", flush=True)

    def __enter__(self) -> _ProgressDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)


def _print_job(job: PrepareJob) -> None:
    tokenizer = job.tokenizer
    for notice in tokenizer.notices:
        print(f"note: {escape_message(notice)}")
    print(f"tokenizer  {escape(tokenizer.path)} ({tokenizer.vocab_size} entries)")
    ends = []
    if job.bos is not None:
        ends.append(f"begin with BOS {job.bos} {tokenizer.piece(job.bos)}")
    if job.eos is not None:
        ends.append(f"end with EOS {job.eos} {tokenizer.piece(job.eos)}")
    print(f"documents  {' and '.join(ends) or 'have neither BOS nor EOS'}; a literal <s> in the text stays text")


def _print_engine(engine: str, reason: str) -> None:
    print(f"engine     {engine}{reason}")


def _print_reused(prepared: PreparedData) -> None:
    for name, entry in prepared.manifest["outputs"].items():
        counts = f"{entry['documents']:,} documents, {entry['tokens']:,} tokens"
        print(f"reused     {escape(prepared.out)}_{escape(name)}: same inputs and options, {counts}")


def _print_written(prepared: PreparedData) -> None:
    manifest, out = prepared.manifest, escape(prepared.out)
    for name, entry in manifest["outputs"].items():
        counts = f"{entry['documents']:,} documents, {entry['tokens']:,} tokens"
        print(f"wrote      {out}_{name}: {counts}, {entry['dtype']}")
    records = manifest["records"]
    print(
        f"records    {records['in']:,} in = {records['out']:,} out + {records['quarantined']:,} quarantined "
        f"({records['empty']:,} empty)"
    )
    if prepared.first_rejected:
        print(f"           see {out}.quarantine.jsonl; first: {prepared.first_rejected}")
    megabytes, seconds = manifest["text_bytes"] / 1e6, prepared.seconds
    print(f"speed      {megabytes:.1f} MB of text in {seconds:.1f} s, {megabytes / max(seconds, 1e-9):.1f} MB/s")
