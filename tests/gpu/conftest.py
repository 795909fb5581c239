"""Everything here needs a CUDA device: without one the tests fail and say so, they never pass or skip."""

import sys
from pathlib import Path

import pytest
import torch

# The programs of the Megatron suites serve here, too: they build a model, rows and micro-batches on any device.
sys.path.insert(0, str(Path(__file__).parents[1] / "mcore"))

NO_DEVICE = (
    "no CUDA device: torch.cuda.is_available() is false, so nothing was tested. Run `make gpu-smoke` on a machine with "
    "a GPU, with GPU_PYTHON naming a Python that has this package and a CUDA build of torch."
)


@pytest.fixture(autouse=True)
def _cuda_device() -> None:
    if not torch.cuda.is_available():
        pytest.fail(NO_DEVICE, pytrace=False)


@pytest.fixture(autouse=True)
def _left_groups():
    yield
    if torch.cuda.is_available():
        from asympo_megatron.mcore import shutdown

        shutdown()
