"""Wrong trainers that the lattice must catch: mistakes that real ones have had."""

import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import p2p_communication, schedules
from megatron.core.tensor_parallel import mappings
from torch import Tensor

from asympo_megatron.batch import ObjectiveOutput, ResponseBatch
from asympo_megatron.mcore import Learner, model_config
from asympo_megatron.mcore.loss import ForwardStep
from asympo_megatron.parallel import SINGLE, ParallelGroups

HUNG = 75
"""Exit code of a rank that waited in vain."""

PATIENCE_S = 15.0


def _same(objective: Any) -> Any:
    return objective


def _nothing(_: Learner) -> None: ...


@dataclass(frozen=True)
class Mutant:
    """Where a mistake sits: in the objective, in the code around a learner from its start to its end, or in it."""

    objective: Callable[[Any], Any] = _same
    around: Callable[[], AbstractContextManager[None]] = nullcontext
    after_build: Callable[[Learner], None] = _nothing


@dataclass(frozen=True)
class _Wrapped:
    """An objective whose output is changed by ``change(objective, token_nll_T, batch, groups)``."""

    objective: Any
    change: Callable[[Any, Tensor, ResponseBatch, ParallelGroups], ObjectiveOutput]

    @property
    def needs(self) -> frozenset[str]:
        return self.objective.needs

    def __call__(self, token_nll_T: Tensor, batch: ResponseBatch, groups: ParallelGroups) -> ObjectiveOutput:
        return self.change(self.objective, token_nll_T, batch, groups)


def _wrap(change: Callable[..., ObjectiveOutput]) -> Mutant:
    return Mutant(objective=lambda objective: _Wrapped(objective, change))


def _local_sums(objective: Any, nll_T: Tensor, batch: ResponseBatch, groups: ParallelGroups) -> ObjectiveOutput:
    out = objective(nll_T, batch, groups=replace(groups, context=None))
    return replace(out, normalizer_count=objective.normalizer_count(batch, groups))


def _mean_of_means(objective: Any, nll_T: Tensor, batch: ResponseBatch, groups: ParallelGroups) -> ObjectiveOutput:
    """Each micro-batch of each replica divides by its own count, and counts as one."""
    out = objective(nll_T, batch, groups=groups)
    count = objective.normalizer_count(batch, SINGLE)
    return replace(out, loss_sum=out.loss_sum / count.clamp(min=1), normalizer_count=out.normalizer_count.clamp(max=1))


def _count_everywhere(objective: Any, nll_T: Tensor, batch: ResponseBatch, groups: ParallelGroups) -> ObjectiveOutput:
    out = objective(nll_T, batch, groups=groups)
    return replace(out, normalizer_count=objective.normalizer_count(batch, SINGLE))


def _count_misses_context(
    objective: Any, nll_T: Tensor, batch: ResponseBatch, groups: ParallelGroups
) -> ObjectiveOutput:
    """The trained tokens of one context shard stand for those of all."""
    out = objective(nll_T, batch, groups=groups)
    local = (batch.response_ids_T >= 0).sum() * int(groups.context_rank == 0)
    return replace(out, normalizer_count=local)


@contextmanager
def _divided_by_schedule() -> Iterator[None]:
    """``calculate_per_token_loss`` off: the schedule divides by the local count, DDP by the number of ranks."""
    numerics = model_config._numerics
    model_config._numerics = lambda config: {**numerics(config), "calculate_per_token_loss": False}
    try:
        yield
    finally:
        model_config._numerics = numerics


class _TwoTuple(ForwardStep):
    """Hands Megatron a mean: it multiplies by CP and divides by the number of micro-batches."""

    def _loss(self, output: Tensor, batch: Any) -> Any:
        loss_sum, count, stats = super()._loss(output, batch)
        return loss_sum / count.clamp(min=1), stats


def _use_two_tuple(learner: Learner) -> None:
    step = learner._forward_step
    learner._forward_step = _TwoTuple(step._objective, step._groups)


def _drop_sequence_marks(learner: Learner) -> None:
    for chunk in learner.chunks:
        for param in chunk.parameters():
            param.sequence_parallel = False


