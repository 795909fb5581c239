"""Megatron-Bridge: ``pretrain(config, forward_step_func=ForwardStep(objective))``.

Checked against megatron-bridge 0.6.2, and read in 067f987 of 2026-08-22 (0.7.0 in development; ``megatron/bridge/
training/{train,gpt_step,forward_step_func_types}.py``, ``training/utils/{train_utils,pg_utils}.py``).

Bridge runs Megatron's schedules, with the loss callback of :mod:`asympo_megatron.integrations.megatron_lm`. It
injects its ``GlobalState`` where the first parameter is called ``state``, and keeps the process groups with the model
(``pg_collection``). ``model.calculate_per_token_loss=True`` is required, with ``ddp.average_in_collective=False`` and
without Megatron's own losses (``model.moe_aux_loss_coeff=0``, no ``moe_z_loss_coeff``, ``mtp_loss_scaling_factor=0``).

What it saves: a training loop of your own needs neither log-probs from the engine nor a pass to compute old ones.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch.distributed as dist
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from asympo_megatron.batch import ResponseBatch
from asympo_megatron.integrations.megatron_lm import (
    make_loss_func,
    megatron_groups,
    next_batch,
    require_exact_count,
)
from asympo_megatron.objectives import Objective
from asympo_megatron.parallel import ParallelGroups

__all__ = ["ForwardStep", "model_groups"]


def model_groups(model: Any) -> ParallelGroups:
    """The process groups that the model was built with, or else ``parallel_state``'s, as ``get_pg_collection`` does."""
    try:
        collection = get_attr_wrapped_model(model, "pg_collection", allow_none=False)
    except RuntimeError:  # no such attribute
        return megatron_groups()
    return ParallelGroups(
        tensor=_unless_alone(collection.tp),
        context=_unless_alone(collection.cp),
        data_context=_unless_alone(collection.dp_cp),
        pipeline=_unless_alone(collection.pp),
    )


class ForwardStep:
    """Bridge's forward step for one objective.

    Args:
        objective: what :func:`asympo_megatron.build_objective` returned.
        get_batch: (model arguments, responses) of the next micro-batch; default: ``megatron_lm.next_batch``.
    """

    def __init__(
        self,
        objective: Objective,
        get_batch: Callable[[Iterator[Any]], tuple[dict[str, Any], ResponseBatch]] | None = None,
    ) -> None:
        self._objective, self._get_batch = objective, get_batch

    def __call__(self, state: Any, data_iterator: Iterator[Any], model: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
        """(output of the model, loss callback) of one micro-batch.

        Raises:
            ConfigError: ``model.calculate_per_token_loss`` is off, or a loss of Megatron's own is on.
        """
        require_exact_count(model, self._objective)
        if self._get_batch is None:
            inputs, responses = next_batch(data_iterator, model)
        else:
            inputs, responses = self._get_batch(data_iterator)
        return model(**inputs), partial(make_loss_func(self._objective, model_groups(model)), responses)


def _unless_alone(group: dist.ProcessGroup) -> dist.ProcessGroup | None:
    return None if group.size() == 1 else group
