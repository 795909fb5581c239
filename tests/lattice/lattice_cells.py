"""The cells of the lattice: layouts x micro-batches x packing x objectives x models.

ASymPO visits the full product of layouts, micro-batches and packing; the other objectives and the second model a
pairwise covering: any two values of two axes meet in some cell.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, product
from typing import Any

from lattice_data import VOCAB

from asympo_megatron.objectives import OBJECTIVES
from asympo_megatron.testing.tiny_model import TINY_MOE_HF

MICROBATCHES = (1, 2, 4)
PACKINGS = ("packed", "padded")

MODEL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "rope_theta": 10000.0,
    "vocab_size": VOCAB,
}
MODELS: Mapping[str, dict[str, Any]] = {
    "qwen3-tied": {**MODEL, "model_type": "qwen3", "tie_word_embeddings": True},
    "qwen2-untied": {**MODEL, "model_type": "qwen2", "tie_word_embeddings": False},
}
"""The second one has what the first lacks: biases of the projections, sharded over TP, and an output weight."""

ONE_KV_HEAD = "qwen2-one-kv-head"
"""Fewer key and value heads than tensor-parallel ranks: the ranks share one."""

EXPERTS, BALANCED = "qwen3-moe", "qwen3-moe-balanced"
EXPERT_MODELS: Mapping[str, dict[str, Any]] = {
    EXPERTS: {**TINY_MOE_HF, "router_aux_loss_coef": 0.0},
    BALANCED: dict(TINY_MOE_HF),
}
"""Mixtures of experts without and with a load-balancing loss."""


@dataclass(frozen=True)
class Shape:
    """A parallel layout: how many ranks, and the sections of the configuration that name it."""

    ranks: int
    parallel: Mapping[str, Any] = field(default_factory=dict)
    distributed: bool = False
    ddp: Mapping[str, bool] = field(default_factory=dict)

    @property
    def replicas(self) -> int:
        """Data-parallel size."""
        return self.ranks // math.prod(self.parallel.get(name, 1) for name in ("tensor", "pipeline", "context"))


_REDUCE, _GATHER = {"overlap_grad_reduce": True}, {"overlap_param_gather": True}

ONE_RANK = "one rank"

LAYOUTS: Mapping[str, Shape] = {
    "DP2": Shape(2),
    "DP2+overlap": Shape(2, ddp=_REDUCE),
    "DP2+distopt": Shape(2, distributed=True),
    "DP2+distopt+overlap": Shape(2, distributed=True, ddp=_REDUCE),
    "DP2+distopt+overlap+gather": Shape(2, distributed=True, ddp={**_REDUCE, **_GATHER}),
    "TP2": Shape(2, {"tensor": 2}),
    "TP2+SP": Shape(2, {"tensor": 2, "sequence": True}),
    "PP2": Shape(2, {"pipeline": 2}),
    "PP2xVPP2": Shape(2, {"pipeline": 2, "virtual_pipeline": 2}),
    "CP2": Shape(2, {"context": 2}),
    "TP2xPP2": Shape(4, {"tensor": 2, "pipeline": 2}),
    "TP2xPP2+SP": Shape(4, {"tensor": 2, "pipeline": 2, "sequence": True}),
    "TP2xDP2": Shape(4, {"tensor": 2}),
    "TP2xDP2+SP+distopt": Shape(4, {"tensor": 2, "sequence": True}, distributed=True),
    "TP2xCP2+SP": Shape(4, {"tensor": 2, "context": 2, "sequence": True}),
    "PP2xCP2": Shape(4, {"pipeline": 2, "context": 2}),
    "DP2xCP2": Shape(4, {"context": 2}),
    "CP4": Shape(4, {"context": 4}),
    "TP2xPP2xVPP2+SP": Shape(4, {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2, "sequence": True}),
}


WIDE_LAYOUTS: Mapping[str, Shape] = {
    "TP2xPP2xCP2+SP": Shape(8, {"tensor": 2, "pipeline": 2, "context": 2, "sequence": True}),
    "TP2xCP2xDP2+SP+distopt": Shape(8, {"tensor": 2, "context": 2, "sequence": True}, distributed=True),
}
"""Three ways of splitting at once. Eight ranks are slow on two cores: a few cells only."""

_EXPERT = {"expert": 2, "expert_tensor": 1}

EXPERT_LAYOUTS: Mapping[str, Shape] = {
    "EP2": Shape(2, {"expert": 2}),
    "EP2+distopt": Shape(2, {"expert": 2}, distributed=True),
    "EP2xTP2+SP": Shape(2, {"tensor": 2, "sequence": True, **_EXPERT}),
    "EP2xCP2": Shape(2, {"context": 2, "expert": 2}),
    "EP2xPP2": Shape(4, {"pipeline": 2, "expert": 2}),
    "EP2xTP2xDP2+SP+distopt": Shape(4, {"tensor": 2, "sequence": True, **_EXPERT}, distributed=True),
}
"""Layouts of a mixture of experts; where nothing else is named, EP takes the data-parallel ranks."""

SHAPES: Mapping[str, Shape] = {ONE_RANK: Shape(1), **LAYOUTS, **EXPERT_LAYOUTS, **WIDE_LAYOUTS}


EXPERT_OBJECTIVES = ("asympo", "reinforce", "sft")
"""Those that differ in the divisor (responses, tokens), on which the scale of the load-balancing loss depends."""


@dataclass(frozen=True)
class Cell:
    """One run of a few steps, to be compared with one rank and one micro-batch."""

    layout: str
    microbatches: int
    packing: str
    objective: str
    model: str = "qwen3-tied"
    dtype: str = "fp32"
    mutant: str = ""
    """A mistake of lattice_mutants.MUTANTS that this cell is trained with."""

    def __str__(self) -> str:
        name = f"{self.layout}-{self.microbatches}mb-{self.packing}-{self.objective}-{self.model}-{self.dtype}"
        return f"{name} {self.mutant}".rstrip()

    @property
    def reference(self) -> "Cell":
        """What it is compared with: one rank, one packed micro-batch.

        A load-balancing loss is a product of sums over a micro-batch, so it is defined by what the micro-batches hold:
        there one rank works off the micro-batches of all replicas, one after the other.
        """
        count = self.microbatches * self.shape.replicas if self.model == BALANCED else 1
        return replace(self, layout=ONE_RANK, microbatches=count, packing="packed", mutant="")

    @property
    def ranks(self) -> int:
        return self.shape.ranks

    @property
    def shape(self) -> Shape:
        return SHAPES[self.layout]

    @property
    def hf(self) -> dict[str, Any]:
        """Fields of the model's config.json."""
        one_kv_head = {ONE_KV_HEAD: {**MODELS["qwen2-untied"], "num_key_value_heads": 1}}
        return {**MODELS, **EXPERT_MODELS, **one_kv_head}[self.model]