@contextmanager
def _own_share_only() -> Iterator[None]:
    """Ranks that share a key and value head do not sum what their queries send back to it."""
    gather = mappings._AllGatherFromTensorParallelRegion
    backward = gather.backward
    gather.backward = staticmethod(
        lambda ctx, grad: (grad.chunk(ctx.group.size(), -1)[ctx.group.rank()].contiguous(), None)
    )
    try:
        yield
    finally:
        gather.backward = staticmethod(backward)


@contextmanager
def _late_receiver() -> Iterator[None]:
    """What interleaved stages may meet on any day: freed memory is used again at once, and a peer receives late."""
    deallocate, exchange = schedules.deallocate_output_tensor, p2p_communication._p2p_ops

    def reuse(out: Tensor | None, deallocate_pipeline_outputs: bool = False) -> None:
        if out is not None and deallocate_pipeline_outputs:
            out.data.fill_(math.nan)
        deallocate(out, deallocate_pipeline_outputs)

    def late(*args: Any, **kwargs: Any) -> Any:
        if dist.get_rank() > 0:  # gloo sends when the receiver is ready: the first stage has gone on by then
            busy = torch.ones(256, 256)
            for _ in range(8):
                busy = busy @ busy
        return exchange(*args, **kwargs)

    schedules.deallocate_output_tensor, p2p_communication._p2p_ops = reuse, late
    try:
        yield
    finally:
        schedules.deallocate_output_tensor, p2p_communication._p2p_ops = deallocate, exchange


def _fix_shapes(learner: Learner) -> None:
    """For micro-batches of one length: no exchange of shapes keeps sender and receiver in step."""
    learner.plan.transformer.variable_seq_lengths = False
    forward_backward, config = learner._forward_backward, learner.config.batch

    def with_length(batches: Any) -> Any:
        budget = config.max_tokens_per_microbatch
        (config.max_tokens_per_microbatch,) = {batch.tokens.numel() for batch in batches}
        try:
            return forward_backward(batches)
        finally:
            config.max_tokens_per_microbatch = budget

    learner._forward_backward = with_length


def _deallocate_outputs(learner: Learner) -> None:
    _fix_shapes(learner)
    learner.plan.transformer.deallocate_pipeline_outputs = True


def _unanchored(objective: Any, nll_T: Tensor, batch: ResponseBatch, groups: ParallelGroups) -> ObjectiveOutput:
    """A rank without trained token has a loss that no parameter can be reached from."""
    out = objective(nll_T, batch, groups=groups)
    trained = bool((batch.response_ids_T >= 0).any())
    return out if trained else replace(out, loss_sum=torch.zeros(()))


class _NoAnchor(ForwardStep):
    """Hands the objective's loss on as it is."""

    def _loss(self, output: Tensor, batch: Any) -> Any:
        _, count, stats = super()._loss(output, batch)
        return self._objective(output[0], batch.responses, groups=self._groups).loss_sum, count, stats


def _remove_anchor(learner: Learner) -> None:
    step = learner._forward_step
    learner._forward_step = _NoAnchor(step._objective, step._groups)
    timer = threading.Timer(PATIENCE_S, os._exit, [HUNG])
    timer.daemon = True
    timer.start()


MUTANTS: Mapping[str, Mutant] = {
    "local sums": _wrap(_local_sums),
    "mean of local means": _wrap(_mean_of_means),
    "count on every context rank": _wrap(_count_everywhere),
    "count of one context shard": _wrap(_count_misses_context),
    "3-tuple divided by the schedule": Mutant(around=_divided_by_schedule),
    "2-tuple": Mutant(around=_divided_by_schedule, after_build=_use_two_tuple),
    "norm gradients not summed under SP": Mutant(after_build=_drop_sequence_marks),
    "gradients of a shared head not summed": Mutant(around=_own_share_only),
    "deallocated outputs under VPP": Mutant(around=_late_receiver, after_build=_deallocate_outputs),
    "late receiver": Mutant(around=_late_receiver, after_build=_fix_shapes),
    "no anchor": replace(_wrap(_unanchored), after_build=_remove_anchor),
}
