"""`arriero convert`: any kind of model -> Hugging Face's, Megatron's or AscendSpeed's files, streamed and verified.

The source is opened under Hugging Face's names, written in one pass, opened read_back under Hugging Face's names by the
reader of the other format, and read back: names, shapes, dtypes and fingerprints must be those that went in.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from annotated_types import Interval
from tyro.conf import Positional

from arriero.checkpoint.formats.dialects import ASCENDSPEED, ASCENDSPEED_FUSED, MCORE, MCORE_TE
from arriero.checkpoint.formats.foreign_config import ConfigHints
from arriero.checkpoint.formats.huggingface import bytes_in_dtype, plan_safetensors, write_config_and_tokenizer
from arriero.checkpoint.formats.megatron_args import beyond_megatron, saved_arguments, start_flags
from arriero.checkpoint.formats.megatron_write import RankFormat, plan_ranks
from arriero.checkpoint.formats.sharding_plan import ParallelDegrees, check_degrees, padded_vocab_size
from arriero.checkpoint.open_model import WEIGHT_FORMATS, OpenedModel, open_model
from arriero.checkpoint.tensors.transfer import transfer
from arriero.checkpoint.tensors.values import fingerprint
from arriero.common.errors import EXIT_OK, CheckFailed, UserError, join_problems
from arriero.common.files import new_directory
from arriero.common.progress import ProgressBar
from arriero.common.ranges import flag, range_problems
from arriero.common.text import escape, escape_message
from arriero.model.config import LlamaConfig

DTYPES = {"keep": None, "float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class ConvertArgs:
    """Convert a model between formats and parallel layouts; the source is read once, in bounded memory."""

    source: Positional[Path]
    """A Hugging Face directory, a run or checkpoint, Megatron's (torch, torch_dist), AscendSpeed's or Meta's files."""
    destination: Positional[Path]
    """A new directory; it appears whole or not at all."""
    to: Literal["hf", "megatron", "ascendspeed"]
    """What to write: hf is safetensors with config.json; megatron is megatron-core names in the `torch` layout."""
    source_kind: Annotated[str, WEIGHT_FORMATS, tyro.conf.arg(name="from")] = "auto"
    """What the source is, if it is not recognised."""
    tp: Annotated[int, Interval(ge=1, le=65_536)] = 1
    """Tensor-parallel degree of the files written."""
    pp: Annotated[int, Interval(ge=1, le=65_536)] = 1
    """Pipeline-parallel degree of the files written."""
    vpp: Annotated[int, Interval(ge=1, le=1000)] = 1
    """Virtual stages (model chunks) of each pipeline rank."""
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep"
    """What the weights are written as."""
    make_vocab_size_divisible_by: Annotated[int, Interval(ge=1, le=2**24)] = 128
    """Pad the vocabulary to a multiple of this times --tp, as Megatron does; 1 pads no further than --tp needs."""
    spec: Literal["te", "local"] = "te"
    """Megatron only: the layers' names, Transformer Engine's (Megatron-LM's default) or its own (MindSpeed's)."""
    fused_mlp: bool = False
    """AscendSpeed only: gate and up in one matrix, for training with --mlp-layer-fusion."""
    deepspeed: bool = False
    """AscendSpeed only: the files of its DeepSpeed flavour."""
    iteration: Annotated[int, Interval(ge=0, le=1_000_000_000)] = 0
    """The iteration that the rank files claim; 0 is `release`, with which training starts at 0."""
    config: Path | None = None
    """A Hugging Face config.json, for sources that do not hold their shape."""
    vocab_size: Annotated[int, Interval(ge=1, lt=2**31)] | None = None
    """The true vocabulary size, for sources that hold only the padded one."""
    tokenizer: Path | None = None
    """The tokenizer's directory, if it does not lie with the source; it also gives the true vocabulary size."""
    max_shard_gb: Annotated[float, Interval(gt=0, le=1e6)] = 5.0
    """Largest size of one safetensors file, in GB."""
    verify: bool = False
    """Also compute both ends' logits on random tokens and compare them; this loads the model twice."""
    json: bool = False
    """Print the result as JSON."""


