"""Hugging Face config + run configuration -> Megatron-Core's TransformerConfig, with every contradiction named."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from asympo_megatron.config import Config
from asympo_megatron.errors import ConfigError
from asympo_megatron.mcore.hf_config import ModelFacts, read_hf_config
from asympo_megatron.mcore.overrides import build_megatron_config

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

_FILE = "(config.json of model.path)"


def _of(field: str) -> str:
    return f"model.hf.{field} {_FILE}"


_OWNED = {
    "tensor_model_parallel_size": "parallel.tensor",
    "pipeline_model_parallel_size": "parallel.pipeline",
    "virtual_pipeline_model_parallel_size": "parallel.virtual_pipeline",
    "context_parallel_size": "parallel.context",
    "expert_model_parallel_size": "parallel.expert",
    "expert_tensor_parallel_size": "parallel.expert_tensor",
    "sequence_parallel": "parallel.sequence",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "params_dtype": "model.dtype",
    "pipeline_dtype": "model.dtype",
    "init_method_std": "model.init_std",
    "perform_initialization": "model.init",
    "calculate_per_token_loss": "objective.name",
    "variable_seq_lengths": "batch.max_tokens_per_microbatch",
    "defer_embedding_wgrad_compute": "objective.name",
    "num_layers": _of("num_hidden_layers"),
    "hidden_size": _of("hidden_size"),
    "num_attention_heads": _of("num_attention_heads"),
    "num_query_groups": _of("num_key_value_heads"),
    "ffn_hidden_size": _of("intermediate_size"),
    "kv_channels": _of("head_dim"),
    "layernorm_epsilon": _of("rms_norm_eps"),
    "activation_func": _of("hidden_act"),
    "window_size": _of("sliding_window"),
    "moe_router_topk": _of("num_experts_per_tok"),
    "moe_ffn_hidden_size": _of("moe_intermediate_size"),
    "moe_router_pre_softmax": _of("norm_topk_prob"),
    "moe_layer_freq": _of("mlp_only_layers"),
    **dict.fromkeys(
        (
            "activation_func_clamp_value",
            "add_bias_linear",
            "add_qkv_bias",
            "apply_residual_connection_post_layernorm",
            "attention_dropout",
            "attention_output_gate",
            "experimental_attention_variant",
            "gated_linear_unit",
            "glu_linear_offset",
            "heterogeneous_block_specs",
            "hidden_dropout",
            "is_hybrid_model",
            "layernorm_zero_centered_gamma",
            "moe_apply_probs_on_input",
            "moe_expert_capacity_factor",
            "moe_input_jitter_eps",
            "moe_latent_size",
            "moe_pad_expert_input_to_capacity",
            "moe_router_enable_expert_bias",
            "moe_router_force_load_balancing",
            "moe_router_group_topk",
            "moe_router_load_balancing_type",
            "moe_router_num_groups",
            "moe_router_score_function",
            "moe_router_topk_limited_devices",
            "moe_router_topk_scaling_factor",
            "moe_shared_expert_gate",
            "moe_shared_expert_intermediate_size",
            "moe_token_dropping",
            "mrope_section",
            "mtp_num_layers",
            "multi_latent_attention",
            "no_rope_freq",
            "normalization",
            "num_moe_experts",
            "qk_l2_norm",
            "qk_layernorm",
            "rotary_interleaved",
            "softmax_scale",
            "softmax_type",
            "window_attn_skip_freq",
        ),
        _of("model_type"),
    ),
}
"""Fields of TransformerConfig that must agree with the rest of the configuration, and the key that decides them.

