"""Megatron-Bridge's real training step, on two gloo ranks; the contract is in test_whole_responses."""

import importlib.util
from pathlib import Path

import bridge_ranks
import pytest
import torch
from parity import CASES, assert_same_gradient, core_gradient, make_batch

from asympo_megatron.objectives import build_objective
from asympo_megatron.testing.distributed import run_distributed


def installed():
    """Whether megatron.bridge can be found; ``megatron`` itself has no file."""
    spec = importlib.util.find_spec("megatron")
    return spec is not None and any((Path(folder) / "bridge").is_dir() for folder in spec.submodule_search_locations)


@pytest.mark.slow
@pytest.mark.skipif(not installed(), reason="megatron-bridge is not installed: make test-integrations")
def test_the_real_train_step_has_the_core_s_gradient():
    batch = make_batch()
    want = {name: core_gradient(build_objective(name, **CASES[name]), batch)[1] for name in CASES}
    for results in run_distributed(bridge_ranks.gradients, 2, 2, timeout_s=900):
        for name in CASES:
            for cp_size in (1, 2):
                assert_same_gradient(torch.tensor(results[name, cp_size]), want[name], batch)
        mutant = torch.tensor(results["mutant"])
        with pytest.raises(AssertionError, match="relative error"):
            assert_same_gradient(mutant, want["asympo"], batch)
