"""slime and miles: their own ``loss_function`` calls the adapter on CP-local logits; the gradient must be the core's.

Runs on every rank of a gloo world. Axis suffixes: P response positions, V vocabulary, S tokens of packed sequences, L
local tokens of this rank.
"""

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from checkout import require_parameters, upstream
from parity import CASES, ParityBatch, make_batch
from torch import Tensor

from asympo_megatron.parallel import zigzag_index

LAYOUTS = {2: ((1, 2), (2, 1)), 4: ((2, 2), (1, 4))}
"""World size to (data-parallel, context-parallel) sizes."""

PAD = 4
"""Tokens behind the packed sequences of a rank are padded to a multiple, as their ``get_batch`` does."""


@dataclass(frozen=True)
class Place:
    """Where a rank is, and the groups that the framework holds: context, and all ranks."""

    dp_rank: int
    dp_size: int
    cp_rank: int
    cp_size: int
    world: dist.ProcessGroup


@dataclass(frozen=True)
class Stack:
    """The functions of the framework that a check calls."""

    loss_function: Callable[..., Any]
    slice_response: Callable[..., Tensor]
    adapter: str
    count_argument: str
    extra_arguments: dict[str, Any]


def stack(name: str) -> Stack:
    """Import slime's or miles' functions and compare their signatures with the recorded ones."""
    if name == "slime":
        base = "slime.backends.megatron_utils"
        loss, count = upstream(f"{base}.loss", "loss_function"), "step_global_batch_size"
        log_probs = upstream(f"{base}.loss", "get_log_probs_and_entropy")
        cut = upstream(f"{base}.cp_utils", "slice_log_prob_with_cp")
        require_parameters(upstream(f"{base}.loss", "get_rollout_top_p_logprob_kwargs"), ["args", "batch"])
        extra: dict[str, Any] = {}
    else:
        base = "miles.backends.training_utils"
        loss, count = upstream(f"{base}.loss", "loss_function"), "num_rollouts"
        log_probs = upstream(f"{base}.loss_hub.logit_processors", "get_log_probs_and_entropy")
        cut = upstream(f"{base}.cp_utils", "slice_log_prob_with_cp")
        masks = upstream(f"{base}.cp_utils", "get_local_response_loss_masks")
        require_parameters(masks, ["total_lengths", "response_lengths", "loss_masks", "qkv_format", "max_seq_lens"])
        extra = {"apply_megatron_loss_scaling": True}
    require_parameters(loss, ["args", "batch", "num_microbatches", count, "logits"])
    wanted = ["logits", "args", "unconcat_tokens", "total_lengths", "response_lengths", "with_entropy"]
    require_parameters(log_probs, wanted if name == "slime" else [*wanted, "max_seq_lens"])
    require_parameters(cut, ["log_prob", "total_length", "response_length"])
    return Stack(loss, cut, f"asympo_megatron.integrations.{name}.asympo_loss", count, extra)


def gradient(functions: Stack, place: Place, objective: str, *, contiguous: bool, bshd: bool = False) -> Tensor:
    """The gradient [P, V] of the optimizer step, summed over the world as Megatron would.

    Two micro-batches a data-parallel rank. Their loss carries micro-batches / N x (DP x CP); ``schedules`` divides by
    the micro-batches and DDP averages over DP x CP.
    """
    whole = make_batch()
    args = namespace(functions, objective, contiguous=contiguous and place.cp_size > 1, bshd=bshd)
    leaf_PV = whole.leaf()
    mine = range(place.dp_rank, whole.num_responses, place.dp_size)
    parts = [mine[:2], mine[2:]]
    for rows in parts:
        part, index_P = whole.rows(list(rows))
        logits, batch = microbatch(functions, part, leaf_PV[index_P], place, args)
        loss, count, _ = functions.loss_function(
            args,
            batch,
            len(parts),
            logits=logits,
            **{functions.count_argument: whole.num_responses},
            **functions.extra_arguments,
        )
        if int(count) != 1:
            raise AssertionError(f"loss_function returned {int(count)} as divisor, expected 1.")
        (loss / len(parts)).backward()
    total = leaf_PV.grad
    assert total is not None
    dist.all_reduce(total, group=place.world)
    return total / (place.dp_size * place.cp_size)


