"""The layers a model is made of: Transformer Engine's where it can run, plain PyTorch ones elsewhere."""

import importlib.util
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from asympo_megatron.mcore.attention import PackedAttention


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose weight says that its gradient must be summed over tensor parallelism under sequence parallelism.

    ``finalize_model_grads._allreduce_non_tensor_model_parallel_grads`` looks for that mark; Megatron's own wrapper of
    torch's norms refuses sequence parallelism instead of setting it.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def uses_transformer_engine() -> bool:
    """Whether layers come from Transformer Engine: installed, and a GPU to run it."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def layer_spec(transformer: Any, vp_stage: int | None) -> Any:
    """The spec of one pipeline stage's layers."""
    if uses_transformer_engine():
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=transformer.qk_layernorm)
    spec = get_gpt_layer_local_spec(qk_layernorm=transformer.qk_layernorm, normalization="RMSNorm")
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention = layer.self_attention.submodules
    attention.core_attention = PackedAttention
    if transformer.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    layers = get_num_layers_to_build(transformer, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=RMSNorm)
