"""Granite (IBM), a LLaMA with four multipliers, as a model family: `ARRIERO_PLUGINS=model_family arriero pretrain R`.

The folder of this file must be on PYTHONPATH. A config.json of `model_type` granite is then read, trained in every
layout, saved and resumed. Parameters, initial weights and tensor-parallel plan are LLaMA's, and so not given.
"""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Interval

from arriero.model.config import FAMILIES, LlamaConfig
from arriero.model.family import ModelFamily
from arriero.model.llama import Llama

Multiplier = Annotated[float, Interval(ge=1e-6, le=1e6)]


@dataclass(frozen=True)
class GraniteConfig(LlamaConfig):
    """LLaMA's shape and the multipliers, under Hugging Face's names."""

    model_type = "granite"
    extra_keys = ("embedding_multiplier", "residual_multiplier", "logits_scaling", "attention_multiplier")
    embedding_multiplier: Multiplier = 1.0
    residual_multiplier: Multiplier = 1.0
    logits_scaling: Multiplier = 1.0
    attention_multiplier: Multiplier = 1.0


class Granite(Llama):
    """Embeddings and residual branches are multiplied, logits divided, attention scores scaled by a constant.

    They are hooks of the modules, so that a pipeline stage has those of its own.
    """

    def __init__(self, config: GraniteConfig) -> None:
        super().__init__(config)
        # Scores are q k / sqrt(head_dim) here: the queries' factor makes that the config's.
        self.query_factor = config.attention_multiplier * config.head_dim**0.5
        for layer in self.model.layers.values():
            for branch in (layer.self_attn.o_proj, layer.mlp.down_proj):
                branch.register_forward_hook(lambda module, inputs, out: out * config.residual_multiplier)
            layer.self_attn.q_proj.register_forward_hook(lambda module, inputs, out: out * self.query_factor)
        self.model.embed_tokens.register_forward_hook(lambda module, inputs, out: out * config.embedding_multiplier)
        self.model.norm.register_forward_hook(lambda module, inputs, out: out / config.logits_scaling)


FAMILIES.register("granite", ModelFamily(GraniteConfig, Granite))