def run(args: ConvertArgs) -> int:
    """Converts, checks and reports; returns 0, or raises CheckFailed if what was written differs from the source."""
    started = time.perf_counter()
    _check_options(args)
    kind = None if args.source_kind == "auto" else args.source_kind
    opened = open_model(args.source, kind, ConfigHints(args.config, args.vocab_size, args.tokenizer))
    dtype = DTYPES[args.dtype]
    weights, config = opened.reader.tensors, opened.config
    degrees = ParallelDegrees(args.tp, args.pp, args.vpp)
    if args.to != "hf":
        check_degrees(config, degrees)
    degrees = replace(
        degrees, padded_vocab=padded_vocab_size(config.vocab_size, args.make_vocab_size_divisible_by, args.tp)
    )
    with (
        ProgressBar("converting", sum(t.nbytes for t in weights.values())) as progress,
        new_directory(args.destination, need_bytes=bytes_in_dtype(weights, dtype)) as partial,
    ):
        if args.to == "hf":
            files = plan_safetensors(partial, weights, dtype=dtype, max_shard_bytes=args.max_shard_gb * 1e9)
        else:
            files = plan_ranks(partial, weights, config, _rank_format(args, config, degrees, dtype))
        write_config_and_tokenizer(
            partial, config, dtype=dtype or next(iter(weights.values())).dtype, tokenizer=opened.tokenizer,
            generation=opened.generation,
        )  # fmt: skip
        fingerprints, read_back = transfer(
            weights,
            files,
            dtype=dtype,
            advance=progress.advance,
            reopen=lambda: open_model(partial, args.to).reader.tensors,
        )
        check_written(opened, open_model(partial, args.to), fingerprints=fingerprints, read_back=read_back, dtype=dtype)
    report = {
        "source": str(opened.path), "kind": opened.kind, "layout": opened.layout, "destination": str(args.destination),
        "to": args.to, "files": len(files), "bytes": sum(file.size for file in files),
        "parameters": sum(t.numel for t in weights.values()),
        "vocab_size": config.vocab_size, "padded_vocab": degrees.padded_vocab if args.to != "hf" else config.vocab_size,
        "fingerprint": fingerprint(weights, dtype, fingerprints), "notes": opened.notes,
        "seconds": round(time.perf_counter() - started, 2),
    }  # fmt: skip
    if args.to == "megatron":
        arguments = _arguments(args, config, degrees)
        report["start_with"] = start_flags(args.destination, arguments, iteration=args.iteration)
        report["notes"] = [*opened.notes, *beyond_megatron(config)]
    if args.verify:
        report["largest_logit_difference"] = _compare_logits(opened, open_model(args.destination, args.to), dtype)
    _print(report, args.json)
    return EXIT_OK


def _arguments(args: ConvertArgs, config: LlamaConfig, degrees: ParallelDegrees) -> dict[str, Any]:
    return saved_arguments(config, degrees, multiple=args.make_vocab_size_divisible_by, local=args.spec == "local")


def _rank_format(args: ConvertArgs, config: LlamaConfig, degrees: ParallelDegrees, dtype: str | None) -> RankFormat:
    """What the files of ranks are to be."""
    if args.to == "megatron":
        dialect = MCORE if args.spec == "local" else MCORE_TE
        return RankFormat(dialect, degrees, dtype, args.iteration, arguments=_arguments(args, config, degrees))
    dialect = ASCENDSPEED_FUSED if args.fused_mlp else ASCENDSPEED
    return RankFormat(dialect, degrees, dtype, args.iteration, args.deepspeed)


