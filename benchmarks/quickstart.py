"""The quickstart on seeds nobody tuned on: does RL lift a 20-40% policy to 90%, with stale responses, in three minutes?

    python benchmarks/quickstart.py [--seeds 101 102 103] [--quick] [a.b=c ...]

Every seed has its own warm start, its own words and its own order. Prints one JSON line a figure and seed, then PASS or
FALLS SHORT. --quick runs one seed. Figures: docs/quickstart.md.
"""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import harness

from asympo_megatron.metrics import read_rows

WARM_RANGE = (0.20, 0.40)
GOAL_ACCURACY = 0.90
GOAL_LAG = 1.0
GOAL_TRAINING_S = 180.0


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 102, 103])
    parser.add_argument("--root", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    arguments = parser.parse_intermixed_args()
    report = harness.Report("quickstart", save=arguments.save)
    for seed in arguments.seeds[:1] if arguments.quick else arguments.seeds:
        run_seed(report, seed, arguments.root, arguments.overrides)
    return report.finish()


def run_seed(report: harness.Report, seed: int, root: Path, overrides: list[str]) -> None:
    """One whole quickstart from nothing."""
    run_dir = root / f"seed{seed}"
    shutil.rmtree(run_dir, ignore_errors=True)
    options = [f"run.seed={seed}", f"run.root={root}", f"run.name=seed{seed}", *overrides]
    started = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "asympo_megatron.cli.main", "run", "quickstart", *options],
        check=True,
        stdout=sys.stderr,
    )
    wall_s = time.monotonic() - started
    rows = read_rows(run_dir / "metrics.jsonl")
    warm_rows = read_rows(run_dir / "warmup" / "metrics.jsonl")
    trained = [row for row in rows if row["step"] > 0]
    accuracy = {row["eval/step"]: row["eval/accuracy"] for row in rows if "eval/accuracy" in row}
    warm, final = accuracy[0], accuracy[max(accuracy)]
    lag = sum(row["lag/mean"] for row in trained) / len(trained)
    training_s = rows[-1]["time_s"] + warm_rows[-1]["time_s"]
    report.within("quickstart/accuracy_before_rl", warm, "fraction", *WARM_RANGE, seed=seed)
    report.at_least("quickstart/accuracy_after_rl", final, "fraction", GOAL_ACCURACY, seed=seed)
    report.at_least("quickstart/mean_lag", lag, "steps", GOAL_LAG, seed=seed)
    report.show("quickstart/max_lag", max(row["lag/max"] for row in trained), "steps", seed=seed)
    report.at_most("quickstart/training_time", training_s, "s", GOAL_TRAINING_S, seed=seed)
    report.show("quickstart/wall_time", wall_s, "s", seed=seed)


if __name__ == "__main__":
    sys.exit(main())
