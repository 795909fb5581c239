"""Hugging Face <-> Megatron-Core: weights and names of dense decoders, in any parallel layout."""

from asympo_megatron.conversion.export import export_hf, hf_config_for_export
from asympo_megatron.conversion.load import load_hf

__all__ = ["export_hf", "hf_config_for_export", "load_hf"]
