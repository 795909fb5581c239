"""A Hugging Face config.json read into the few facts that decide a decoder, dense or a mixture of experts."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from asympo_megatron.errors import ConfigError, UnknownNameError
from asympo_megatron.mcore.hf_fields import check_values

LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The constants that Megatron-Core's RotaryEmbedding._apply_scaling has built in."""


@dataclass(frozen=True)
class Family:
    """What distinguishes one family of decoders from another."""

    qkv_bias: bool = False
    qk_norm: bool = False
    moe: bool = False
    head_dim: int | None = None
    """Default of transformers when config.json has none; null: hidden_size / num_attention_heads."""


FAMILIES = {
    "qwen3": Family(qk_norm=True, head_dim=128),
    "qwen2": Family(qkv_bias=True),
    "llama": Family(),
    "mistral": Family(),
    "qwen3_moe": Family(qk_norm=True, moe=True),
}

_REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
_OPTIONAL = (
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "tie_word_embeddings",
    "max_position_embeddings",
    "hidden_act",
    "attention_bias",
    "mlp_bias",
    "sliding_window",
    "use_sliding_window",
    "partial_rotary_factor",
)
_NULLABLE = ("sliding_window",)
"""Where null is not the same as nothing."""
_MOE_OPTIONAL = (
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "norm_topk_prob",
    "decoder_sparse_step",
    "mlp_only_layers",
    "router_aux_loss_coef",
)


@dataclass(frozen=True)
class MoEFacts:
    """The mixture of experts in some or all layers.

    Args:
        top_k: experts of each token.
        ffn_size: of one expert.
        norm_top_k: the weights of a token's experts sum to 1; False: they are probabilities among all experts.
        dense_layers: numbers of the layers that have one MLP of ``ModelFacts.ffn_size`` instead.
        aux_loss_coef: of the load-balancing loss.
    """

    num_experts: int
    top_k: int
    ffn_size: int
    norm_top_k: bool
    dense_layers: tuple[int, ...]
    aux_loss_coef: float


@dataclass(frozen=True)
class ModelFacts:
    """One decoder: RMSNorm, SwiGLU, rotary positions, grouped-query attention.

    Args:
        ffn_size: of a layer that is no mixture of experts.
        rope_factor: factor of the llama3 rule, or None.
        position_divisor: linear position interpolation, or None.
        sliding_window: attention window in tokens, or None for full attention.
        moe: None for a dense decoder.
    """

    model_type: str
    family: Family
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    norm_eps: float
    tied: bool
    max_positions: int
    rope_theta: float
    rope_factor: float | None
    position_divisor: float | None
    sliding_window: int | None
    moe: MoEFacts | None = None

    def is_moe_layer(self, number: int) -> bool:
        """Whether the layer of this number, from 0, is a mixture of experts."""
        return self.moe is not None and number not in self.moe.dense_layers


def read_hf_config(hf: Mapping[str, Any]) -> ModelFacts:
    """Read a config.json, of transformers 4 or 5, with the defaults transformers would use.

    Raises:
        UnknownNameError: a model_type without support.
        ConfigError: a field that is missing, misspelt, contradictory, or asks for something unsupported.
    """
    model_type = str(hf.get("model_type", ""))
    if model_type not in FAMILIES:
        raise UnknownNameError("model_type of the Hugging Face config", model_type, FAMILIES)
    family = FAMILIES[model_type]
    _check_spelling(hf, family)
    hf = {name: value for name, value in hf.items() if value is not None or name in _NULLABLE}
    missing = [name for name in _REQUIRED if name not in hf]
    if missing:
        raise ConfigError(f"the Hugging Face config lacks {', '.join(missing)}. Set it in config.json, or model.hf.")
    check_values(hf)
    _check_supported(hf)
    theta, factor, divisor = _rope(hf)
    heads, hidden = hf["num_attention_heads"], hf["hidden_size"]
    head_dim = hf.get("head_dim") or family.head_dim
    if head_dim is None and hidden % heads:
        raise ConfigError(f"hidden_size={hidden} is not divisible by num_attention_heads={heads}: set head_dim.")
    kv_heads = hf.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise ConfigError(
            f"num_attention_heads={heads} is not divisible by num_key_value_heads={kv_heads}: change one of them."
        )
    return ModelFacts(
        model_type=model_type,
        family=family,
        vocab_size=hf["vocab_size"],
        hidden_size=hidden,
        num_layers=hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim or hidden // heads,
        ffn_size=hf["intermediate_size"],
        norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
        tied=bool(hf.get("tie_word_embeddings", False)),
        max_positions=int(hf.get("max_position_embeddings", 32768)),
        rope_theta=theta,
        rope_factor=factor,
        position_divisor=divisor,
        sliding_window=_sliding_window(hf),
        moe=_moe(hf) if family.moe else None,
    )