def _check_options(args: ConvertArgs) -> None:
    """Options that are out of range, would have no effect, or contradict each other, are errors."""
    problems = range_problems(args, flag)
    if args.to == "hf" and (args.tp, args.pp, args.vpp) != (1, 1, 1):
        problems.append(UserError("--tp, --pp and --vpp have no effect with --to hf", "leave them out"))
    if args.to != "ascendspeed" and (args.fused_mlp or args.deepspeed):
        problems.append(UserError("--fused-mlp and --deepspeed belong to --to ascendspeed", "leave them out"))
    if args.to != "megatron" and args.spec != "te":
        problems.append(UserError("--spec belongs to --to megatron", "leave it out"))
    if args.to == "ascendspeed" and args.vpp > 1:
        problems.append(UserError("AscendSpeed has no files for virtual stages", "leave --vpp out"))
    if args.deepspeed and args.pp > 1:
        problems.append(
            UserError("in the DeepSpeed flavour all stages have one file name", "use --pp 1, or no --deepspeed")
        )
    if problems:
        raise join_problems(problems)


def check_written(
    source: OpenedModel,
    written: OpenedModel,
    *,
    fingerprints: dict[str, int],
    read_back: dict[str, int],
    dtype: str | None,
) -> None:
    """Compares what the destination's own reader found with what went in.

    Args:
        source: what was converted.
        written: the destination, opened when all was written: replicas are compared on opening.
        fingerprints: fingerprints as written.
        read_back: fingerprints as read back.
        dtype: what the weights were cast to.

    Raises:
        CheckFailed: a name, shape, dtype or fingerprint is not what went in.
    """
    before, after = source.reader.tensors, written.reader.tensors
    for name, tensor in before.items():
        found = after.get(name)
        expected = (tensor.shape, dtype or tensor.dtype)
        if found is None or (found.shape, found.dtype) != expected:
            state = "missing" if found is None else f"{found.dtype} {list(found.shape)}"
            raise CheckFailed(f"{written.path}: {name} is {state} after writing, not {expected[1]} {list(expected[0])}")
    if len(after) != len(before) or written.config != source.config:
        raise CheckFailed(f"{written.path}: reads back as another model than was written")
    wrong = [name for name in before if read_back[name] != fingerprints[name]]
    if wrong:
        raise CheckFailed(
            f"{written.path}: {wrong[0]} and {len(wrong) - 1} more read back other values than were written"
        )


def _compare_logits(source: OpenedModel, written: OpenedModel, dtype: str | None) -> float:
    """Largest logit difference of the two ends, in float32; must be 0 unless the dtype changed."""
    from arriero.checkpoint.export import logit_difference

    difference = logit_difference(source.reader, written.reader, source.config)
    changed = dtype is not None and any(t.dtype != dtype for t in source.reader.tensors.values())
    if difference and not changed:
        raise CheckFailed(f"{written.path}: logits differ from the source's by {difference:.3g}")
    return difference


def _print(report: dict[str, object], as_json: bool) -> None:
    if as_json:
        print(json.dumps(report))
        return
    source, destination = escape(report["source"]), escape(report["destination"])
    print(f"{source} ({report['kind']}, {escape(report['layout'])}) -> {destination} ({report['to']})")
    vocabulary = f"vocabulary {report['vocab_size']:,}"
    if report["padded_vocab"] != report["vocab_size"]:
        vocabulary += f" padded to {report['padded_vocab']:,}"
    print(f"{report['parameters']:,} parameters, {vocabulary}, {report['files']} files, {report['bytes'] / 1e9:.3f} GB")  # type: ignore[operator]
    print(f"read back and compared: names, shapes, dtypes, fingerprint {str(report['fingerprint'])[:16]}")
    if "largest_logit_difference" in report:
        print(f"largest logit difference on random tokens: {report['largest_logit_difference']:.3g}")
    if "start_with" in report:
        print(f"start Megatron-LM with: {report['start_with']}")
    for note in report["notes"]:  # type: ignore[attr-defined]
        print(escape_message(f"note: {note}"))
