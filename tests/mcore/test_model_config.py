"""Hugging Face configs to Megatron's, and the contradictions that are named."""

from typing import Any

import pytest
import torch
from rank_programs import HF, make_config

from asympo_megatron.errors import ConfigError, UnknownNameError
from asympo_megatron.mcore.hf_config import FAMILIES, ModelFacts, read_hf_config
from asympo_megatron.mcore.model_config import plan_model

MINIMAL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 50,
}


def _plan(hf: dict[str, Any] | None = None, **sections: Any) -> Any:
    return plan_model(make_config(**sections), {**HF, **(hf or {})})


@pytest.mark.parametrize("model_type", FAMILIES)
def test_defaults_are_those_of_transformers(model_type: str) -> None:
    """An engine fills gaps of a config.json with transformers' defaults; the trainer must mean the same model."""
    from transformers import AutoConfig

    theirs = AutoConfig.for_model(model_type, **MINIMAL)
    ours = read_hf_config({"model_type": model_type, **MINIMAL})
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.tied == theirs.tie_word_embeddings
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 16)
    assert ours.sliding_window == theirs.sliding_window if model_type == "mistral" else ours.sliding_window is None
    assert read_hf_config(theirs.to_dict()) == _same_positions(ours, theirs.max_position_embeddings)


def _same_positions(facts: ModelFacts, positions: int) -> ModelFacts:
    from dataclasses import replace

    return replace(facts, max_positions=positions)


def test_rope_of_both_generations_of_transformers() -> None:
    old = {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0}}
    new = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 32.0, "high_freq_factor": 4.0}}
    for rope in (old, new):
        facts = read_hf_config({"model_type": "llama", **MINIMAL, **rope})
        assert (facts.rope_theta, facts.rope_factor, facts.position_divisor) == (5e5, 32.0, None)
    linear = read_hf_config({"model_type": "llama", **MINIMAL, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert linear.position_divisor == 2.0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rms_norm_eps": {}}, ConfigError, r"rms_norm_eps=\{\} of the Hugging Face config is not a positive number"),
        ({"num_hidden_layers": 10**30}, ConfigError, "num_hidden_layers=10+ .* is not an integer from 1 to 65536"),
        ({"num_key_value_heads": 0}, ConfigError, "num_key_value_heads=0 .* is not an integer from 1 to 65536"),
        ({"tie_word_embeddings": "no"}, ConfigError, "tie_word_embeddings='no' .* is not true or false"),
        ({"rope_parameters": {"factor": "x"}}, ConfigError, r"rope_parameters\.factor='x' .* is not a positive number"),
        ({"rope_parameters": {"rope_type": "linear"}}, ConfigError, "rope_type=linear .* has no factor"),
        ({"model_type": "qwen4"}, UnknownNameError, "did you mean 'qwen"),
        ({"vocab_size": None}, ConfigError, "lacks vocab_size"),
        ({"rms_norm_epss": 1e-5}, UnknownNameError, "did you mean 'rms_norm_eps'"),
        ({"hidden_act": "gelu"}, ConfigError, "hidden_act='gelu'"),
        ({"attention_bias": True}, ConfigError, "attention_bias=True"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ConfigError, "rope_type='yarn' is not supported"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0}},
            ConfigError,
            "low_freq_factor=2.0 is not supported",
        ),
        ({"num_key_value_heads": 3}, ConfigError, "num_attention_heads=4 is not divisible by num_key_value_heads=3"),
        ({"partial_rotary_factor": 0.5}, ConfigError, "partial_rotary_factor=0.5"),
        ({"use_sliding_window": True, "sliding_window": 32}, ConfigError, "sliding_window=32 is not supported"),
    ],
)
def test_unsupported_models_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _plan(change)


def test_window_longer_than_any_sequence_is_full_attention() -> None:
    assert _plan({"model_type": "mistral", "sliding_window": 96}).facts.sliding_window == 96


