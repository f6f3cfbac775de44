"""One training step on one accelerator, against a plain transformers loop in the same run; under 8 minutes on an H100.

    python benchmarks/gpu_step.py                       # the card that is there
    python benchmarks/gpu_step.py --device cpu --tiny   # the same code, small, in seconds

(a) TinyLlama 1.1B whole; (b) 8 layers of LLaMA-7B and of Llama-3 8B at 2k, 4k and 8k tokens: 16,384 tokens a step,
bfloat16 over float32 masters, AdamW, clipping, the loss read at every step, random weights and tokens. Where memory
runs out, a contender's micro-batch is halved and the rest accumulated. A contender runs alone: two do not fit. The
fastest matmul is measured before and after, since a warm card is slower. What does not fit into --budget seconds is
named as not run; "compiled" is per block for arriero, the whole model for transformers, and runs on CUDA alone, as
float8 does where torchao is installed. Prints Markdown, then JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import math
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from arriero.cli.bench.measure import initialize_randomly
from arriero.cli.bench.peak import matmul_peak
from arriero.cli.bench.table import markdown, percent
from arriero.common.device import (
    device_description,
    device_name,
    device_type,
    peak_memory,
    select_device,
    synchronize,
    tune_allocator,
)
from arriero.data.config import DataConfig
from arriero.distributed.parallel.mesh import Ranks
from arriero.model.config import LlamaConfig
from arriero.observe.throughput import peak_flops, throughput
from arriero.train.build import build_trainer
from arriero.train.config import TrainConfig
from arriero.train.recipe import Recipe, bundled_directory
from arriero.train.synthetic import write_random_data

TINY = LlamaConfig(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-5, max_position_embeddings=256,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    name: str
    model: LlamaConfig
    length: int
    tokens: int
    """A step."""


@dataclass(frozen=True)
class Bench:
    kind: str
    root: Path
    warmup: int
    steps: int


def cases(tiny: bool) -> list[Case]:
    if tiny:
        return [Case("tiny", TINY, length, 256) for length in (64, 128)]

    def shape(name: str) -> LlamaConfig:
        return LlamaConfig.from_json(bundled_directory() / "models" / f"{name}.json")

    parts = {f"{title}, 8 layers": replace(shape(name), num_hidden_layers=8, max_position_embeddings=8192)
             for title, name in (("LLaMA-7B", "llama-7b"), ("Llama-3 8B", "llama3-8b"))}  # fmt: skip
    found = [Case("TinyLlama 1.1B, whole", shape("tinyllama-1.1b"), 2048, 2**14)]
    return found + [Case(name, model, n, 2**14) for n in (2048, 4096, 8192) for name, model in parts.items()]


def ours(bench: Bench, case: Case, micro: int, **changes: Any) -> Callable[[], float]:
    """A step of arriero's own trainer; returns the loss."""
    (bench.root / "config.json").write_text(json.dumps(case.model.to_json()))
    data = bench.root / f"random-{case.model.vocab_size}-{case.length}"
    if not data.with_suffix(".idx").exists():
        write_random_data(data, case.model.vocab_size, tokens=2**19, longest=2 * case.length)
    train = TrainConfig(
        steps=bench.warmup + bench.steps + 1, sequence_length=case.length, global_batch=case.tokens // case.length,
        micro_batch=micro, dtype="bfloat16", **changes,
    )  # fmt: skip
    data_config = DataConfig(prefix=str(data), split="1,0,0")
    recipe = Recipe(model=str(bench.root / "config.json"), data=data_config, train=train, device=bench.kind)  # type: ignore[arg-type]
    trainer = build_trainer(recipe, Ranks(), local_rank=0, device_kind=bench.kind)
    initialize_randomly(trainer, recipe.seed)

    def step() -> float:
        try:
            return trainer.step().lm_loss
        except torch.OutOfMemoryError:
            trainer.close()
            raise

    return step


