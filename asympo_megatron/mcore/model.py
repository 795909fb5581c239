"""GPTModel that ends in token NLLs instead of logits, and the model chunks of one rank.

Axis suffixes: T local tokens, H hidden, V rows of the local vocabulary shard.
"""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from asympo_megatron.mcore.model_config import ModelPlan
from asympo_megatron.mcore.spec import layer_spec
from asympo_megatron.parallel import ParallelGroups, token_nll


class OutputWeight(MegatronModule):
    """Stands where GPTModel has its output projection: holds that weight, and hands the hidden states on.

    ``compute_language_model_loss`` turns them into NLLs chunk by chunk, so [T, V] logits never exist. Being a module
    with the weight inside, it still fires the forward hooks with which Megatron gathers parameters just in time.
    """

    def __init__(self, projection: Any, config: Any) -> None:
        super().__init__(config=config)
        self.register_parameter("weight", projection.weight)  # None when tied to the embedding of the same stage
        self._tp_group = projection.tp_group

    def forward(self, hidden_T1H: Tensor, weight: Tensor | None = None, **_: Any) -> tuple[Tensor, None]:
        """Gather the sequence-parallel shards, or mark the copy: the backward sums the vocabulary shards' parts."""
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden_T1H, group=self._tp_group), None
        return copy_to_tensor_model_parallel_region(hidden_T1H, group=self._tp_group), None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> Any:
        """Sharded along the vocabulary, exactly as ColumnParallelLinear would be."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self._tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


class PolicyModel(GPTModel):
    """A decoder whose forward with ``labels`` returns [2, T]: token NLL and entropy of each position."""

    output_layer: Any

    def __init__(self, *args: Any, temperature: float, groups: ParallelGroups, true_vocab_size: int, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._temperature, self._groups, self._true_vocab_size = temperature, groups, true_vocab_size
        if self.post_process:
            self.output_layer = OutputWeight(self.output_layer, self.config)

    def forward(self, *args: Any, padding_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """As GPTModel's; ``padding_mask`` [1, T] is read by routers of experts only."""
        if self.config.num_moe_experts is None:
            padding_mask = None
        elif padding_mask is not None and self.config.sequence_parallel and not self.pre_process:
            # GPTModel._preprocess splits the mask over sequence parallelism on the first pipeline stage only
            group = self.pg_collection.tp
            padding_mask = padding_mask.chunk(group.size(), dim=1)[group.rank()]
        return super().forward(*args, padding_mask=padding_mask, **kwargs)

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Score targets [1, T] with the hidden states [T, 1, H] that :class:`OutputWeight` returned as ``logits``."""
        weight_VH = self.output_layer.weight
        if weight_VH is None:
            weight_VH = self.shared_embedding_or_output_weight()
        nll_T, entropy_T = token_nll(
            logits.squeeze(1),
            weight_VH,
            labels.squeeze(0),
            temperature=self._temperature,
            groups=self._groups,
            with_entropy=True,
            vocab_size=self._true_vocab_size,
        )
        # detached: a gradient of zeros for the entropy would cost token_nll's backward a second pass over the logits
        return torch.stack([nll_T, entropy_T.detach()])


def build_chunks(plan: ModelPlan, temperature: float, groups: ParallelGroups) -> list[Any]:
    """The model chunks of this rank, one per virtual pipeline stage, without meaningful weights yet."""
    virtual = plan.transformer.virtual_pipeline_model_parallel_size
    stages: list[int | None] = list(range(virtual)) if virtual else [None]
    chunks = [_build_chunk(plan, temperature, groups, stage) for stage in stages]
    if torch.cuda.is_available():
        chunks = [chunk.cuda(torch.cuda.current_device()) for chunk in chunks]
    if plan.transformer.bf16:
        chunks = [Float16Module(plan.transformer, chunk) for chunk in chunks]
    return chunks


def unwrap(chunk: Any) -> Any:
    """The PolicyModel inside DistributedDataParallel and Float16Module."""
    while not isinstance(chunk, PolicyModel):
        chunk = chunk.module
    return chunk


def policy_models(chunks: list[Any]) -> Iterator[PolicyModel]:
    """The PolicyModels of all chunks."""
    return (unwrap(chunk) for chunk in chunks)


def _build_chunk(plan: ModelPlan, temperature: float, groups: ParallelGroups, vp_stage: int | None) -> PolicyModel:
    facts, transformer = plan.facts, plan.transformer
    first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
    return PolicyModel(
        transformer,
        layer_spec(transformer, vp_stage),
        vocab_size=plan.padded_vocab_size,
        max_sequence_length=facts.max_positions,
        pre_process=first,
        post_process=last,
        parallel_output=True,
        share_embeddings_and_output_weights=facts.tied,
        position_embedding_type="rope",
        rotary_base=facts.rope_theta,
        rope_scaling=facts.rope_factor is not None,
        rope_scaling_factor=facts.rope_factor or 1.0,
        seq_len_interpolation_factor=facts.position_divisor,
        vp_stage=vp_stage,
        temperature=temperature,
        groups=groups,
        true_vocab_size=facts.vocab_size,
    )
