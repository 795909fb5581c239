"""Programs that test ranks run (see asympo_megatron.testing.megatron); not tests themselves."""

import errno
import os
import random
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from asympo_megatron.batch import ObjectiveOutput, ResponseBatch
from asympo_megatron.config import Config
from asympo_megatron.config.validate import validate
from asympo_megatron.errors import AsympoError, CheckpointError
from asympo_megatron.mcore import Checkpoints, Layout, Learner, Row, checkpoint, cpu, initialize, shutdown
from asympo_megatron.mcore.loss import ForwardStep
from asympo_megatron.objectives import build_objective
from asympo_megatron.packing import plan_microbatches
from asympo_megatron.parallel import ParallelGroups
from asympo_megatron.testing.megatron import join_group

# isort: split
from megatron.core.dist_checkpointing import serialization  # asympo_megatron.mcore imports Megatron-Core first

PROGRAM = __file__

VOCAB = 67
"""Odd on purpose: under tensor parallelism the vocabulary is padded."""

HF: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "tie_word_embeddings": True,
    "rope_theta": 10000.0,
    "vocab_size": VOCAB,
}


def make_config(**sections: dict[str, Any]) -> Config:
    """A small run; ``sections`` overrides single values, e.g. parallel={"tensor": 2}."""
    config = Config()
    config.run.steps = 8
    config.model.hf = dict(HF)
    config.model.init_std = 0.2  # far from uniform predictions, so that gradients are worth comparing
    config.optimizer.lr = 1e-3
    config.optimizer.eps = 1e-5  # 1e-8 turns rounding noise of tiny gradients into different directions
    config.batch.max_tokens_per_microbatch = 96
    config.rollout.source = "supervised"
    config.objective.name = "sft"
    config.advantage.estimator = "none"
    for section, values in sections.items():
        for name, value in values.items():
            assert hasattr(getattr(config, section), name)
            setattr(getattr(config, section), name, value)
    validate(config)
    return config


def make_rows(step: int, count: int = 16) -> list[Row]:
    """Responses of one global batch: one-token ones, holes in masks, masked ones, a zero advantage, uneven lengths."""
    rng = random.Random(step)
    rows = []
    for number in range(count):
        prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 20))]
        size = 1 if number % 7 == 0 else rng.randint(1, 24)
        mask = [int(rng.random() < 0.8) for _ in range(size)]
        if number % 5 == 0:
            mask = [0] * size
        ids = [rng.randrange(VOCAB) for _ in range(size)]
        advantage = 0.0 if number == 3 else rng.uniform(-1, 1)
        rows.append(Row(prompt, ids, mask, advantage, [-rng.random() for _ in range(size)]))
    return rows


def microbatches(rows: list[Row], config: Config, layout: Layout) -> list[list[Row]]:
    """This DP rank's share, planned as the trainer plans it."""
    plan = plan_microbatches(
        [len(row.prompt_ids) + len(row.ids) for row in rows],
        dp_size=layout.dp_size,
        max_tokens=config.batch.max_tokens_per_microbatch,
        pad_multiple=layout.pad_multiple,
        pack_multiple=layout.pack_multiple,
    )
    return [[rows[i] for i in batch] for batch in plan.microbatches[layout.dp_rank]]


def build(case: dict[str, Any]) -> tuple[Config, Layout, Learner]:
    """A learner in the layout of ``case``; several ranks have joined their group."""
    if "RANK" not in os.environ:
        shutdown()  # of the learner that a test in the same process built before
    config = make_config(**case.get("config", {}))
    layout = initialize(config)
    objective: Any = build_objective(case.get("objective", "asympo"))
    learner = Learner(config, {**HF, **case.get("hf", {})}, objective, layout)
    return config, layout, learner


def train(name: str, case: dict[str, Any]) -> dict[str, Any]:
    """Train a few steps, loading and saving where the case says so; what one rank saw."""
    if "RANK" in os.environ:
        join_group(name)
    try:
        config, layout, learner = build(case)
        if "load" in case:
            learner.load(Path(case["load"]))
        result: dict[str, Any] = {"checksums": [learner.checksum()], "figures": []}
        for _ in range(case.get("steps", 4)):
            rows = make_rows(learner.step_count)
            result["figures"].append(learner.step(microbatches(rows, config, layout), len(rows)))
            result["checksums"].append(learner.checksum())
            if learner.step_count == case.get("save_at"):
                learner.save(Path(case["save"]))
        return result
    finally:
        shutdown()


def train_cases(payload: dict[str, Any]) -> dict[str, Any]:
    """Several layouts in one process: case name -> result."""
    return {name: train(name, case) for name, case in payload["cases"].items()}


