"""Megatron-LM: ``pretrain(..., forward_step_func=make_forward_step(objective, megatron_groups))``.

Checked against Megatron-LM d98e8a6 of 2026-08-22 (core 0.20.0 in development; ``megatron/training/training.py``,
``core/pipeline_parallel/schedules.py``, ``pretrain_gpt.py``); run against megatron-core 0.16.1.

``make_loss_func`` gives the loss callback alone, for anybody's ``forward_backward_func``. It returns Megatron's
3-tuple: the sum over local tokens, what this rank adds to N, and figures as [total, count], which ``training.py`` sums
over micro-batches and DP x CP and then divides, also by 0: only figures over all responses are handed over. Without
``--calculate-per-token-loss`` Megatron divides each micro-batch by its local count instead: that is refused. So are
Megatron's own losses (load balancing, router z-loss, multi-token prediction) beside an objective divided by responses:
they are scaled for a division by tokens.

The NLL is what the model returns for ``labels``: at temperature 1. If responses were sampled at another temperature,
compute the NLL from logits / temperature and call the loss function with it.

What it saves: a training loop of your own needs neither log-probs from the engine nor a pass to compute old ones.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import get_model_config
from torch import Tensor

from asympo_megatron.batch import ResponseBatch
from asympo_megatron.errors import BatchError, ConfigError
from asympo_megatron.integrations.padded import FIGURES
from asympo_megatron.mcore.layout import megatron_groups
from asympo_megatron.mcore.loss import loss_terms
from asympo_megatron.objectives import Objective
from asympo_megatron.parallel import ParallelGroups

__all__ = ["make_forward_step", "make_loss_func", "megatron_groups", "next_batch", "split_batch"]

LossFunc = Callable[[ResponseBatch, Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]

_INPUTS = {
    "tokens": "input_ids",
    "position_ids": "position_ids",
    "attention_mask": "attention_mask",
    "labels": "labels",
    "packed_seq_params": "packed_seq_params",
}
"""Keys of a batch and the arguments of ``GPTModel.forward`` that they become."""

_TIMES_TOKENS = {
    "num_moe_experts": ("moe_aux_loss_coeff", "moe_z_loss_coeff"),
    "mtp_num_layers": ("mtp_loss_scaling_factor",),
    "experimental_attention_variant": ("dsa_indexer_loss_coeff",),
}
"""Parts of a model, and the coefficients of losses that ``TopKRouter``, multi-token prediction and sparse attention
multiply by local tokens under ``calculate_per_token_loss``: ``finalize_model_grads`` is to divide them by tokens."""


def make_loss_func(objective: Objective, groups: ParallelGroups) -> LossFunc:
    """The loss callback of Megatron's schedules, without its first argument: ``partial(loss_func, responses)``.

    Args:
        objective: what :func:`asympo_megatron.build_objective` returned.
        groups: :func:`megatron_groups`, or your own; only ``groups.context`` is used.

    Returns:
        ``loss_func(responses, token_nll)``: ``token_nll`` of any shape holds one entry for each of
        ``responses.response_ids_T``; it returns (loss sum, count, figures as float32 [2]).
    """

    def loss_func(responses: ResponseBatch, token_nll: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        loss_sum, count, stats = loss_terms(objective, token_nll.flatten(), responses, groups)
        figures = {name: stats[name].values_K.float() for name in ("loss", *FIGURES) if name in stats}
        return loss_sum, count, figures

    return loss_func


def split_batch(batch: Mapping[str, Any], device: torch.device | None = None) -> tuple[dict[str, Any], ResponseBatch]:
    """Arguments of the model and the batch of the objective.

    Args:
        batch: ``tokens``, ``labels`` and ``response_ids`` of one shape (this rank's tokens, ``labels`` shifted before
            any context-parallel split), ``advantages`` [R], ``token_counts`` [R] of whole responses; optional
            ``position_ids``, ``attention_mask``, ``packed_seq_params``. Or one such item behind the leading axis that
            a collating loader adds.
        device: where all of it is to go; None leaves it where it is.

    Raises:
        BatchError: a key is missing, or a loader has put several items into one micro-batch.
    """
    wanted = ("tokens", "labels", "response_ids", "advantages", "token_counts")
    missing = [key for key in wanted if key not in batch]
    if missing:
        raise BatchError(f"the batch has no {', '.join(missing)}; it holds {', '.join(sorted(batch))}.")
    moved = {key: _to(value, device) for key, value in batch.items()}
    inputs = {argument: moved.get(key) for key, argument in _INPUTS.items()}
    advantage_R, token_count_R = moved["advantages"], moved["token_counts"]
    if advantage_R.dim() == 2:
        if len(advantage_R) != 1:
            raise BatchError(
                f"advantages has shape {tuple(advantage_R.shape)}: the loader put {len(advantage_R)} items into one "
                "micro-batch, and their response ids would collide. Set --micro-batch-size 1: an item is a micro-batch."
            )
        advantage_R, token_count_R = advantage_R[0], token_count_R[0]
    return inputs, ResponseBatch(moved["response_ids"].flatten(), advantage_R, token_count_R)


def next_batch(data_iterator: Iterator[Any] | None, model: torch.nn.Module) -> tuple[dict[str, Any], ResponseBatch]:
    """:func:`split_batch` of the next item, on the device of the model.

    Raises:
        BatchError: this rank has no iterator, or see :func:`split_batch`.
    """
    if data_iterator is None:
        raise BatchError(
            "this rank has no data iterator: Megatron-LM makes loaders on the first tensor-parallel rank only, unless "
            "the function that provides the data sets has the attribute is_distributed = True. Set it."
        )
    return split_batch(next(data_iterator), next(model.parameters()).device)


def _to(value: Any, device: torch.device | None) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, PackedSeqParams):
        moved = copy.copy(value)
        vars(moved).update({name: _to(part, device) for name, part in vars(value).items()})
        return moved
    return value


def make_forward_step(
    objective: Objective,
    groups: Callable[[], ParallelGroups] = megatron_groups,
    get_batch: Callable[[Iterator[Any]], tuple[dict[str, Any], ResponseBatch]] | None = None,
) -> Callable[..., tuple[Tensor, Callable[[Tensor], Any]]]:
    """``forward_step_func`` for ``pretrain`` and for ``get_forward_backward_func()``.

    Args:
        objective: what :func:`asympo_megatron.build_objective` returned.
        groups: called at every step, as Megatron initialises its groups only inside ``pretrain``.
        get_batch: (model arguments, responses) of the next micro-batch; default: :func:`next_batch`.
    """

    def forward_step(data_iterator: Iterator[Any], model: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
        require_exact_count(model, objective)
        inputs, responses = get_batch(data_iterator) if get_batch else next_batch(data_iterator, model)
        return model(**inputs), partial(make_loss_func(objective, groups()), responses)

    return forward_step


def require_exact_count(model: Any, objective: Objective) -> None:
    """Refuse settings under which a division by our count scales some term wrongly.

    Raises:
        ConfigError: ``calculate_per_token_loss`` is off, or a loss of Megatron's own is on beside an objective that is
            not divided by tokens.
    """
    config = get_model_config(model)
    if not config.calculate_per_token_loss:
        raise ConfigError(
            "calculate_per_token_loss is False: Megatron would divide each micro-batch by its local count, not by N. "
            "Pass --calculate-per-token-loss, or set it in the model's TransformerConfig."
        )
    if objective.normalizer == "tokens":
        return  # the divisor that Megatron's own losses are made for
    for part, coefficients in _TIMES_TOKENS.items():
        for name in coefficients if getattr(config, part) else ():
            value = getattr(config, name)
            if any(value) if isinstance(value, list) else value:
                raise ConfigError(
                    f"{name} is {value}: Megatron multiplies this loss by the tokens of a micro-batch, to divide it by "
                    f"all tokens; objective {objective.name!r} is divided by responses, so the loss would grow by the "
                    f"tokens of a response. Set {name}=0. (`asympo train` scales the losses of its routers itself.)"
                )
