"""A run directory with the files of a quickstart, made from a formula: the report is tested without training."""

import math
import random
from collections.abc import Sequence
from pathlib import Path

from asympo_megatron.config import RunDir, load_config
from asympo_megatron.metrics import MetricsWriter

STEPS = 250


def write_run(
    root: Path, steps: int = STEPS, seed: int = 0, overrides: Sequence[str] = (), greedy: float = 0.985
) -> Path:
    """Make RUN_DIR with config.yaml, metrics.jsonl and warmup/metrics.jsonl; returns RUN_DIR."""
    config = load_config("quickstart", [f"run.root={root}", f"run.steps={steps}", *overrides])
    run_dir = RunDir.of(config)
    run_dir.create(config)
    rng = random.Random(seed)
    writer = MetricsWriter(run_dir.metrics)
    for step in range(steps + 1):
        writer.write(_row(step, steps, rng, greedy))
    writer.close()
    warmup = MetricsWriter(RunDir(run_dir.warmup).metrics)
    for step in range(1, 301):
        loss = 0.95 + 2.6 * math.exp(-step / 40) + rng.gauss(0, 0.02)
        warmup.write({"step": step, "incarnation": 1, "train/loss": loss, "lag/mean": 0.0, "reward/mean": 0.0})
    warmup.close()
    return run_dir.path


def _row(step: int, steps: int, rng: random.Random, greedy: float) -> dict:
    skill = 0.28 + 0.68 * (1 - math.exp(-4.0 * step / steps))
    row: dict = {"step": step, "incarnation": 1, "time_s": 0.42 * step}
    if step % 25 == 0 or step == steps:
        row |= {"eval/accuracy": skill, "eval/step": step, "eval/responses": 256, "eval/version": step}
        row["eval/greedy_accuracy"] = greedy
    if step == 0:
        return row
    histogram = [0] * 6
    for _ in range(256):
        histogram[min(5, max(0, round(rng.gauss(2.4, 1.0))))] += 1
    if step > 20:
        histogram[4] += histogram[5]
        histogram[5] = 0
    lags = [lag for lag, count in enumerate(histogram) if count]
    wait, train, publish = abs(rng.gauss(0.14, 0.05)), abs(rng.gauss(0.2, 0.02)), abs(rng.gauss(0.05, 0.01))
    checkpoint = 0.4 if step % 50 == 0 else 0.0
    total = wait + train + publish + checkpoint
    positive = 0.08 + 0.5 * (1 - skill) * math.exp(rng.gauss(0, 0.08))
    negative = positive * (2 + 6 * skill) * math.exp(rng.gauss(0, 0.12))
    return row | {
        "reward/mean": min(1.0, max(0.0, skill - 0.03 + rng.gauss(0, 0.03))),
        "train/J": -0.35 * (1 - skill) + rng.gauss(0, 0.02),
        "train/loss": rng.gauss(0, 1e-3),
        "train/grad_norm": 0.6 * math.exp(rng.gauss(0, 0.35)),
        "train/nll_pos": positive,
        "train/nll_neg": negative,
        "train/nll_ratio": negative / positive,
        "train/entropy": 0.05 + 0.9 * (1 - skill) * math.exp(rng.gauss(0, 0.05)),
        "train/tokens": 1500.0,
        "train/tokens_per_s": 1500 / total,
        "train/weights_checksum": f"{step:016x}",
        "train/ess": 180.0 + rng.gauss(0, 8),
        "train/zero_advantage_fraction": 0.02 + 0.6 * skill**4,
        "lag/mean": sum(lag * count for lag, count in enumerate(histogram)) / sum(histogram),
        "lag/max": max(lags),
        "lag/min": min(lags),
        "lag/histogram": histogram,
        "rollout/spanning_fraction": 0.3 + rng.gauss(0, 0.03),
        "rollout/response_tokens_mean": 5.9 + rng.gauss(0, 0.05),
        "rollout/truncated_fraction": 0.002,
        "rollout/in_flight": 900 + rng.randrange(200),
        "rollout/tokens_per_s": 5200 + rng.gauss(0, 400),
        "sync/version": step,
        "sync/seconds": abs(rng.gauss(0.03, 0.005)),
        "time/step_s": total,
        "time/wait_s": wait,
        "time/train_s": train,
        "time/publish_s": publish,
        "time/checkpoint_s": checkpoint,
    }