def objective_names() -> list[str]:
    """Every registered objective once, without aliases."""
    names: dict[type, str] = {}
    for name, kind in OBJECTIVES.items():
        names.setdefault(kind, name)
    return list(names.values())


OPTIONS: Mapping[str, dict[str, Any]] = {"dr_grpo": {"constant_tokens": 16}}
"""Of objectives that have options without a default."""


def full_product() -> list[Cell]:
    """ASymPO in every layout, number of micro-batches and packing; experts without the load-balancing loss."""
    dense = [Cell(*values, "asympo") for values in product(LAYOUTS, MICROBATCHES, PACKINGS)]
    return dense + [Cell(*values, "asympo", EXPERTS) for values in product(EXPERT_LAYOUTS, MICROBATCHES, PACKINGS)]


def covering() -> list[Cell]:
    """The other objectives, and the other models: every pair of values of two axes at least once."""
    others = [name for name in objective_names() if name != "asympo"]
    # When a gradient is reduced, and into whose shard, is nothing to an objective: the full product covers overlaps.
    layouts = [name for name in LAYOUTS if "overlap" not in name]
    dense = pairwise([layouts, MICROBATCHES, PACKINGS, others, list(MODELS)])
    experts = pairwise([list(EXPERT_LAYOUTS), MICROBATCHES, PACKINGS, EXPERT_OBJECTIVES, [BALANCED]])
    return [Cell(*row) for row in (*dense, *experts)]


def shared_kv_head() -> list[Cell]:
    """ASymPO where tensor-parallel ranks share a key and value head."""
    layouts = ("TP2", "TP2+SP", "TP2xPP2", "TP2xCP2+SP", "TP2xDP2+SP+distopt")
    return [Cell(layout, 2, "packed", "asympo", ONE_KV_HEAD) for layout in layouts]


def wide() -> list[Cell]:
    """Cells of eight ranks."""
    return [Cell(layout, *values, "asympo") for layout in WIDE_LAYOUTS for values in ((2, "packed"), (4, "padded"))]


def all_cells() -> list[Cell]:
    """The lattice."""
    return [*full_product(), *covering(), *shared_kv_head(), *wide()]


def pairwise(axes: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
    """Rows such that any two values of two axes share a row: greedy, deterministic, near the smallest number.

    A row starts with the first pair that is not covered yet; each further axis takes the value that covers most.
    """
    open_pairs = [((a, x), (b, y)) for a, b in combinations(range(len(axes)), 2) for x in axes[a] for y in axes[b]]
    remaining = dict.fromkeys(open_pairs)
    rows = []
    while remaining:
        row: dict[int, Any] = dict(next(iter(remaining)))
        for axis in range(len(axes)):
            if axis not in row:
                row[axis] = max(axes[axis], key=lambda value: len(_covers({**row, axis: value}, remaining)))
        for pair in _covers(row, remaining):
            del remaining[pair]
        rows.append(tuple(row[axis] for axis in range(len(axes))))
    return rows


def _covers(row: Mapping[int, Any], remaining: Mapping[Any, None]) -> list[Any]:
    items = sorted(row.items(), key=lambda item: item[0])
    return [pair for pair in combinations(items, 2) if pair in remaining]