def namespace(functions: Stack, objective: str, *, contiguous: bool, bshd: bool) -> Namespace:
    """The flags that the loss path reads, at their defaults except for ours."""
    return Namespace(
        loss_type="custom_loss",
        custom_loss_function_path=functions.adapter,
        asympo_objective=objective,
        asympo_options=CASES[objective],
        calculate_per_token_loss=False,
        recompute_loss_function=False,
        normalize_advantages=False,
        allgather_cp=contiguous,
        qkv_format="bshd" if bshd else "thd",
        rollout_temperature=1.0,
        rollout_top_p=1.0,
        log_probs_chunk_size=-1,
        entropy_coef=0.0,
        true_on_policy_mode=False,
        use_dynamic_global_batch_size=False,
        multi_lora=False,
    )


def microbatch(
    functions: Stack, part: ParityBatch, logits_PV: Tensor, place: Place, args: Namespace
) -> tuple[Tensor, dict[str, Any]]:
    """This rank's logits [1, L, V] (or [R, L, V]) and the batch that their ``get_batch`` would make."""
    total, length = part.sequence_length_R.tolist(), part.response_length_R.tolist()
    longest = -(-max(total) // (2 * place.cp_size)) * 2 * place.cp_size
    bshd = args.qkv_format == "bshd"
    sequences = part.sequence_logits(logits_PV).split(total)
    if args.allgather_cp:
        joined = padded(torch.cat(sequences), PAD * place.cp_size)
        logits = joined.chunk(place.cp_size)[place.cp_rank][None]
    else:
        local = [local_part(sequence, place, longest if bshd else 0) for sequence in sequences]
        logits = torch.stack(local) if bshd else padded(torch.cat(local), PAD)[None]
    masks = [mask.float() for mask in part.mask_P.split(length)]
    extra = ("bshd", longest) if bshd else ()
    cut = [
        functions.slice_response(torch.full((size,), float(advantage)), whole, size, *extra)
        for advantage, whole, size in zip(part.advantage_R.tolist(), total, length, strict=True)
    ]
    batch = {
        "unconcat_tokens": list(part.sequence_tokens.split(total)),
        "total_lengths": total,
        "response_lengths": length,
        "loss_masks": masks,
        "advantages": cut,
        "rollout_mask_sums": [mask.sum() for mask in masks],
        "max_seq_lens": [longest] * len(total) if bshd else None,
    }
    return logits, batch


def local_part(sequence_SV: Tensor, place: Place, longest: int) -> Tensor:
    """The two zigzag pieces of one sequence, padded to ``longest`` or to a multiple of 2 x CP."""
    multiple = 1 if place.cp_size == 1 else 2 * place.cp_size
    whole = padded(sequence_SV, longest or multiple)
    return whole[zigzag_index(torch.tensor([0, whole.shape[0]]), place.cp_size, place.cp_rank)]


def padded(value_SV: Tensor, multiple: int) -> Tensor:
    """Zeros behind the last row, up to a multiple."""
    missing = -value_SV.shape[0] % multiple
    return torch.cat([value_SV, value_SV.new_zeros(missing, *value_SV.shape[1:])])


def cases(name: str, cp_size: int) -> Sequence[dict[str, bool]]:
    """Token layouts that the framework can hand over."""
    layouts: list[dict[str, bool]] = [{"contiguous": False}]
    if cp_size > 1:
        layouts.append({"contiguous": True})
    if name == "miles":
        layouts.append({"contiguous": False, "bshd": True})
    return layouts