def _moe(hf: Mapping[str, Any]) -> MoEFacts:
    """With the defaults of transformers' Qwen3MoeConfig; its version 5 writes num_experts as num_local_experts."""
    experts = hf.get("num_experts", hf.get("num_local_experts", 128))
    top_k, layers, step = hf.get("num_experts_per_tok", 8), hf["num_hidden_layers"], hf.get("decoder_sparse_step", 1)
    if not 1 <= top_k <= experts:
        raise ConfigError(
            f"num_experts_per_tok={top_k} of the Hugging Face config must be at least 1 and at most "
            f"num_experts={experts}: change one of them."
        )
    only = hf.get("mlp_only_layers") or ()
    dense = tuple(number for number in range(layers) if number in only or (number + 1) % step)
    if len(dense) == layers:
        raise ConfigError(
            f"mlp_only_layers={list(only)} and decoder_sparse_step={step} of the Hugging Face config leave none of the "
            f"{layers} layers with experts. Change one of them, or set model_type=qwen3."
        )
    return MoEFacts(
        num_experts=experts,
        top_k=top_k,
        ffn_size=hf.get("moe_intermediate_size", 768),
        norm_top_k=bool(hf.get("norm_topk_prob", False)),
        dense_layers=dense,
        aux_loss_coef=float(hf.get("router_aux_loss_coef", 0.001)),
    )


def _check_spelling(hf: Mapping[str, Any], family: Family) -> None:
    """config.json has many fields that change nothing here, so only a near miss is an error."""
    known = (*_REQUIRED, *_OPTIONAL, *(_MOE_OPTIONAL if family.moe else ()))
    for name in hf:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.9)
        if name not in known and near and near[0] not in hf:
            raise UnknownNameError("field of the Hugging Face config", name, known)


def _check_supported(hf: Mapping[str, Any]) -> None:
    for name, wanted in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        if hf.get(name, wanted) != wanted:
            raise ConfigError(f"{name}={hf[name]!r} of the Hugging Face config is not supported; only {wanted!r} is.")
    if hf.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise ConfigError(f"partial_rotary_factor={hf['partial_rotary_factor']} is not supported; only 1.0 is.")


def _sliding_window(hf: Mapping[str, Any]) -> int | None:
    # Qwen keeps sliding_window in the file and switches it with use_sliding_window; Mistral has no switch.
    if hf["model_type"] != "mistral" and not hf.get("use_sliding_window", False):
        return None
    return hf.get("sliding_window", 4096)


def _rope(hf: Mapping[str, Any]) -> tuple[float, float | None, float | None]:
    """(theta, llama3 factor, linear divisor). transformers 5 keeps all of it under rope_parameters."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    rope = {name: value for name, value in rope.items() if value is not None}
    theta = float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"partial_rotary_factor={rope['partial_rotary_factor']} is not supported; only 1.0 is.")
    if kind == "default":
        return theta, None, None
    if kind not in ("linear", "llama3"):
        raise ConfigError(f"rope_type={kind!r} is not supported; default, linear and llama3 are.")
    if "factor" not in rope:
        raise ConfigError(f"rope_type={kind} of the Hugging Face config has no factor. Set it in config.json.")
    if kind == "linear":
        return theta, None, float(rope["factor"])
    for name, built_in in LLAMA3_ROPE.items():
        if float(rope.get(name, built_in)) != built_in:
            raise ConfigError(f"rope_type=llama3 with {name}={rope[name]} is not supported: Megatron has {built_in}.")
    return theta, float(rope["factor"]), None
