"""The verb `demo`: the whole path, each step as the command that a user would type.

Embedded text -> tokenizer -> prepare -> pretrain on one process, and its first steps on two -> compare -> export ->
reload and sample.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Interval

from arriero.common.errors import CheckFailed, UserError
from arriero.demo_corpus import corpus_texts, train_tokenizer, write_corpus

VOCABULARY = 2048  # the demo model's, see recipes/models/demo.json


@dataclass(frozen=True)
class DemoArgs:
    """Run the whole path on Python's own documentation: no network, no accelerator, under three minutes."""

    out: Path = Path("runs/demo")
    """Directory for everything that the demo makes."""
    steps: Annotated[int, Interval(ge=1, le=1_000_000)] = 200
    """Optimizer steps of the main run."""
    overwrite: bool = False
    """Remove an earlier demo in the same directory first."""


def run(args: DemoArgs) -> int:
    """Runs the demo; 0 if every step worked and the two runs agree."""
    out = args.out
    if out.exists() and any(out.iterdir()):
        if not args.overwrite:
            raise UserError(f"{out}: holds something already", "add --overwrite, or name another directory with --out")
        if not (out / "data" / "tokenizer").is_dir():
            raise UserError(f"{out}: does not look like an earlier demo", "name another directory with --out")
        shutil.rmtree(out)
    began = time.perf_counter()
    data, one, two, model = out / "data", out / "one-process", out / "tensor-parallel-2", out / "huggingface"
    _heading("Text: the documentation of Python's standard library, as Alpaca records")
    stats = write_corpus(data / "python_docs.parquet")
    print(f"{stats.records:,} records, {stats.characters / 1e6:.1f} MB -> {data / 'python_docs.parquet'}")
    train_tokenizer(corpus_texts(data / "python_docs.parquet"), data / "tokenizer", VOCABULARY)
    print(f"a LLaMA-style tokenizer of {VOCABULARY:,} pieces -> {data / 'tokenizer'}")
    _heading("Token files")
    tokenizer = str(data / "tokenizer")
    prefix = str(data / "python_docs")
    documents = ["--format", "alpaca", "--tokenizer", tokenizer, "--out", prefix]
    _arriero("prepare", str(data / "python_docs.parquet"), *documents)
    named = ["--data.prefix", f"{prefix}_text_document", "--tokenizer", tokenizer]
    named += ["--schedule.decay-steps", str(args.steps)]
    _heading("Pre-train on one process")
    _arriero("pretrain", "demo", *named, "--train.steps", str(args.steps), "--out", str(one))
    _heading("The same recipe's first ten steps on two tensor-parallel processes")
    short = ["--train.steps", "10", "--log.every", "5", "--train.eval-every", "0"]
    two_words = ["--parallel.tensor-parallel", "2", *short]
    _arriero("pretrain", "demo", *named, *two_words, "--out", str(two))
    _heading("Are they the same run?")
    _arriero("compare", str(one), str(two), "--max-rel", "1e-5", "--out", str(out / "compare"))
    _heading("A Hugging Face directory, reloaded, and text from it")
    _arriero("export", str(one), str(model))
    _arriero("generate", str(model), "--prompt", "Document the function os.path.", "--max-new-tokens", "60")
    _close(out, time.perf_counter() - began)
    return 0


def _heading(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _arriero(*words: str) -> None:
    """Shows a command and runs it; raises CheckFailed if it fails."""
    print("$ arriero " + " ".join(f'"{w}"' if " " in w else w for w in words), flush=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    code = subprocess.run([sys.executable, "-m", "arriero", *words], env=environment, check=False).returncode
    if code:
        raise CheckFailed(f"arriero {words[0]} ended with exit code {code}")


def _close(out: Path, seconds: float) -> None:
    rows = [
        ("loss curve", out / "one-process" / "loss.png"),
        ("comparison", out / "compare" / "compare.md"),
        ("its figure", out / "compare" / "compare.png"),
        ("metrics", out / "one-process" / "metrics.jsonl"),
        ("model", out / "huggingface"),
    ]
    print(f"\nDone in {seconds:.0f} s. Look at:")
    for name, path in rows:
        print(f"  {name:11} {path}")
    print("Next:")
    print(f'  arriero generate {out / "huggingface"} --prompt "Document the module " --temperature 0.8')
    print(f"  arriero pretrain --resume {out / 'one-process'} --train.steps 400     # goes on where it stopped")
    print("  arriero prepare YOUR.txt --tokenizer DIR --out PREFIX                 # your own text")