The engine reads config.json alone: whatever is part of the function that the model computes comes from there.
"""

_OWNED_ON_CPU = {"deallocate_pipeline_outputs": "parallel.virtual_pipeline"}
"""See ``_parallel``: the wrong value gives wrong gradients there."""

_PIPELINE_SPLITS = (
    "pipeline_model_parallel_layout",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
)


@dataclass(frozen=True)
class ModelPlan:
    """What is needed to build the model.

    Args:
        facts: what the Hugging Face config says.
        transformer: Megatron-Core's TransformerConfig.
        padded_vocab_size: vocab_size rounded up to a multiple of parallel.tensor; the padding is never scored.
    """

    facts: ModelFacts
    transformer: Any
    padded_vocab_size: int


def plan_model(config: Config, hf: Mapping[str, Any]) -> ModelPlan:
    """Translate and check.

    Raises:
        ConfigError, UnknownNameError: the message names the value to change.
    """
    from megatron.core.transformer import TransformerConfig

    facts = read_hf_config(hf)
    _check_layout(config, facts)
    tensor = config.parallel.tensor
    base = {**_architecture(facts), **_experts(facts), **_parallel(config), **_numerics(config)}
    owned = _OWNED if torch.cuda.is_available() else {**_OWNED, **_OWNED_ON_CPU}
    transformer = build_megatron_config(TransformerConfig, "model.megatron", base, config.model.megatron, owned)
    return ModelPlan(facts, transformer, -(-facts.vocab_size // tensor) * tensor)


def _architecture(facts: ModelFacts) -> dict[str, Any]:
    return {
        "num_layers": facts.num_layers,
        "hidden_size": facts.hidden_size,
        "num_attention_heads": facts.num_heads,
        "num_query_groups": facts.num_kv_heads,
        "kv_channels": facts.head_dim,
        "ffn_hidden_size": facts.ffn_size,
        "layernorm_epsilon": facts.norm_eps,
        "qk_layernorm": facts.family.qk_norm,
        "add_qkv_bias": facts.family.qkv_bias,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


def _experts(facts: ModelFacts) -> dict[str, Any]:
    from asympo_megatron.mcore.spec import uses_transformer_engine  # Megatron-Core comes with it

    moe = facts.moe
    if moe is None:
        return {}
    layers = [int(facts.is_moe_layer(number)) for number in range(facts.num_layers)]
    return {
        "num_moe_experts": moe.num_experts,
        "moe_router_topk": moe.top_k,
        "moe_ffn_hidden_size": moe.ffn_size,
        "moe_layer_freq": layers if moe.dense_layers else 1,
        # softmax over the chosen experts is softmax over all, chosen and divided by their sum
        "moe_router_pre_softmax": not moe.norm_top_k,
        "moe_router_dtype": "fp32",
        "moe_aux_loss_coeff": moe.aux_loss_coef,
        "moe_grouped_gemm": uses_transformer_engine(),
    }


def _parallel(config: Config) -> dict[str, Any]:
    parallel = config.parallel
    virtual = parallel.virtual_pipeline is not None
    return {
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline,
        "context_parallel_size": parallel.context,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.expert_tensor_size,
        "sequence_parallel": parallel.sequence,
        # Packed micro-batches differ in length, so pipeline stages exchange shapes. TransformerConfig accepts that
        # only with this dispatcher, dense models included.
        "variable_seq_lengths": parallel.pipeline > 1,
        "moe_token_dispatcher_type": "alltoall",
        "overlap_p2p_comm": virtual,
        "batch_p2p_comm": not virtual,
        # Interleaved stages on gloo read outputs that were freed too early: wrong gradients without any error.
        "deallocate_pipeline_outputs": not virtual or torch.cuda.is_available(),
    }


def _numerics(config: Config) -> dict[str, Any]:
    from asympo_megatron.mcore.spec import uses_transformer_engine  # Megatron-Core comes with it

    dtype = DTYPES[config.model.dtype]
    cuda = torch.cuda.is_available()
    return {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "init_method_std": config.model.init_std,
        # loss_func returns sums and counts; finalize_model_grads divides once by the count of the global batch.
        "calculate_per_token_loss": True,
        # Weights are drawn by global name afterwards, alike in every layout. Switching initialization off altogether
        # would also lose the marks that say which axis of a weight is split.
        "init_method": _leave,
        "output_layer_init_method": _leave,
        "embedding_init_method": _leave,
        "use_cpu_initialization": not cuda,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
        "bias_activation_fusion": cuda,
        # By reading, not by measurement: the unfused rotation of packed sequences copies their lengths to the host
        # and loops over them, twice a layer. Transformer Engine has one kernel for the whole pack.
        "apply_rope_fusion": uses_transformer_engine(),
    }


def _leave(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _check_layout(config: Config, facts: ModelFacts) -> None:
    parallel = config.parallel
    _check_divisible("parallel.tensor", parallel.tensor, num_attention_heads=facts.num_heads)
    _check_kv_heads(parallel.tensor, facts)
    if facts.moe is None or facts.moe.dense_layers:
        _check_divisible("parallel.tensor", parallel.tensor, intermediate_size=facts.ffn_size)
    _check_experts(config, facts)
    stages = parallel.pipeline * (parallel.virtual_pipeline or 1)
    own_split = any(name in config.model.megatron for name in _PIPELINE_SPLITS)
    if facts.num_layers % stages and not own_split:
        raise ConfigError(
            f"num_hidden_layers={facts.num_layers} is not divisible by parallel.pipeline={parallel.pipeline} x "
            f"parallel.virtual_pipeline={parallel.virtual_pipeline or 1}. Set them to a divisor, or split the layers "
            "with model.megatron.num_layers_in_first_pipeline_stage."
        )
    budget = config.batch.max_tokens_per_microbatch
    if facts.sliding_window is not None and facts.sliding_window < budget:
        raise ConfigError(
            f"sliding_window={facts.sliding_window} is not supported and could matter: a sequence may have up to "
            f"batch.max_tokens_per_microbatch={budget} tokens. Lower that to {facts.sliding_window}, or set "
            "sliding_window to null if the model was trained without it."
        )


def _check_kv_heads(ranks: int, facts: ModelFacts) -> None:
    """Fewer of them than ranks: Megatron-Core gathers queries, keys and values, and some ranks share a head."""
    heads = facts.num_kv_heads
    if heads % ranks and ranks % heads:
        raise ConfigError(
            f"num_key_value_heads={heads} of the model is neither a multiple nor a divisor of "
            f"parallel.tensor={ranks}. Set parallel.tensor to a multiple or a divisor of {heads}."
        )
    if heads < ranks:
        rows = (facts.num_heads + 2 * heads) * facts.head_dim
        if rows % ranks:
            raise ConfigError(
                f"the query, key and value heads of the model have {rows} rows together, which parallel.tensor={ranks} "
                f"does not divide. Set parallel.tensor to a divisor of num_key_value_heads={heads}."
            )


def _check_divisible(key: str, ranks: int, **sizes: int) -> None:
    for name, value in sizes.items():
        if value % ranks:
            raise ConfigError(
                f"{name}={value} of the model is not divisible by {key}={ranks}. Set {key} to a divisor of {value}."
            )


def _check_experts(config: Config, facts: ModelFacts) -> None:
    parallel, moe = config.parallel, facts.moe
    if moe is None:
        if parallel.expert > 1:
            raise ConfigError(
                f"parallel.expert is {parallel.expert}, but model_type={facts.model_type} has no experts. "
                "Set parallel.expert=1."
            )
        return
    _check_divisible("parallel.expert", parallel.expert, num_experts=moe.num_experts)
    split = "parallel.tensor" if parallel.expert_tensor is None else "parallel.expert_tensor"
    _check_divisible(split, parallel.expert_tensor_size, moe_intermediate_size=moe.ffn_size)
    if parallel.tensor > 1 and not parallel.sequence:
        raise ConfigError(
            f"model_type={facts.model_type} has experts, and with parallel.tensor={parallel.tensor} Megatron-Core "
            "trains those under sequence parallelism only. Set parallel.sequence=true."
        )
    dispatcher = config.model.megatron.get("moe_token_dispatcher_type", "alltoall")
    if dispatcher == "allgather" and parallel.expert > 1:
        raise ConfigError(
            "model.megatron.moe_token_dispatcher_type=allgather needs micro-batches of one length on all ranks; ours "
            "differ. Set it to alltoall."
        )
