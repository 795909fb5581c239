"""The layers a model is made of: Transformer Engine's where it can run, plain PyTorch ones elsewhere."""

import importlib.util
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from asympo_megatron.mcore.attention import PackedAttention
from asympo_megatron.mcore.moe import BalancedRouter
from asympo_megatron.mcore.norm import RMSNorm


def uses_transformer_engine() -> bool:
    """Whether layers come from Transformer Engine: installed, and a GPU to run it."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def layer_spec(transformer: Any, vp_stage: int | None) -> Any:
    """The spec of one pipeline stage's layers."""
    if uses_transformer_engine() and transformer.num_moe_experts is None:
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=transformer.qk_layernorm)
    if uses_transformer_engine():
        block = get_gpt_decoder_block_spec(transformer, use_transformer_engine=True, vp_stage=vp_stage)
        for layer in block.layer_specs:
            _balance(layer)
        return block
    count = get_num_layers_to_build(transformer, vp_stage=vp_stage)
    first = get_transformer_layer_offset(transformer, vp_stage=vp_stage)
    specs = {moe: _local_layer(transformer, moe) for moe in (False, transformer.num_moe_experts is not None)}
    layers = [specs[_is_moe(transformer, number)] for number in range(first, first + count)]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def _is_moe(transformer: Any, number: int) -> bool:
    if transformer.num_moe_experts is None:
        return False
    return transformer.moe_layer_freq == 1 or bool(transformer.moe_layer_freq[number])


def _local_layer(transformer: Any, moe: bool) -> Any:
    spec = get_gpt_layer_local_spec(
        num_experts=transformer.num_moe_experts if moe else None,
        moe_grouped_gemm=False,  # of Transformer Engine, or of a package that it has replaced
        qk_layernorm=transformer.qk_layernorm,
        normalization="RMSNorm",
    )
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    if moe:  # only a dense MLP has its norm inside a projection of Transformer Engine's layer, and in its checkpoints
        layer.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
    attention = layer.self_attention.submodules
    attention.core_attention = PackedAttention
    if transformer.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    _balance(spec)
    return spec


def _balance(spec: Any) -> None:
    """Let a mixture of experts route with :class:`BalancedRouter`; a dense layer stays as it is."""
    mlp = spec.submodules.mlp
    # 0.16 describes it by a ModuleSpec, 0.19 by a functools.partial of the module
    submodules = mlp.keywords.get("submodules") if isinstance(mlp, partial) else mlp.submodules
    if isinstance(submodules, MoESubmodules):
        submodules.router = BalancedRouter
