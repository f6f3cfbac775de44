"""Tokens per CPU second of each layout on the CPU, against plain DDP and DeepSpeed on the same shape and batch.

    python benchmarks/layout_speed.py [--steps 8] [--rounds 3] [--peers]

CPU seconds of all processes together, so that a busy machine matters little; rounds are interleaved, medians printed.
The shape: hidden 512, 8 layers, 8 heads, feed-forward 1376, vocabulary 32,000; 4 samples of 512 tokens a step; bfloat16
in flight over float32 masters, AdamW, clipping, the loss read at every step. `--peers` needs `pip install deepspeed`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

STEPS_BEFORE = 3
SHAPE = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
}  # fmt: skip
TOKENS = 2048
OURS = {
    "arriero, one process": (1, {}),
    "arriero, ZeRO-1, data 2": (2, {"zero_stage": 1}),
    "arriero, ZeRO-2, data 2": (2, {"zero_stage": 2}),
    "arriero, ZeRO-3, data 2": (2, {"zero_stage": 3}),
    "arriero, tensor 2": (2, {"tensor_parallel": 2}),
    "arriero, tensor 2, sequence": (2, {"tensor_parallel": 2, "sequence_parallel": True}),
}
PEERS = {"DDP, plain loop": "ddp", "DeepSpeed ZeRO-1": "1", "DeepSpeed ZeRO-2": "2", "DeepSpeed ZeRO-3": "3"}


def measure(step, steps: int) -> float:
    for _ in range(STEPS_BEFORE):
        step()
    began = time.process_time()
    for _ in range(steps):
        step()
    return time.process_time() - began


def ours(job: dict) -> None:
    from arriero.data.config import DataConfig
    from arriero.distributed.parallel.config import ParallelConfig
    from arriero.distributed.parallel.mesh import Ranks
    from arriero.train.build import build_trainer
    from arriero.train.recipe import Recipe

    recipe = Recipe(
        model=job["root"] + "/config.json", data=DataConfig(prefix=job["root"] + "/data", split="1,0,0"),
        parallel=ParallelConfig(**job["parallel"]),
    )  # fmt: skip
    micro = 4 if job["processes"] == 1 or "tensor_parallel" in job["parallel"] else 2
    train = replace(recipe.train, sequence_length=512, global_batch=4, micro_batch=micro, dtype="bfloat16", steps=1000)
    ranks = Ranks.build(recipe.parallel, "cpu")
    trainer = build_trainer(replace(recipe, train=train), ranks, local_rank=0, device_kind="cpu")
    trainer.load(None)
    report(job, measure(trainer.step, job["steps"]), ranks.rank)


def peer(job: dict) -> None:
    """A transformers model under DDP or DeepSpeed, as their documentation has it."""
    import torch
    import torch.distributed as dist
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{k: v for k, v in SHAPE.items() if k != "model_type"}, use_cache=False)
    model = transformers.LlamaForCausalLM(config)
    tokens = torch.randint(0, 32000, (2, 512))
    if job["kind"] == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(model)
        adamw = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)

        def step() -> float:
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adamw.step()
            adamw.zero_grad()
            return loss.item()
    else:
        import deepspeed

        settings = {
            "train_batch_size": 4, "train_micro_batch_size_per_gpu": 2, "bf16": {"enabled": True},
            "gradient_clipping": 1.0, "zero_optimization": {"stage": int(job["kind"])},
            "zero_force_ds_cpu_optimizer": False, "steps_per_print": 10**9,
        }  # fmt: skip
        adamw = torch.optim.AdamW(model.parameters(), lr=3e-4)
        engine, *_ = deepspeed.initialize(model=model, optimizer=adamw, config=settings, dist_init_required=False)

        def step() -> float:
            loss = engine(input_ids=tokens, labels=tokens).loss
            engine.backward(loss)
            engine.step()
            return loss.item()

    report(job, measure(step, job["steps"]), dist.get_rank())


def report(job: dict, seconds: float, rank: int) -> None:
    Path(f"{job['out']}.{rank}").write_text(str(seconds))


def run(job: dict) -> None:
    (peer if "kind" in job else ours)(job)


def one(name: str, root: str, steps: int) -> float:
    """Tokens per CPU second of one configuration, in processes of its own."""
    processes, parallel = OURS.get(name, (2, {}))
    job = {"processes": processes, "root": root, "steps": steps, "out": f"{root}/out", "parallel": parallel}
    if name in PEERS:
        job["kind"] = PEERS[name]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
    done = subprocess.run(
        [sys.executable, __file__, "--job", json.dumps(job)], env=environment, capture_output=True, text=True,
        check=False, timeout=600,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    seconds = sum(float(Path(f"{root}/out.{rank}").read_text()) for rank in range(processes))
    return TOKENS * steps / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        from arriero.distributed.launch.launcher import run_processes
        from arriero.distributed.launch.worker import run_in_process_group

        job = json.loads(args.job)
        if job["processes"] == 1:
            run_in_process_group(run, job)
        else:
            run_processes(run, job, job["processes"])
        return
    from arriero.data.indexed import IndexedWriter

    with tempfile.TemporaryDirectory() as root:
        Path(root, "config.json").write_text(json.dumps(SHAPE))
        writer = IndexedWriter(Path(root, "data"), np.dtype(np.uint16))
        writer.add(np.random.default_rng(0).integers(0, 32000, 200_000).astype(np.uint16))
        writer.end_document()
        writer.close()
        names = [*OURS, *(PEERS if args.peers else [])]
        found: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(args.rounds):
            for name in names if turn % 2 == 0 else names[::-1]:
                found[name].append(one(name, root, args.steps))
    import torch

    medians = {name: statistics.median(values) for name, values in found.items()}
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {args.rounds} rounds of {args.steps} steps")
    print("| layout | tokens per CPU second | of one process |\n| --- | --- | --- |")
    for name, value in medians.items():
        print(f"| {name} | {value:.0f} | {value / medians['arriero, one process']:.2f} |")


if __name__ == "__main__":
    main()
