"""Fixtures of the Megatron tests: one rank in this process, several ranks in others."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # rank_programs is shared with the ranks' own processes


@pytest.fixture
def one_rank() -> Iterator[None]:
    """Leave whatever group a test joined, also when it fails."""
    from asympo_megatron.testing.megatron import leave_groups

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    leave_groups()
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def reference() -> dict[str, Any]:
    """The default case on a single rank: what every layout must reproduce."""
    from rank_programs import train

    return train("reference", {})
