"""The contenders of train_cpu.py, as their documentation has them; this file is what each contender's process runs.

All start from the weights of one Hugging Face directory and take the same batches: tokens and the token that follows
each, AdamW with decay 0.1, clipping at 1.0, the loss read at every step. Peers get the fused AdamW, which litgpt itself
uses on CUDA alone.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from turns import Turns

from arriero.train.config import TrainConfig

LR, BETAS, DECAY, CLIP = 1e-4, (0.9, 0.95), 0.1, 1.0


@dataclasses.dataclass(frozen=True)
class Job:
    name: str
    root: str
    """Holds `model`, the Hugging Face directory; `data`, arriero's data set; batches.npz, the same batches."""
    length: int
    samples: int
    """A step."""
    steps: int
    """At most."""
    warmup: int
    dtype: str
    threads: int
    preload: str = ""

    @property
    def model(self) -> str:
        return f"{self.root}/model"

    @property
    def mixed(self) -> bool:
        return self.dtype == "bfloat16"

    def batches(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Tokens and following tokens of each step, int64 [samples, length]."""
        held = np.load(f"{self.root}/batches.npz")
        return list(zip(torch.from_numpy(held["tokens"]), torch.from_numpy(held["labels"]), strict=True))


def arriero(job: Job, *, compiled: bool = False) -> None:
    """The trainer in a process as `arriero pretrain` makes it."""
    from arriero.distributed.launch.worker import run_in_process_group

    run_in_process_group(partial(_arriero, compiled=compiled), job)


def _arriero(job: Job, *, compiled: bool) -> None:
    from arriero.data.config import DataConfig
    from arriero.distributed.parallel.mesh import Ranks
    from arriero.train.build import build_trainer
    from arriero.train.config import OptimConfig, ScheduleConfig
    from arriero.train.recipe import Recipe

    keys: dict[str, Any] = {"compile": compiled} if can_compile() else {}
    train = TrainConfig(
        steps=job.steps, sequence_length=job.length, global_batch=job.samples, micro_batch=job.samples,
        dtype=job.dtype, grad_clip=CLIP, **keys,
    )  # fmt: skip
    recipe = Recipe(
        init=job.model, data=DataConfig(prefix=f"{job.root}/data", split="1,0,0"), train=train, device="cpu",
        schedule=ScheduleConfig(shape="constant", lr=LR, min_lr=0.0),
        optim=OptimConfig(betas=BETAS, weight_decay=DECAY),
    )  # fmt: skip
    trainer = build_trainer(recipe, Ranks(), local_rank=0, device_kind="cpu")
    trainer.load(None)
    turns = Turns(job.warmup)
    while True:
        turns.after_step(trainer.step().lm_loss)


def can_compile() -> bool:
    """Whether this arriero has the recipe key train.compile."""
    return "compile" in {field.name for field in dataclasses.fields(TrainConfig)}


def load_transformers(job: Job) -> torch.nn.Module:
    import transformers

    model = transformers.LlamaForCausalLM.from_pretrained(job.model, dtype=torch.float32, attn_implementation="sdpa")
    model.config.use_cache = False
    return model.train()


def adamw(model: torch.nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=DECAY, fused=True)


def transformers_loop(job: Job, *, compiled: bool = False) -> None:
    """What a user writes by hand: float32 weights under autocast."""
    model = load_transformers(job)
    optimizer = adamw(model)
    forward = torch.compile(model) if compiled else model
    turns = Turns(job.warmup)
    for tokens, labels in job.batches():
        with torch.autocast("cpu", torch.bfloat16, enabled=job.mixed):
            loss = forward(input_ids=tokens, labels=labels, shift_labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        turns.after_step(loss.item())


def transformers_trainer(job: Job) -> None:
    """transformers' Trainer, which logs every step and saves nothing."""
    import transformers

    turns = Turns(job.warmup)

    class AfterLog(transformers.TrainerCallback):
        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:
                turns.after_step(logs["loss"])

    arguments = transformers.TrainingArguments(
        output_dir=f"{job.root}/trainer", use_cpu=True, bf16=job.mixed, max_steps=job.steps,
        per_device_train_batch_size=job.samples, learning_rate=LR, lr_scheduler_type="constant", weight_decay=DECAY,
        adam_beta1=BETAS[0], adam_beta2=BETAS[1], max_grad_norm=CLIP, optim="adamw_torch_fused", logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True, train_sampling_strategy="sequential",
        dataloader_pin_memory=False, remove_unused_columns=False,  # it would take shift_labels away
    )  # fmt: skip
    rows = [
        {"input_ids": tokens, "labels": labels, "shift_labels": labels}
        for batch in job.batches()
        for tokens, labels in zip(*batch, strict=True)
    ]
    trainer = transformers.Trainer(
        model=load_transformers(job), args=arguments, train_dataset=rows, callbacks=[AfterLog()],
        data_collator=transformers.default_data_collator,
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    turns.begin()
    trainer.train()


def litgpt_loop(job: Job, *, compiled: bool = False) -> None:
    """The loop of litgpt/pretrain.py, which compiles always, without its checkpoints."""
    import lightning
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision="bf16-mixed" if job.mixed else "32-true")
    fabric.launch()
    config, weights = litgpt_weights(job.model)
    with fabric.init_module(empty_init=True):
        model = GPT(config)
    model.load_state_dict(weights)
    model.max_seq_length = job.length
    model = fabric.setup(torch.compile(model) if compiled else model)
    optimizer = fabric.setup_optimizers(adamw(model))
    turns = Turns(job.warmup)
    for tokens, labels in job.batches():
        loss = chunked_cross_entropy(model(tokens), labels)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=CLIP)
        optimizer.step()
        optimizer.zero_grad()
        turns.after_step(loss.item())


