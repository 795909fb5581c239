"""Which part of which global parameter each local tensor is: for initial weights, checksums and conversion.

A global parameter has one name and one shape whatever the layout: layers are numbered through the pipeline, tensors
are whole over tensor parallelism, experts are numbered through expert parallelism, the vocabulary has no padding.
"""

import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from asympo_megatron.mcore.model import unwrap

GATED = ".linear_fc1.weight"
"""Of an MLP or an expert: rows are [gate; up], and every tensor-parallel rank holds a slice of both."""

_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""Transformer Engine's layers keep a norm inside the projection behind it; the global name does not."""

# Sequential experts are modules, grouped ones (Transformer Engine) numbered parameters of two modules.
_SEQUENTIAL = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(.+)")
_GROUPED = re.compile(r"mlp\.experts\.(linear_fc[12])\.(weight|bias)(\d+)")

_EXPERT_AXES = {"linear_fc1.weight": 0, "linear_fc1.bias": 0, "linear_fc2.weight": 1}
"""Axes split over expert tensor parallelism. Grouped experts of Megatron-Core 0.16 do not say: Transformer Engine,
which is not told of it, marks every weight as split along axis 0."""

VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


@dataclass(frozen=True)
class Shard:
    """One local parameter and its place in the global one.

    Args:
        name: global name, e.g. ``decoder.layers.7.mlp.linear_fc1.weight`` or, of an expert,
            ``decoder.layers.7.mlp.experts.12.linear_fc1.weight``.
        param: the local tensor.
        dim: axis split over tensor parallelism, or None if replicated.
        rank, size: of the tensor-parallel group; of experts, which may be split over fewer ranks, theirs.
        group: that group.
        replica: which of the copies in data parallelism this is, from 0.
        true_rows: rows of the global tensor without vocabulary padding.
        is_copy: True for the tied output weight of a last stage, a copy of the first stage's embedding.
    """

    name: str
    param: Tensor
    dim: int | None
    rank: int
    size: int
    group: dist.ProcessGroup
    replica: int
    true_rows: int
    is_copy: bool

    @property
    def global_shape(self) -> tuple[int, ...]:
        """Shape over tensor parallelism, vocabulary padding included."""
        shape = list(self.param.shape)
        if self.dim is not None:
            shape[self.dim] *= self.size
        return tuple(shape)

    def take(self, whole: Tensor) -> Tensor:
        """This rank's part of a global tensor, which may lack the vocabulary padding (filled with zeros)."""
        missing = self.global_shape[0] - whole.shape[0]
        if missing > 0:
            whole = torch.cat([whole, whole.new_zeros((missing, *whole.shape[1:]))])
        if self.dim is None or self.size == 1:
            return whole
        if self.name.endswith(GATED):
            return torch.cat([half.chunk(self.size)[self.rank] for half in whole.chunk(2)])
        return whole.chunk(self.size, self.dim)[self.rank]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The global tensor from the parts of all tensor-parallel ranks, without vocabulary padding."""
        if self.dim is None or self.size == 1:
            whole = parts[0]
        elif self.name.endswith(GATED):
            halves = [part.chunk(2) for part in parts]
            whole = torch.cat([gate for gate, _ in halves] + [up for _, up in halves])
        else:
            whole = torch.cat(list(parts), self.dim)
        return whole[: self.true_rows]

    def rows(self) -> Tensor:
        """int64: global row of every local row."""
        rows = self.param.shape[0]
        local = torch.arange(rows, device=self.param.device)
        if self.dim != 0 or self.size == 1:
            return local
        if self.name.endswith(GATED):
            half = rows // 2
            return local + self.rank * half + (local >= half) * half * (self.size - 1)
        return local + self.rank * rows

    def columns(self) -> Tensor:
        """int64: global column of every local column; one column for vectors."""
        if self.param.dim() == 1:
            return torch.zeros(1, dtype=torch.int64, device=self.param.device)
        local = torch.arange(self.param.shape[1], device=self.param.device)
        return local + self.rank * self.param.shape[1] if self.dim == 1 else local


def shards(chunks: Sequence[Any], vocab_size: int) -> Iterator[Shard]:
    """Every parameter of this rank, in the order of the model."""
    dense, experts = _dense_place(), _expert_place()
    for chunk in chunks:
        model = unwrap(chunk)
        offset = get_transformer_layer_offset(model.config, vp_stage=model.vp_stage)
        for local_name, param in model.named_parameters():
            name, is_expert = _global_name(local_name, offset, _first_expert(model.config))
            group, replica = experts if is_expert else dense
            rank, size = group.rank(), group.size()
            dim = _split_axis(name, param, is_expert) if size > 1 else None
            rows = param.shape[0] * (size if dim == 0 else 1)
            is_copy = name == VOCABULARY[1] and model.share_embeddings_and_output_weights
            true_rows = vocab_size if name in VOCABULARY else rows
            yield Shard(name, param, dim, rank, size, group, replica, true_rows, is_copy)


def _split_axis(name: str, param: Any, is_expert: bool) -> int | None:
    if is_expert:
        return _EXPERT_AXES.get(".".join(name.split(".")[-2:]))
    return param.partition_dim if getattr(param, "tensor_model_parallel", False) else None


def _dense_place() -> tuple[dist.ProcessGroup, int]:
    """Tensor-parallel group, and which copy of the weights this rank holds."""
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    return parallel_state.get_tensor_model_parallel_group(), replica


def _expert_place() -> tuple[dist.ProcessGroup, int]:
    return parallel_state.get_expert_tensor_parallel_group(), parallel_state.get_expert_data_parallel_rank()


def _first_expert(transformer: Any) -> int:
    """Number of this rank's first expert."""
    experts = transformer.num_moe_experts or 0
    size, rank = transformer.expert_model_parallel_size, parallel_state.get_expert_model_parallel_rank()
    return experts // size * rank


@torch.no_grad()
def draw_initial_weights(chunks: Sequence[Any], vocab_size: int, *, seed: int, std: float, num_layers: int) -> None:
    """Draw every global parameter from a generator seeded by its name, then keep the local part: alike in any layout.

    Matrices are normal(0, std), the two that write into the residual stream normal(0, std / sqrt(2 layers)); norms
    are one, biases zero.
    """
    for shard in shards(chunks, vocab_size):
        if shard.param.dim() == 1:
            shard.param.fill_(0.0 if shard.name.endswith("bias") else 1.0)
            continue
        name = VOCABULARY[0] if shard.is_copy else shard.name
        # The CPU generator keeps 32 bits of a seed: a run's seed in the upper ones would change nothing.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
        shape = (shard.true_rows, *shard.global_shape[1:])
        residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        scale = std / (2 * num_layers) ** 0.5 if residual else std
        whole = torch.randn(shape, generator=generator) * scale
        shard.param.copy_(shard.take(whole))


def _global_name(local_name: str, layer_offset: int, first_expert: int) -> tuple[str, bool]:
    """The name in the whole model, and whether it is of an expert."""
    parts = local_name.split(".")
    if parts[:2] != ["decoder", "layers"]:
        return local_name, False
    parts[2] = str(int(parts[2]) + layer_offset)
    tail = ".".join(parts[3:])
    if match := _SEQUENTIAL.fullmatch(tail):
        number, rest = match.groups()
    elif match := _GROUPED.fullmatch(tail):
        module, kind, number = match.groups()
        rest = f"{module}.{kind}"
    else:
        return ".".join([*parts[:3], _FUSED_NORMS.get(tail, tail)]), False
    return ".".join([*parts[:3], "mlp.experts", str(int(number) + first_expert), rest]), True
