"""Programs that ranks of the mixture-of-experts tests run; not tests themselves."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))  # a rank's process has no conftest

from rank_programs import make_config, make_rows

from asympo_megatron.config import Config
from asympo_megatron.mcore import Layout, Learner, Row, initialize, moe, shutdown, spec
from asympo_megatron.objectives import build_objective
from asympo_megatron.testing.gradients import GradientProbe, relative_errors
from asympo_megatron.testing.megatron import join_group
from asympo_megatron.testing.tiny_model import TINY_MOE_HF

PROGRAM = __file__

ROUTER = "decoder.layers.0.mlp.router.weight"


def build(case: dict[str, Any]) -> tuple[Config, Layout, Learner]:
    """A learner of the tiny mixture of experts in the layout of ``case``."""
    if "RANK" not in os.environ:
        shutdown()
    config = make_config(**case.get("config", {}))
    config.model.megatron = {"moe_aux_loss_coeff": case.get("coefficient", 0.0), **case.get("megatron", {})}
    layout = initialize(config)
    objective = build_objective(case.get("objective", "reinforce"))
    return config, layout, Learner(config, {**TINY_MOE_HF, **case.get("hf", {})}, objective, layout)


def cut(rows: list[Row], parts: int) -> list[list[Row]]:
    """Micro-batches of the global batch, the same ones whatever the layout."""
    return [rows[part::parts] for part in range(parts)]


def gradients(name: str, case: dict[str, Any]) -> dict[str, Any]:
    """One step: relative errors of this rank's gradients against those in ``wanted``, or writes them to ``keep``."""
    if "RANK" in os.environ:
        join_group(name)
    try:
        with mutated(case.get("mutant", "")):
            _, layout, learner = build(case)
            probe = GradientProbe(learner)
            rows = make_rows(0)
            parts = cut(rows, case.get("microbatches", 4)) * case.get("repeat", 1)
            figures = learner.step(parts[layout.dp_rank :: layout.dp_size], len(rows) * case.get("repeat", 1))
            result: dict[str, Any] = {"figures": figures}
            if "keep" in case:
                save_file({name: grad.contiguous() for name, grad in probe.gradients.items()}, case["keep"])
            if "wanted" in case:
                result["errors"] = relative_errors(probe.gradients, load_file(case["wanted"]))
            return result
    finally:
        shutdown()


def gradient_cases(payload: dict[str, Any]) -> dict[str, Any]:
    """Several layouts in one process: case name -> result."""
    return {name: gradients(name, case) for name, case in payload["cases"].items()}


class mutated:
    """Break one rule of the router's loss while a case runs."""

    def __init__(self, mutant: str) -> None:
        self._changes: list[tuple[Any, str, Any]] = {
            "": [],
            "Megatron's own scale": [(spec, "BalancedRouter", moe.TopKRouter)],
            "padding counted": [(moe, "_valid", _all_valid)],
            "tokens of this rank only": [(moe.dist, "all_reduce", _reduce_nothing(moe.dist.all_reduce))],
        }[mutant]

    def __enter__(self) -> None:
        self._before = [(target, name, getattr(target, name)) for target, name, _ in self._changes]
        for target, name, value in self._changes:
            setattr(target, name, value)

    def __exit__(self, *_: Any) -> None:
        for target, name, value in self._before:
            setattr(target, name, value)


def _all_valid(logits: torch.Tensor, _: Any) -> torch.Tensor:
    return torch.ones(logits.shape[:-1].numel(), dtype=torch.bool)


def _reduce_nothing(all_reduce: Any) -> Any:
    """All-reduces as ever, but not of a router's token counts."""
    experts = TINY_MOE_HF["num_experts"]

    def reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return None if tensor.shape == (experts + 1,) else all_reduce(tensor, *args, **kwargs)

    return reduce


def trained(name: str, case: dict[str, Any]) -> dict[str, Any]:
    """Steps, with a checkpoint loaded before and saved after them where the case says so."""
    if "RANK" in os.environ:
        join_group(name)
    try:
        _, layout, learner = build(case)
        result: dict[str, Any] = {"figures": []}
        if "load" in case:
            learner.load(Path(case["load"]))
            result["loaded"] = learner.checksum()
        for _ in range(case["steps"]):
            rows = make_rows(learner.step_count)
            result["figures"].append(learner.step(cut(rows, 4)[layout.dp_rank :: layout.dp_size], len(rows)))
        if "save" in case:
            learner.save(Path(case["save"]))
        result["checksum"] = learner.checksum()
        return result
    finally:
        shutdown()


def trained_cases(payload: dict[str, Any]) -> dict[str, Any]:
    """Several layouts in one process: case name -> result."""
    return {name: trained(name, case) for name, case in payload["cases"].items()}
