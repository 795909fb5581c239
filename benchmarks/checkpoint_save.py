"""How long training stands still for a checkpoint: saved at once, and by a thread while training goes on.

    python benchmarks/checkpoint_save.py [--quick] [--save]

Wall time of one process without a GPU, the two kinds in turn. At once: the call that saves. Meanwhile: the copy of the
state and the plan before the next step, and the marker and the rename behind the write; steps are trained in between,
and their time beside the write is shown against that of steps alone.
"""

import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch

from asympo_megatron.config import Config
from asympo_megatron.mcore import Learner, Row, checkpoint_save, initialize, shutdown
from asympo_megatron.objectives import build_objective

HF: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 1536,
    "tie_word_embeddings": True,
    "vocab_size": 4096,
}
ROWS = [Row([1, 2, 3], list(range(4, 68)), [1] * 64, 1.0 - 2.0 * (number % 2)) for number in range(4)]


def main() -> int:
    arguments = harness.parser(__doc__).parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    config = Config()
    config.model.hf = HF
    config.rollout.source = "supervised"
    learner = Learner(config, HF, build_objective("asympo"), initialize(config))
    report = harness.Report("checkpoint_save", save=arguments.save)
    try:
        with tempfile.TemporaryDirectory() as folder:
            _measure(report, learner, Path(folder), harness.MIN_PAIRS * (1 if arguments.quick else 2))
    finally:
        shutdown()
    return report.finish()


def _measure(report: harness.Report, learner: Learner, folder: Path, pairs: int) -> None:
    _step(learner)  # makes the optimizer's moments
    _meanwhile(learner, folder)  # a warm-up
    at_once: list[float] = []
    meanwhile: list[float] = []
    alone: list[float] = []
    beside: list[float] = []
    for _ in range(pairs):
        at_once.append(_seconds(lambda: checkpoint_save.save(learner, folder / "at-once")))
        shutil.rmtree(folder / "at-once")
        alone.append(_step(learner))
        stopped_s, steps_s = _meanwhile(learner, folder)
        meanwhile.append(stopped_s)
        beside += steps_s
    parameters = sum(shard.param.numel() for shard in learner.shards())
    ratio = statistics.median(one / other for one, other in zip(meanwhile, at_once, strict=True))
    report.at_most("checkpoint_save/standstill", ratio, "of a save at once", 1.0, pairs=pairs, parameters=parameters)
    report.show("checkpoint_save/at_once", statistics.median(at_once), "s")
    report.show("checkpoint_save/meanwhile", statistics.median(meanwhile), "s")
    report.show("checkpoint_save/step_alone", statistics.median(alone), "s")
    report.show("checkpoint_save/step_beside_the_write", statistics.median(beside), "s", steps=len(beside))


def _meanwhile(learner: Learner, folder: Path) -> tuple[float, list[float]]:
    """Save in the background; how long training stood still, and the steps that were trained meanwhile."""
    start = time.perf_counter()
    saving = checkpoint_save.Saving(learner, folder / "meanwhile", background=True)
    stopped_s, steps_s = time.perf_counter() - start, []
    while not saving.written(wait=False):
        steps_s.append(_step(learner))
    stopped_s += _seconds(saving.complete)
    shutil.rmtree(folder / "meanwhile")
    return stopped_s, steps_s


def _step(learner: Learner) -> float:
    return _seconds(lambda: learner.step([ROWS], len(ROWS)))


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
