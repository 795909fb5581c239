"""slime's and miles' recorded contracts on the ranks of a gloo world of processes."""

import importlib
import sys
from pathlib import Path

import pytest
import recorded_context_parallel as recorded
import torch.distributed as dist
from parity import CASES

sys.path.append(str(Path(__file__).parents[2] / "tools" / "check_integration"))
import context_parallel


def gradients(rank, name):
    """[(objective, layout, gradient)] of every layout; the objective "mutant" sums over the rank's own tokens only."""
    recorded.install(pytest.MonkeyPatch(), getattr(recorded, f"{name}_modules")())
    adapter = importlib.import_module(f"asympo_megatron.integrations.{name}")
    if name == "slime":
        adapter.mpu = recorded.mpu_stand_in()
    results = []
    world = dist.group.WORLD
    for dp_size, cp_size in context_parallel.LAYOUTS[dist.get_world_size()]:
        context, _ = dist.new_subgroups(cp_size)
        recorded.enter(world, cp_size, context)
        place = recorded.place
        where = context_parallel.Place(place.dp_rank, dp_size, place.cp_rank, cp_size, world)
        for case in context_parallel.cases(name, cp_size):
            for objective in CASES:
                results.append((objective, (dp_size, cp_size), _gradient(name, where, objective, case)))
            if cp_size > 1:
                with pytest.MonkeyPatch.context() as patch:
                    module = importlib.import_module("asympo_megatron.objectives.asympo")
                    real = module.sum_per_response
                    patch.setattr(module, "sum_per_response", lambda *given, real=real: real(*given[:3], None))
                    results.append(("mutant", (dp_size, cp_size), _gradient(name, where, "asympo", case)))
    return results


def _gradient(name, where, objective, case):
    return context_parallel.gradient(context_parallel.stack(name), where, objective, **case)
