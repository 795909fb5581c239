"""Do two directories hold the same model? Tensor by tensor, then by the NLL of every token of some texts."""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asympo_megatron.config import Config
from asympo_megatron.conversion.hf_files import INDEX, SINGLE, HFFiles
from asympo_megatron.conversion.megatron_weights import MegatronWeights, Progress, read_config
from asympo_megatron.conversion.names import entries
from asympo_megatron.conversion.tensors import hf_shapes
from asympo_megatron.errors import CheckpointError
from asympo_megatron.mcore import Learner, initialize, shutdown
from asympo_megatron.mcore.collate import Row
from asympo_megatron.mcore.hf_config import ModelFacts, read_hf_config
from asympo_megatron.objectives import build_objective

TOLERANCE = 1e-4
"""Largest difference of a token's NLL, in nats, float32 on both sides."""

TEXTS = (
    "The lighthouse keeper counted the ships that passed each night and wrote their names in a grey book.",
    "To add two fractions, bring them to a common denominator: 1/3 + 1/4 = 4/12 + 3/12 = 7/12.",
    "def mean(values):\n    if not values:\n        raise ValueError('empty')\n    return sum(values) / len(values)\n",
)

MAX_TOKENS = 512
"""Of one text."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TensorDifference:
    """How far one tensor is from its counterpart; 0 if every value is the same.

    Args:
        largest: absolute difference.
        relative: L2 norm of the difference over that of the first.
        dtypes: of the two.
    """

    name: str
    largest: float
    relative: float
    dtypes: tuple[torch.dtype, torch.dtype]


@dataclass(frozen=True)
class Comparison:
    """What ``verify`` found.

    Args:
        tensors: the tensors that differ, worst first.
        num_tensors: compared.
        nll: mean NLL of the texts in nats per token, for both.
        nll_difference: the largest of one token.
        tolerance: what it may be.
    """

    tensors: list[TensorDifference]
    num_tensors: int
    nll: tuple[float, float]
    nll_difference: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Every tensor is equal, and every token has the same NLL within the tolerance."""
        return not self.tensors and self.nll_difference <= self.tolerance

    def table(self, rows: int = 10) -> str:
        """The worst tensors and the NLLs as text."""
        lines = [f"{self.num_tensors - len(self.tensors)} of {self.num_tensors} tensors are equal"]
        if self.tensors:
            lines.append(f"{'largest':>10} {'relative':>10}  tensor")
        for tensor in self.tensors[:rows]:
            first, second = tensor.dtypes
            kinds = "" if first == second else f" ({first} and {second})"
            lines.append(f"{tensor.largest:10.2e} {tensor.relative:10.2e}  {tensor.name}{kinds}")
        if len(self.tensors) > rows:
            lines.append(f"... and {len(self.tensors) - rows} more")
        lines.append(
            f"NLL of the texts {self.nll[0]:.6f} and {self.nll[1]:.6f} nats/token, "
            f"largest difference of a token {self.nll_difference:.2e} (at most {self.tolerance:.0e})"
        )
        lines.append("the same model" if self.ok else "NOT the same model")
        return "\n".join(lines)


def verify(
    first: str | Path,
    second: str | Path,
    *,
    model_files: str | Path | None = None,
    texts: Sequence[str] = TEXTS,
    tolerance: float = TOLERANCE,
    progress: Progress | None = None,
) -> Comparison:
    """Compare two models; each is a Hugging Face directory or a Megatron checkpoint.

    A Hugging Face directory is scored by transformers, a Megatron checkpoint by the packed path that trains.

    Args:
        model_files: config.json and tokenizer of a Megatron checkpoint that has none.
        texts: whose tokens are scored, the first ``MAX_TOKENS`` of each.

    Raises:
        CheckpointError: one of them cannot be read, or they are models of different shape.
        ConfigError, UnknownNameError: a model that is not supported.
    """
    sides = [_open(Path(path), model_files) for path in (first, second)]
    _check_same_shape(sides[0], sides[1])
    total = sum(len(entry.hf) for entry in entries(sides[0].facts))
    different = []
    for number, (one, other) in enumerate(zip(sides[0].tensors(), sides[1].tensors(), strict=True)):
        difference = _difference(one[0], one[1], other[1])
        if difference is not None:
            different.append(difference)
        if progress is not None:
            progress(number + 1, total)
    different.sort(key=lambda tensor: (-tensor.relative, tensor.name))
    tokens = _tokens(sides[0], texts)
    nlls = [torch.tensor(side.nlls(tokens), dtype=torch.float64) for side in sides]
    return Comparison(
        different,
        total,
        (float(nlls[0].mean()), float(nlls[1].mean())),
        float((nlls[0] - nlls[1]).abs().max()),
        tolerance,
    )


