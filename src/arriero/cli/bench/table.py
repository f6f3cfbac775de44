"""What a bench prints: AscendSpeed's performance table for this machine, and the formula behind each figure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from arriero.cli.bench.measure import Result
from arriero.cli.bench.peak import Peak
from arriero.observe.throughput import peak_flops


def markdown(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(value: float | None) -> str:
    """A share; - where there is none."""
    return "-" if value is None else f"{value:.1%}"


def result_table(result: Result) -> str:
    """The table of one recipe, and its footnotes."""
    headers = ["device", "model", "iterations", "samples/s/p", "tokens/s/p", "s/step", "TFLOPs", "MFU"]
    row = [
        result.device, result.model, str(result.iterations), f"{result.samples_per_second_per_device:.4g}",
        f"{result.tokens_per_second_per_device:.0f}", f"{result.seconds_per_step:.4g}", f"{result.tflops:.4g}",
        percent(result.mfu),
    ]  # fmt: skip
    more = [("MFU, attention in full", percent(result.mfu_full))]
    more += [("HFU", percent(result.hfu))] if result.hfu is not None else []
    more += [("peak memory, GB", f"{result.peak_memory_gb:.2f}"), ("first step, s", f"{result.first_step_seconds:.2f}")]
    table = markdown([*headers, *(name for name, _ in more)], [[*row, *(value for _, value in more)]])
    return f"{table}\n\n{footnotes(result)}"


def footnotes(result: Result) -> str:
    """What was run, and the formula of every figure."""
    samples = f"{result.global_batch} samples of {result.sequence_length} tokens a step, {result.micro_batch} at a time"
    compiled = ", layers compiled" if result.compiled else ""
    once = "the compilation and all else that is done once" if result.compiled else "all that is done once"
    lines = [
        f"{result.layout}; {samples}; {result.dtype}, recompute {result.recompute}{compiled}; {result.data}",
        "p: one process, which has one device; s/step: mean of the iterations, after the warm-up",
        "TFLOPs: tokens/s/p x (6 x matmul parameters + 6 L d s), model FLOPs with causal attention",
        f"MFU: TFLOPs / {result.peak_tflops:.4g} ({result.peak_source}); attention in full: 12 L d s instead of 6 L d s"
        if result.mfu is not None
        else f"MFU: no peak ({result.peak_source})",
    ]
    if result.hfu is not None:
        lines.append("HFU: as MFU, with the forward pass of recomputed layers counted again, less their last matmul")
    held = "resident set" if " thread" in result.device else "allocations on the device"
    lines.append(f"peak memory: {held} of the process that used most; first step: with {once}")
    return "\n".join(f"- {line}" for line in lines)


def peak_table(device: str, peaks: Sequence[Peak]) -> str:
    """The measured peaks beside the known ones."""
    rows = []
    for peak in peaks:
        sheet = peak_flops(device, peak.dtype)
        shown = f"{sheet / 1e12:.4g}" if sheet else "-"
        rows.append([peak.dtype, f"{peak.tflops:.4g}", f"{peak.size} x {peak.size} by {peak.how}", shown])
    table = markdown(["dtype", "TFLOP/s", "fastest matmul", "data sheet"], rows)
    keys = [f"- {p.dtype} on this device: --log.peak_tflops {p.tflops:.4g}" for p in peaks if p.dtype != "tf32"]
    return f"{device}\n\n{table}\n\n" + "\n".join(keys)


def as_json(results: object) -> str:
    """Dataclasses, or lists of them, as one JSON text."""
    plain = [asdict(r) for r in results] if isinstance(results, list) else asdict(results)  # type: ignore[call-overload]
    return json.dumps(plain, indent=1)
