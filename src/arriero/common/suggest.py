"""Suggestions for an unknown key: by its last part, by other programs' names for it, and by similarity."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MAX_SUGGESTIONS = 3
MIN_SIMILARITY = 0.65

OTHER_NAMES: dict[str, str] = {
    "train.compile": "torch_compile",
    "train.dtype": "precision torch_dtype bf16 fp16 mixed_precision",
    "train.eval_batches": "eval_iters",
    "train.eval_every": "eval_interval eval_steps eval_freq",
    "train.float8": "fp8",
    "train.global_batch": (
        "batch_size bs global_batch_size train_batch_size gbs gradient_accumulation_steps grad_accum accumulation"
    ),
    "train.grad_clip": "clip_grad max_grad_norm max_norm gradient_clip_val gradient_clipping grad_norm_clip",
    "train.initial_loss_scale": "loss_scale",
    "train.micro_batch": (
        "batch_size bs micro_batch_size mbs local_batch_size per_device_train_batch_size "
        "train_micro_batch_size_per_gpu gradient_accumulation_steps grad_accum accumulation"
    ),
    "train.sequence_length": "seq_length seq_len seqlen max_seq_length block_size context_length max_length cutoff_len",
    "train.steps": (
        "max_steps train_iters max_iters iters iterations num_steps train_steps training_steps epochs "
        "num_train_epochs num_epochs"
    ),
    "checkpoint.asynchronous": "async_save",
    "checkpoint.every": "save_interval save_steps save_every checkpoint_interval ckpt_interval",
    "checkpoint.keep": "save_total_limit",
    "data.prefix": "data_path dataset train_data data datasets",
    "init": "load model_name_or_path pretrained checkpoint_dir",
    "log.every": "log_interval logging_steps log_every",
    "model": "model_name_or_path",
    "node_rank": "rank",
    "nodes": "nnodes num_nodes",
    "nproc_per_node": "dp data_parallel data_parallel_size nproc gpus devices num_gpus",
    "optim.betas": "adam_beta1 adam_beta2 beta1 beta2 adam_betas",
    "optim.eps": "adam_eps adam_epsilon epsilon",
    "optim.offload": "cpu_offload",
    "optim.weight_decay": "wd decay",
    "out": "save output_dir out_dir checkpoint_dir",
    "parallel.context_parallel": "cp cp_size context_parallel_size context_parallel_degree sp",
    "parallel.pipeline_parallel": (
        "pp pp_size pipeline_parallel_size pipeline_model_parallel_size pipeline_parallel_degree"
    ),
    "parallel.sequence_parallel": "sp",
    "parallel.tensor_parallel": "tp tp_size tensor_parallel_size tensor_parallel_degree tensor_model_parallel_size",
    "parallel.virtual_stages": "vpp num_virtual_stages_per_pipeline_rank",
    "parallel.zero_group": "dp data_parallel",
    "parallel.zero_stage": "zero fsdp stage use_distributed_optimizer",
    "recompute.first_layers": "recompute_num_layers",
    "recompute.mode": "activation_checkpointing gradient_checkpointing recompute_granularity",
    "resume": "load",
    "schedule.decay_steps": "lr_decay_iters lr_decay_steps",
    "schedule.lr": "learning_rate max_lr base_lr peak_lr lr_max",
    "schedule.min_lr": "lr_min min_learning_rate",
    "schedule.shape": "lr_scheduler lr_scheduler_type lr_decay_style",
    "schedule.warmup_fraction": "warmup warmup_ratio lr_warmup_fraction",
    "schedule.warmup_steps": "lr_warmup_iters warmup_iters warmup num_warmup_steps",
    "tokenizer": "tokenizer_model tokenizer_path tokenizer_name_or_path",
}
"""arriero's keys -> their names in Megatron-LM, DeepSpeed, Hugging Face's trainer, torchtitan, litgpt and nanoGPT."""


def suggestion(key: str, known: Iterable[str]) -> str:
    """A sentence that names at most three of the known keys, the likeliest first.

    Args:
        key: what was given, dotted.
        known: all keys, dotted.
    """
    names = list(known)
    wanted = key.lower().lstrip("-").replace("-", "_")[:100]
    last = wanted.rsplit(".", 1)[-1]
    found = [name for name in names if name.rsplit(".", 1)[-1] == last]
    found = found or [name for name, others in OTHER_NAMES.items() if last in others.split() and name in names]
    found = found or [name for name in names if name.startswith(f"{wanted}.")]
    if not found:
        scores = {name: _similarity(wanted, last, name) for name in names}
        best = max(scores.values(), default=0.0)
        found = [name for name in names if scores[name] >= max(MIN_SIMILARITY, best - 0.05)]
        found.sort(key=lambda name: -scores[name])
    quoted = [repr(name) for name in found[:MAX_SUGGESTIONS]]
    if not quoted:
        return "--help lists every key"
    return f"did you mean {' or '.join([', '.join(quoted[:-1]), quoted[-1]] if quoted[1:] else quoted)}?"


def _similarity(wanted: str, last: str, name: str) -> float:
    """From 0 to 1: of the whole keys, or, weighted 0.95, of their last parts."""
    name = name.lstrip("-").replace("-", "_")
    whole = difflib.SequenceMatcher(None, wanted, name).ratio()
    return max(whole, 0.95 * difflib.SequenceMatcher(None, last, name.rsplit(".", 1)[-1]).ratio())
