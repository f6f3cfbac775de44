"""Random data, and a recipe at reduced width: what --verify-layout, torture and bench train on."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from arriero.data.config import DataConfig
from arriero.data.indexed import IndexedWriter
from arriero.train.recipe import Recipe


def reduced_recipe(recipe: Recipe, processes: int, root: Path, *, steps: int) -> Recipe:
    """The recipe at reduced width in float64 on the CPU, with a model and random data of its own below `root`.

    Kept: layers, heads, parallel degrees, pipeline schedule, recomputation. Reduced: head width, feed-forward,
    vocabulary, sequence and batch.
    """
    parallel, whole = recipe.parallel, recipe.model_config()
    width = whole.num_attention_heads * 4
    model = replace(
        whole, hidden_size=width, head_dim=4, vocab_size=min(whole.vocab_size, 251),
        intermediate_size=math.lcm(8, parallel.tensor_parallel) * 4,
    )  # fmt: skip
    (root / "config.json").write_text(json.dumps(model.to_json()))
    length = 4 * parallel.context_parallel * parallel.tensor_parallel * 2
    micro = max(2, parallel.stages if parallel.pipeline_parallel > 1 else 2)
    batch = micro * (processes // parallel.model_parallel)
    write_random_data(root / "random", model.vocab_size, tokens=(steps + 1) * batch * length + 1000)
    train = replace(
        recipe.train, steps=steps, dtype="float64", float8="none", sequence_length=length, micro_batch=1,
        global_batch=batch, eval_every=0, eval_batches=1,
    )  # fmt: skip
    schedule = replace(recipe.schedule, lr=1e-3, min_lr=1e-4, warmup_steps=0, warmup_fraction=0.0, decay_steps=0)
    return replace(
        recipe, model=str(root / "config.json"), init="", tokenizer="", out=str(root / "laid-out"), device="cpu",
        data=DataConfig(prefix=str(root / "random"), split="1,0,0", attention=recipe.data.attention), train=train,
        schedule=schedule,
    )  # fmt: skip


def write_random_data(prefix: Path, vocabulary: int, *, tokens: int, longest: int = 60) -> None:
    """Writes an indexed data set of documents of random tokens and lengths, the same ones every time."""
    dtype = np.dtype(np.uint16 if vocabulary <= 2**16 else np.int32)
    random, writer = np.random.default_rng(0), IndexedWriter(prefix, dtype)
    written = 0
    while written < tokens:
        ids = random.integers(0, vocabulary, int(random.integers(5, longest)))
        writer.add(ids.astype(dtype))
        writer.end_document()
        written += len(ids)
    writer.close()