def litgpt_weights(directory: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """litgpt's shape and weights, by its own converter, of a Hugging Face directory."""
    from litgpt.config import Config
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from safetensors.torch import load_file

    hub = json.loads(Path(directory, "config.json").read_text())
    config = Config(
        name="bench", block_size=hub["max_position_embeddings"], vocab_size=hub["vocab_size"],
        padded_vocab_size=hub["vocab_size"], n_layer=hub["num_hidden_layers"], n_head=hub["num_attention_heads"],
        n_embd=hub["hidden_size"], n_query_groups=hub["num_key_value_heads"], rotary_percentage=1.0,
        parallel_residual=False, bias=False, norm_class_name="RMSNorm", norm_eps=hub["rms_norm_eps"],
        mlp_class_name="LLaMAMLP", intermediate_size=hub["intermediate_size"],
    )  # fmt: skip
    weights: dict[str, torch.Tensor] = {}
    copy_weights_hf_llama(config, {}, weights, load_file(Path(directory, "model.safetensors")))
    return config, weights


class Contender(NamedTuple):
    run: Callable[[Job], None]
    needs: tuple[str, ...] = ()
    """Packages that arriero does not bring along."""
    compiled: bool = False


def contenders() -> dict[str, Contender]:
    """By name, ours first."""
    ours = {"arriero": Contender(arriero)}
    if can_compile():
        ours["arriero, compiled"] = Contender(partial(arriero, compiled=True), compiled=True)
    hub, lit = ("transformers",), ("litgpt", "lightning")
    return ours | {
        "transformers": Contender(transformers_loop, hub),
        "transformers, compiled": Contender(partial(transformers_loop, compiled=True), hub, compiled=True),
        "transformers Trainer": Contender(transformers_trainer, (*hub, "accelerate")),
        "litgpt": Contender(litgpt_loop, lit),
        "litgpt, compiled": Contender(partial(litgpt_loop, compiled=True), lit, compiled=True),
    }


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    if job.preload and job.preload not in Path("/proc/self/maps").read_text():
        raise SystemExit(f"{job.preload} was not preloaded")
    torch.set_num_threads(job.threads)
    contenders()[job.name].run(job)


if __name__ == "__main__":
    main()
