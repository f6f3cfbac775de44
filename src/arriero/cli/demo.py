"""The verb `demo`: the whole path, each step as the command that a user would type.

The standard library's documentation -> tokenizer -> prepare -> pretrain -> the same steps on one process and on two ->
compare -> export -> reload and sample.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Interval

from arriero.common.errors import EXIT_CHECK_FAILED, CheckFailed, UserError
from arriero.common.files import make_directory, os_error_text
from arriero.common.text import escape
from arriero.data.demo_corpus import corpus_texts, train_tokenizer, write_corpus

VOCABULARY = 2048  # the demo model's, see recipes/models/demo.json
LIMIT = "1e-10"
"""Largest relative difference of the two runs. They differ only in the order of sums: by 1e-15 in float64 (ten seeds, 1
to 4 threads), in float32 by 1e-6 to 1e-5, depending on seed, threads and processor."""
COMPARED_STEPS = "10"


@dataclass(frozen=True)
class DemoArgs:
    """Run the whole path on the documentation of this Python: no network, no accelerator."""

    out: Path = Path("runs/demo")
    """Directory for everything that the demo makes."""
    steps: Annotated[int, Interval(ge=1, le=1_000_000)] = 150
    """Optimizer steps of the main run."""
    overwrite: bool = False
    """Remove an earlier demo in the same directory first."""


def run(args: DemoArgs) -> int:
    """Runs the demo; 0 if every step worked, 1 if one failed or the two compared runs differ."""
    out = args.out
    _prepare_directory(out, overwrite=args.overwrite)
    started = time.perf_counter()
    data, model = out / "data", out / "huggingface"
    main, one, two = out / "one-process", out / "one-process-float64", out / "tensor-parallel-2-float64"
    _heading("Text: the documentation of Python's standard library, as Alpaca records")
    stats = write_corpus(data / "python_docs.parquet")
    print(f"{stats.records:,} records, {stats.characters / 1e6:.1f} MB -> {escape(data / 'python_docs.parquet')}")
    train_tokenizer(corpus_texts(data / "python_docs.parquet"), data / "tokenizer", VOCABULARY)
    print(f"a LLaMA-style tokenizer of {VOCABULARY:,} pieces -> {escape(data / 'tokenizer')}")
    _heading("Token files")
    tokenizer, prefix = str(data / "tokenizer"), str(data / "python_docs")
    documents = ["--format", "alpaca", "--tokenizer", tokenizer, "--out", prefix]
    _run_or_fail("prepare", str(data / "python_docs.parquet"), *documents)
    named = ["--data.prefix", f"{prefix}_text_document", "--tokenizer", tokenizer]
    _heading("Pre-train on one process")
    decay = ["--schedule.decay-steps", str(args.steps)]
    _run_or_fail("pretrain", "demo", *named, *decay, "--train.steps", str(args.steps), "--out", str(main))
    _heading("The recipe's first ten steps in float64: on one process, and on two tensor-parallel ones")
    short = ["--train.dtype", "float64", "--train.steps", COMPARED_STEPS, "--log.every", "5", "--train.eval-every", "0"]
    _run_or_fail("pretrain", "demo", *named, *short, "--out", str(one))
    _run_or_fail("pretrain", "demo", *named, *short, "--parallel.tensor-parallel", "2", "--out", str(two))
    _heading("Are they the same run?")
    code = _run_arriero("compare", str(one), str(two), "--max-rel", LIMIT, "--out", str(out / "compare"))
    _heading("A Hugging Face directory, reloaded, and text from it")
    _run_or_fail("export", str(main), str(model))
    _run_or_fail("generate", str(model), "--prompt", "Document the function os.path.", "--max-new-tokens", "60")
    _print_summary(out, time.perf_counter() - started)
    if code:
        print(f"\nFAILED: the comparison ended with exit code {code}; see {escape(out / 'compare' / 'compare.md')}")
    return EXIT_CHECK_FAILED if code else 0


def _prepare_directory(out: Path, *, overwrite: bool) -> None:
    """Makes an empty directory; removes an earlier demo. Raises UserError if it holds anything else."""
    other = "name another directory with --out"
    make_directory(out, other)
    try:
        if any(out.iterdir()):
            if not overwrite:
                raise UserError(f"{escape(out)}: holds something already", f"add --overwrite, or {other}")
            if not (out / "data" / "tokenizer").is_dir():
                raise UserError(f"{escape(out)}: does not look like an earlier demo", other)
            shutil.rmtree(out)
        make_directory(out / "data", other)
    except OSError as error:
        raise UserError(f"{escape(out)}: {os_error_text(error)}", other) from None


def _heading(text: str) -> None:
    print(f"\n== {text}", flush=True)


def program() -> str:
    """How the user's shell starts this arriero: `arriero` if PATH finds it, else its path."""
    script = Path(sys.executable).parent / "arriero"
    found = shutil.which("arriero")
    if found and Path(found).resolve() == script.resolve():
        return "arriero"
    if not script.exists():
        return f"{shlex.quote(sys.executable)} -m arriero"
    here = Path.cwd()
    return shlex.quote(str(script.relative_to(here) if script.is_relative_to(here) else script))


def _run_arriero(*words: str) -> int:
    """Prints a command and runs it; returns its exit code."""
    print(f"$ {program()} {shlex.join(words)}", flush=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.run([sys.executable, "-m", "arriero", *words], env=environment, check=False).returncode


def _run_or_fail(*words: str) -> None:
    """As `_run_arriero`; raises CheckFailed if the command fails."""
    if code := _run_arriero(*words):
        raise CheckFailed(f"arriero {words[0]} ended with exit code {code}")


def _print_summary(out: Path, seconds: float) -> None:
    rows = [
        ("loss curve", out / "one-process" / "loss.png"),
        ("comparison", out / "compare" / "compare.md"),
        ("its figure", out / "compare" / "compare.png"),
        ("metrics", out / "one-process" / "metrics.jsonl"),
        ("model", out / "huggingface"),
    ]
    print(f"\nDone in {seconds:.0f} s. Look at:")
    for name, path in rows:
        print(f"  {name:11} {escape(path)}")
    model, main, tokenizer = (shlex.quote(str(out / part)) for part in ("huggingface", "one-process", "data/tokenizer"))
    print("Next:")
    print(f'  {program()} generate {model} --prompt "Document the module " --temperature 0.8')
    print(f"  {program()} pretrain --resume {main} --train.steps 300     # continues where it stopped")
    print(f"  {program()} inspect {main}")
    print("Your own text (YOUR.txt):")
    print(f"  {program()} prepare YOUR.txt --tokenizer {tokenizer} --out runs/yours")
