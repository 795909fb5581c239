"""Families without a map of ours: Megatron-Bridge converts them, where it is installed.

Checked against ``models/conversion/auto_bridge.py`` of Megatron-Bridge 0.3.1 and 00b2fbf (0.7 in development).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from asympo_megatron.conversion.names import LAYERS
from asympo_megatron.errors import CheckpointError, ConfigError
from asympo_megatron.mcore import cpu

SOURCE_WEIGHTS = "*.safetensors"


def needs_bridge(hf_config: Mapping[str, Any]) -> bool:
    """Whether ``conversion.names`` has no table for this model."""
    return str(hf_config.get("model_type")) not in LAYERS


def import_checkpoint(hf_config: Mapping[str, Any], source: Path, target: Path) -> None:
    """A Hugging Face directory as a checkpoint of Megatron-Bridge, which Megatron-LM reads, too.

    Raises:
        ConfigError: Megatron-Bridge is not installed.
        CheckpointError: it cannot convert this model.
    """
    auto_bridge = _auto_bridge(hf_config)
    try:
        with _group_of_one():
            auto_bridge.import_ckpt(str(source), str(target))
    except Exception as error:  # of another project: any kind
        raise _failed(source, error) from error


def export_checkpoint(hf_config: Mapping[str, Any], checkpoint: Path, model_files: Path, target: Path) -> None:
    """A checkpoint of Megatron-Bridge as a Hugging Face directory.

    Args:
        checkpoint: directory ``iter_NNNNNNN``, or its parent.
        model_files: the model it began with, weights included: Bridge cuts its files as they are cut there.

    Raises:
        ConfigError, CheckpointError: see :func:`import_checkpoint`; or ``model_files`` has no weights.
    """
    auto_bridge = _auto_bridge(hf_config)
    if not any(model_files.glob(SOURCE_WEIGHTS)):
        raise CheckpointError(
            f"{model_files} has no safetensors, whose names and files Megatron-Bridge takes over. Give the directory "
            "of the Hugging Face model that the checkpoint began with: --hf DIR."
        )
    cpu.install()
    try:
        auto_bridge.from_hf_pretrained(str(model_files)).export_ckpt(str(checkpoint), str(target), show_progress=False)
    except Exception as error:  # of another project: any kind
        raise _failed(checkpoint, error) from error


def _auto_bridge(hf_config: Mapping[str, Any]) -> Any:
    try:
        from megatron.bridge import AutoBridge
    except Exception as error:  # not installed, or without something that it imports
        raise ConfigError(
            f"unknown model_type {hf_config.get('model_type')!r} of the Hugging Face config: known are "
            f"{', '.join(sorted(LAYERS))}. Megatron-Bridge converts others, but it cannot be imported ({error}): "
            "install asympo-megatron[bridge] (Python >= 3.12), with Transformer Engine."
        ) from error
    return AutoBridge


@contextmanager
def _group_of_one() -> Iterator[None]:
    """What ``export_ckpt`` does itself: ``import_ckpt`` would join NCCL at a fixed port, and never leave it."""
    from megatron.bridge.training.model_load_save import temporary_distributed_context

    cpu.install()
    with temporary_distributed_context(backend="gloo"):
        yield


def _failed(directory: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"Megatron-Bridge could not convert {directory}: {type(error).__name__}: {error}")
