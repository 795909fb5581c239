"""Megatron-LM and Megatron-Bridge: the checkout's own ``schedules`` call the adapter's loss callback.

One process; context parallelism on ranks is in tests/integrations. Axis suffixes: P response positions, V vocabulary.
"""

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import torch
from checkout import require_parameters, upstream
from parity import CASES, ParityBatch, core_batch, make_batch
from torch import Tensor

from asympo_megatron.objectives import Objective, build_objective
from asympo_megatron.parallel import SINGLE

PARTS = ([0, 5, 3, 7], [1, 2, 4, 6, 8, 9, 10, 11])


def gradients(name: str) -> Iterator[tuple[str, str, Tensor]]:
    """(objective, layout, gradient)."""
    for objective in CASES:
        built = build_objective(objective, **CASES[objective])
        yield objective, "two micro-batches", _gradient(name, built)


def _gradient(name: str, objective: Objective) -> Tensor:
    if name == "megatron_bridge":
        needs_state = upstream("megatron.bridge.training.utils.train_utils", "needs_global_state_injection")
        from asympo_megatron.integrations.megatron_bridge import ForwardStep

        step: Any = ForwardStep(objective, next)
        assert needs_state(step), "Megatron-Bridge no longer recognises a first parameter called state"
    else:
        from asympo_megatron.integrations.megatron_lm import make_forward_step

        step = make_forward_step(objective, lambda: SINGLE, next)
    calculate = upstream("megatron.core.pipeline_parallel.schedules", "forward_step_calc_loss")
    require_parameters(calculate, ["model", "output_tensor", "loss_func", "config", "forward_data_store"])
    whole = make_batch()
    leaf_PV = whole.leaf()
    model = ScoredLogits()
    store: list[Any] = []
    count = 0
    for rows in PARTS:
        part, index_P = whole.rows(rows)
        batches = iter([({"part": part, "logits_PV": leaf_PV[index_P]}, core_batch(part))])
        output, loss_func = step(*([None] if name == "megatron_bridge" else []), batches, model)
        loss, counted = calculate(
            model, output, loss_func, model.config, None, False, len(PARTS), store, cp_group_size=1, is_last_stage=True
        )
        loss.backward()
        count += int(counted)
    for figure in store[0].values():
        assert figure.shape == (2,), "figures are not [total, count], which the training loop adds up and divides"
    assert leaf_PV.grad is not None
    return leaf_PV.grad / count  # finalize_model_grads with calculate_per_token_loss


class ScoredLogits(torch.nn.Module):
    """In the place of a model: the NLL of free logits."""

    def __init__(self) -> None:
        super().__init__()
        self.config = Namespace(
            calculate_per_token_loss=True,
            timers=None,
            num_moe_experts=None,
            mtp_num_layers=None,
            experimental_attention_variant=None,
            grad_scale_func=None,
        )

    def forward(self, part: ParityBatch, logits_PV: Tensor) -> Tensor:
        return -part.logprob(logits_PV)
