"""`model.megatron.*`, `optimizer.megatron.*`, `ddp.megatron.*`: fields of Megatron-Core's configs, checked by name."""

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any, TypeVar

import torch

from asympo_megatron.errors import ConfigError, UnknownNameError

T = TypeVar("T")

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_megatron_config(
    cls: type[T], section: str, base: Mapping[str, Any], overrides: Mapping[str, Any], owned: Mapping[str, str]
) -> T:
    """An instance of a Megatron-Core config dataclass: our values, then the user's.

    Args:
        cls: TransformerConfig, OptimizerConfig or DistributedDataParallelConfig.
        section: name of the overrides in messages, e.g. ``model.megatron``.
        base: what this package derives from the rest of the configuration.
        overrides: the user's fields; dtypes as fp32 | bf16 | fp16, enum members by name.
        owned: fields that the rest of the configuration decides, and the key that does.

    Raises:
        UnknownNameError: a field that ``cls`` does not have; the message names the nearest.
        ConfigError: a field in ``owned``, or values that Megatron-Core refuses.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in overrides:
        if name not in fields:
            raise UnknownNameError(f"field of {section} ({cls.__name__} of Megatron-Core):", name, fields)
        if name in owned:
            raise ConfigError(f"{section}.{name} is decided by {owned[name]}. Remove it and set {owned[name]}.")
    # Older releases of Megatron-Core lack some of the fields that newer ones need: pass what exists.
    values = {name: value for name, value in base.items() if name in fields}
    values.update({name: _value(section, name, value, fields[name].type) for name, value in overrides.items()})
    try:
        return cls(**values)
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"Megatron-Core refuses its {cls.__name__}: {error}") from error


def _value(section: str, name: str, value: Any, kind: Any) -> Any:
    if kind is torch.dtype and isinstance(value, str):
        if value not in _DTYPES:
            raise UnknownNameError(f"value of {section}.{name}", value, _DTYPES)
        return _DTYPES[value]
    if isinstance(kind, type) and issubclass(kind, enum.Enum) and isinstance(value, str):
        if value not in kind.__members__:
            raise UnknownNameError(f"value of {section}.{name}", value, kind.__members__)
        return kind[value]
    return value
