"""The verb `prepare`: text in, Megatron-format .bin/.idx out."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from annotated_types import Interval

from arriero.common.errors import EXIT_OK, UserError, join_problems
from arriero.common.files import open_regular
from arriero.common.ranges import PathText
from arriero.common.text import escape, escape_message
from arriero.data.formats import FORMATS, Format, Template, load_template, make_format
from arriero.data.indexed import bin_path, idx_path
from arriero.data.inputs import find_inputs
from arriero.data.manifest import manifest_path, read_manifest
from arriero.data.output import check_output, make_place, written
from arriero.data.tokenizer import Tokenizer, load_tokenizer
from arriero.data.writing import Job, SourceHashes, output_names, sample_texts, write


@dataclass(frozen=True)
class PrepareArgs:
    """Tokenise text into a data set."""

    inputs: tyro.conf.Positional[tuple[Annotated[str, PathText], ...]]
    """Files, directories or quoted globs of one kind: parquet, json, jsonl, csv, txt, arrow, feather (also .gz and
    .zst). With --merge: the data sets to join."""
    out: Annotated[str, PathText]
    """Path that the written names begin with: OUT_text_document.bin, .idx and OUT.manifest.json."""
    tokenizer: Path | None = None
    """Directory with tokenizer.model or tokenizer.json, or such a file."""
    format: str = "text"
    """text, alpaca (one text of instruction, input and output), alpaca-sft (loss on the answer) or chat (loss on the
    answers)."""
    keys: tuple[str, ...] = ("text",)
    """Columns of the text format; one data set for each."""
    template: str | None = None
    """stanford (the default), ascendspeed, ascendspeed-instruction, vicuna, or a TOML file."""
    loss_on: Literal["all", "last"] = "all"
    """Chats: learn every answer, or only the last."""
    ignore: tuple[str, ...] = ()
    """Columns of alpaca and chat records (or keys of a chat's turns), such as tools, that are left out though they are
    filled. Without it such records are set aside, since what they say would be lost."""
    per: Literal["line", "paragraph", "file"] = "line"
    """Text files: what one document is."""
    bos: bool = True
    """Put BOS before every document."""
    eos: bool = True
    """Put EOS after every document (after every answer, in chats)."""
    workers: Annotated[int, Interval(ge=0, le=4096)] = 0
    """Threads that tokenise; 0 means one for each core. The output does not depend on it."""
    engine: Literal["auto", "reference", "fast"] = "auto"
    """reference: sentencepiece or tokenizers; fast: gigatoken, after a check on your own text; auto: fast if it is
    installed and passes the check."""
    strict: bool = False
    """Stop at the first record that cannot be used."""
    max_bad: Annotated[float, Interval(ge=0, le=1)] = 0.01
    """Largest share of records that may be quarantined (empty ones do not count); above it nothing is written."""
    overwrite: bool = False
    """Replace what an earlier run with other inputs wrote under this name."""
    merge: bool = False
    """Join finished data sets (their prefixes are the inputs) instead of tokenising."""
    log_interval: Annotated[int, Interval(ge=0, le=1_000_000_000)] = 0
    """Print a plain progress line every so many documents instead of a bar."""


def run(args: PrepareArgs) -> int:
    """Does what `arriero prepare` says; returns the exit code. Raises UserError."""
    if args.merge:
        from arriero.data.merge import merge

        with written(args.out):
            check_output(args.out, ())
            make_place(args.out)
            return merge(list(args.inputs), args.out, overwrite=args.overwrite)
    kind, files, form, tokenizer = _check(args)
    bos, eos = tokenizer.bos_id if args.bos else None, tokenizer.eos_id if args.eos else None
    job = Job(
        out=args.out,
        kind=kind,
        files=files,
        form=form,
        tokenizer=tokenizer,
        bos=bos,
        eos=eos,
        per=args.per,
        workers=args.workers or len(os.sched_getaffinity(0)),
        strict=args.strict,
        max_bad=args.max_bad,
        log_interval=args.log_interval,
        request=_request(args, tokenizer, form),
        options={**dataclasses.asdict(args), "tokenizer": str(args.tokenizer)},
    )
    for notice in tokenizer.notices:
        print(f"note: {escape_message(notice)}")
    print(f"tokenizer  {escape(tokenizer.path)} ({tokenizer.vocab_size} entries)")
    print(f"documents  {_policy(tokenizer, bos, eos)}; a literal <s> in the text stays text")
    make_place(args.out)
    with written(args.out), _only_writer(args.out):
        hashes = SourceHashes(files)
        earlier = read_manifest(args.out)
        if earlier is not None and not args.overwrite:
            _reuse(args.out, earlier, job.request, hashes.wait())
            return EXIT_OK
        if earlier is None and not args.overwrite:
            _refuse_foreign(args.out, form)
        write(dataclasses.replace(job, tokenizer=_engine(args, job)), hashes)
    return EXIT_OK


def _check(args: PrepareArgs) -> tuple[str, list[Path], Format, Tokenizer]:
    """Opens everything that is read, and reports all problems together."""
    problems: list[UserError] = []
    kind, files, tokenizer, form = "", [Path()], None, None
    try:
        kind, files = find_inputs(args.inputs)
    except UserError as error:
        problems.append(error)
    try:
        if args.tokenizer is None:
            raise UserError("--tokenizer is missing", "give the directory of the model's tokenizer")
        tokenizer = load_tokenizer(args.tokenizer)
        for name, wanted, found in (("BOS", args.bos, tokenizer.bos_id), ("EOS", args.eos, tokenizer.eos_id)):
            if wanted and found is None:
                problems.append(
                    UserError(f"{tokenizer.path} has no {name} token", f"give --no-{name.lower()} to do without")
                )
    except UserError as error:
        problems.append(error)
    try:
        form = make_format(
            args.format, keys=args.keys, template=_template(args), loss_on=args.loss_on,
            ignored=args.ignore,
        )  # fmt: skip
    except UserError as error:
        problems.append(error)
    try:
        check_output(args.out, output_names(form) if form else ())
    except UserError as error:
        problems.append(error)
    problems += _idle_options(args, kind)
    if problems:
        raise join_problems(problems)
    assert tokenizer is not None
    assert form is not None
    return kind, files, form, tokenizer


def _template(args: PrepareArgs) -> Template:
    return load_template("stanford" if args.template is None else args.template)


def _idle_options(args: PrepareArgs, kind: str) -> list[UserError]:
    """Options that would have no effect, or no sensible one."""
    idle = [
        ("--keys", args.keys != ("text",) and args.format != "text", f"format {args.format} has its own columns"),
        ("--template", args.template is not None and args.format == "text", "format text has no template"),
        ("--ignore", bool(args.ignore) and args.format == "text", "format text reads the columns of --keys alone"),
        ("--loss-on", args.loss_on != "all" and args.format != "chat", "it is for format chat"),
        ("--per", args.per != "line" and kind not in ("", "text"), f"the inputs are {kind}, not text files"),
    ]
    problems = [UserError(f"{name} has no effect: {why}", "leave it out") for name, wrong, why in idle if wrong]
    if args.format in FORMATS and args.format != "text" and kind == "text":
        problems.append(UserError(f"format {args.format} needs columns, and text files have none", "use --format text"))
    if len(set(args.keys)) != len(args.keys) or not args.keys:
        problems.append(UserError(f"--keys {' '.join(args.keys)}: none, or one of them twice", "name each column once"))
    if args.workers < 0:
        problems.append(UserError(f"--workers {args.workers} is below 0", "0 means one for each core"))
    if not 0 <= args.max_bad <= 1:
        problems.append(UserError(f"--max-bad {args.max_bad} is no share", "give a number from 0 to 1"))
    return problems


def _policy(tokenizer: Tokenizer, bos: int | None, eos: int | None) -> str:
    words = []
    if bos is not None:
        words.append(f"begin with BOS {bos} {tokenizer.piece(bos)}")
    if eos is not None:
        words.append(f"end with EOS {eos} {tokenizer.piece(eos)}")
    return " and ".join(words) or "have neither BOS nor EOS"


def _engine(args: PrepareArgs, job: Job) -> Tokenizer:
    """The tokenizer that does the work, and a line that says why it is this one. Raises UserError for --engine fast."""
    if args.engine == "reference":
        print(f"engine     {job.tokenizer.engine}, as asked")
        return job.tokenizer
    from arriero.data.fast import fast_or_reason

    fast, reason = fast_or_reason(job.tokenizer, sample_texts(job.files, job.kind, job.form, per=job.per))
    if fast is None and args.engine == "fast":
        raise UserError(f"--engine fast: {reason}", "pip install 'arriero[fast]', or use --engine auto")
    print(f"engine     {(fast or job.tokenizer).engine}: {escape_message(reason)}")
    return fast or job.tokenizer


@contextlib.contextmanager
def _only_writer(out: str) -> Iterator[None]:
    """Holds OUT.lock: two runs cannot write the same names at once. The lock dies with its process."""
    path = Path(f"{out}.lock")
    with open(open_regular(path, os.O_RDWR | os.O_CREAT), "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"another process is preparing {escape(out)}", "wait for it, or choose another --out"
            ) from error
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _request(args: PrepareArgs, tokenizer: Tokenizer, form: Format) -> dict[str, Any]:
    """Everything that decides the output, apart from the sources. Neither workers nor engine do."""
    template = dataclasses.asdict(_template(args)) if args.format != "text" else None
    return {
        "format": args.format,
        "keys": list(form.names),
        "template": template,
        "loss_on": args.loss_on,
        "per": args.per,
        "bos": args.bos,
        "eos": args.eos,
        "tokenizer": tokenizer.file_sha256,
    } | ({"ignore": sorted(args.ignore)} if args.ignore else {})


def _reuse(out: str, earlier: dict[str, Any], request: dict[str, Any], hashes: list[str]) -> None:
    """A second run: nothing to do if it asks for the same; refused otherwise. Raises UserError."""
    different = [key for key, value in request.items() if earlier["request"].get(key) != value]
    if [source["sha256"] for source in earlier["sources"]] != hashes:
        different.append("input files")
    fix = "give --overwrite to replace it, or another --out"
    if different:
        raise UserError(f"{out} was prepared from something else; different: {', '.join(different)}", fix)
    for name, entry in earlier["outputs"].items():
        path = bin_path(f"{out}_{name}")
        if not (path.is_file() and path.stat().st_size == entry["bin_bytes"] and idx_path(f"{out}_{name}").is_file()):
            raise UserError(
                f"{path} is missing or cut short, though {manifest_path(out)} lists it",
                "give --overwrite to write it anew",
            )
        print(
            f"reused     {escape(out)}_{escape(name)}: same inputs and options, {entry['documents']:,} documents, "
            f"{entry['tokens']:,} tokens"
        )


def _refuse_foreign(out: str, form: Format) -> None:
    for name in output_names(form):
        if (path := idx_path(f"{out}_{name}")).exists() or (path := bin_path(f"{out}_{name}")).exists():
            raise UserError(
                f"{path} exists and has no manifest: another program wrote it", "give --overwrite, or another --out"
            )
