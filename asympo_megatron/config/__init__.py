"""Configuration: dataclass schema, YAML and overrides, validation."""

from asympo_megatron.config.load import (
    data_hash,
    load_config,
    override_config,
    preset_names,
    save_config,
    warm_start_config,
)
from asympo_megatron.config.rundir import RunDir
from asympo_megatron.config.schema import Config

__all__ = [
    "Config",
    "RunDir",
    "data_hash",
    "load_config",
    "override_config",
    "preset_names",
    "save_config",
    "warm_start_config",
]
