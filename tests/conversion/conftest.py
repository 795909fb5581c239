"""Small Hugging Face models of every family, one rank in this process."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for the modules beside this file


@pytest.fixture
def one_rank() -> Iterator[None]:
    """Leave whatever group a test joined, also when it fails."""
    from asympo_megatron.testing.megatron import leave_groups

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    leave_groups()
    yield
    leave_groups()
    torch.set_num_threads(threads)


@pytest.fixture
def make_hf(tmp_path: Path) -> Callable[..., tuple[Any, Path]]:
    """Save a random transformers model of a kind; returns it with its directory."""
    from small_models import KINDS, save_small_model

    def make(kind: str, shard_size: str = "5GB") -> tuple[Any, Path]:
        directory = tmp_path / kind
        return save_small_model(directory, KINDS[kind], shard_size), directory

    return make
