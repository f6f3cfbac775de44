"""megatron-core's GPTModel on the CPU: `python megatron_oracle.py JOBS.json` in each of tensor-parallel many processes.

Jobs have one layer spec. Action `logits` loads a rank file a process, writes logits and loss; `train` writes the losses
of AdamW steps; `torch_dist` saves a distributed checkpoint.
"""

import argparse
import contextlib
import json
import sys
from pathlib import Path

import te_stub
import torch

JOBS = json.loads(Path(sys.argv[1]).read_text())
if JOBS[0]["spec"] == "te":
    te_stub.install()
torch.cuda.current_device = lambda: "cpu"  # Megatron uses it as device= for buffers and collectives
torch.cuda.synchronize = lambda *a, **k: None
import torch.distributed as dist  # noqa: E402
from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import (  # noqa: E402
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.safe_globals import register_safe_globals  # noqa: E402
from megatron.core.tensor_parallel import random as megatron_random  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

megatron_random.CudaRNGStatesTracker.fork = lambda self, name="": contextlib.nullcontext()


def shape_of(hf):
    """Megatron's arguments for a Hugging Face shape, where no checkpoint has them."""
    return argparse.Namespace(
        num_layers=hf["num_hidden_layers"], hidden_size=hf["hidden_size"], ffn_hidden_size=hf["intermediate_size"],
        num_attention_heads=hf["num_attention_heads"], group_query_attention=True,
        num_query_groups=hf["num_key_value_heads"], kv_channels=hf["head_dim"], normalization="RMSNorm", swiglu=True,
        add_bias_linear=hf["mlp_bias"], add_qkv_bias=hf["attention_bias"], hidden_dropout=0.0, attention_dropout=0.0,
        norm_epsilon=hf["rms_norm_eps"], rotary_base=hf["rope_theta"], position_embedding_type="rope",
        rotary_percent=1.0, rotary_interleaved=False, max_position_embeddings=64, use_rope_scaling=False,
        untie_embeddings_and_output_weights=not hf["tie_word_embeddings"], transformer_impl="local",
    )  # fmt: skip


def build(args, tensor, vocab):
    """GPTModel of these arguments, as core_transformer_config_from_args and pretrain_gpt.py build it."""
    te = args.transformer_impl == "transformer_engine"
    config = TransformerConfig(
        num_layers=args.num_layers, hidden_size=args.hidden_size, ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups if args.group_query_attention else None,
        kv_channels=args.kv_channels, tensor_model_parallel_size=tensor, use_cpu_initialization=True,
        normalization=args.normalization, gated_linear_unit=args.swiglu, activation_func=torch.nn.functional.silu,
        add_bias_linear=args.add_bias_linear, add_qkv_bias=args.add_qkv_bias, hidden_dropout=args.hidden_dropout,
        attention_dropout=args.attention_dropout, layernorm_epsilon=args.norm_epsilon,
        rotary_interleaved=args.rotary_interleaved, bias_activation_fusion=False, bias_dropout_fusion=False,
        masked_softmax_fusion=False, persist_layer_norm=False, gradient_accumulation_fusion=False,
        apply_rope_fusion=False, params_dtype=torch.float32, pipeline_dtype=torch.float32,
    )  # fmt: skip
    spec = get_gpt_layer_with_transformer_engine_spec() if te else get_gpt_layer_local_spec(normalization="RMSNorm")
    return GPTModel(
        config=config, transformer_layer_spec=spec, vocab_size=vocab,
        max_sequence_length=args.max_position_embeddings, position_embedding_type=args.position_embedding_type,
        rotary_base=args.rotary_base, rotary_percent=args.rotary_percent, rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=getattr(args, "rope_scaling_factor", 8.0),
        seq_len_interpolation_factor=getattr(args, "rotary_seq_len_interpolation_factor", None),
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights, parallel_output=True,
    )  # fmt: skip


def train(model, job):
    """AdamW steps over the job's batches, matrices decayed and norms not; each step's mean loss."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": job["weight_decay"]}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1.0, betas=job["betas"], eps=1e-8)
    losses = []
    for tokens, labels, rate in zip(job["tokens"], job["labels"], job["rates"], strict=True):
        ids = torch.tensor(tokens)
        mask = torch.triu(torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool), 1)
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        loss = model(ids, positions, mask, labels=torch.tensor(labels)).mean()
        loss.backward()
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
        adamw.zero_grad()
        losses.append(loss.item())
    return losses


def run_job(job, rank, tensor):
    payload = torch.load(job["file"].format(rank), weights_only=True, mmap=True)
    args = payload.get("args") or shape_of(job["config"])
    model = build(args, tensor, job["padded_vocab"])
    missing, unexpected = model.load_state_dict(payload["model"], strict=False)
    assert not unexpected, unexpected
    assert all("_extra_state" in name for name in missing), missing
    if job["action"] == "torch_dist":
        groups = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
        dist_checkpointing.save(
            {"model": model.sharded_state_dict(prefix="", metadata=groups), "iteration": 5}, job["out"]
        )
    elif job["action"] == "train":
        losses = train(model, job)
        if rank == 0:
            Path(job["out"]).write_text(json.dumps(losses))
    else:
        ids = torch.tensor(job["tokens"])
        mask = torch.triu(torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool), 1)
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        model.eval()
        with torch.no_grad():
            part = model(ids, positions, mask).contiguous()
            parts = [torch.empty_like(part) for _ in range(tensor)]
            dist.all_gather(parts, part)
            loss = model(ids, positions, mask, labels=torch.tensor(job["labels"])).mean()
        if rank == 0:
            torch.save({"logits": torch.cat(parts, -1), "loss": loss}, job["out"])
    dist.barrier()


def main():
    dist.init_process_group("gloo")
    rank, tensor = dist.get_rank(), dist.get_world_size()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor)
    register_safe_globals()
    for job in JOBS:
        run_job(job, rank, tensor)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