def plain_transformers(bench: Bench, case: Case, micro: int, *, compiled: bool = False) -> Callable[[], float]:
    """What a user writes by hand: float32 weights under autocast, accumulation, clipping, fused AdamW."""
    import transformers

    device, count = torch.device(bench.kind), case.tokens // case.length
    torch.manual_seed(1234)
    with device:
        config = transformers.LlamaConfig(**case.model.to_json(), use_cache=False, attn_implementation="sdpa")
        model = transformers.LlamaForCausalLM(config)
        tokens = torch.randint(0, case.model.vocab_size, (count, case.length))
    if compiled:
        model.compile()
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> float:
        total = torch.zeros((), device=device)
        for rows in tokens.split(micro):
            with torch.autocast(bench.kind, torch.bfloat16):
                loss = model(input_ids=rows, labels=rows).loss * (len(rows) / count)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()
        return total.item()

    return step


@dataclass(frozen=True)
class Contender:
    name: str
    make: Callable[..., Callable[[], float]]
    everywhere: bool = True
    """Whether it runs every case, or the first two alone."""


def contenders(kind: str) -> list[Contender]:
    """In the order of their weight: what the budget does not allow is at the end."""
    peers, compiles = importlib.util.find_spec("transformers") is not None, kind == "cuda"
    eight = compiles and importlib.util.find_spec("torchao") is not None
    some = partial(Contender, everywhere=False)
    found = {
        Contender("arriero, compiled", partial(ours, compile=True)): compiles,
        Contender("transformers", plain_transformers): peers,
        some("arriero, compiled, float8 tensorwise", partial(ours, compile=True, float8="tensorwise")): eight,
        (some if compiles else Contender)("arriero", ours): True,
        some("transformers, compiled", partial(plain_transformers, compiled=True)): peers and compiles,
        some("arriero, compiled, float8 rowwise", partial(ours, compile=True, float8="rowwise")): eight,
    }
    return [contender for contender, there in found.items() if there]


def turns(kind: str, tiny: bool) -> list[tuple[Case, Contender]]:
    """Contender after contender, those of little weight last."""
    all_cases = cases(tiny)
    return [(case, c) for c in contenders(kind) for case in all_cases[: None if c.everywhere else 2]]


def measure(bench: Bench, case: Case, make: Callable[..., Callable[[], float]]) -> dict[str, Any]:
    """Tokens a second of one contender, with the largest micro-batch that fits."""
    micro = case.tokens // case.length
    while micro:
        try:
            return timed(bench, case, make(bench, case, micro)) | {"micro_batch": micro}
        except torch.OutOfMemoryError:
            micro //= 2
        finally:
            clean(bench.kind)
    return {"problem": "out of memory even with one sample at a time"}


def timed(bench: Bench, case: Case, step: Callable[[], float]) -> dict[str, Any]:
    began = time.perf_counter()
    first_loss = step()
    first = time.perf_counter() - began
    for _ in range(bench.warmup - 1):
        step()
    synchronize(bench.kind)
    began = time.perf_counter()
    for _ in range(bench.steps):
        step()
    synchronize(bench.kind)
    seconds = (time.perf_counter() - began) / bench.steps
    memory = peak_memory(bench.kind)
    return {
        "tokens_per_second": case.tokens / seconds, "seconds_per_step": seconds, "first_step_seconds": first,
        "peak_memory_gb": memory / 1e9, "first_loss": first_loss,
        "log_vocabulary": math.log(case.model.vocab_size), "busy": busy_seconds(bench.kind, step) / seconds or None,
    }  # fmt: skip


def busy_seconds(kind: str, step: Callable[[], float]) -> float:
    """Seconds of one step in which the card computes: what is missing to 1 is what CUDA graphs could gain at most.

    The kernels' own times are taken from a profile, the step's from a run without, since profiling slows the host.
    """
    if kind != "cuda":
        return 0.0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        synchronize(kind)
    return sum(e.self_device_time_total for e in profile.key_averages()) / 1e6