class _HFSide:
    def __init__(self, directory: Path) -> None:
        self.directory = self.model_files = directory
        self.facts = read_hf_config(read_config(directory))
        self._files = HFFiles(directory)
        self._files.check_names((name for entry in entries(self.facts) for name in entry.hf), tied=self.facts.tied)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for entry in entries(self.facts):
            for name, shape in zip(entry.hf, hf_shapes(entry, self.facts), strict=True):
                yield name, self._files.read(name, shape)

    @torch.no_grad()
    def nlls(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.directory, dtype=torch.float32, local_files_only=True).eval()
        scored = []
        for ids in sequences:
            row = torch.tensor([ids])
            logprobs = model(row).logits[0, :-1].log_softmax(-1)
            scored += (-logprobs.gather(1, row[0, 1:, None])[:, 0]).tolist()
        return scored


class _MegatronSide(MegatronWeights):
    def nlls(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """Through a learner of one rank: packed, chunk by chunk, as in training."""
        config = Config()
        config.model.init = str(self.directory)
        config.batch.max_tokens_per_microbatch = max(map(len, sequences))
        layout = initialize(config)
        try:
            learner = Learner(config, read_config(self.model_files), build_objective("asympo"), layout)
            with torch.no_grad():
                for shard in learner.shards():
                    shard.param.copy_(shard.take(self.parameter(shard.name)))
            rows = [Row(ids[:1], ids[1:], [1] * (len(ids) - 1), 0.0) for ids in map(list, sequences)]
            scored = learner.score([[row] for row in rows], "old")
        finally:
            shutdown()
        return [-logprob for (row,) in scored for logprob in row.proximal_logprobs or ()]


def _open(path: Path, model_files: str | Path | None) -> _HFSide | _MegatronSide:
    if (path / SINGLE).is_file() or (path / INDEX).is_file():
        return _HFSide(path)
    return _MegatronSide(path, model_files)


def _check_same_shape(first: _HFSide | _MegatronSide, second: _HFSide | _MegatronSide) -> None:
    ours, theirs = _shape(first.facts), _shape(second.facts)
    for name, value in ours.items():
        if theirs[name] != value:
            raise CheckpointError(
                f"{first.directory} has {name}={value} and {second.directory} has {name}={theirs[name]}: these are "
                "different models."
            )


def _shape(facts: ModelFacts) -> dict[str, Any]:
    return dataclasses.asdict(facts)


def _difference(name: str, first: Tensor, second: Tensor) -> TensorDifference | None:
    one, other = first.double(), second.double()
    if torch.equal(one, other) and first.dtype == second.dtype:
        return None
    gap = one - other
    norm = float(one.norm())
    return TensorDifference(
        name,
        float(gap.abs().max()),
        float(gap.norm()) / norm if norm else float(gap.norm()),
        (first.dtype, second.dtype),
    )


def _tokens(side: _HFSide | _MegatronSide, texts: Sequence[str]) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(side.model_files, local_files_only=True)
    sequences = [tokenizer(text)["input_ids"][:MAX_TOKENS] for text in texts]
    sequences = [ids for ids in sequences if len(ids) > 1]
    if not sequences:
        raise CheckpointError(f"the tokenizer of {side.model_files} makes no two tokens of any text; give other texts.")
    return sequences
