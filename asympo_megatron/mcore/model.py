"""GPTModel that ends in token NLLs instead of logits, and the model chunks of one rank.

Axis suffixes: T local tokens, H hidden, V rows of the local vocabulary shard.
"""

from collections.abc import Callable, Iterator
from functools import partial
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


class OutputLayer(MegatronModule):
    """Stands where GPTModel has its output projection, holds that weight, and returns token NLLs instead of logits.

    GPTModel calls it without the targets; then it hands the hidden states on, and ``compute_language_model_loss``
    calls it again with them. Everything that reads the weight is inside ``forward``, so that Megatron's forward hooks,
    which gather parameters just in time, have fired for it.

    Args:
        projection: the ColumnParallelLinear it replaces.
        config: TransformerConfig.
        score: :func:`~asympo_megatron.parallel.token_nll` with temperature, groups and vocabulary.
    """

    def __init__(self, projection: Any, config: Any, score: Callable[..., Any]) -> None:
        super().__init__(config=config)
        self.register_parameter("weight", projection.weight)  # None when tied to the embedding of the same stage
        self._tp_group = projection.tp_group
        self._score = score

    def forward(
        self, hidden_T1H: Tensor, weight: Tensor | None = None, targets_1T: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        """[2, T], token NLL and (detached) entropy; without targets the hidden states as they came.

        Args:
            hidden_T1H: this rank's part of T under sequence parallelism, else all of it.
            weight: [V, H] where it is tied.
            targets_1T: int64, of all T.
        """
        if targets_1T is None:
            return hidden_T1H, None
        weight_VH = self.weight if weight is None else weight
        nll_T, entropy_T = self._score(self._gather(hidden_T1H).squeeze(1), weight_VH, targets_1T.squeeze(0))
        # detached: a gradient of zeros for the entropy would cost token_nll's backward a second pass over the logits
        return torch.stack([nll_T, entropy_T.detach()]), None

    def _gather(self, hidden_T1H: Tensor) -> Tensor:
        """Gather the sequence-parallel shards, or mark the copy: the backward sums the vocabulary shards' parts."""
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden_T1H, group=self._tp_group)
        return copy_to_tensor_model_parallel_region(hidden_T1H, group=self._tp_group)

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
        if self.post_process:
            score = partial(
                token_nll, temperature=temperature, groups=groups, with_entropy=True, vocab_size=true_vocab_size
            )
            self.output_layer = OutputLayer(self.output_layer, self.config, score)

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
        """Score targets [1, T] with the hidden states that :class:`OutputLayer` handed on as ``logits``."""
        tied = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        return self.output_layer(logits, tied, labels)[0]


def build_chunks(plan: ModelPlan, temperature: float, groups: ParallelGroups) -> list[Any]:
    """The model chunks of this rank, one per virtual pipeline stage, without meaningful weights yet."""
    virtual = plan.transformer.virtual_pipeline_model_parallel_size
    stages: list[int | None] = list(range(virtual)) if virtual else [None]
    chunks = [_build_chunk(plan, temperature, groups, stage) for stage in stages]
    if torch.cuda.is_available() and not next(chunks[0].parameters()).is_meta:
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
