"""What one rank does in the tests of the scoring pass; not tests themselves."""

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).parent))  # a rank imports this file alone

from rank_programs import HF, make_config, make_rows, microbatches

from asympo_megatron.batch import ResponseBatch
from asympo_megatron.config import Config
from asympo_megatron.mcore import Layout, Learner, Row, initialize, reference, scoring, shutdown
from asympo_megatron.objectives import M2PO, Objective, penalize_kl
from asympo_megatron.parallel import SINGLE, ParallelGroups
from asympo_megatron.testing.gradients import GradientProbe
from asympo_megatron.testing.megatron import join_group

PROGRAM = __file__
KL_COEF = 0.3


@dataclass(frozen=True)
class OwnMicroBatchOnly(M2PO):
    """Mutant: the statistic of the whole batch is taken from the first micro-batch of this rank."""

    def statistics(self, batches: Sequence[ResponseBatch], groups: ParallelGroups = SINGLE) -> Any:
        return super().statistics(batches[:1], SINGLE)


def unmerged(local_L: torch.Tensor, batches: Sequence[Any], groups: ParallelGroups) -> torch.Tensor:
    """Mutant: the zigzag split is not undone."""
    ranks = [torch.empty_like(local_L) for _ in range(groups.context_size)]
    torch.distributed.all_gather(ranks, local_L, group=groups.context)
    return torch.cat(ranks)


MUTANTS: dict[str, Any] = {
    "zigzag left": lambda: patch.object(scoring, "_merge", unmerged),
    "weights left": lambda: patch.object(reference, "restored", lambda _: nullcontext()),
}


def objective_of(case: dict[str, Any]) -> Objective:
    """All that a scoring pass is for, at once: mu, pi_prox, a statistic of the whole batch and a reference policy."""
    kind = OwnMicroBatchOnly if case.get("mutant") == "own micro-batch" else M2PO
    # the bound falls among the tokens: log-probs of the rows are random
    return penalize_kl(kind(second_moment=1.0), KL_COEF, case.get("estimator", "k3"))


def build(case: dict[str, Any], objective: Objective) -> tuple[Config, Layout, Learner]:
    """A learner and its reference policy, which is the initial one shrunk."""
    if "RANK" not in os.environ:
        shutdown()
    config = make_config(**case.get("config", {}))
    layout = initialize(config)
    learner = Learner(config, HF, objective, layout)

    def shrink() -> None:
        for chunk in learner.chunks:
            for param in chunk.parameters():
                param.data.mul_(0.7)

    learner.hold_reference(shrink)
    return config, layout, learner


def scored_rows(learner: Learner, batches: list[list[Row]]) -> list[list[Row]]:
    for which in learner.passes:
        batches = learner.score(batches, which)
    return batches


def score_and_step(name: str, case: dict[str, Any]) -> dict[str, Any]:
    """Score a global batch, train on it twice; log-probs by row of the batch, figures, the second step's gradients."""
    if "RANK" in os.environ:
        join_group(name)
    try:
        config, layout, learner = build(case, objective_of(case))
        probe = GradientProbe(learner)
        result: dict[str, Any] = {"figures": [], "logprobs": {}, "checksums": [learner.checksum()]}
        with MUTANTS.get(case.get("mutant", ""), nullcontext)():
            for step in range(2):
                rows = make_rows(step)
                number = {id(row): index for index, row in enumerate(rows)}
                mine = microbatches(rows, config, layout)
                scored = scored_rows(learner, mine)
                for before, after in zip(chain(*mine), chain(*scored), strict=True):
                    key = f"{step}.{number[id(before)]}"
                    result["logprobs"][key] = [after.proximal_logprobs, after.reference_logprobs]
                    assert before == replace(after, proximal_logprobs=None, reference_logprobs=None)
                result["checksums"].append(learner.checksum())
                result["figures"].append(learner.step(scored, len(rows)))
        if "folder" in case:
            torch.save(probe.gradients, Path(case["folder"]) / f"{name}.{layout.rank}.pt")
        else:
            result["gradients"] = probe.gradients
        return result
    finally:
        shutdown()


def score_cases(payload: dict[str, Any]) -> dict[str, Any]:
    """Several layouts in one process: case name -> result."""
    return {name: score_and_step(name, case) for name, case in payload["cases"].items()}
