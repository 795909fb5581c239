"""Small weights, and their versions."""

from pathlib import Path

import torch

from asympo_megatron.sync import write_version

TENSORS = {
    "model.embed_tokens.weight": torch.arange(24.0).reshape(6, 4),
    "model.norm.weight": torch.ones(4),
    "steps": torch.tensor([3, 4]),
}


def publish(root: Path, version: int, model_files: Path, **options) -> Path:
    return write_version(root, version, version * 10, TENSORS.items(), f"sum{version}", model_files, **options)
