"""The quickstart on seeds nobody tuned on: does RL lift a 20-40% policy to 90%, with stale responses, in three minutes?

    python benchmarks/quickstart.py [--seeds 101 102 103] [--quick] [a.b=c ...]

Every seed has its own warm start, its own words and its own order. Prints one JSON line a figure and seed, then PASS or
FALLS SHORT. --quick runs one seed. Figures: docs/quickstart.md.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from asympo_megatron.metrics import read_rows

WARM_RANGE = (0.20, 0.40)
GOAL_ACCURACY = 0.90
GOAL_LAG = 1.0
GOAL_TRAINING_S = 180.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 102, 103])
    parser.add_argument("--quick", action="store_true", help="the first seed only")
    parser.add_argument("--root", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    arguments = parser.parse_intermixed_args()
    seeds = arguments.seeds[:1] if arguments.quick else arguments.seeds
    oks = [ok for seed in seeds for ok in run_seed(seed, arguments.root, arguments.overrides)]
    print("PASS" if all(oks) else "FALLS SHORT")
    return 0 if all(oks) else 1


def run_seed(seed: int, root: Path, overrides: list[str]) -> list[bool]:
    """One whole quickstart from nothing; returns whether each figure meets its goal."""
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
    return [
        show(seed, "accuracy_before_rl", warm, "fraction", f"in {WARM_RANGE}", WARM_RANGE[0] <= warm <= WARM_RANGE[1]),
        show(seed, "accuracy_after_rl", final, "fraction", f">= {GOAL_ACCURACY}", final >= GOAL_ACCURACY),
        show(seed, "mean_lag", lag, "steps", f"> {GOAL_LAG}", lag > GOAL_LAG),
        show(seed, "max_lag", max(row["lag/max"] for row in trained), "steps", None, True),
        show(seed, "training_time", training_s, "s", f"<= {GOAL_TRAINING_S}", training_s <= GOAL_TRAINING_S),
        show(seed, "wall_time", wall_s, "s", None, True),
    ]


def show(seed: int, name: str, value: float, unit: str, goal: str | None, ok: bool) -> bool:
    line = {"name": f"quickstart/{name}", "seed": seed, "value": round(value, 4), "unit": unit, "goal": goal, "ok": ok}
    print(json.dumps(line), flush=True)
    return ok


if __name__ == "__main__":
    sys.exit(main())
