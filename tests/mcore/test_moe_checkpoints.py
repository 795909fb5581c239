"""A mixture of experts goes on where it was saved, in a layout with or without expert parallelism."""

from pathlib import Path
from typing import Any

import pytest
from moe_programs import PROGRAM, trained

from asympo_megatron.testing.megatron import run_ranks

pytestmark = pytest.mark.slow

STEPS, MORE = 2, 2


def _case(distributed: bool = False, **options: Any) -> dict[str, Any]:
    parallel = options.pop("parallel", {})
    config = {"parallel": parallel, "optimizer": {"distributed": distributed}}
    return {"config": config, "coefficient": 0.05, **options}


EXPERT = {"expert": 2}


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, Any]:
    return trained("uninterrupted", _case(steps=STEPS + MORE))


def _check(got: dict[str, Any], saved: dict[str, Any], uninterrupted: dict[str, Any]) -> None:
    assert got["loaded"] == saved["checksum"], "other weights were loaded than saved"
    for ours, wanted in zip(got["figures"], uninterrupted["figures"][STEPS:], strict=True):
        for name in ("J", "nll", "entropy", "grad_norm", "moe_balance"):
            assert ours[name] == pytest.approx(wanted[name], rel=1e-5), name


@pytest.mark.parametrize("distributed", [False, True])
def test_with_and_without_expert_parallelism(
    one_rank: None, tmp_path: Path, uninterrupted: dict[str, Any], distributed: bool
) -> None:
    alone, shared = str(tmp_path / "alone"), str(tmp_path / "shared")
    saved_alone = trained("alone", _case(distributed, steps=STEPS, save=alone))
    cases = {
        "save": _case(distributed, parallel=EXPERT, steps=STEPS, save=shared),
        "same": _case(distributed, parallel=EXPERT, steps=MORE, load=shared),
        "from one rank": _case(distributed, parallel=EXPERT, steps=MORE, load=alone),
        "to data": _case(distributed, steps=MORE, load=shared),
        "to pipeline": _case(distributed, parallel={"pipeline": 2}, steps=MORE, load=shared),
    }
    ranks = run_ranks(f"{PROGRAM}:trained_cases", 2, {"cases": cases}, timeout_s=400)
    saved_shared = ranks[0].pop("save")
    for name in ("same", "to data", "to pipeline"):
        _check(ranks[0][name], saved_shared, uninterrupted)
    _check(ranks[0]["from one rank"], saved_alone, uninterrupted)
    _check(trained("to one rank", _case(distributed, steps=MORE, load=shared)), saved_shared, uninterrupted)
