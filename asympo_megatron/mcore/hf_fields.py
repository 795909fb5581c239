"""Values of a config.json are what they are taken for. It may come from anywhere, and be damaged."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from asympo_megatron.errors import ConfigError

MAX_COUNT = 1 << 16
"""Layers, heads or experts; more would be lists that fill the memory before anything contradicts them."""
MAX_WIDTH = 1 << 24
"""Of a matrix: the number of its elements is an int64."""
MAX_POSITIONS = (1 << 31) - 1


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_integers(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(type(number) is int for number in value)


def _up_to(most: int) -> tuple[str, Callable[[Any], bool]]:
    return f"an integer from 1 to {most}", lambda value: type(value) is int and 1 <= value <= most


_COUNT, _WIDTH, _POSITIONS = _up_to(MAX_COUNT), _up_to(MAX_WIDTH), _up_to(MAX_POSITIONS)
_POSITIVE = "a positive number", lambda value: _is_number(value) and value > 0
_NUMBER = "a number", _is_number
_FLAG = "true or false", lambda value: isinstance(value, bool)
_MAPPING = "a mapping", lambda value: isinstance(value, Mapping)

_FIELDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"), _COUNT),
    **dict.fromkeys(("num_experts", "num_local_experts", "num_experts_per_tok", "decoder_sparse_step"), _COUNT),
    **dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size", "vocab_size"), _WIDTH),
    **dict.fromkeys(("max_position_embeddings", "sliding_window"), _POSITIONS),
    **dict.fromkeys(("rms_norm_eps", "rope_theta"), _POSITIVE),
    **dict.fromkeys(("tie_word_embeddings", "use_sliding_window", "norm_topk_prob"), _FLAG),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), _MAPPING),
    "router_aux_loss_coef": _NUMBER,
    "mlp_only_layers": ("a list of integers", _is_integers),
}

_ROPE_FIELDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = dict.fromkeys(
    ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), _POSITIVE
)


def check_values(hf: Mapping[str, Any]) -> None:
    """Every field that is read has a usable value, or none (null).

    Raises:
        ConfigError: the first that has not.
    """
    _check(hf, _FIELDS, "")
    for name in ("rope_parameters", "rope_scaling"):
        _check(hf.get(name) or {}, _ROPE_FIELDS, f"{name}.")


def _check(values: Mapping[str, Any], fields: Mapping[str, tuple[str, Callable[[Any], bool]]], prefix: str) -> None:
    for name, (expected, fits) in fields.items():
        value = values.get(name)
        if value is not None and not fits(value):
            raise ConfigError(
                f"{prefix}{name}={value!r} of the Hugging Face config is not {expected}. Correct it in config.json, or "
                "in model.hf."
            )