def clean(kind: str) -> None:
    """Frees what the last contender held, and forgets its peak."""
    torch._dynamo.reset()
    gc.collect()
    if kind != "cpu":
        torch.accelerator.empty_cache()
        torch.get_device_module(kind).reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def run(bench: Bench, tiny: bool, budget: float) -> dict[str, Any]:
    began = time.perf_counter()
    device = select_device(bench.kind, 0)
    before = matmul_peak(device, "bfloat16", seconds=0.2 if tiny else 3.0)
    clean(bench.kind)
    sheet = (peak_flops(device_name(bench.kind), "bfloat16") or 0.0) / 1e12
    rows, longest = [], 0.0
    for case, contender in turns(bench.kind, tiny):
        row: dict[str, Any] = {"case": case.name, "length": case.length, "contender": contender.name}
        rows.append(row)
        start = time.perf_counter()
        if start - began + longest > budget:
            row["problem"] = f"not run: the {budget:.0f} s were spent"
            continue
        row |= measure(bench, case, contender.make)
        if rate := row.get("tokens_per_second"):
            figures = throughput(case.model, rate, case.length, peak_tflops=sheet or before.tflops)
            row |= {"tflops": figures.tflops, "mfu": figures.mfu, "mfu_full": figures.mfu_full}
        longest = max(longest, time.perf_counter() - start)
        print(f"{time.perf_counter() - began:.0f} s: {row}", file=sys.stderr, flush=True)
    order = [(case.name, case.length) for case in cases(tiny)]
    rows.sort(key=lambda row: order.index((row["case"], row["length"])))  # by case, then as they ran
    after = matmul_peak(device, "bfloat16", seconds=0.2 if tiny else 3.0)
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    if importlib.util.find_spec("transformers"):
        versions["transformers"] = importlib.import_module("transformers").__version__
    return {
        "device": device_description(bench.kind), "versions": versions, "data_sheet_tflops": sheet or None,
        "matmul_tflops_before": before.tflops, "matmul_tflops_after": after.tflops, "rows": rows,
        "seconds": time.perf_counter() - began,
    }  # fmt: skip


def report(found: dict[str, Any]) -> str:
    headers = ["shape", "tokens", "", "tokens/s", "of transformers", "TFLOPs", "MFU", "MFU, attention in full",
               "card busy", "peak memory, GB", "micro batch", "first step, s"]  # fmt: skip
    peers = {(r["case"], r["length"]): r.get("tokens_per_second") for r in found["rows"]
             if r["contender"] == "transformers"}  # fmt: skip
    lines = []
    for r in found["rows"]:
        shown = [r.get("problem", ""), *["-"] * 8]
        if rate := r.get("tokens_per_second"):
            peer = peers.get((r["case"], r["length"]))
            shown = [
                f"{rate:.0f}", f"{rate / peer:.2f}" if peer else "-", f"{r['tflops']:.4g}", percent(r["mfu"]),
                percent(r["mfu_full"]), percent(r["busy"]), f"{r['peak_memory_gb']:.2f}", str(r["micro_batch"]),
                f"{r['first_step_seconds']:.1f}",
            ]  # fmt: skip
        lines.append([r["case"], str(r["length"]), r["contender"], *shown])
    sheet = found["data_sheet_tflops"]
    against = (
        f"the data sheet's {sheet:.4g}" if sheet else f"the matmul measured before, {found['matmul_tflops_before']:.4g}"
    )
    notes = [
        f"{found['device']}; {', '.join(f'{k} {v}' for k, v in found['versions'].items())}; {found['seconds']:.0f} s",
        f"fastest bfloat16 matmul: {found['matmul_tflops_before']:.4g} TFLOP/s before, "
        f"{found['matmul_tflops_after']:.4g} after",
        "card busy: the kernels' own time in a step over the step's; first step: with compilation, of which later "
        "shapes find some in torch's cache",
        f"MFU: tokens/s x (6 x matmul parameters + 6 L d s) / {against} TFLOP/s; attention in full: 12 L d s",
    ]
    if not peers:
        notes.append("transformers is not importable here: nothing to compare with")
    return markdown(headers, lines) + "\n\n" + "\n".join(f"- {n}" for n in notes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "npu"))
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a try on any machine")
    parser.add_argument("--budget", type=float, default=440.0, help="seconds after which nothing new is started")
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()
    kind = device_type(args.device)
    if kind == "cpu" and not args.tiny:
        raise SystemExit("no accelerator here: these shapes would take hours; add --tiny")
    tune_allocator()
    with tempfile.TemporaryDirectory() as root:
        bench = Bench(kind, Path(root), warmup=2 if args.tiny else 3, steps=2 if args.tiny else 6)
        found = run(bench, args.tiny, args.budget)
    print(report(found) + "\n\n" + json.dumps(found, indent=1))
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