@pytest.mark.parametrize(
    ("hf", "parallel", "message"),
    [
        (
            {"num_attention_heads": 12, "num_key_value_heads": 4},
            {"tensor": 6},
            "num_key_value_heads=4 of the model is neither a multiple nor a divisor of parallel.tensor=6.*divisor of 4",
        ),
        (
            {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 2},
            {"tensor": 8},
            "num_attention_heads=4 of the model is not divisible by parallel.tensor=8",
        ),
        (
            {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 2},
            {"tensor": 8},
            "heads of the model have 20 rows together, which parallel.tensor=8",
        ),
        ({"intermediate_size": 47}, {"tensor": 2}, "intermediate_size=47"),
        ({}, {"pipeline": 3}, r"num_hidden_layers=4 is not divisible by parallel.pipeline=3"),
        ({}, {"pipeline": 2, "virtual_pipeline": 4}, "virtual_pipeline=4"),
    ],
)
def test_layouts_that_cannot_work(hf: dict[str, Any], parallel: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _plan(hf, parallel=parallel)


def test_vocabulary_is_padded_to_the_tensor_size() -> None:
    assert _plan(parallel={"tensor": 2}).padded_vocab_size == 68
    assert _plan().padded_vocab_size == 67


def test_every_megatron_field_passes_through() -> None:
    options = {"recompute_granularity": "selective", "autocast_dtype": "bf16", "attention_backend": "fused"}
    transformer = _plan(model={"megatron": options}).transformer
    assert transformer.recompute_granularity == "selective"
    assert transformer.autocast_dtype in ("bf16", torch.bfloat16)
    assert transformer.attention_backend.name == "fused"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"recompute_granularty": "full"}, UnknownNameError, "did you mean 'recompute_granularity'"),
        ({"attention_backend": "flesh"}, UnknownNameError, "did you mean 'flash'"),
        ({"sequence_parallel": True}, ConfigError, "Remove it and set parallel.sequence"),
        ({"hidden_size": 3}, ConfigError, r"model.megatron.hidden_size is decided by model.hf.hidden_size \(c"),
        ({"num_moe_experts": 4}, ConfigError, "Remove it and set model.hf.model_type"),
        ({"recompute_granularity": "full", "recompute_method": "sideways"}, ConfigError, "Megatron-Core refuses"),
    ],
)
def test_wrong_megatron_fields_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _plan(model={"megatron": options})


@pytest.mark.parametrize(
    ("name", "value", "decider"),
    [
        ("layernorm_epsilon", 1e-3, "rms_norm_eps"),
        ("num_query_groups", 4, "num_key_value_heads"),
        ("window_size", [8, 0], "sliding_window"),
        ("softmax_scale", 0.5, "model_type"),
        ("rotary_interleaved", True, "model_type"),
        ("mtp_num_layers", 1, "model_type"),
        ("softmax_type", "learnable", "model_type"),
        ("attention_output_gate", True, "model_type"),
        ("layernorm_zero_centered_gamma", True, "model_type"),
    ],
)
def test_trainer_and_engine_compute_the_same_model(name: str, value: Any, decider: str) -> None:
    """The engine reads config.json: what changes the function of the model cannot be set on the trainer alone."""
    with pytest.raises(ConfigError, match=rf"model.megatron.{name} is decided by model.hf.{decider} \(config.json"):
        _plan(model={"megatron": {name: value}})


def test_every_value_read_from_the_hugging_face_config_is_owned() -> None:
    from asympo_megatron.mcore import model_config

    assert set(model_config._architecture(_plan().facts)) <= set(model_config._OWNED)


def test_pipeline_outputs_stay_on_cpu() -> None:
    with pytest.raises(ConfigError, match=r"deallocate_pipeline_outputs is decided by parallel.virtual_pipeline"):
        _plan(model={"megatron": {"deallocate_pipeline_outputs": True}})
