"""Speed of `arriero prepare` beside the raw engines, on real text: the sources of Python and its packages.

    python benchmarks/data_tokenize.py --tokenizer DIR [--megabytes 200] [--rounds 2]

Every line is one process of its own, start-up included, with two workers; files are written. The raw engines read the
same file and throw their ids away. Wall-clock MB/s, MB per CPU second, and peak resident memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

MEASURE = """
import resource, sys
used = resource.getrusage(resource.RUSAGE_SELF)
print("USAGE", used.ru_utime + used.ru_stime, used.ru_maxrss, file=sys.stderr)
"""

RAW_SENTENCEPIECE = """
import json, sys, sentencepiece
processor = sentencepiece.SentencePieceProcessor(model_file=sys.argv[2])
batch = []
def go():
    processor.encode(batch, num_threads=2, return_type="numpy"); batch.clear()
for line in open(sys.argv[1], encoding="utf-8"):
    batch.append(json.loads(line)["text"])
    if sum(map(len, batch)) > 4e6: go()
go()
"""

RAW_GIGATOKEN = """
import json, sys, gigatoken
from concurrent.futures import ThreadPoolExecutor
from gigatoken.gigatoken_rs import PadTruncate
tokenizer = gigatoken.Tokenizer.from_sentencepiece(sys.argv[2]).backend
def go(batch): tokenizer.encode_batch_padded(batch, PadTruncate(0), parallel=False)
def batches():
    batch = []
    for line in open(sys.argv[1], encoding="utf-8"):
        batch.append(json.loads(line)["text"])
        if sum(map(len, batch)) > 250000: yield sorted(batch, key=len); batch = []
    yield batch
with ThreadPoolExecutor(2) as pool:
    waiting = []
    for batch in batches():
        for part in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
            if part: waiting.append(pool.submit(go, part))
        while len(waiting) > 6: waiting.pop(0).result()
"""

OURS = """
import sys
from pathlib import Path
from arriero.cli.prepare import PrepareArgs, run
source, tokenizer, out, form, engine = sys.argv[1:]
run(PrepareArgs(inputs=(source,), tokenizer=Path(tokenizer), out=out, format=form, engine=engine, workers=2))
"""


def texts() -> Iterator[str]:
    for root in (sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["purelib"]):
        for path in sorted(Path(root).rglob("*")):
            if path.suffix in (".py", ".txt", ".rst", ".md", ".pyi", ".h") and path.is_file():
                try:
                    text = path.read_text(encoding="utf-8")
                except (OSError, UnicodeDecodeError):
                    continue
                if text.strip():
                    yield text


def write_corpus(directory: Path, megabytes: float) -> tuple[Path, Path]:
    """The same text twice: whole files, and as Alpaca records of about 900 characters."""
    whole, alpaca = directory / "text.jsonl", directory / "alpaca.jsonl"
    size = records = 0
    with whole.open("w", encoding="utf-8") as a, alpaca.open("w", encoding="utf-8") as b:
        for text in texts():
            a.write(json.dumps({"text": text}) + "\n")
            for at in range(0, len(text) - 200, 900):
                record = {
                    "instruction": text[at : at + 60],
                    "input": text[at + 60 : at + 120],
                    "output": text[at + 120 : at + 900],
                }
                if all(value.strip() for value in record.values()):
                    record["input"] = record["input"] if records % 5 < 2 else ""  # 40% of Alpaca's have an input
                    b.write(json.dumps(record) + "\n")
                    records += 1
            size += len(text.encode())
            if size > megabytes * 1e6:
                break
    return whole, alpaca


def measure(code: str, *args: object) -> tuple[float, float, float]:
    """Seconds, CPU seconds and peak MB of a Python process."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code + MEASURE, *map(str, args)], capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - began
    if done.returncode:
        sys.exit(done.stderr)
    cpu, peak = done.stderr.split("USAGE")[1].split()
    return seconds, float(cpu), float(peak) / 1000


def text_megabytes(out: Path) -> float:
    return json.loads(Path(f"{out}.manifest.json").read_text())["text_bytes"] / 1e6


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--megabytes", type=float, default=200)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    model = args.tokenizer / "tokenizer.model"
    with tempfile.TemporaryDirectory() as name:
        here = Path(name)
        whole, alpaca = write_corpus(here, args.megabytes)
        out = here / "out"
        names = " ".join(f"{p} {version(p)}" for p in ("sentencepiece", "gigatoken", "numpy"))
        print(
            f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {names}, "
            f"{time.strftime('%Y-%m-%d')}"
        )
        rows = [
            ("raw sentencepiece, 2 threads", RAW_SENTENCEPIECE, (whole, model)),
            ("arriero, sentencepiece", OURS, (whole, args.tokenizer, out, "text", "reference")),
            ("arriero, sentencepiece, Alpaca", OURS, (alpaca, args.tokenizer, out, "alpaca", "reference")),
            ("raw gigatoken, 2 threads", RAW_GIGATOKEN, (whole, model)),
            ("arriero, gigatoken", OURS, (whole, args.tokenizer, out, "text", "fast")),
            ("arriero, gigatoken, Alpaca", OURS, (alpaca, args.tokenizer, out, "alpaca", "fast")),
        ]
        best: dict[str, tuple[float, float, float]] = {}
        sizes = {}
        for _ in range(args.rounds):  # in turn, so that a busy moment of the machine does not fall on one of them
            for label, code, given in rows:
                for old in here.glob("out*"):
                    old.unlink()
                found = measure(code, *given)
                if code is OURS:
                    sizes[label] = text_megabytes(out)
                best[label] = min(best.get(label, found), found)
        sizes["raw sentencepiece, 2 threads"] = sizes["raw gigatoken, 2 threads"] = sizes["arriero, sentencepiece"]
        print(f"{'':34}{'MB':>7}{'MB/s':>8}{'MB/CPU s':>10}{'peak MB':>9}")
        for label, (seconds, cpu, peak) in best.items():
            print(f"{label:34}{sizes[label]:7.0f}{sizes[label] / seconds:8.1f}{sizes[label] / cpu:10.1f}{peak:9.0f}")
        print(f"start-up (one line of text): {start_up(here, args.tokenizer):.2f} CPU s")


def start_up(here: Path, tokenizer: Path) -> float:
    line = here / "line.txt"
    line.write_text("one line\n")
    return min(measure(OURS, line, tokenizer, here / f"start{n}", "text", "fast")[1] for n in range(3))


if __name__ == "__main__":
    main()
