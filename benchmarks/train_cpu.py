"""One training step on the CPU: arriero against transformers' plain loop, its Trainer and litgpt, in turns in one run.

    make peers && build/peers/bin/python benchmarks/train_cpu.py     # with all peers, in an environment of their own
    python benchmarks/train_cpu.py --tiny --only arriero --only transformers

Every contender has a process of its own for the whole run, starts from the same weights and takes the same batches;
first losses that differ end the run before anything is compared. Rounds of turns are shuffled. What counts is CPU
seconds of all threads, so that a busy machine matters little. Batches: 4 samples of 512 tokens, vocabulary 32,000;
AdamW, clipping, the loss read at every step; bfloat16 is mixed precision over float32 masters. Prints Markdown.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cpu_contenders import Job, contenders
from turns import Player, PlayerError

from arriero.checkpoint.formats.huggingface import write_huggingface
from arriero.checkpoint.tensors.in_memory import in_memory
from arriero.cli.bench.peak import matmul_peak
from arriero.cli.bench.table import markdown, percent
from arriero.common.device import device_description
from arriero.data.batches import Batches
from arriero.data.config import DataConfig
from arriero.model.config import LlamaConfig
from arriero.model.init import InitialWeights
from arriero.observe.throughput import throughput
from arriero.train.synthetic import write_random_data

SEED = 1234
SAMPLES = 4
TOLERANCE = {"bfloat16": 1e-2, "float32": 1e-4}
"""Of the first loss; it is near ln 32,000 = 10.4."""
PACKAGES = ("torch", "transformers", "accelerate", "litgpt", "lightning")


def shape(name: str) -> LlamaConfig:
    """A model; its longest sequence is the one that is trained."""
    vocabulary, hidden, layers, heads, feed_forward, length = {
        "small": (32000, 512, 8, 8, 1376, 512),
        "deep": (32000, 768, 12, 12, 2048, 512),
        "tiny": (512, 64, 2, 4, 128, 64),
    }[name]
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=feed_forward, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, head_dim=hidden // heads, rms_norm_eps=1e-5,
        max_position_embeddings=length,
    )  # fmt: skip


def write_inputs(root: Path, config: LlamaConfig, *, steps: int) -> None:
    """The weights, and the batches: as a data set for arriero, and as arrays of what it reads from it."""
    length = config.max_position_embeddings
    weights = InitialWeights(config, SEED)
    write_huggingface(root / "model", in_memory({name: weights.read(name) for name in weights.names()}), config=config)
    write_random_data(root / "data", config.vocab_size, tokens=2 * steps * SAMPLES * length, longest=2 * length)
    data = DataConfig(prefix=str(root / "data"), split="1,0,0")
    batches = Batches(
        data, sequence_length=length, global_batch=SAMPLES, seed=SEED, split="train", samples=steps * SAMPLES
    )
    read = [batches.batch(step, 0, SAMPLES) for step in range(steps)]
    np.savez(root / "batches.npz", tokens=np.stack([b.tokens for b in read]), labels=np.stack([b.labels for b in read]))


def disagreement(first_losses: Mapping[str, float], tolerance: float) -> str:
    """What to say where the first losses are not one number; nothing where they are."""
    losses = list(first_losses.values())
    if all(math.isfinite(loss) and abs(loss - losses[0]) <= tolerance for loss in losses):
        return ""
    told = ", ".join(f"{name} {loss:.6f}" for name, loss in first_losses.items())
    return f"the first losses differ by more than {tolerance:g}, so these do not train the same model: {told}"


def missing(name: str) -> list[str]:
    return [package for package in contenders()[name].needs if importlib.util.find_spec(package) is None]


def start(job: Job) -> Player:
    """A contender's process, which begins to warm up."""
    environment = {
        "OMP_NUM_THREADS": str(job.threads), "ARRIERO_THREADS": str(job.threads),
        "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0",  # who waits must not spin
        "TORCHINDUCTOR_CACHE_DIR": f"{job.root}/inductor of {job.name}".replace(" ", "-"),  # compilation is measured
        "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    if job.preload:
        environment["LD_PRELOAD"] = job.preload
    command = [sys.executable, str(Path(__file__).with_name("cpu_contenders.py")), json.dumps(dataclasses.asdict(job))]
    return Player(job.name, command, Path(job.root) / f"{job.name}.log", environment)


def play(args: argparse.Namespace, names: list[str], config: LlamaConfig, root: Path) -> list[Player]:
    """Warms them up one after another, compares the first losses, and hands out the turns.

    Raises:
        SystemExit: the losses differ, or a process failed.
    """
    length, warmup = config.max_position_embeddings, 2 if args.tiny else 3
    steps = warmup + args.rounds * args.steps + 1
    write_inputs(root, config, steps=steps)
    players: list[Player] = []
    try:
        for name in names:
            preload = "" if name.startswith("arriero") else args.preload
            players.append(
                start(Job(name, str(root), length, SAMPLES, steps, warmup, args.dtype, args.threads, preload))
            )
            players[-1].warm_up()
        first = {player.name: player.start["first_loss"] for player in players}
        if problem := disagreement(first, TOLERANCE[args.dtype]):
            raise SystemExit(problem)
        order = random.Random(SEED)
        for _ in range(args.rounds):
            for player in order.sample(players, len(players)):
                player.turn(args.steps)
    except PlayerError as failure:
        raise SystemExit(str(failure)) from None
    finally:
        for player in players:
            player.close()
    return players


def figures(player: Player, ours: Player | None, *, tokens: int) -> dict[str, Any]:
    """One contender's row; `tokens` are those of a turn."""
    rates = [tokens / turn["cpu_seconds"] for turn in player.turns]
    warmup = player.start["warmup_seconds"]
    row: dict[str, Any] = {
        "tokens_per_cpu_second": statistics.median(rates),
        "tokens_per_second": statistics.median(tokens / turn["wall_seconds"] for turn in player.turns),
        "of_arriero": None, "first_loss": player.start["first_loss"], "last_loss": player.turns[-1]["last_loss"],
        "first_step_seconds": warmup[0], "compile_seconds": None,
        "peak_memory_gb": player.turns[-1]["peak_memory_gb"], "turns": player.turns,
    }  # fmt: skip
    if ours is not None:
        other = [tokens / turn["cpu_seconds"] for turn in ours.turns]
        row["of_arriero"] = statistics.median(a / b for a, b in zip(rates, other, strict=True))
    if contenders()[player.name].compiled:  # a second step may compile again
        row["compile_seconds"] = sum(seconds - warmup[-1] for seconds in warmup)
    return row


def run(args: argparse.Namespace) -> dict[str, Any]:
    began = time.perf_counter()
    name = "tiny" if args.tiny else args.shape
    config = shape(name)
    torch.set_num_threads(args.threads)
    device = device_description("cpu")
    torch.set_num_threads(1)  # the peak of one core: CPU seconds are one core's
    wanted = args.only or list(contenders())
    absent = {contender: missing(contender) for contender in wanted}
    peaks = [peak(args)]
    with tempfile.TemporaryDirectory() as root:
        players = play(args, [contender for contender in wanted if not absent[contender]], config, Path(root))
    peaks.append(peak(args))
    held, tokens = {player.name: player for player in players}, SAMPLES * config.max_position_embeddings
    rows: list[dict[str, Any]] = []
    for contender in wanted:
        row: dict[str, Any] = {"problem": f"not installed: {', '.join(absent[contender])}"}
        if contender in held:
            row = figures(held[contender], held.get("arriero"), tokens=args.steps * tokens)
            rate = row["tokens_per_cpu_second"]
            row["mfu"] = throughput(config, rate, config.max_position_embeddings, peak_tflops=max(peaks)).mfu
        rows.append({"contender": contender} | row)
    return {
        "device": device, "threads": args.threads, "versions": versions(), "shape": name, "dtype": args.dtype,
        "rounds": args.rounds, "steps": args.steps, "tokens_per_step": tokens, "preload": args.preload,
        "matmul_tflops_before": peaks[0], "matmul_tflops_after": peaks[1], "rows": rows,
        "seconds": time.perf_counter() - began,
    }  # fmt: skip


def peak(args: argparse.Namespace) -> float:
    """TFLOP/s of the fastest matmul on one thread, now."""
    return matmul_peak(torch.device("cpu"), args.dtype, seconds=0.2 if args.tiny else 3.0).tflops


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        if importlib.util.find_spec(package):
            found[package] = importlib.metadata.version(package)
    return found


def report(found: Mapping[str, Any]) -> str:
    headers = ["", "tokens per CPU second", "of arriero", "MFU", "first loss", "last loss", "first step, s",
               "compilation, s", "peak memory, GB"]  # fmt: skip
    lines = []
    for row in found["rows"]:
        shown = [row.get("problem", ""), *["-"] * 7]
        if "problem" not in row:
            ratio, compilation = row["of_arriero"], row["compile_seconds"]
            shown = [
                f"{row['tokens_per_cpu_second']:.0f}", "-" if ratio is None else f"{ratio:.2f}", percent(row["mfu"]),
                f"{row['first_loss']:.4f}", f"{row['last_loss']:.4f}", f"{row['first_step_seconds']:.1f}",
                "-" if compilation is None else f"{compilation:.1f}", f"{row['peak_memory_gb']:.2f}",
            ]  # fmt: skip
        lines.append([row["contender"], *shown])
    notes = [
        f"{found['device']}; {', '.join(f'{k} {v}' for k, v in found['versions'].items())}; {found['seconds']:.0f} s",
        f"shape {found['shape']}, {found['dtype']}, {found['tokens_per_step']} tokens a step; medians of "
        f"{found['rounds']} rounds, a turn of {found['steps']} steps for each, in shuffled order",
        "CPU seconds: of all threads of the process; of arriero: the median of the rounds' ratios",
        f"fastest {found['dtype']} matmul on one thread: {found['matmul_tflops_before']:.4g} TFLOP/s before, "
        f"{found['matmul_tflops_after']:.4g} after; MFU is against the faster, with causal attention",
    ]
    if found["preload"]:
        notes.append(f"the peers, not arriero, had {found['preload']} preloaded")
    return markdown(headers, lines) + "\n\n" + "\n".join(f"- {note}" for note in notes)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("small", "deep"), default="small")
    parser.add_argument("--dtype", choices=tuple(TOLERANCE), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=3, help="of a turn")
    parser.add_argument("--only", action="append", choices=tuple(contenders()), help="may be given several times")
    parser.add_argument("--preload", default="", help="a library for the peers' LD_PRELOAD, such as tcmalloc")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--tiny", action="store_true", help="a small shape, for a try")
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args(words)
    if args.preload:
        if not Path(args.preload).is_file():
            parser.error(f"--preload: there is no {args.preload}")
        args.preload = str(Path(args.preload).resolve())
    if min(args.rounds, args.steps, args.threads) < 1:
        parser.error("--rounds, --steps and --threads must be at least 1")
    found = run(args)
    print(report(found))
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
