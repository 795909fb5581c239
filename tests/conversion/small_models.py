"""Small random Hugging Face models of every family, in files."""

from pathlib import Path
from typing import Any

import torch

SMALL = {
    "vocab_size": 71,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
LLAMA3 = {
    "rope_theta": 5e5,
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

MOE = {
    "model_type": "qwen3_moe",
    "head_dim": 8,
    "moe_intermediate_size": 24,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}

KINDS: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "qwen3-untied": {"model_type": "qwen3", "head_dim": 8, "tie_word_embeddings": False},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2-untied": {"model_type": "qwen2", "tie_word_embeddings": False},
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
    "llama3-rope": {"model_type": "llama", "tie_word_embeddings": True, "rope_parameters": LLAMA3},
    "qwen3_moe": {**MOE, "norm_topk_prob": True, "mlp_only_layers": [1], "num_hidden_layers": 4},
    "qwen3_moe-raw-weights": {**MOE, "norm_topk_prob": False, "tie_word_embeddings": True},
    "mistral": {
        "model_type": "mistral",
        "num_hidden_layers": 4,
        "sliding_window": None,
        "rope_parameters": {"rope_theta": 1e6},
    },
}


def save_small_model(directory: Path, fields: dict[str, Any], shard_size: str = "5GB") -> Any:
    """Write a random float32 model without a tokenizer; returns it.

    Args:
        fields: of its config.json, ``model_type`` among them, on top of ``SMALL``.
        shard_size: of the largest safetensors file.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {**SMALL, **fields}
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields)).float()
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.dim() == 1:  # norms at one and biases at zero would hide a mix-up
                param.add_(torch.randn_like(param) * 0.3)
            assert param.isfinite().all(), name
    model.save_pretrained(directory, max_shard_size=shard_size)
    return model.eval()
