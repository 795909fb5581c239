"""What two ranks see of the output layer: collectives, tensors, gradients. Also run in the tests' own process."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent))

from rank_programs import VOCAB, build, make_rows, microbatches

from asympo_megatron.mcore import shutdown
from asympo_megatron.mcore.collate import collate
from asympo_megatron.mcore.model import policy_models
from asympo_megatron.parallel import logit_tiles
from asympo_megatron.testing.megatron import join_group

PROGRAM = __file__
SMALL_TILE_BYTES = 4 * 16 * 16


class Spy(TorchDispatchMode):
    """Collectives by name, and the shapes of all tensors that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[str] = []
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.collectives.append(func._opname)
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor):
                self.shapes.add(tuple(value.shape))
        return out

    def logits(self, tokens: int) -> int:
        """How many shapes are all tokens of a micro-batch by the vocabulary shard."""
        rows = {VOCAB, (VOCAB + 1) // 2, VOCAB // 2}
        return sum(shape[-1] in rows and shape[-2] >= tokens for shape in self.shapes if len(shape) > 1)


def spied_step(case: dict[str, Any]) -> int:
    """[T, V] shapes that forward and backward of one micro-batch make."""
    config, layout, learner = build(case)
    rows = microbatches(make_rows(0), config, layout)[0]
    batch = collate(rows, layout)
    with Spy() as spy:
        learner._forward_backward([batch])
    return spy.logits(batch.targets.numel())


def one_layer(case: dict[str, Any]) -> dict[str, list[str]]:
    """Collectives of the output layer alone, forward and backward."""
    config, layout, learner = build(case)
    layer = next(policy_models(learner.chunks)).output_layer
    tokens = 12 // (layout.groups.tensor_size if config.parallel.sequence else 1)
    hidden = torch.randn(tokens, 1, learner.hf_config["hidden_size"], requires_grad=True)
    with Spy() as forward:
        scores_2T, _ = layer(hidden, None, torch.arange(12)[None])
    with Spy() as backward:
        scores_2T.sum().backward()
    return {"forward": forward.collectives, "backward": backward.collectives}


def spies(payload: dict[str, Any]) -> dict[str, Any]:
    """Case name -> what one rank saw."""
    results: dict[str, Any] = {}
    for name, case in payload["cases"].items():
        join_group(name)
        logit_tiles.CPU_TILE_BYTES = SMALL_TILE_BYTES if case.get("small_tile") else 4 * 2048**2
        try:
            results[name] = one_layer(case) if case["spy"] == "layer" else spied_step(case)
        finally:
            shutdown()
    return results