@dataclass(frozen=True)
class Unanchored:
    """An objective that forgets the graph on a rank where no token is trained."""

    def __call__(self, token_nll_T: Any, batch: ResponseBatch, groups: ParallelGroups) -> ObjectiveOutput:
        out = build_objective("asympo")(token_nll_T, batch, groups=groups)
        trained = bool((batch.response_ids_T >= 0).any())
        loss = out.loss_sum if trained else torch.zeros(())
        return ObjectiveOutput(loss, out.normalizer_count, out.metrics)


class NoAnchor(ForwardStep):
    """Mutant: hands the objective's loss on as it is."""

    def _loss(self, nll_and_entropy_2T: Any, batch: Any) -> Any:
        out = self._objective(nll_and_entropy_2T[0], batch.responses, groups=self._groups)
        _, count, stats = super()._loss(nll_and_entropy_2T, batch)
        return out.loss_sum, count, stats


def anchor(payload: dict[str, Any]) -> dict[str, float]:
    """One trained token under context parallelism: the other rank has nothing to learn, and must take part."""
    join_group("anchor")
    config = make_config(parallel={"context": 2})
    layout = initialize(config)
    learner = Learner(config, HF, Unanchored(), layout)
    if payload["mutant"]:
        learner._forward_step = NoAnchor(Unanchored(), layout.groups)
        threading.Timer(payload["patience_s"], os._exit, [HUNG]).start()
    return learner.step([[Row([1, 2, 3, 4, 5, 6], [7], [1], 1.0)]], 1)


HUNG = 75
"""Exit code of a rank that waited in vain."""


def refusals(_: dict[str, Any]) -> dict[str, str]:
    """Trouble on the second data-parallel rank only."""
    join_group("refusals")
    _, layout, learner = build({})
    before = learner.checksum()
    good, bad = Row([1], [2], [1], 1.0), Row([1], [VOCAB], [1], 1.0)
    infinite = Row([1], [2], [1], float("inf"))
    second = layout.dp_rank == 1
    result = {"checksum_before": before}
    for name, row in (("rows", bad), ("loss", infinite)):
        try:
            learner.step([[row if second else good]], 2)
        except AsympoError as error:
            result[name] = f"{type(error).__name__}: {error}"
    result["checksum"] = learner.checksum()
    return result


def failing_save(payload: dict[str, Any]) -> str:
    """The first rank alone fails to write the part of a checkpoint that all ranks have in common."""
    join_group("failing save")
    _, layout, learner = build({})

    def over_quota(*_: Any) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    if layout.rank == 0:
        serialization.save_config = over_quota
    try:
        learner.save(payload["save"])
    except AsympoError as error:
        return f"{type(error).__name__}: {error}"
    return "saved"


def markers(payload: dict[str, Any]) -> list[str]:
    """Load where only the first rank sees the checkpoint, then where it sees none."""
    join_group("markers")
    _, layout, learner = build({})
    learner.save(payload["save"])

    def blind(directory: Path) -> dict[str, Any]:
        raise CheckpointError(f"checkpoint {directory} is not seen here.")

    if layout.rank > 0:
        checkpoint.read_marker = blind
    seen = []
    for name in (payload["save"], payload["save"] + "-gone"):
        try:
            learner.load(name)
            seen.append("loaded")
        except AsympoError as error:
            seen.append(str(error))
    return seen


def scatter_views(_: dict[str, Any]) -> list[list[float]]:
    """Scatter the even and the odd columns of a matrix: views whose memory interleaves."""
    cpu.install()
    join_group("scatter")
    whole = torch.arange(8.0).view(2, 4)
    received = torch.empty(2, 2)
    torch.distributed.scatter(received, [whole[:, ::2], whole[:, 1::2]] if os.environ["RANK"] == "0" else None, src=0)
    shutdown()
    return received.tolist()


def resumed_from_damaged(payload: dict[str, Any]) -> dict[str, Any]:
    """Two checkpoints; the second rank's shard of the newer one is cut."""
    join_group("damaged")
    config, layout, learner = build({"config": {"parallel": {"tensor": 2}}})
    checkpoints = Checkpoints(payload["root"], keep_last=9)
    checksums = []
    for step in range(2):
        rows = make_rows(step)
        learner.step(microbatches(rows, config, layout), len(rows))
        checkpoints.save(learner)
        checksums.append(learner.checksum())
    if layout.rank == 0:
        os.truncate(sorted(Path(payload["root"]).glob("step_000002/__1_*.distcp"))[0], 5000)
    torch.distributed.barrier()
    resumed = checkpoints.resume(learner)
    assert resumed is not None
    seen = {"from": resumed.name, "step": learner.step_count, "same": learner.checksum() == checksums[0]}
    shutdown()
    return seen
