"""Megatron-Bridge's own ``train_step`` on every rank of a gloo world, with free logits in the place of a model.

Axis suffixes: P response positions of all rows, V vocabulary, L tokens of this rank in one micro-batch.
"""

import sys
import typing
from pathlib import Path
from types import SimpleNamespace

import torch
import typing_extensions
from parity import CASES, make_batch

from asympo_megatron.objectives import build_objective
from asympo_megatron.parallel import ParallelGroups, zigzag_index

sys.path.append(str(Path(__file__).parents[2] / "tools" / "check_integration"))
import placeholders

PARTS = [[0, 2, 3], [5, 8, 9], [1, 4, 6], [7, 10, 11]]  # the first holds the response without trained tokens


def gradients(rank, world_size):
    """The gradient [P, V] of one step by (objective, CP size); "mutant": no sum over context-parallel ranks."""
    _prepare()
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import (
        init_num_microbatches_calculator,
        unset_num_microbatches_calculator,
    )

    from asympo_megatron.integrations import megatron_bridge

    results = {}
    for cp_size in (1, world_size):
        dp_size = world_size // cp_size
        parallel_state.initialize_model_parallel(context_parallel_size=cp_size)
        init_num_microbatches_calculator(rank, None, len(PARTS), 1, dp_size)
        for name in CASES:
            results[name, cp_size] = _step(name)
        if cp_size > 1:
            found, megatron_bridge.model_groups = megatron_bridge.model_groups, lambda _: ParallelGroups.single()
            results["mutant"] = _step("asympo")
            megatron_bridge.model_groups = found
        unset_num_microbatches_calculator()
        parallel_state.destroy_model_parallel()
    return results


def _prepare():
    """CPU in the place of CUDA, placeholders for what lies beside the loss path, one name that Python 3.12 has."""
    if sys.version_info < (3, 12):
        typing.override = typing_extensions.override
    from asympo_megatron.mcore import cpu

    cpu.install()
    placeholders.allow("megatron_bridge")


def _step(name):
    """``train_step`` as ``train`` calls it: Megatron's DDP, schedule and ``finalize_model_grads``."""
    from megatron.bridge.training.train import train_step
    from megatron.bridge.training.utils.train_utils import prepare_forward_step_func
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.rerun_state_machine import RerunDataIterator
    from megatron.core.transformer import TransformerConfig

    from asympo_megatron.integrations.megatron_bridge import ForwardStep

    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, calculate_per_token_loss=True)
    config.finalize_model_grads_func = finalize_model_grads
    groups = ProcessGroupCollection.use_mpu_process_groups()
    settings = DistributedDataParallelConfig(average_in_collective=False)
    model = DistributedDataParallel(config, settings, _free_logits(config, groups))
    state = SimpleNamespace(
        cfg=_configuration(), timers=lambda *_, **__: SimpleNamespace(start=_nothing, stop=_nothing)
    )
    place, dp_size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    losses, *_ = train_step(
        prepare_forward_step_func(ForwardStep(build_objective(name, **CASES[name])), state),
        RerunDataIterator(iter([_microbatch(rows) for rows in PARTS[place::dp_size]])),
        [model],
        SimpleNamespace(zero_grad=_nothing, step=lambda: (True, 0.0, None)),
        SimpleNamespace(step=_nothing),
        state,
        groups,
        get_forward_backward_func(),
        None,
    )
    assert torch.isfinite(losses["J"])
    return model.module.logits_PV.main_grad.tolist()  # lists: the parent has no Megatron to unpickle a tensor with


def _free_logits(config, groups):
    from megatron.core.enums import ModelType
    from megatron.core.transformer.module import MegatronModule

    class FreeLogits(MegatronModule):
        """``tokens`` are positions in P: the NLL of ``labels`` there."""

        def __init__(self):
            super().__init__(config)
            self.model_type, self.pg_collection = ModelType.encoder_or_decoder, groups
            self.logits_PV = torch.nn.Parameter(make_batch().logits_PV.clone())

        def set_input_tensor(self, _):
            pass

        def forward(self, input_ids, position_ids, attention_mask, labels, packed_seq_params):
            logprob = torch.log_softmax(self.logits_PV[input_ids], -1)
            return -logprob.gather(-1, labels[..., None]).squeeze(-1)

    return FreeLogits()


def _microbatch(rows):
    """This rank's tokens of some rows, in zigzag order, as ``split_batch`` wants them."""
    from megatron.core import parallel_state

    whole = make_batch()
    part, index_P = whole.rows(rows)
    cp_size = parallel_state.get_context_parallel_world_size()
    pad = -len(index_P) % (2 * cp_size)
    length = torch.tensor([0, len(index_P) + pad])
    mine = zigzag_index(length, cp_size, parallel_state.get_context_parallel_rank())
    index_L = torch.nn.functional.pad(index_P, (0, pad))[mine]
    return {
        "tokens": index_L[None],
        "labels": whole.token_P[index_L][None],
        "response_ids": torch.nn.functional.pad(part.response_ids_P, (0, pad), value=-1)[mine][None],
        "advantages": part.advantage_R,
        "token_counts": part.token_count_R,
    }


def _configuration():
    """What ``train_step`` reads of Bridge's configuration."""
    return SimpleNamespace(
        train=SimpleNamespace(
            micro_batch_size=1,
            empty_unused_memory_level=0,
            check_optimizer_step_success=False,
            skip_sync_grad_norm_across_mp=True,
        ),
        optimizer=SimpleNamespace(
            reuse_grad_buf_for_mxfp8_param_ag=False, barrier_with_L1_time=False, log_num_zeros_in_grad=False
        ),
        ddp=SimpleNamespace(overlap_param_gather=False),
        model=SimpleNamespace(seq_length=1),
        dataset=SimpleNamespace(dataloader_type="single"),
        dist=SimpleNamespace(use_decentralized_pg=True),
        data_parallel_size=1,
    )


def _nothing(*_, **__):
    pass
