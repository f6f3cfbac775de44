"""A model family: what makes a decoder with LLaMA's skeleton another model, in one object.

The skeleton is fixed: embedding, decoder layers, final norm and head, under Hugging Face's names (model/llama.py). A
family may change what is in them, further keys of config.json, initial weights and the tensor-parallel plan. FLOPs
follow from the parameters' shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from arriero.model.config import LlamaConfig, llama_layer_shapes
from arriero.model.init import llama_initial_std
from arriero.model.llama import Llama

TENSOR_PARALLEL = {
    "model.embed_tokens": "embedding",
    "model.layers.*.self_attn": "attention",
    "model.layers.*.self_attn.q_proj": "column",
    "model.layers.*.self_attn.k_proj": "column",
    "model.layers.*.self_attn.v_proj": "column",
    "model.layers.*.self_attn.o_proj": "row",
    "model.layers.*.mlp": "mlp",
    "model.layers.*.mlp.gate_proj": "column",
    "model.layers.*.mlp.up_proj": "column",
    "model.layers.*.mlp.down_proj": "row",
    "model.layers.*.input_layernorm": "norm",
    "model.layers.*.post_attention_layernorm": "norm",
    "model.norm": "norm",
    "lm_head": "head",
}
"""LLaMA's plan, Megatron-LM's: module path -> one of the styles of distributed/parallel/tensor.py."""


@dataclass(frozen=True)
class ModelFamily:
    """What is read of a family, by its config's `model_type`."""

    config: type[LlamaConfig]
    """Reads and writes config.json; a subclass of LlamaConfig with `model_type` and `extra_keys`."""
    module: type[Llama]
    """The model as plain math."""
    layer_shapes: Callable[[LlamaConfig], dict[str, tuple[int, ...]]] = llama_layer_shapes
    """Parameter shapes of a decoder layer, named as below `model.layers.N.`."""
    initial_std: Callable[[LlamaConfig, str], float] = llama_initial_std
    """Standard deviation of a matrix's initial weights, by its name; norms begin at 1, biases at 0."""
    tensor_parallel: Mapping[str, str] | None = None
    """Module path -> style; None is LLaMA's plan."""

    @property
    def plan(self) -> Mapping[str, str]:
        """The tensor-parallel plan."""
        return TENSOR_PARALLEL if self.tensor_parallel is None else self.tensor_parallel


LLAMA = ModelFamily(LlamaConfig, Llama)
