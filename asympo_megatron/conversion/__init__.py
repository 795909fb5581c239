"""Hugging Face <-> Megatron-Core: weights, names and checkpoints, in any parallel layout."""

from asympo_megatron.conversion.convert import hf_to_megatron, megatron_to_hf
from asympo_megatron.conversion.export import export_hf
from asympo_megatron.conversion.load import load_hf
from asympo_megatron.conversion.megatron_weights import read_config

__all__ = ["export_hf", "hf_to_megatron", "load_hf", "megatron_to_hf", "read_config"]
